"""Names of devices, refused before torch is imported."""

import re

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def known_device(name: str) -> str:
    """Return the name of a device that this package computes on.

    Raises:
        ValueError: it is another; the message does not hold the name.
    """
    if _NAME.fullmatch(name):
        return name
    hint = ""
    if name.partition(":")[0] == "mps":
        hint = "; Apple's GPUs (mps) are not supported, so use cpu there"
    raise ValueError(f"must be auto, cpu or cuda[:n]{hint}")
