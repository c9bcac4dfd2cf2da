"""Numbers that are not finite, put into one step of a run: for the row of such numbers."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.reliability.training import CLEAN, TINY, Ran, replaced, train

STEPS = 6  # of the run: three of SFT, three with JEPA
WORDS = (
    *TINY,
    CLEAN,
    "--phases.sft.steps=3",
    "--phases.jepa.steps=3",
    "--optim.batch=8",
    "--optim.micro_tokens=64",  # micro-batches of a window or two
    "--run.save_every=1",
    "--run.keep=9",
)
HORIZONS = (  # what JEPA then predicts, on a running scale of the target's states
    "--objective.jepa=horizon",
    '--objective.horizons=["30d", "365d"]',
    "--objective.positions=8",
)


class Injection(NamedTuple):
    """What becomes not finite, and when."""

    place: str  # "loss", "gradient", "activation", or "target": all that horizons compare with
    value: float
    step: int  # from 0
    number: int = 0  # of the micro-batch, the parameter or the call of a layer
    steps: int = 1  # in a row

    @property
    def words(self) -> str:
        """It in words."""
        return f"{self.value} in {self.place} {self.number} of step {self.step + 1}"


@dataclass
class _Now:
    """Where a run is."""

    step: int = -1
    losses: int = 0  # calls in this step
    layers: int = 0
    trains: bool = False  # not an evaluation


def put_in(injection: Injection) -> list[AbstractContextManager]:
    """What makes a number of a run not finite."""
    now = _Now()

    def hits(number: int) -> bool:
        here = injection.step <= now.step < injection.step + injection.steps
        return here and number == injection.number

    def losses_of(real: Any) -> Any:
        def made(settings: Any) -> Any:
            def losses(*args: Any, **more: Any) -> Any:
                terms = real(settings)(*args, **more)
                now.losses += 1
                if injection.place != "loss" or not hits(now.losses - 1):
                    return terms
                return type(terms)(*(t if t is None else t * injection.value for t in terms))

            return losses

        return made

    def forward_backward(real: Any) -> Any:
        def passes(losses: Any, encoder: Any, *args: Any, **more: Any) -> Any:
            now.step, now.losses, now.layers, now.trains = now.step + 1, 0, 0, True
            summed = real(losses, encoder, *args, **more)
            if injection.place == "gradient" and hits(injection.number):
                grads = [p.grad for p in encoder.parameters() if p.grad is not None]
                grads[injection.number % len(grads)].view(-1)[-1] = injection.value
            now.trains = False
            return summed

        return passes

    def run_layer(real: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            first, *others = real(*args, **more)
            now.layers += now.trains
            if injection.place == "activation" and now.trains and hits(now.layers - 1):
                first = first * injection.value
            return (first, *others)

        return run

    def averaged(real: Any) -> Any:
        def states(*args: Any) -> Any:
            is_hit = injection.place == "target" and now.trains and hits(injection.number)
            return real(*args) * (injection.value if is_hit else 1.0)

        return states

    return [
        replaced("smbfast.objective:averaged", averaged),
        replaced("smbfast.run.loop:losses_of", losses_of),
        replaced("smbfast.run.loop:forward_backward", forward_backward),
        replaced("smbfast.model.decoder:run_layer", run_layer),
    ]


def passing_over(step: int, *, scale: bool = False) -> list[AbstractContextManager]:
    """Let the optimizer pass over a step, which is the run that an injected one must equal.

    Args:
        scale: whether the running scale of horizons passes over it too.
    """

    def stepped(real: Any) -> Any:
        calls = [0]

        def make_step(self: Any, *args: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] - 1 != step:
                return real(self, *args, **more)
            whole, self.optimizer.step = self.optimizer.step, lambda: None
            try:
                return real(self, *args, **more)
            finally:
                self.optimizer.step = whole

        return make_step

    def kept(real: Any) -> Any:
        calls = [STEPS // 2]  # the first steps have no JEPA

        def update(*args: Any) -> None:
            calls[0] += 1
            if calls[0] - 1 != step:
                real(*args)

        return update

    patches = [replaced("smbfast.run.loop:Updater.step", stepped)]
    if scale:
        patches.append(replaced("smbfast.model.horizon_scale:HorizonScale.update", kept))
    return patches


def skipping(folder: Path, data: list[str], step: int) -> Ran:
    """A run that passes over a step."""
    return train(folder, [*WORDS, *data], *passing_over(step))


def injected(folder: Path, data: list[str], injection: Injection) -> Ran:
    """A run with a number that is not finite."""
    return train(folder, [*WORDS, *data], *put_in(injection))


def wrong_with(ran: Ran, like: Ran, injection: Injection) -> list[str]:
    """Say how a run differs from one that passes over the step, and what it does not say."""
    bad = []
    if ran.code or like.code:
        return [f"ended with {ran.code}, and the other with {like.code}: {ran.err[-200:]}"]
    phase = "sft" if injection.step < 3 else "jepa"
    said = f"step {injection.step + 1} of phase {phase}: gradient not finite"
    if said not in ran.err:
        bad.append("does not name the step and the phase")
    for folder in (f"checkpoints/step-{STEPS:06d}", "final"):
        for file in sorted((like.folder / folder).glob("*.safetensors")):
            if file.read_bytes() != (ran.folder / folder / file.name).read_bytes():
                bad.append(f"other bits in {folder}/{file.name}")
    if f"step-{injection.step:06d}" not in ran.checkpoints and injection.step:
        bad.append("the checkpoint before is gone")
    return bad + not_finite(ran)


def not_finite(ran: Ran) -> list[str]:
    """Name the tensors of all checkpoints and models of a run that are not finite."""
    from safetensors.torch import load_file

    return [
        f"{name} is not finite in {file.parent.name}"
        for file in sorted(ran.folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


def gives_up(folder: Path, data: list[str], injection: Injection) -> list[str]:
    """Say what is wrong with the end of a run whose every step is not finite from one on."""
    ran = injected(folder, data, injection._replace(steps=STEPS))
    bad = not_finite(ran)
    if ran.code != 1 or "not finite in 3 steps in a row" not in ran.err:
        bad.append(f"ended with {ran.code}")
    if injection.step and ran.checkpoints[-1:] != [f"step-{injection.step:06d}"]:
        bad.append(f"leaves {ran.checkpoints}")
    if (ran.folder / "final").exists():
        bad.append("leaves a model")
    return bad


def drawn(count: int, seed: int) -> list[Injection]:
    """Injections of every place and value at steps that are drawn."""
    import random

    draws = random.Random(seed)
    places = ("gradient", "loss", "activation")
    values = (math.nan, math.inf, -math.inf)
    return [
        Injection(
            places[i % 3],
            values[(i // 3) % 3],
            step=draws.randrange(STEPS - 1),
            number=draws.randrange(2),
        )
        for i in range(count)
    ]
