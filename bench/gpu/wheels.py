"""Packages that the machine with the GPU lacks: fetched where there is a network, unpacked there.

Pinned, so that the GPU runs on what was rehearsed. Nothing here needs more than Python.
"""

import subprocess
import sys
from pathlib import Path

# beside an installation of torch with its usual companions; two of them are compiled
WHEELS = {
    "annotated-types": "0.8.0",
    "autograd": "1.9.1",
    "autograd-gamma": "0.4.2",  # 0.5.0 has no wheel
    "flexible_schema": "0.1.1",
    "jsonschema": "4.26.0",
    "jsonschema-specifications": "2025.9.1",
    "lifelines": "0.30.3",
    "liger-kernel": "0.8.5",
    "meds": "0.4.1",
    "pydantic": "2.14.3",
    "pydantic-core": "2.50.4",
    "referencing": "0.37.0",
    "rpds-py": "2026.9.1",
    "tensorboardX": "2.6.5",
    "typing-extensions": "4.16.0",  # older ones, which torch takes, are too old for pydantic
    "typing-inspection": "0.4.5",
}
PRESENT = (  # expected there, of what the project and the wheels ask for
    *("attrs", "formulaic", "hypothesis", "jinja2", "matplotlib", "numpy", "packaging", "pandas"),
    *("peft", "protobuf", "pyarrow", "pytest", "pytest-benchmark", "pytest-xdist", "rich"),
    *("safetensors", "scikit-learn", "scipy", "tokenizers", "torch", "transformers", "triton"),
)
PLATFORMS = ("_2_28", "_2_27", "_2_17", "2014", "1")  # of manylinux: pip matches them exactly


def download_command(folder: Path) -> list[str]:
    """pip's, for Python 3.12 on Linux."""
    target = ["--python-version=3.12", "--implementation=cp"]
    target += [f"--platform=manylinux{tag}_x86_64" for tag in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    packages = [f"{name}=={version}" for name, version in WHEELS.items()]
    return [*command, *target, "-d", str(folder), *packages]


def download(folder: Path) -> str:
    """Fetch all wheels into a folder, and say how many bytes they are."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(download_command(folder), check=True)
    files = sorted(folder.glob("*.whl"))
    size = sum(f.stat().st_size for f in files)
    return f"{len(files)} wheels, {size / 1e6:.1f} MB, in {folder}"


def install(folder: Path, site: Path, seconds: float) -> str:
    """Unpack the wheels of a folder, without a network, once.

    Returns:
        Why it failed; empty: they are in `site`.
    """
    mark = site / "complete"
    if mark.exists():
        return ""
    files = sorted(map(str, folder.glob("*.whl")))
    if not files:
        return f"{folder} holds no wheel: `python -m bench.gpu --wheels={folder}` fetches them"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"unpacking took over {seconds:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    mark.touch()
    return ""
