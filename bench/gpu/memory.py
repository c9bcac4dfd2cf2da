"""The peak that `smbfast` predicts for a step, which sizes micro-batches, and the measured one."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu.child import Bench, Item
from bench.gpu.sizes import workload

MICRO = (1, 2, 3)  # windows of a micro-batch; four are predicted not to fit an H200


def items(bench: Bench) -> list[Item]:
    """For micro-batches of several sizes."""
    return [Item(f"W1/{micro} windows", partial(_peaks, bench, micro), 45) for micro in MICRO]


def _peaks(bench: Bench, micro: int) -> dict[str, Any]:
    from bench.step.variants import Smbfast
    from smbfast import objective
    from smbfast.base.runtime import held_memory, reset_peak_memory
    from smbfast.model.memory import free_memory, predict_peak
    from smbfast.model.target import TargetForm

    load = replace(workload("W1", bench.device), micro=micro)
    load = replace(load, lengths=load.lengths[: 2 * micro])  # two micro-batches: gradients add up
    where = torch.device(bench.device)
    before = held_memory(where)
    encoder = load.size.encoder(bench.device)
    heaviest = max(load.batches(), key=lambda b: b.segments.tokens)
    run = partial(objective.losses, normalize=True, recompute="none", sft_scale=1.0, jepa_scale=1.0)
    free = free_memory(where)
    predicted = predict_peak(encoder, heaviest, run, target=TargetForm("auto"))
    figures: dict[str, Any] = {"tokens": heaviest.segments.tokens, "free": free}
    figures |= {"predicted": predicted.total, "predicted_parts": vars(predicted)}
    variant = Smbfast(encoder)
    variant.take(load)
    variant.step()  # with moments, and with what is allocated once
    figures["resettable"] = reset_peak_memory(where)
    variant.step()
    bench.wait()
    figures["measured"] = held_memory(where, peak=True) - before
    if bench.device == "cuda":
        figures["reserved"] = torch.cuda.max_memory_reserved()
    figures["measured_over_predicted"] = figures["measured"] / predicted.total
    return figures
