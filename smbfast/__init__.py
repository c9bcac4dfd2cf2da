"""smbfast: patient world models from longitudinal EHR, by next-token prediction and JEPA.

`smbfast.load("runs/x/final")` is a trained model that embeds patients; see `smbfast.serving`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smbfast.serving import load as load

__version__ = "0.1.0"

if find_spec("smbkernels") is None:  # a checkout that was never installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for: it needs torch, and most of this package does not."""
    if name == "load":
        from smbfast.serving import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
