"""The benchmark of `prepare`: what a process took, who is compared, what is judged."""

import json
import sys
from pathlib import Path

import pytest

from bench import prepare, records
from bench.prepare import Cost, Tool, judged, measure, result, run
from smbfast.simulation.dataset import simulate

FAKE_PYTHON = """#!{python}
print('{{"meds-torch-data": "0.0"}}')
"""
FAKE_PEER = """#!{python}
import os, sys
from pathlib import Path
words = dict(word.split("=") for word in sys.argv[1:])
assert os.environ["POLARS_MAX_THREADS"] == "1" and len(os.sched_getaffinity(0)) == 1
assert os.environ["PATH"].startswith(str(Path(__file__).parent)) and not os.environ["PYTHONPATH"]
data, out = Path(words["MEDS_dataset_dir"]) / "data", Path(words["output_dir"]) / "data"
for file in data.glob("*/*.parquet"):
    if {all} or file.parent.name != "tuning":
        (out / file.parent.name).mkdir(parents=True)
        (out / file.parent.name / "0.nrt").write_bytes(b"")
"""
BURN = "import time; x = bytearray(200 << 20)\nwhile time.process_time() < 0.5: pass"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"


def a_peer(folder: Path, *, complete: bool = True) -> Path:
    """An interpreter, and beside it a command that makes empty files."""
    folder.mkdir()
    for name, text in (("python", FAKE_PYTHON), ("MTD_preprocess", FAKE_PEER)):
        (folder / name).write_text(text.format(python=sys.executable, all=complete))
        (folder / name).chmod(0o755)
    return folder / "python"


def a_tool(name: str, code: str, form: str = "") -> Tool:
    return Tool(name, form, lambda data, out: [sys.executable, "-c", code], lambda *_: None, {})


def test_the_cost_is_that_of_the_process_and_all_its_children():
    """Half a second of CPU and 200 MiB are taken by a process that the command starts."""
    cost = run([sys.executable, "-c", CHILD], {}, 60)
    assert cost.cpu_s >= 0.5 and cost.peak_mib >= 200


def test_the_memory_of_whoever_measures_is_not_counted():
    held = bytearray(200 << 20)  # as large as what it must not show up in
    held[:: 1 << 12] = b"\1" * len(held[:: 1 << 12])
    assert run([sys.executable, "-S", "-c", ""], {}, 60).peak_mib < 100


def test_what_fails_or_does_not_end_is_named():
    with pytest.raises(ValueError, match="failed: ValueError: so it is"):
        run([sys.executable, "-c", "raise ValueError('so it is')"], {}, 60)
    with pytest.raises(ValueError, match=r"did not end in 0\.5 s"):
        run([sys.executable, "-c", "import time; time.sleep(600)"], {}, 0.5)


def test_a_peer_that_fails_is_marked_and_loses_nothing(tmp_path):
    good, bad = a_tool(prepare.OURS, ""), a_tool(prepare.PEER, "raise SystemExit(3)")
    inputs = {"part": tmp_path / "part", "whole": tmp_path / "whole"}
    measure([good, bad], inputs, 2, 60)
    assert {size: len(costs) for size, costs in good.costs.items()} == {"part": 2, "whole": 2}
    assert "failed: no message on the part input" in bad.reason
    row = result(bad, {"part": 1, "whole": 6}, good)
    assert row["not_measured"] == bad.reason and "events_per_cpu_s" not in row
    assert "not measured" in prepare.table([row])
    with pytest.raises(ValueError, match="failed"):
        measure([a_tool(prepare.OURS, "raise SystemExit(3)")], inputs, 1, 60)


def test_the_rate_without_start_up_is_that_of_the_difference():
    tool = a_tool(prepare.OURS, "", "codes")
    tool.costs = {
        "part": [Cost(cpu, 9.0, 500.0) for cpu in (4.0, 5.0, 60.0)],
        "whole": [Cost(cpu, 9.0, 600.0) for cpu in (8.0, 10.0, 11.0)],
    }
    row = result(tool, {"part": 250_000, "whole": 1_500_000}, tool)
    assert row["events_per_cpu_s"] == 150_000 and row["marginal_events_per_cpu_s"] == 250_000
    assert row["start_up_cpu_s"] == 4 and row["peak_growth"] == 1.2
    assert row["cpu_over_first"] == 1 and row["rounds"] == 3
    assert [met for _, met in judged(row)] == [True, True]
    worse = row | {"marginal_events_per_cpu_s": 249_999.0, "peak_growth": 1.3}
    assert [met for _, met in judged(worse)] == [False, False]
    assert [met for _, met in judged(row | {"marginal_events_per_cpu_s": None})] == [True, False]
    assert len(judged(row | {"format": "text"})) == 1  # that format has no bar


def test_a_format_is_passed_on_only_when_it_is_given(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    words = prepare.ours("codes").command(tmp_path, tmp_path / "out")
    assert "--format=codes" in words and "--splits=train" in words and "--workers=1" in words
    words = prepare.ours("").command(tmp_path, tmp_path / "out")
    assert not any(word.startswith("--format") for word in words)


def test_a_peer_must_be_there_and_prepare_everything(tmp_path):
    with pytest.raises(ValueError, match="must have MTD_preprocess beside it"):
        prepare.peer(tmp_path / "python")
    simulate(tmp_path / "part", 20, 0)
    inputs = {"part": tmp_path / "part"}
    for complete, reason in ((True, ""), (False, "of all 3, made 2 on the part input")):
        tool = prepare.peer(a_peer(tmp_path / f"bin{complete}", complete=complete))
        measure([tool], inputs, 1, 60)
        assert tool.reason.endswith(reason) and bool(tool.costs["part"]) == complete


@pytest.mark.slow
def test_a_run_beside_a_peer_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    python = a_peer(tmp_path / "bin")
    prepare.main(["--patients=1000", "--copies=2", f"--peer={python}", "--save"])
    lines = [json.loads(x) for x in (tmp_path / "prepare.jsonl").read_text().splitlines()]
    assert [x["tool"] for x in lines] == [prepare.OURS, prepare.PEER]
    for line in lines:
        assert line["threads"] == 1 and line["data"] == "simulated"
        assert line["events"] > 1.5 * line["events_part"] > 0
        assert line["cpu_s"] > 0 and line["peak_mib_part"] > 0
    assert lines[0]["tokens"] > lines[0]["events"]
    assert lines[1]["peer_versions"] == {"meds-torch-data": "0.0"}
    assert lines[1]["cpu_over_first"] < 1 == lines[0]["cpu_over_first"]
    assert "prepare: peak memory" in capsys.readouterr().out
