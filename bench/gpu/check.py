"""The shared step against the reference, on the GPU, as a run compares them before its first step.

First few layers at their true width; then as many as the model has, where rounding has grown. If
they differ, each operation in turn is put on its reference: which of them heals it is recorded.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from smbkernels.registry import OPS, use

from bench.gpu.child import Bench, Item
from bench.gpu.journal import WRONG
from bench.gpu.sizes import with_layers, workload


def items(bench: Bench) -> list[Item]:
    """A comparison for each depth."""
    return [
        Item(f"{layers} layers", partial(_compared, bench, layers), 60)
        for layers in bench.sizes.layers
    ]


def _compared(bench: Bench, layers: int) -> dict[str, Any]:
    size = with_layers(workload("W1", bench.device).size, layers)
    encoder, target = _models(size, bench.device)
    figures, reason = _differences(bench, encoder, target)
    if not reason or bench.rehearsal == "fake":  # where there are no values, none are compared
        return figures
    healed = {}
    if layers == bench.sizes.layers[0]:
        for op in OPS:
            gaps, still = _differences(bench, encoder, target, op)
            healed[op] = still or gaps
    return {"state": WRONG, "reason": reason, "with_reference_of": healed}


def _differences(
    bench: Bench, encoder: Any, target: Any, plain: str = ""
) -> tuple[dict[str, Any], str]:
    """Of losses and gradients; or why they are too large. `plain` runs on its reference."""
    from bench.step.workloads import window
    from smbfast.data.timelines import Preamble
    from smbfast.data.windows import WindowSet
    from smbfast.run.startup import self_check
    from smbfast.settings import PhaseSettings, load

    tokens, vocabulary = bench.sizes.checked, len(encoder.head_VD)
    settings = load("tiny", ["--optim.batch=2", f"--data.window={tokens}"])
    timelines = [window(i, tokens, vocabulary) for i in range(2)]
    windows = WindowSet.of([timelines], tokens, Preamble(), settings.objective)
    phase = PhaseSettings(name="both", steps=1, w_sft=1.0, w_jepa=1.0)
    try:
        with use(**{plain: "torch"}) if plain else nullcontext():
            gaps = self_check(encoder, target, windows, settings, 0, phase)
    except ValueError as error:
        encoder.zero_grad(set_to_none=True)
        return {}, str(error)[:400]
    return {"differences": gaps, "tokens": 2 * tokens}, ""


def _models(size: Any, device: str) -> tuple[Any, Any]:
    """An encoder, and a target that it has moved away from."""
    from smbfast.model.target import TargetEncoder, TargetForm

    encoder = size.encoder(device)
    target = TargetEncoder(encoder, TargetForm("auto"))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    target.update(0.5)
    return encoder, target
