"""Risk functions: from an embedding to a calibrated probability, as a linear probe was fitted.

A probe scores label rows. What it has fitted is written beside its predictions, so that a patient
can be scored at any other moment to the same numbers, without a fit. The file is
`risk_functions.safetensors`: float64 tensors `<place>.<name>` of each task, and metadata `smbfast`,
as JSON, with the tasks in order and the origin of the embeddings. Weights are fitted to patients,
so it is readable by its owner alone.

Legend: K nodes, F features, H horizons, U times of a baseline.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit

from smbfast.base.files import committed_file
from smbfast.statistics.incidence import Baseline

FILE = "risk_functions.safetensors"
METADATA = "smbfast"  # the key of the file's metadata


@dataclass(frozen=True)
class RiskFunction:
    """The probability of an outcome, by the features of a node as they are.

    With s = features @ weight_F + offset + intercept, a logit, the probability of a binary outcome
    is expit(slope s + shift). Of time to event, s is a log hazard, and the probability of the event
    by each of horizons_H (days) is that of `baseline` at the log hazard slope (s - shift).

    weight_F: float64. offset, intercept: what scaling on train leaves, and what was fitted; they
    are added in this order, as the probe adds them. baseline: None of a binary outcome.
    """

    weight_F: np.ndarray
    offset: float
    intercept: float = 0.0
    slope: float = 1.0
    shift: float = 0.0
    horizons_H: tuple[float, ...] = ()
    baseline: Baseline | None = None

    def score(self, feature_KF: np.ndarray) -> np.ndarray:
        """Return the logit or log hazard before calibration, float64 [K].

        Raises:
            ValueError: features are not as many as were fitted.
        """
        if feature_KF.shape[1] != len(self.weight_F):
            raise ValueError(
                f"features must be {len(self.weight_F):,} a node, as the probe was fitted to; got "
                f"{feature_KF.shape[1]:,}"
            )
        return feature_KF.astype(np.float64) @ self.weight_F + self.offset + self.intercept

    def probability(self, feature_KF: np.ndarray) -> np.ndarray:
        """Return the probability of the outcome, float64 [K, 1], or of the event by each horizon,
        [K, H]. Raises as `score` does."""
        score_K = self.score(feature_KF)
        if self.baseline is None:
            return expit(self.slope * score_K + self.shift)[:, None]
        log_hazard_K = self.slope * (score_K - self.shift)
        return self.baseline.probability(log_hazard_K, np.array(self.horizons_H))


def write_risk_functions(
    folder: Path, functions: dict[str, RiskFunction], origin: dict[str, Any] | None
) -> None:
    """Write `risk_functions.safetensors` into a folder, readable by its owner alone.

    Args:
        functions: by task.
        origin: of the embeddings, as their file says it.
    """
    tensors: dict[str, np.ndarray] = {}
    for place, own in enumerate(functions.values()):
        constants = [own.offset, own.intercept, own.slope, own.shift]
        tensors[f"{place}.weight_F"] = np.ascontiguousarray(own.weight_F, np.float64)
        tensors[f"{place}.constants"] = np.array(constants, np.float64)
        tensors[f"{place}.horizons_H"] = np.array(own.horizons_H, np.float64)
        if own.baseline is not None:
            tensors[f"{place}.time_U"] = np.asarray(own.baseline.time_U, np.float64)
            tensors[f"{place}.log_event_U"] = own.baseline.log_event_U
            if own.baseline.competing_U is not None:
                tensors[f"{place}.competing_U"] = own.baseline.competing_U
    about = {"tasks": list(functions), "origin": origin}
    with committed_file(Path(folder) / FILE, private=True) as staging:
        save_file(tensors, staging, metadata={METADATA: json.dumps(about)})


def read_risk_functions(folder: Path) -> tuple[dict[str, RiskFunction], dict[str, Any]]:
    """Return the risk functions of a folder by task, and the origin of the embeddings ({} if it is
    not known).

    Raises:
        ValueError: there is none, or the file is damaged or of others.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} must hold {FILE}, which a probe of its embeddings writes; it has none. "
            "Probe them again with python -m smbfast.probe"
        )
    try:
        with safe_open(file, "np") as opened:
            about = json.loads((opened.metadata() or {})[METADATA])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        functions = {task: _function(tensors, at) for at, task in enumerate(about["tasks"])}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{file} must be as a probe writes it; it is damaged or of others"
        ) from None
    return functions, about.get("origin") or {}


def _function(tensors: dict[str, np.ndarray], place: int) -> RiskFunction:
    offset, intercept, slope, shift = tensors[f"{place}.constants"].tolist()
    baseline = None
    if f"{place}.time_U" in tensors:
        steps = tensors[f"{place}.time_U"], tensors[f"{place}.log_event_U"]
        baseline = Baseline(*steps, tensors.get(f"{place}.competing_U"))
    horizons_H = tuple(tensors[f"{place}.horizons_H"].tolist())
    weight_F = tensors[f"{place}.weight_F"]
    return RiskFunction(weight_F, offset, intercept, slope, shift, horizons_H, baseline)
