"""What each experiment asks, with which arms, and what would refute it: fixed before it is run.

Every arm begins from the preset `default` (the format codes, width 96, batches of 32 windows) and
has the same number of steps and the same learning rate, but for what it says itself. So a
difference between two arms is one of what they train on, at equal steps; what equal FLOPs give
stands beside it. The primary figure is the mean AUROC of the three yes-or-no tasks on held-out
patients, of a linear probe on the state at the last token.

A claim is that one arm exceeds another. It is supported if the 95 % interval of the difference,
over replicates x patients, lies above 0; refuted if it lies below `LEAST`, so that no gain worth
having is left; else it stays open. All of it is our choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from smbfast.settings import Experiment, ExperimentSettings, TrainSettings, load

LEAST = 0.005  # AUROC: the smallest gain that we would call one
LR = 3e-3  # of every phase, that of the preset `default`
_BEGIN = 0.1  # share of the steps that are SFT alone before codes or horizons, as in `default`

Phases = tuple[tuple[float, float, float, float], ...]
"""For each phase its share of the steps, and the weights of SFT, JEPA and codes to come."""

SFT: Phases = ((1, 1, 0, 0),)
JEPA: Phases = ((1, 0, 1, 0),)
HYBRID: Phases = ((1, 1, 1, 0),)
CURRICULUM: Phases = ((0.55, 1, 0, 0), (0.45, 0, 1, 0))  # as in the preset


@dataclass(frozen=True)
class Arm:
    """A way to train: its phases, and settings by dotted key that differ from the default's.

    flops: whether it has as many steps as reach the FLOPs of the dearest other arm.
    states: whether its checkpoints stay, because something is measured at them.
    """

    label: str
    phases: Phases
    settings: dict[str, object] = field(default_factory=dict)
    flops: bool = False
    states: bool = False

    def of(
        self, size: ExperimentSettings, replicate: int, steps: int | None = None
    ) -> TrainSettings:
        """Return the settings of its run in a replicate (from 1), without those of its place."""
        steps = steps or size.steps
        words = [
            f"--cohort.seed={size.first + replicate - 1}",
            f"--cohort.patients={size.patients}",
            f"--cohort.held_out={size.held_out}",
            f"--run.seed={replicate}",
            "--run.threads=1",
            f"--run.save_every={max(size.steps // 5, 1)}",
            f"--run.keep={6 if self.states else 2}",
            f"--eval.every={max(size.steps // 2, 1)}",
            "--eval.nodes=0",
            "--probe.labels=",
            "--probe.pool=last",
            *(f"--{key}={value}" for key, value in self.settings.items()),
        ]
        base = load("default", words)
        return TrainSettings.model_validate(base.model_dump() | {"phases": self._phases(steps)})

    def _phases(self, steps: int) -> list[dict[str, object]]:
        phases: list[dict[str, object]] = []
        for number, (share, w_sft, w_jepa, w_codes) in enumerate(self.phases):
            last = number == len(self.phases) - 1
            own = (
                steps - sum(int(str(p["steps"])) for p in phases) if last else round(share * steps)
            )
            weights = {"w_sft": w_sft, "w_jepa": w_jepa, "w_codes": w_codes}
            phases.append(
                {"name": f"phase-{number + 1}", "steps": max(own, 1), "lr": LR, **weights}
            )
        return phases


@dataclass(frozen=True)
class Claim:
    """That the primary figure of `one` is above that of `other`, and why one might think so."""

    one: str
    other: str
    text: str


@dataclass(frozen=True)
class Plan:
    """An experiment: its question, what it trains, what it claims, and what would refute that."""

    name: Experiment
    question: str
    primary: str
    refuted: str
    arms: dict[str, Arm]
    claims: tuple[Claim, ...] = ()
    replicates: int = 3
    notes: str = ""

    def text(self) -> str:
        """Return all of it as lines, as it is printed before anything is trained."""
        width = max((len(name) for name in self.arms), default=0)
        lines = [f"{self.name}: {self.question}", f"  primary figure: {self.primary}", "  arms:"]
        lines += [f"    {name:<{width}}  {arm.label}" for name, arm in self.arms.items()]
        if self.claims:
            lines += ["  claims:", *(f"    {c.one} > {c.other}: {c.text}" for c in self.claims)]
        lines.append(f"  refuted: {self.refuted}")
        return "\n".join([*lines, *([f"  {self.notes}"] if self.notes else [])])


PRIMARY = "mean AUROC of the three yes-or-no tasks, held-out, linear probe on the last state"
REFUTED = (
    f"a claim, if the 95 % interval of its difference (replicates x patients) lies below {LEAST}; "
    "supported above 0; else open"
)


def _mask(**more: object) -> dict[str, object]:
    return {"objective.jepa": "mask", **{f"objective.{k}": v for k, v in more.items()}}


def _ahead(jepa: float, codes: float) -> Phases:
    return ((_BEGIN, 1, 0, 0), (1 - _BEGIN, 1, jepa, codes))


_SFT_ARM = Arm("SFT, the next-token loss alone, for as many steps", SFT)
_HYBRID = Arm(
    "SFT and JEPA at half of the tokens of the future, masked", HYBRID, _mask(), states=True
)
_HORIZON = Arm("a tenth of SFT, then SFT and JEPA by horizon", _ahead(1, 0), states=True)
_CODES = Arm("a tenth of SFT, then SFT and codes to come", _ahead(0, 1))
_BOTH = Arm("a tenth of SFT, then SFT, JEPA by horizon and codes to come", _ahead(1, 1))


def _regimes() -> Plan:
    arms = {
        "sft": _SFT_ARM,
        "sft_flops": Arm("SFT alone at the FLOPs of the dearest other arm", SFT, flops=True),
        "jepa": Arm("JEPA at masked tokens alone", JEPA, _mask()),
        "hybrid": _HYBRID,
        "curriculum": Arm("SFT for 55 % of the steps, then JEPA alone", CURRICULUM, _mask()),
        "horizon": _HORIZON,
        "codes": _CODES,
        "horizon_codes": _BOTH,
        "horizon_none": replace(
            _HORIZON,
            label="as horizon, but nothing is left out as censored",
            settings={"objective.censored": "none"},
            states=False,
        ),
    }
    claims = (
        Claim("jepa", "sft", "JEPA needs no SFT; null: it learns no more"),
        Claim("hybrid", "sft", "JEPA at masked tokens adds to SFT; null: it adds nothing"),
        Claim("curriculum", "sft", "SFT, then JEPA, beats SFT; null: it does not"),
        Claim("curriculum", "hybrid", "the paper's order; null: the order does not matter"),
        Claim("horizon", "sft", "JEPA by horizon adds to SFT; null: it adds nothing"),
        Claim(
            "horizon", "sft_flops", "and at equal FLOPs or fewer; null: SFT for longer is as good"
        ),
        Claim("horizon", "hybrid", "horizons beat masks; null: they do not"),
        Claim("codes", "sft", "codes to come add to SFT; null: they add nothing"),
        Claim("horizon_codes", "sft_flops", "both at equal FLOPs; null: SFT for longer is as good"),
        Claim("horizon_codes", "codes", "JEPA adds to codes to come; null: it adds nothing"),
        Claim("horizon", "horizon_none", "pairs without follow-up harm; null: they do not"),
    )
    question = "which losses, in which order, give the best embedding at equal steps?"
    return Plan("regimes", question, PRIMARY, REFUTED, arms, claims, replicates=5)


def _mask_ratio() -> Plan:
    arms = {
        "ratio_25": replace(
            _HYBRID, label="a quarter masked", settings=_mask(mask_ratio=0.25), states=False
        ),
        "ratio_50": _HYBRID,
        "ratio_75": replace(
            _HYBRID, label="three quarters masked", settings=_mask(mask_ratio=0.75), states=False
        ),
        "ratio_100": replace(
            _HYBRID, label="all events masked", settings=_mask(mask_ratio=1.0), states=False
        ),
        "span_50": replace(
            _HYBRID,
            label="half masked, in runs of 8 tokens in the mean",
            settings=_mask(mask_unit="span"),
            states=False,
        ),
    }
    claims = tuple(
        Claim("ratio_50", other, "the paper's half is best; null: it is not better than this")
        for other in ("ratio_25", "ratio_75", "ratio_100", "span_50")
    )
    return Plan(
        "mask_ratio",
        "does it matter how much of a future is masked, and in pieces of which size?",
        PRIMARY,
        REFUTED,
        arms,
        claims,
        notes="In the format codes an event is one token, so these two units are the same.",
    )


def _interference() -> Plan:
    return Plan(
        "interference",
        "do the gradients of SFT and JEPA on the weights that they share point against each other?",
        "mean cosine of the two gradients of a batch, 16 batches at each of 5 moments of a run",
        "that they interfere, unless the upper end of the 95 % interval of the cosine (replicates "
        "x batches) is below 0; the null is a cosine of 0 or more",
        {"hybrid": _HYBRID, "horizon": _HORIZON},
        notes="Noise: the cosine between two halves of a batch, of one loss. Without conflict two "
        "losses would agree no better than that. Divided by it, the cosine is that of mean "
        "gradients.",
    )


def _depth() -> Plan:
    arms = {
        f"layers_{n}": replace(
            _HYBRID,
            label=f"a predictor of {n} linear layer{'s' * (n > 1)}",
            settings=_mask(predictor_layers=n),
            states=False,
        )
        for n in (1, 2, 3, 4)
    }
    claims = tuple(
        Claim(one, other, "depth helps; null: it does not")
        for one, other in (
            ("layers_2", "layers_1"),
            ("layers_3", "layers_2"),
            ("layers_4", "layers_2"),
        )
    )
    question = "does a deeper predictor give a better embedding?"
    return Plan("depth", question, PRIMARY, REFUTED, arms, claims)


def _tau() -> Plan:
    arms = {
        f"tau_{name}": replace(
            _HORIZON,
            label=f"JEPA by horizon, decay of the EMA teacher {value}",
            settings={"objective.tau": value},
            states=False,
        )
        for name, value in (("0", 0.0), ("90", 0.9), ("99", 0.99), ("996", 0.996), ("1", 1.0))
    }
    arms["tau_rise"] = replace(
        _HORIZON,
        label="the same, from 0.99 to 1 over the run",
        settings={"objective.tau": 0.99, "objective.tau_end": 1.0},
        states=False,
    )
    claims = tuple(
        Claim("tau_996", other, "the paper's decay is best; null: it is not better than this")
        for other in arms
        if other != "tau_996"
    )
    question = "does it matter how slowly the EMA teacher follows?"
    return Plan("tau", question, PRIMARY, REFUTED, arms, claims)


def _cuts() -> Plan:
    arms = {
        f"cuts_{k}": replace(
            _HYBRID,
            label=f"{k} masked future{'s' * (k > 1)} of each window",
            settings=_mask(cuts=k),
            states=False,
        )
        for k in (1, 2, 4)
    }
    claims = (
        Claim("cuts_2", "cuts_1", "more futures of a window help; null: they do not"),
        Claim("cuts_4", "cuts_1", "and more of them more; null: they do not"),
    )
    question = "do several cuts (K) of a window help at equal steps?"
    return Plan("cuts", question, PRIMARY, REFUTED, arms, claims)


def _posterior() -> Plan:
    arms = {
        "sft": _SFT_ARM,
        "hybrid": _HYBRID,
        "horizon": _HORIZON,
        "codes": _CODES,
        "horizon_codes": _BOTH,
    }
    claims = tuple(
        Claim(name, "sft", "this loss makes the belief easier to read; null: it does not")
        for name in arms
        if name != "sft"
    )
    return Plan(
        "posterior",
        "how much of the Bayes filter's posterior can be read linearly from an embedding?",
        "R2 on held-out nodes of a ridge from the embedding to the posterior of the 20 states, "
        "whose penalty tuning chooses",
        REFUTED,
        arms,
        claims,
    )


def _format() -> Plan:
    text = {"data.format": "text", "data.window": 1024, "data.bucket": "day"}
    both = _ahead(1, 1)
    arms = {
        "codes_sft": _SFT_ARM,
        "text_sft": Arm("SFT on text, for as many steps", SFT, text),
        "codes_ahead": _BOTH,
        "text_ahead": Arm("SFT on text, then JEPA by horizon and codes to come", both, text),
    }
    claims = (
        Claim("codes_sft", "text_sft", "a token for an event beats text; null: it does not"),
        Claim("codes_ahead", "text_ahead", "and with losses ahead; null: it does not"),
    )
    return Plan(
        "format",
        "is one token for an event better than text, at equal steps of as many patients?",
        PRIMARY,
        REFUTED,
        arms,
        claims,
        notes="A text has about five times the tokens, so its steps cost more: FLOPs stand beside.",
    )


def _controls() -> Plan:
    return Plan(
        "controls",
        "is what a run learned due to its losses, or would SFT have learned it as well?",
        PRIMARY,
        REFUTED,
        {
            "run": Arm("the runs that are given by --run", ()),
            "sft": Arm("SFT alone for as many steps", ()),
            "sft_flops": Arm("SFT alone at as many FLOPs", ()),
        },
        (
            Claim("run", "sft", "more than SFT at equal steps; null: it is not"),
            Claim("run", "sft_flops", "more than SFT at equal FLOPs; null: it is not"),
        ),
    )


_MADE: tuple[Callable[[], Plan], ...] = (
    _regimes,
    _mask_ratio,
    _depth,
    _tau,
    _cuts,
    _interference,
    _posterior,
    _format,
    _controls,
)
PLANS: dict[str, Plan] = {plan.name: plan for plan in (make() for make in _MADE)}


def epilog() -> str:
    """Return the plans of all experiments, for `--help`."""
    examples = """Examples

  Compare the regimes of training, in about half an hour on two cores:
    python -m smbfast.experiment regimes --work=FOLDER --jobs=2

  Try an experiment on a small cohort of its own first:
    python -m smbfast.experiment regimes --work=FOLDER --first=901 --replicates=1 \\
        --steps=5 --patients=300 --held_out=0

  Cross-validate a method on data of your own, which has a help page of its own:
    python -m smbfast.experiment folds --help"""
    return "\n\n".join(["Experiments", *(plan.text() for plan in PLANS.values()), examples])
