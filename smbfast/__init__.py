"""smbfast: patient world models from longitudinal EHR, by next-token prediction and JEPA."""

import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

if find_spec("smbkernels") is None:  # a checkout that was never installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
