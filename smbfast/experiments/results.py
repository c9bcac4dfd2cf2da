"""Results of an experiment: figures with intervals over replicates x patients, claims, a table.

A draw takes patients within each replicate, and replicates with weights that are stretched for how
few they are (`smbfast.experiments.scores`); it is the same for all arms and baselines, so that
differences are paired. The spread between replicates holds that between patients already, so an
interval is rather too wide than too narrow.

Legend: B draws, R replicates.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from smbfast.data.nodes import SPLIT_NAMES
from smbfast.experiments import interference, posterior
from smbfast.experiments.models import BASELINES
from smbfast.experiments.patients import Shared
from smbfast.experiments.plans import LEAST, Claim
from smbfast.experiments.scores import (
    COUNTS,
    FILTER,
    MEAN,
    Areas,
    Estimate,
    Estimates,
    Scores,
    areas,
    cells,
    differences,
    over_seeds,
    shares,
    together,
)
from smbfast.experiments.sweep import Job, Kind, Sweep, judged_of
from smbfast.statistics import resample
from smbfast.statistics.holm import holm, p_value

UNTRAINED = "untrained"


def measured(sweep: Sweep) -> dict[str, Any]:
    """Return the figures of an experiment whose work is done, as JSON values."""
    if sweep.plan.name == "interference":
        return {"arms": arms(sweep), "unit": "cosine", "cosines": cosines(sweep)}
    if sweep.plan.name == "posterior":
        return decodable(sweep)
    own = stacked([areas_of(sweep, replicate) for replicate in sweep.replicates])
    estimated = over_seeds(own, sweep.size.first)
    rivals = (UNTRAINED, *BASELINES)
    pairs = [(name, rival) for name in sweep.plan.arms for rival in rivals]
    pairs += [(claim.one, claim.other) for claim in sweep.plan.claims]
    gaps = differences(estimated, dict.fromkeys(pairs))
    binary = {key: value for key, value in estimated.items() if key[1] in _binary(own)}
    return {
        "arms": arms(sweep),
        "unit": "mean AUROC",
        "figures": cells(estimated),
        "share": cells(shares(binary)),
        "differences": cells(gaps),
        "claims": judged(sweep.plan.claims, gaps),
        "of_replicate": {
            f"{model}, {task}": value_R.tolist() for (model, task), value_R in own.of_seed.items()
        },
    }


def areas_of(sweep: Sweep, replicate: int) -> Areas:
    """Return the AUROCs of all arms and baselines of a replicate, with their draws."""
    first = sweep.first_arm
    fixed = _scores(sweep.job("baselines", first, replicate))
    parts = [_scores(sweep.job("run", n, replicate), n) for n in sweep.plan.arms]
    parts += [_scores(sweep.job("untrained", first, replicate), UNTRAINED), fixed]
    return areas(together(parts), sweep.size.draws, sweep.size.first + replicate - 1)


def _scores(job: Job, name: str | None = None) -> Scores:
    scores, _ = Scores.read(job.file)
    return scores if name is None else replace(scores, models={name: scores.models[job.kind]})


def stacked(own: list[Areas]) -> Areas:
    """Put replicates beside each other, as training seeds are."""
    keys = [key for key in own[0].of_seed if all(key in other.of_seed for other in own)]
    return Areas(
        {key: np.concatenate([other.of_seed[key] for other in own]) for key in keys},
        {key: np.concatenate([other.drawn[key] for other in own], 1) for key in keys},
    )


def _binary(own: Areas) -> set[str]:
    """Return the tasks whose figure is an AUROC, and their mean: what the filter bounds."""
    return {task for task in own.tasks if not task.startswith("tte_")}


def judged(claims: tuple[Claim, ...], gaps: Estimates) -> list[dict[str, Any]]:
    """Return each claim with its difference and whether it is supported, refuted or open."""
    rows = []
    for claim in claims:
        one = gaps[f"{claim.one} - {claim.other}", MEAN]
        rows.append({**vars(claim), **verdict(one), "p": p_value(one[1])})
    adjusted = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def verdict(difference: Estimate) -> dict[str, Any]:
    """Return a difference with its interval, and what it says of the claim that it is above 0."""
    own = resample.interval(*difference)
    said = "open"
    if own.low is not None and own.high is not None:
        said = "supported" if own.low > 0 else "refuted" if own.high < LEAST else "open"
    return {"difference": own._asdict(), "verdict": said}


def decodable(sweep: Sweep) -> dict[str, Any]:
    """Return R2 of the filter's posterior from the embedding of each arm (see `posterior`)."""
    size, names = sweep.size, [*sweep.plan.arms, UNTRAINED]
    whole: dict[str, list[float]] = {name: [] for name in names}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for replicate in sweep.replicates:
        seed = size.first + replicate - 1
        run = sweep.run_of(sweep.first_arm, replicate)
        nodes = judged_of(run, Shared.of(size.work, run.settings)).nodes
        belief_KZ = posterior.posterior(seed, size.patients + size.held_out, nodes)
        spread_R = posterior.spread(belief_KZ, nodes.split_K)
        held_K = nodes.split_K == SPLIT_NAMES.index("held_out")
        weight_BR = resample.patient_weights(nodes.subject_K[held_K], range(size.draws), seed)
        for name in names:
            kind: Kind = "untrained" if name == UNTRAINED else "run"
            arm = sweep.first_arm if name == UNTRAINED else name
            embedding_KD = np.load(sweep.job(kind, arm, replicate).embeddings, allow_pickle=False)
            left_R, _ = posterior.residuals(embedding_KD, belief_KZ, nodes.split_K)
            whole[name].append(1 - float(left_R.sum() / spread_R.sum()))
            drawn[name].append(1 - (weight_BR @ left_R) / (weight_BR @ spread_R))
    own = Areas(
        {(name, MEAN): np.array(value) for name, value in whole.items()},
        {(name, MEAN): np.stack(value, 1) for name, value in drawn.items()},
    )
    estimated = over_seeds(own, size.first)
    pairs = [(claim.one, claim.other) for claim in sweep.plan.claims]
    pairs += [(name, UNTRAINED) for name in sweep.plan.arms]
    gaps = differences(estimated, pairs)
    return {
        "arms": arms(sweep),
        "unit": "R2 of the posterior",
        "figures": cells(estimated),
        "share": {},
        "differences": cells(gaps),
        "claims": judged(sweep.plan.claims, gaps),
        "of_replicate": {name: value for name, value in whole.items()},
    }


def cosines(sweep: Sweep) -> dict[str, Any]:
    """Return, for each arm, the cosines at each moment and as a mean over the moments."""
    result = {}
    for name in sweep.plan.arms:
        files = [sweep.job("gradients", name, r).file for r in sweep.replicates]
        read = [np.load(file, allow_pickle=False) for file in files]
        own = interference.estimates(
            [file["gram"] for file in read], sweep.size.draws, sweep.size.first
        )
        moments = [f"step {step}" for step in read[0]["steps"].tolist()] + [MEAN]
        result[name] = {
            figure: {
                moment: resample.interval(float(value_M[at]), drawn_BM[:, at])._asdict()
                for at, moment in enumerate(moments)
            }
            for figure, (value_M, drawn_BM) in own.items()
        }
    return result


def arms(sweep: Sweep) -> dict[str, Any]:
    """Return label, steps, and mean FLOPs, tokens and seconds of training of each arm."""
    rows = {}
    for name, arm in sweep.plan.arms.items():
        costs = [sweep.run_of(name, r).cost() for r in sweep.replicates]
        means = {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]}
        rows[name] = {"label": arm.label, **means}
    return rows


def text(record: dict[str, Any]) -> str:
    """Return the record as tables and its claims as lines, for the terminal."""
    if "cosines" in record:
        return _cosine_text(record["cosines"])
    tasks = list(next(iter(record["figures"].values())))
    rows = [["", *tasks, "share of the gap", "steps", "TFLOP", "s"]]
    for name, own in record["figures"].items():
        cost = record["arms"].get(name)
        share = record["share"].get(name, {}).get(MEAN)
        about = ["", "", ""]
        if cost:
            about = [
                f"{cost['steps']:.0f}",
                f"{cost['flops'] / 1e12:.2f}",
                f"{cost['seconds']:.0f}",
            ]
        shown = [_shown(own[task]) if task in own else "" for task in tasks]
        rows.append([name, *shown, _shown(share) if share else "", *about])
    lines = [columns(rows), ""]
    for claim in record["claims"]:
        difference = _shown(claim["difference"], "+")
        lines.append(f"{claim['verdict']:<9}  {claim['one']} > {claim['other']}: {difference}")
    gap = f"share of the gap: from {COUNTS} to the Bayes {FILTER}, mean of the yes-or-no tasks"
    return "\n".join([*lines, "", gap])


def paragraph(record: dict[str, Any]) -> str:
    """Return what came out in one paragraph, in words that follow from the figures alone."""
    many = f"Over {record['replicates']} replicate{'s' * (record['replicates'] > 1)}"
    if "cosines" in record:
        lines = []
        for arm, own in record["cosines"].items():
            cell = own["cosine"][MEAN]
            said = "open"
            if cell["low"] is not None:
                said = "shown" if cell["high"] < 0 else "not shown"
            lines.append(f"in {arm} interference is {said}: {_shown(cell, '+')}")
        return f"{many}, {'; '.join(lines)}. The null is a cosine of 0 or more."
    lines = []
    for kind in ("refuted", "supported", "open"):
        own = [c for c in record["claims"] if c["verdict"] == kind]
        if own:
            each = (f"{c['one']} > {c['other']} ({_shown(c['difference'], '+')})" for c in own)
            lines.append(f"{kind} {'is' if len(own) == 1 else 'are'} {', '.join(each)}")
    after = [c for c in record["claims"] if c["p_holm"] is not None and c["p_holm"] <= 0.05]
    return (
        f"{many}, in {record['unit']}: {'; '.join(lines)}. After Holm's correction over all "
        f"{len(record['claims'])} claims {len(after)} differ from 0 at 5 %. It holds for this "
        "simulator at this size."
    )


def _cosine_text(own: dict[str, Any]) -> str:
    blocks = []
    for name, by_figure in own.items():
        moments = list(next(iter(by_figure.values())))
        rows = [[name, *moments]]
        rows += [[f, *(_shown(cell[m], "+") for m in moments)] for f, cell in by_figure.items()]
        blocks.append(columns(rows))
    return "\n\n".join(blocks)


def columns(rows: list[list[str]]) -> str:
    """Return rows of words as lines with aligned columns."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _shown(cell: dict[str, Any], sign: str = "") -> str:
    if cell["low"] is None:
        return f"{cell['value']:{sign}.3f}"
    return f"{cell['value']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"
