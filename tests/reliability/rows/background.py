"""The row of checkpoints that are written while steps go on."""

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work

BACKGROUND = "smbfast/run/background.py"
SAVES = ("--run.save_every=3", "--phases.0.steps=8", "--phases.1.steps=2", "--run.keep=99")
MOST_CALLS = 60  # of the system in a write; more than there are


def in_background(work: Work) -> Proof:
    """The loop stops for one copy, and nothing that goes on meanwhile changes what is written."""
    from tests.reliability import background as trials

    outcomes: list[str | None] = []
    for kind in work.pick(push=["tracked", "scratch"], recorded=list(trials.KINDS)):
        steps = work.pick(push=4, recorded=45)
        outcomes += trials.copied_once(kind, steps, work.folder / "copies")
        every = work.pick(push=12, recorded=1, mutant=MOST_CALLS)
        for call in range(0, MOST_CALLS, every):
            died = trials.died_writing(kind, call, work.folder / "kills")
            if died == "over":
                break
            outcomes.append(died)
    if work.has_enough(outcomes):
        return Proof(len(outcomes), "saves", [text for text in outcomes if text is not None])
    ends = [*SAVES, "--eval.every=100"]
    alone = trials.trained(work.folder, "alone", *ends, foreground=True)
    held = trials.trained(work.folder, "held", *ends, held=True)
    outcomes += trials.same(alone, held)
    outcomes += [*alone.wrong, *held.wrong]
    outcomes.append(None if held.at_most == 1 else f"{held.at_most} writes at a time")
    lost = work.pick(push=[(6, 3)], recorded=[(3, 0), (6, 3), (8, 6), (9, 8), (10, 9)])
    for step, before in lost:
        words = (("fails", "No space left on device"), ("not_finite", "must be finite"))
        for how, said in words[: work.pick(push=1, recorded=2, mutant=2)]:
            name = f"{how}-{step}"
            seen = trials.trained(work.folder, name, *ends, **{how: step})
            outcomes += [trials.ended_at_once(seen, step, before, said), *seen.wrong]
    bad = [text for text in outcomes if text is not None]
    figure = f"{held.at_most} write at a time"
    return Proof(len(outcomes), "saves", bad, figure)


ROWS: tuple[Row, ...] = (
    Row(
        "B1",
        "A checkpoint stops the loop for one copy of the state, and is of that moment; a write "
        "that fails ends the run within a step.",
        {"push": 15, "nightly": 200, "recorded": 200},
        in_background,
        (
            mutant(
                "background-reads-live-tensors",
                "the writer copies when it writes, and the state is of a later step",
                BACKGROUND,
                "            torch._foreach_copy_(\n"
                "                list(self._views.values()), list(tensors.values()), "
                "non_blocking=True\n            )",
                "            live = list(tensors.values())\n"
                "            self.require_finite = lambda: torch._foreach_copy_(  # type: ignore\n"
                "                list(self._views.values()), live\n            )",
            ),
            mutant(
                "background-failure-swallowed",
                "a write that fails is forgotten",
                BACKGROUND,
                "            self._error = error\n",
                "            warn_failed('the checkpoint', error, 'the run goes on')\n",
            ),
            mutant(
                "background-save-does-not-wait",
                "a save copies into the buffer that is being written",
                BACKGROUND,
                "        self._comes_to_rest()\n        error, ",
                "        error, ",
            ),
            mutant(
                "background-failure-heard-at-next-save",
                "a run goes on for steps that it cannot save",
                "smbfast/run/loop.py",
                "bool(stop) or run.lost_a_checkpoint",
                "bool(stop)",
            ),
            mutant(
                "background-not-finite",
                "what is not finite is saved",
                "smbfast/run/checkpoint.py",
                "    snapshot.tensors.require_finite()\n",
                "",
            ),
            mutant(
                "background-status-before-disk",
                "the status names a step that is not saved yet",
                "smbfast/run/open_run.py",
                "            snapshot = checkpoint.taken(*state, self.writer.buffer)\n",
                "            snapshot = checkpoint.taken(*state, self.writer.buffer)\n"
                "            write_status(self.folder, 'running', step, command)\n",
            ),
            mutant(
                "background-buffer-anew",
                "every save takes memory of its own",
                BACKGROUND,
                "        if start > len(self._bytes):",
                "        if start:",
            ),
        ),
    ),
)
