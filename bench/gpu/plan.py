"""The stages, the call each belongs to, and how long each may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A process that measures items, each of which is a record of its own."""

    name: str
    call: int
    cap: float  # seconds after which it is killed
    least: float  # seconds below which it is not worth starting
    about: str
    fresh: bool = False  # a process for each item: what one leaves in memory is not in the next
    traced: bool = False  # it also runs on a pretended GPU
    module: str = ""  # that has `items`; empty: of the stage's name, in this package

    @property
    def path(self) -> str:
        """Of its module."""
        return self.module or f"bench.gpu.{self.name}"


CALLS = {1: 540.0, 2: 480.0, 3: 360.0}  # seconds of each
INSTALL = 25.0  # seconds that unpacking the wheels may take
STAGES = (
    Stage("rates", 1, 65, 25, "copies, and sustained products at the six shapes of Qwen3-8B"),
    Stage(
        "ops",
        1,
        90,
        20,
        "every backend of every operation against fp64, in poisoned memory",
        traced=True,
    ),
    Stage("suite", 1, 140, 40, "the tests that need a GPU, in eight processes"),
    Stage(
        "check", 1, 70, 25, "the shared step against the reference: 4 layers, then 36", traced=True
    ),
    Stage(
        "engines",
        1,
        60,
        20,
        "attention engines, truncation and predictor, side by side",
        traced=True,
    ),
    Stage(
        "step", 1, 90, 40, "our step on W1 in parts, and its kernels by torch.profiler", traced=True
    ),
    Stage("pairs", 2, 450, 60, "our step and a rival's in turn, on W1 and W2", fresh=True),
    Stage("memory", 3, 70, 25, "the predicted peak of a step and the measured one", traced=True),
    Stage("sanitizer", 3, 110, 40, "stage ops again under compute-sanitizer"),
    Stage("convergence", 3, 150, 60, "200 steps at the shape of Qwen3-0.6B, ours and a rival's"),
)
