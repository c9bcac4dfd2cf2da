"""Whether all ranks still hold the same state: a flipped bit on one of them must not be saved.

Ranks sum their gradients and update alike, so what they hold stays the same bits. Memory that
forgets or a GPU that computes wrongly breaks that without an error. At evaluations and before each
checkpoint every rank sums its state as 64-bit integers, so that any single bit that differs changes
a sum; two numbers for each kind of state are exchanged. All of the state is read once, on its
device, and nothing is copied where a tensor is contiguous.
"""

from collections import Counter
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smbfast.base.entry import RunFailed
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import SCALE, TargetEncoder
from smbfast.run.optim import trained
from smbfast.run.ranks import Ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TAIL = 8  # bytes of an integer


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bytes as 64-bit integers, int64 [], modulo 2^64.

    A tail of less than 8 bytes is added by its elements. Any one bit that flips changes the sum.
    """
    flat = tensor.detach().contiguous().flatten()
    size = flat.element_size()
    whole = flat.numel() * size // _TAIL * _TAIL // size
    if flat.data_ptr() % _TAIL:  # a part of another tensor
        whole = 0
    total = flat[:whole].view(torch.int64).sum() if whole else flat.new_zeros((), dtype=torch.int64)
    return total + flat[whole:].view(_INTEGERS[size]).sum(dtype=torch.int64)


def state_of(
    encoder: PatientEncoder, optimizer: torch.optim.Optimizer, target: TargetEncoder | None
) -> dict[str, dict[str, Tensor]]:
    """Return by kind and name all tensors that ranks hold alike.

    A frozen backbone that ranks share (`model.fsdp`) is left out: each has another part of it.
    """
    own = trained(encoder)
    state: dict[str, dict[str, Tensor]] = {"trained weights": dict(own)}
    for kind, key in (
        ("first moments of the optimizer", "exp_avg"),
        ("second moments of the optimizer", "exp_avg_sq"),
        ("step counts of the optimizer", "step"),
    ):
        moments = {name: optimizer.state.get(p) for name, p in own.items()}
        state[kind] = {name: moment[key] for name, moment in moments.items() if moment}
    averages = target.state() if target is not None else {}
    scale = {name for name in averages if name.startswith(SCALE)}
    state["averages of the target"] = {n: t for n, t in averages.items() if n not in scale}
    state["running scale of horizons"] = {n: averages[n] for n in sorted(scale)}
    state["frozen weights"] = _frozen(encoder, own)
    return state


def _frozen(encoder: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    return {n: t for n, t in tensors if n not in own and not isinstance(t, DTensor)}


def require_same_state(
    ranks: Ranks,
    encoder: PatientEncoder,
    optimizer: torch.optim.Optimizer,
    target: TargetEncoder | None,
) -> None:
    """Raise RunFailed, on all ranks, unless all hold the same bits; all call it after a step.

    One all-gather of two int64 for each kind of state, which waits for a GPU. Only if they differ,
    one more of an int64 for each tensor of that kind.

    Raises:
        RunFailed: it names the rank, the kind of state and the first tensor that differs.
    """
    if ranks.world == 1:
        return
    kinds = state_of(encoder, optimizer, target)
    sums = {kind: _sums(tensors) for kind, tensors in kinds.items()}
    totals = [_total(kinds[kind], own) for kind, own in sums.items()]
    counts = [len(tensors) for tensors in kinds.values()]
    gathered = ranks.gathered([*counts, *totals])
    rows = [list(zip(row[: len(counts)], row[len(counts) :], strict=True)) for row in gathered]
    for number, (kind, own) in enumerate(sums.items()):
        values = [row[number] for row in rows]
        unlike = _unlike(values)
        if unlike is None:
            continue
        first = "their number differs"
        if len({count for count, _ in values}) == 1:
            columns = zip(*ranks.gathered(own), strict=True)
            named = zip(kinds[kind], columns, strict=True)
            first = f"first in {next((n for n, column in named if len(set(column)) > 1), '?')}"
        raise RunFailed(_words(kind, first, unlike, values))


def _sums(tensors: dict[str, Tensor]) -> list[int]:
    """Return the checksum of each tensor; one wait for each device that holds some of them."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors.values()):
        by_device.setdefault(tensor.device, []).append(place)
    listed, sums = list(tensors.values()), [0] * len(tensors)
    for places in by_device.values():
        values = torch.stack([checksum(listed[place]) for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            sums[place] = value
    return sums


def _total(tensors: dict[str, Tensor], sums: list[int]) -> int:
    """Return one int64 of the sums of tensors, each times an odd number that its name gives."""
    total = 0
    for name, own in zip(tensors, sums, strict=True):
        odd = int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) | 1
        total += odd * own
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _unlike(values: list[tuple[int, int]]) -> int | None:
    """Return the first rank that is in the minority, or in a draw the first unlike rank 0."""
    if len(set(values)) == 1:
        return None
    (most, count), *others = Counter(values).most_common()
    if others[0][1] == count:
        most = values[0]
    return next(rank for rank, value in enumerate(values) if value != most)


def _words(kind: str, first: str, unlike: int, values: list[tuple[int, int]]) -> str:
    same = sum(value != values[unlike] for value in values)
    others, wrong = "rank 0", "one of the two computes or remembers"
    if 2 * same > len(values):
        others, wrong = f"{same} other ranks", "its machine computes or remembers"
    return (
        f"the {kind} of rank {unlike} are no longer those of {others} ({first}), so {wrong} "
        "wrongly. Nothing of this step is saved; checkpoints from before stay, and the same "
        "command goes on from the newest"
    )
