"""The operations and the names of their backends, for a caller that must not import torch."""

REFERENCE = "torch"
AUTO = "auto"
# each operation's backends in the order in which a call without a choice tries them
BACKENDS: dict[str, tuple[str, ...]] = {
    "add_rms_norm": ("triton", "cpp"),
    "ema_update_": ("triton", "cpp"),
    "linear": ("onednn", "onednn_rows"),
    "linear_cross_entropy": ("triton", "chunked"),
    "lora_linear": ("fused", "triton"),
    "masked_jepa_mse": ("triton", "cpp"),
    "qk_norm_rope": ("triton", "cpp"),
    "swiglu": ("triton", "cpp"),
    "timeline_attention": ("triton", "varlen", "flash", "cudnn", "cpp", "sdpa"),
}


def check_choice(everywhere: str | None, by_op: dict[str, str]) -> None:
    """Check a choice of backends as `use` takes it, by name alone.

    Whether a backend can run on this machine is only known when torch is there: see `Op.on`.

    Args:
        everywhere: a backend for all operations; None: none is forced.
        by_op: backends by operation; they go before `everywhere`.

    Raises:
        ValueError: no such operation, or one of those that are meant has no such backend.
    """
    for name in by_op:
        if name not in BACKENDS:
            names = ", ".join(sorted(BACKENDS))
            raise ValueError(f"operation must be one of {names}, got {name!r}")
    for name in BACKENDS if everywhere else by_op:
        backend = by_op.get(name, everywhere)
        if backend not in (None, AUTO):
            check_backend(name, BACKENDS[name], backend)


def check_backend(operation: str, backends: tuple[str, ...], wanted: str | None) -> None:
    """Raise a ValueError unless `wanted` is one of the backends, or the reference."""
    if wanted not in (*backends, REFERENCE):
        names = ", ".join([*backends, REFERENCE])
        raise ValueError(f"backend of {operation} must be one of {names}, got {wanted!r}")
