"""How long a run will take: its steps, then embeddings, probes and the report.

What is to come is counted in FLOPs, and takes as long a FLOP as the steps so far, with all that
happens between them. What is no forward has seconds that were measured once, on a CPU that others
used too. So it is an estimate, and each stage that begins mends it.
"""

from dataclasses import dataclass

import numpy as np

from smbfast.base.counts import few
from smbfast.base.progress import AHEAD, duration
from smbfast.data.labels import without_held_out
from smbfast.data.nodes import distinct_nodes
from smbfast.model.flops import flops_in_phase, target_flops
from smbfast.run.open_run import OpenRun
from smbfast.settings.training import ProbeSettings

EMBEDDING, POOLS, PROBES, REPORT = "embedding", "pools", "probes", "report"
MEAN_WINDOW = 0.75  # of a window is what a node sees on average, between a half and all of it
# seconds: of a model's choice of a pool, of a task with 1,000 resamples, of each of its rows, and
# of a report and of each task in it. On busy cores the probes of 4 tasks of 1,700 rows took 153 s
A_CHOICE, A_TASK, A_ROW, A_REPORT, A_FIGURE = 4.0, 15.0, 0.01, 4.0, 2.0


@dataclass(frozen=True)
class Outlook:
    """What a run has before it.

    steps: number of steps of each phase, and the FLOPs of one.
    num_nodes, num_models, embedding: nodes that will be embedded, by how many models, and the FLOPs
        of that.
    seconds: predicted, of each stage behind the embedding.
    """

    steps: tuple[tuple[int, int], ...]
    num_nodes: int
    num_models: int
    embedding: int
    seconds: dict[str, float]

    @classmethod
    def of(cls, run: OpenRun) -> "Outlook":
        """Look at the first step of each phase that is not over, and count the nodes."""
        steps, first, done = [], 0, run.progress.step
        for phase in run.settings.phases:
            flops = 0
            if first + phase.steps > done:
                micro_batches = run.make_step(max(first, done)).micro_batches
                flops = flops_in_phase(run.shape, micro_batches, phase)
            steps.append((phase.steps, flops))
            first += phase.steps
        final = run.settings.probe.final
        tasks = [labels if final else without_held_out(labels) for _, labels in run.tasks]
        nodes = distinct_nodes(tasks)
        num_nodes, num_subjects = len(nodes.subject_K), len(np.unique(nodes.subject_K))
        num_models = 1 + (1 if run.settings.model.path else run.settings.probe.untrained)
        tokens, window = _tokens(run, num_nodes, num_subjects)
        one = target_flops(run.shape, tokens, tokens * window // 2).total
        return cls(
            steps=tuple(steps),
            num_nodes=num_nodes,
            num_models=num_models,
            embedding=num_models * one,
            seconds=_seconds(run.settings.probe, [len(labels) for labels in tasks], num_models),
        )

    def seconds_after(self, step: int, pace: float) -> float:
        """Return the seconds left after `step` steps, where a FLOP takes `pace` seconds."""
        flops = 0
        for number, cost in self.steps:
            flops += max(number - max(step, 0), 0) * cost
            step -= number
        return flops * pace + sum(self.later(pace).values())

    def later(self, pace: float | None) -> dict[str, float]:
        """Return the seconds of each stage behind the last step, in order.

        Args:
            pace: None where no step was measured.
        """
        return {EMBEDDING: self.embedding * (pace or 0.0), **self.seconds}

    def begin(self, pace: float | None) -> None:
        """Say what follows the last step, and let lines of progress count it in."""
        stages = self.later(pace)
        AHEAD.expect(stages)
        AHEAD.begin(EMBEDDING)
        if not self.num_nodes:
            return
        about = f", about {duration(sum(stages.values()))} in all" if pace else ""
        print(
            f"embedding {few(self.num_nodes)} nodes by {self.num_models} models (trained and "
            f"untrained), then probes and report{about}",
            flush=True,
        )


def _seconds(probe: ProbeSettings, num_rows: list[int], num_models: int) -> dict[str, float]:
    """Return the predicted seconds of each stage behind the embedding."""
    each = A_TASK * probe.bootstraps / 1000
    return {
        POOLS: A_CHOICE * num_models * (probe.pool == "auto" and bool(num_rows)),
        PROBES: sum(each + A_ROW * rows for rows in num_rows),
        REPORT: A_REPORT + A_FIGURE * len(num_rows),
    }


def _tokens(run: OpenRun, num_nodes: int, num_subjects: int) -> tuple[int, int]:
    """Return how many tokens a model will read to embed all nodes, and those of a window.

    Of the subjects of the shards, the mean number of tokens is taken: windows overlap by half, and
    nodes in the same window share it.
    """
    if not num_nodes:
        return 0, 0
    counts, most = run.prepared.counts, run.data.window
    each = counts["tokens"] / max(counts["subjects"], 1)
    window = min(each, MEAN_WINDOW * most)
    num_windows = min(num_nodes / num_subjects, max(1.0, 2 * each / most))
    return int(num_subjects * num_windows * window), int(window)
