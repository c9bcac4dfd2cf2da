"""smbfast: patient world models from longitudinal EHR, by next-token prediction and JEPA.

`smbfast.load("runs/x/final")` is a trained model that embeds patients (`smbfast.serving`), and
`smbfast.PatientEmbedder` the same as a step of scikit-learn (`smbfast.estimator`). docs/api.md
shows both.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smbfast.base.early import watch

if TYPE_CHECKING:
    from smbfast.estimator import PatientEmbedder as PatientEmbedder
    from smbfast.estimator import clear_cache as clear_cache
    from smbfast.serving import Embedder as Embedder
    from smbfast.serving import Embeddings as Embeddings
    from smbfast.serving import load as load

__all__ = ["Embedder", "Embeddings", "PatientEmbedder", "__version__", "clear_cache", "load"]

__version__ = "0.1.0"

watch()
if find_spec("smbkernels") is None:  # a checkout that was never installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))


_ESTIMATOR = ("PatientEmbedder", "clear_cache")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is asked for: it needs torch, and most of this package
    does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "smbfast.estimator" if name in _ESTIMATOR else "smbfast.serving"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    """Return the names of the interface, for completion in a notebook."""
    return sorted(__all__)
