"""Steps of a backbone that ranks share, and of the same backbone on one process.

Functions of this module run in processes that `tests.rank_server` forks.
"""

import os
import signal
from functools import partial

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from smbfast import objective, reference
from smbfast.base.entry import RunFailed
from smbfast.batch import NewToken, Timeline, idle_batch
from smbfast.data.horizons import Horizons
from smbfast.data.loader import make_batch, make_step
from smbfast.data.timelines import Preamble
from smbfast.data.windows import WindowSet
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.sharding import held_bytes
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.agreement import require_same_state
from smbfast.run.gradients import gradients
from smbfast.run.optim import make_optimizer
from smbfast.run.ranks import ALONE, Ranks, joined
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, TrainSettings
from tests.tiny import VOCABULARY, random_window, window_set

CPU = torch.device("cpu")
FORM = ObjectiveSettings(min_future=4, cuts=2)
PHASE = {"name": "both", "steps": 9, "w_sft": 1.0, "w_jepa": 1.0, "lr": 1e-3}
WINDOWS = 5  # of a step: no number of ranks divides its rows


def settings_of(base: str, *, fsdp: bool, **model: object) -> TrainSettings:
    """Settings of a LoRA run on the backbone in `base`."""
    values = {"path": base, "fsdp": fsdp, **model}
    data, lora = {"window": 128}, {"r": 2, "alpha": 4}
    return TrainSettings(preset="x", model=values, data=data, lora=lora, phases=[PHASE])


def encoder_of(settings: TrainSettings, num_horizons: int = 0) -> PatientEncoder:
    """The encoder at the start, none of whose factors is zero, with rows for two new tokens."""
    words = {f"w{i}": i for i in range(VOCABULARY + 2)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    new = [NewToken(VOCABULARY + n, f"w{n + 1}") for n in range(2)]
    encoder = make_encoder(settings, tokenizer, CPU, new, num_horizons=num_horizons)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return encoder


def window_of(seed: int) -> Timeline:
    """A window in which tokens occur that are new to the backbone."""
    window = random_window(seed)
    window.ids_T[window.ids_T == 3] = VOCABULARY
    window.ids_T[window.ids_T == 4] = VOCABULARY + 1
    return window


def start(base: str, out: str, fsdp: bool | None = None) -> dict:
    """Make the encoder as shared out, or alone in one process; save it whole."""
    with joined() as ranks:
        encoder = encoder_of(settings_of(base, fsdp=ranks.world > 1 if fsdp is None else fsdp))
        shared = {id(p) for p in encoder.parameters() if isinstance(p, DTensor)}
        _save(dict(encoder.named_parameters()), ranks, out)
        layers = encoder.decoder.layers.parameters()
        trained = [n for n, p in encoder.named_parameters() if id(p) in shared and p.requires_grad]
        frozen = sum(p.numel() for p in layers if not p.requires_grad)
        every = sum(p.numel() * p.element_size() for p in encoder.parameters())
        return {
            "held": frozen - (every - held_bytes(encoder)) // 4,
            "frozen": frozen,
            "trained": trained,
            "shared": len(shared),
        }


def steps(base: str, out: str, recompute: str) -> list:
    """Take three steps; what they give, and what an evaluation measures after them."""
    with joined() as ranks:
        settings = settings_of(base, fsdp=ranks.world > 1)
        encoder = encoder_of(settings)
        target = TargetEncoder(encoder, TargetForm("tracked", 2, 2))
        updater = Updater(make_optimizer(encoder, settings.optim), clip=1.0)
        losses = partial(objective.losses, normalize=True, recompute=recompute)
        given: list = []
        for number in range(3):
            windows = window_set([window_of(s) for s in range(9)], FORM)
            step = make_step(
                windows,
                FORM,
                number,
                batch=WINDOWS,
                tokens=256,
                seed=0,
                jepa=True,
                rank=ranks.rank,
                ranks=ranks.world,
                even=ranks.world > 1,
            )
            scales = LossScales.of_batch(settings.phases[0], step)
            own = forward_backward(losses, encoder, target, step.micro_batches, scales, ranks=ranks)
            total, _ = ranks.summed(updater.parameters, torch.stack(own), False, step.digest)
            named = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
            _save(named, ranks, f"{out}-{number}")
            norm = float(updater.step(1e-3, target, 0.9))
            given.append([total.tolist(), norm, len(step.micro_batches)])
        require_same_state(ranks, encoder, updater.optimizer, target)
        return [*given, measured(encoder, target, settings)]


def gathering(base: str, dies: int) -> str:
    """Kill a rank at its third gathering of a layer; what the other one says."""
    real, turns = param_group.foreach_all_gather, [0]

    def gathered(*words: object, **more: object) -> object:
        turns[0] += 1
        if turns[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **more)

    with joined() as ranks:
        encoder = encoder_of(settings_of(base, fsdp=True))
        if ranks.rank == dies:
            vars(param_group)["foreach_all_gather"] = gathered
        batch = make_batch([window_of(3)], FORM, 0, 0, jepa=False)
        try:
            with ranks.loss_is_failure():
                for _ in range(9):
                    terms = objective.losses(
                        encoder, None, batch, sft_scale=1.0, jepa_scale=0.0, normalize=True
                    )
                    torch.autograd.backward([terms.sft])
        except RunFailed as error:
            return str(error)
    return "nothing"


def measured(encoder: PatientEncoder, target: TargetEncoder, settings: TrainSettings) -> list:
    """What evaluations and the self-check compute: the same batch on every rank."""
    batch = make_batch([window_of(s) for s in (3, 5)], FORM, 0, 0, jepa=True)
    values = list(target.measures().values())
    values += gradients(encoder, target, batch, settings, settings.phases[0]).values()
    for path in (objective, reference):
        with torch.no_grad():
            seen = path.measure(encoder, target, batch)
        values += [seen.sft, seen.masked.prediction_MD.sum(), seen.masked.target_MD.sum()]
        terms = path.losses(encoder, target, batch, sft_scale=0.01, jepa_scale=0.01, normalize=True)
        torch.autograd.backward([terms.sft, terms.jepa])
        values += [p.grad.norm() for p in encoder.parameters() if p.grad is not None]
        encoder.zero_grad(set_to_none=True)
    states: list[Tensor] = []
    with torch.inference_mode():
        rows = torch.tensor([2, 7])
        pack = (batch.ids_T, batch.position_T, batch.segments)
        encoder.packed(*pack, rows=rows, each=states.append)
    return [float(v) for v in [*values, *(s.sum() for s in states)]]


def uneven(base: str, horizons: int) -> list:
    """Two steps of which rank 0 has all rows, rank 1 one without masks and the others none."""
    with joined() as ranks:
        encoder = encoder_of(settings_of(base, fsdp=ranks.world > 1), horizons)
        target = TargetEncoder(encoder, TargetForm("tracked"))
        jepa = {"jepa": "horizon", "horizons": ["1d", "2d"]} if horizons else {}
        form = ObjectiveSettings(min_future=4, **jepa)
        ahead = Horizons(tuple(form.horizons)) if horizons else None
        make = partial(make_batch, objective=form, seed=0, step=0, horizons=ahead)
        windows = WindowSet.of(
            [[window_of(s) for s in range(3)]], 256, Preamble(), form, horizons=ahead
        )
        rows = [make([windows[s]], jepa=j) for s, j in ((0, True), (1, True), (2, False))]
        idle = idle_batch()
        own = [rows] if ranks == ALONE else [rows[:2], [rows[2], idle], [idle] * 2]
        mine = own[min(ranks.rank, len(own) - 1)]
        counts = [sum(getattr(b, n) for b in rows) for n in ("num_labels", "num_masked")]
        latent = [b.pairs.num_by_horizon for b in rows if b.pairs]
        by_horizon = [sum(n) for n in zip(*latent, strict=True)]
        scales = LossScales.of(1.0, 1.0, counts[0], counts[1] + sum(by_horizon))
        losses = partial(objective.losses, normalize=True)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        for _ in range(2):
            encoder.zero_grad(set_to_none=True)
            step = forward_backward(
                losses, encoder, target, mine, scales, num_by_horizon=by_horizon, ranks=ranks
            )
            total, _ = ranks.summed(parameters, torch.stack(step), False, b"same")
        norms = [None if p.grad is None else float(p.grad.norm()) for p in parameters]
        return [total.tolist(), norms, [float(p.abs().sum()) for p in parameters]]


def _save(tensors: dict[str, Tensor], ranks: Ranks, out: str) -> None:
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    if ranks == ALONE or ranks.is_main:
        save_file({n: t.detach().clone() for n, t in whole.items()}, f"{out}.safetensors")
