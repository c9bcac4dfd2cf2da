"""A frozen backbone that is shared out over the ranks of torchrun, layer by layer (FSDP2).

Each rank holds 1 / ranks of the weights of every layer and gathers those of one layer while it
runs, the next one's meanwhile. Embeddings, head and final norm, which are used by their weights
and not by a call, are whole on every rank, as is all that is trained: adapters, token rows,
predictor and mask vector. So gradients, checkpoints and the target's factors are plain tensors.

Loading never puts a whole model anywhere: rank 0 reads the safetensors tensor by tensor, and each
rank receives its part.
"""

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from smbfast.model.decoder import HfModule, PackedDecoder, run_layer, run_layers


def shard_(decoder: HfModule, mesh: DeviceMesh) -> None:
    """Share out the weights of a decoder's layers; what else it holds stays as it is.

    The decoder is the root, so that a layer's weights are gathered while the one before it runs.
    """
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for module, run in [(decoder, run_layers), *((layer, run_layer) for layer in decoder.layers)]:
        setattr(module, run.__name__, MethodType(run, module))
        register_fsdp_forward_method(module, run.__name__)


def is_sharded(decoder: nn.Module) -> bool:
    """Whether `shard_` has shared it out."""
    return isinstance(decoder, FSDPModule)


def gathered(weight: Tensor) -> Tensor:
    """Return a weight whole; all ranks must ask for it if it is shared out."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
