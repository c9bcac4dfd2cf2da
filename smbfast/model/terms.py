"""What the two paths, `smbfast.objective` and `smbfast.reference`, return."""

from typing import NamedTuple

from torch import Tensor

from smbfast.model.target import HorizonStates, JepaStates


class Terms(NamedTuple):
    """The scaled losses of a batch, scalars; None where one has no weight or nothing to predict."""

    sft: Tensor | None = None
    jepa: Tensor | None = None
    codes: Tensor | None = None


class Measured(NamedTuple):
    """Summed losses of a batch, scalars, and the states that JEPA compares if there is a target."""

    sft: Tensor
    codes: Tensor | None = None
    masked: JepaStates | None = None
    latent: HorizonStates | None = None
