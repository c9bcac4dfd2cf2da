"""Single bits that flip in what ranks hold alike: in one process, on one of two ranks, in runs."""

import os
import random
from typing import Any

from tests.reliability.cohort import Cohort, cohort, imported
from tests.reliability.proof import Proof, Work


def _holding(kind: int) -> tuple[Any, Any, Any]:
    """An encoder, its optimizer and its target after some steps, of one of three kinds."""
    import torch

    from smbfast.model.target import TargetEncoder, TargetForm
    from smbfast.run.optim import make_optimizer
    from smbfast.settings import OptimSettings
    from tests.tiny import tiny_encoder

    encoder = tiny_encoder(lora=kind > 0)
    form = (TargetForm("merged"), TargetForm("merged"), TargetForm("tracked", 1, 2))[kind]
    if kind != 1:
        encoder = type(encoder)(encoder.lm, 2, num_horizons=3)
    target = TargetEncoder(encoder, form)
    optimizer = make_optimizer(encoder, OptimSettings())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        target.update(0.9)
    if target.scale:
        sums = target.scale.new_sums()
        sums.add(torch.randn(12, encoder.width, generator=generator), torch.arange(12) % 3)
        target.scale.update(sums, [4, 4, 4])
    return encoder, optimizer, target


def _flip(tensor: Any, byte: int, bit: int) -> None:
    """Flip a bit of a tensor in place; twice is none."""
    import numpy as np

    raw = tensor.detach().numpy()  # of the tensor's own memory, whatever its strides
    place = np.unravel_index(byte // raw.itemsize, raw.shape) if raw.ndim else ()
    own = bytearray(raw[place].tobytes())
    own[byte % raw.itemsize] ^= 1 << bit
    raw[place] = np.frombuffer(bytes(own), raw.dtype)[0]


def flips(work: Work) -> Proof:
    """Flip single bits of all that ranks hold; then on one of two ranks, and in whole runs."""
    from smbfast.run.agreement import _sums, _total, state_of

    draw, bad = random.Random(work.seed), []
    count = work.pick(push=300, nightly=900, recorded=3000, mutant=120)
    by_kind: dict[str, int] = {}
    for which in range(3):
        held = _holding(which)
        kinds = state_of(*held)
        before = {kind: _total(own, _sums(own)) for kind, own in kinds.items()}
        places = [(kind, name) for kind, own in _own_tensors(*held).items() for name in own]
        for _ in range(count // 3):
            kind = draw.choice(sorted({k for k, _ in places}))
            name = draw.choice([n for k, n in places if k == kind])
            tensor = _own_tensors(*held)[kind][name]
            byte, bit = draw.randrange(tensor.nbytes), draw.randrange(8)
            _flip(tensor, byte, bit)
            after = {k: _total(own, _sums(own)) for k, own in state_of(*held).items()}
            _flip(tensor, byte, bit)
            by_kind[kind] = by_kind.get(kind, 0) + 1
            if after == before:
                bad.append(f"bit {bit} of byte {byte} of {kind}, {name}: no sum changes")
        if before != {k: _total(own, _sums(own)) for k, own in state_of(*held).items()}:
            raise AssertionError("a flip was not taken back")
    real = work.pick(push=12, nightly=60, recorded=200, mutant=0)
    if real:
        bad += _flips_of_ranks(work, real, draw.getrandbits(32))
    whole = work.pick(push=0, nightly=4, recorded=12, mutant=0)
    for number in range(whole):
        bad += _flip_in_a_run(work, number)
    figure = f"{real} on one of two ranks, {whole} in whole runs; {len(by_kind)} kinds of state"
    return Proof(count + real + whole, "flipped bits", bad, figure)


def _own_tensors(encoder: Any, optimizer: Any, target: Any) -> dict[str, dict[str, Any]]:
    """What is held, by kind and name, found without the code that sums it: the tensors' own
    memory, with which the encoder, the optimizer and the target compute."""
    moments: dict[str, dict[str, Any]] = {}
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            moments.setdefault(key, {})[name] = value
    averages = {
        f"{number} {key}": value
        for number, part in enumerate(target.parts)
        for key, value in _tensors_of(part)
    }
    own = {"weights": trained, **moments, "averages": averages}
    own["mask vector"] = {"mask_vector": encoder.mask_vector}
    if len(trained) < len(list(encoder.parameters())):
        own["frozen"] = {n: p for n, p in encoder.named_parameters() if n not in trained}
    if target.scale:
        own["scale"] = vars(target.scale._running)
    return own


def _tensors_of(part: Any) -> list[tuple[str, Any]]:
    """The averages of one form: whole weights, or the columns of its factors that are in use."""
    if hasattr(part, "_average"):
        return [(str(n), w) for n, w in enumerate(part._average)]
    tensors = []
    for number, group in enumerate(part.groups):
        used = group.held_rank + part.pending * group.r
        tensors.append((f"u {number}", group.u_MNQ[:, :, :used]))
        tensors.append((f"v {number}", group.v_MQK[:, :used]))
    return tensors


def ranks_flip(count: int, seed: int) -> list[str]:
    """Of two ranks, flip bits on one at a time; each must be named by both."""
    from smbfast.base.entry import RunFailed
    from smbfast.run.agreement import require_same_state
    from smbfast.run.ranks import joined

    draw, wrong = random.Random(seed), []
    with joined() as ranks:
        held = _holding(2)
        require_same_state(ranks, *held)
        for _ in range(count):
            victim, tensors = draw.randrange(2), _own_tensors(*held)
            kind = draw.choice(sorted(tensors))
            name = draw.choice(sorted(tensors[kind]))
            tensor = tensors[kind][name]
            place = draw.randrange(tensor.nbytes), draw.randrange(8)
            if ranks.rank == victim:
                _flip(tensor, *place)
            try:
                require_same_state(ranks, *held)
                wrong.append(f"rank {victim}, {kind}, {name}: not seen")
            except RunFailed as error:
                if "of rank 1 are no longer those of rank 0" not in str(error):
                    wrong.append(f"rank {victim}, {kind}, {name}: {error}")
            if ranks.rank == victim:
                _flip(tensor, *place)
        require_same_state(ranks, *held)
    return wrong


def _flips_of_ranks(work: Work, count: int, seed: int) -> list[str]:
    from tests import rank_server

    imported()
    arguments = {"count": count, "seed": seed}
    ended = rank_server._run_case(2, f"{__name__}:ranks_flip", 900.0, arguments)
    return [text for rank in ended for text in (rank.value or [])] + [
        f"two ranks: {rank.error[-300:]}" for rank in ended if rank.error
    ]


def run_with_flip(words: list[str], on: int, step: int, kind: str) -> list[str]:
    """Train; flip a bit of one kind of state of one rank behind a step."""
    from smbfast.run import loop
    from tests.ranks_case import run

    real, seen = loop.Updater.step, [0]

    def stepped(self: Any, *words: Any, **more: Any) -> Any:
        norm = real(self, *words, **more)
        seen[0] += 1
        if seen[0] == step and int(os.environ["RANK"]) == on:
            last = next(p for p in self.parameters if self.optimizer.state.get(p))
            state = {"weights": last, **self.optimizer.state[last]}
            _flip(state[kind], 0, 3)
        return norm

    loop.Updater.step = stepped
    try:
        run(*words)
    except SystemExit as end:
        return [str(end.code)]
    return []


def _flip_in_a_run(work: Work, number: int) -> list[str]:
    """Whether a run of two ranks stops before it saves what one of them holds otherwise."""
    from tests import rank_server

    if not (work.folder / "data").is_dir():
        cohort(work, "codes")
    words = Cohort(work.folder / "data").words(steps=6, save=4)
    run = work.folder / f"flipped-{number}"
    kind = ("weights", "exp_avg", "exp_avg_sq", "step")[number % 4]
    arguments = {"words": [*words, f"--run.dir={run}"], "on": number % 2, "kind": kind}
    ended = rank_server._run_case(
        2, f"{__name__}:run_with_flip", 900.0, {**arguments, "step": 2 + number % 3}
    )
    name = f"a run, {kind} of rank {number % 2}"
    if not all("no longer those of rank 0" in " ".join(e.value or []) for e in ended):
        return [f"{name}: {[e.value or e.error for e in ended]}"]
    if list(run.glob("checkpoints/step-*")) or list(run.glob("best/*")):
        return [f"{name}: the state was saved"]
    return []
