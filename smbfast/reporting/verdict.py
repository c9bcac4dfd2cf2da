"""Judges from evaluations whether a run is healthy, while it runs and in its report.

What is embedded comes first: the states of the online encoder and the embeddings at decision
nodes, in every phase. Then the target encoder, then whether JEPA learns anything. A collapse is
change since the phase began, or states that are nearly constant. All limits are our choice.

Legend: N records of one phase.
"""

import math

import numpy as np

from smbfast.reporting.runlog import Finding, Phase, Record, column, relative

CONSTANT = 1e-2  # std of states over their size, below which their mean cosine is above 0.9999
LOST = 1e-3  # share of the std at phase entry below which states have collapsed
TENTH = 0.1  # share of the rank at phase entry below which they have
HALF = 0.5  # and below which this is a warning
GOOD_RATIO = 0.9  # loss of mask JEPA over that of the best trivial predictor
KINDS = {
    "online": "states of the online encoder",
    "embedding": "embeddings at decision nodes",
    "target": "states of the target encoder",
}
_WEAKEST = "5th percentile of the target's standard deviations"
_ORDER = ("good", "unknown", "warn", "bad")


def judged(phase: Phase) -> bool:
    """Return whether the spread of any states was measured in a phase."""
    return any(np.isfinite(column(phase.evals, f"{kind}_rank")).any() for kind in KINDS)


def collapse(phases: list[Phase]) -> Finding:
    """Judge whether a run collapsed in any phase; return the worst finding, of equals the last."""
    findings = [_verdict(phase) for phase in phases if judged(phase)]
    if not findings:
        return Finding("unknown", "No evaluation of this run measured the spread of states.")
    return max(reversed(findings), key=lambda finding: _ORDER.index(finding.level))


def alarms(entry: Record, later: list[Record], *, jepa: bool) -> list[Finding]:
    """Return what is wrong with the spread of states, one finding for each kind, in order.

    Args:
        entry: the evaluation with which a phase began. Random weights spread their states by
            chance, so one that is `untrained` is no reference; the first of `later` is it then.
        later: evaluations of the phase after it.
        jepa: whether the phase has a target encoder, on which the remedies depend.
    """
    wrong = [_spread_finding(entry, later, kind) for kind in KINDS]
    remedy = (
        "Raise w_sft or tau, or lower the learning rate."
        if jepa
        else "Lower the learning rate or lengthen the warm-up."
    )
    return [Finding(finding.level, f"{finding.text}. {remedy}") for finding in wrong if finding]


def _spread_finding(entry: Record, later: list[Record], kind: str) -> Finding | None:
    """Judge one kind of states: nearly constant, collapsed, at half of its rank, or None."""
    states = KINDS[kind]
    size = _lowest(column(later, f"{kind}_std"))
    if kind != "target" and size < CONSTANT:  # the target's is not over its size
        return Finding(
            "bad",
            f"collapsed: the {states} are nearly constant, their standard deviation is {size:.1g} "
            "of their size",
        )
    compared = _compared(entry, later)
    std = _lowest(relative(column(compared, f"{kind}_std")))
    rank = _lowest(relative(column(compared, f"{kind}_rank")))
    if std < LOST:
        return Finding(
            "bad",
            f"collapsed: the standard deviation of the {states} fell to {std:.1g} of its value at "
            "phase entry",
        )
    if rank >= HALF:
        return None
    fell = (
        f"the effective rank of the {states} fell to {_percent(rank)} of its value at phase entry"
    )
    return Finding("bad", f"collapsed: {fell}") if rank < TENTH else Finding("warn", fell)


def _compared(entry: Record, later: list[Record]) -> list[Record]:
    return later if entry.get("untrained") else [entry, *later]


def learning(evals: list[Record]) -> Finding:
    """Say whether JEPA predicts better at the last evaluation than a predictor that is trivial.

    "unknown" where nothing was measured; "warn" for no better or, for mask JEPA, hardly better.
    """
    last = {key: _last(column(evals, key)) for key in ("r2", "r2_copy")}
    if math.isfinite(last["r2"]):
        text = (
            f"the last R² of the latent loss is {last['r2']:.2f}, that of copying the state "
            f"{last['r2_copy']:.2f}"
        )
        if last["r2"] <= max(last["r2_copy"], 0.0):
            best = "copying the state" if last["r2_copy"] > 0 else "a constant"
            return Finding("warn", f"the prediction is no better than {best}: {text}")
        return Finding("good", text)
    ratio = _last(trivial_ratio(evals))
    if not math.isfinite(ratio):
        return Finding("unknown", "the loss was not compared with trivial predictors")
    text = (
        f"the last tuning loss is {ratio:.2f} of the best trivial predictor's (below 1 is needed, "
        f"{GOOD_RATIO} or less is good)"
    )
    if ratio <= GOOD_RATIO:
        return Finding("good", text)
    better = "no better than" if ratio >= 1 else "hardly better than"
    return Finding("warn", f"the prediction is {better} a trivial one: {text}")


def trivial_ratio(records: list[Record]) -> np.ndarray:
    """Return the JEPA loss over that of the better trivial predictor, as logged: float64 [N]."""
    ratio_N = column(records, "ratio")
    trivial_N = np.fmin(column(records, "trivial_mean"), column(records, "trivial_copy"))
    with np.errstate(divide="ignore", invalid="ignore"):
        computed_N = column(records, "jepa") / np.where(trivial_N > 0, trivial_N, np.nan)
    return np.where(np.isfinite(ratio_N), ratio_N, computed_N)


def _verdict(phase: Phase) -> Finding:
    where, evals = f"in phase “{phase.name}”", phase.evals
    if len(evals) < 2:
        return Finding(
            "unknown",
            f"Too early to say {where}: collapse shows as change since phase entry, and there is "
            "no second measurement yet.",
        )
    jepa = bool(np.isfinite(column(evals, "target_rank")).any())
    wrong, learns = alarms(evals[0], evals[1:], jepa=jepa), learning(evals)
    after = f" As to JEPA, {learns.text}." if jepa else ""
    if wrong:
        level = max((finding.level for finding in wrong), key=_ORDER.index)
        head = "The run collapsed" if level == "bad" else "Signs of collapse"
        texts = " ".join(_capital(finding.text) for finding in wrong)
        return Finding(level, f"{head} {where}. {texts}{after}")
    compared = _compared(evals[0], evals[1:])
    weakest = _lowest(relative(column(compared, "target_std_p5")))
    spread = _spread(compared)
    if weakest < HALF:
        return Finding(
            "warn",
            f"No collapse as a whole {where}, but single dimensions die: {spread}, yet the "
            f"{_WEAKEST} fell to {_percent(weakest)}.{after}",
        )
    if jepa and learns.level == "warn":
        return Finding("warn", f"No collapse {where}, but {learns.text}; {spread}.")
    return Finding("good", f"No signs of collapse {where}: {spread}.{after}")


def _spread(evals: list[Record]) -> str:
    """Say of each kind of states what its lowest rank was, as a share of that at phase entry."""
    ranks = {
        states: _lowest(relative(column(evals, f"{kind}_rank"))) for kind, states in KINDS.items()
    }
    shares = [f"{_percent(rank)} ({states})" for states, rank in ranks.items() if rank < math.inf]
    return f"effective ranks stayed at or above these shares of phase entry: {', '.join(shares)}"


def _lowest(value_N: np.ndarray) -> float:
    finite_N = value_N[np.isfinite(value_N)]
    return float(finite_N.min()) if len(finite_N) else math.inf


def _last(value_N: np.ndarray) -> float:
    finite_N = value_N[np.isfinite(value_N)]
    return float(finite_N[-1]) if len(finite_N) else math.nan


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    # rounded down, so that 49.9 % never reads as the half it missed
    return f"{math.floor(share * 100)} %"
