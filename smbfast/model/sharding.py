"""A frozen backbone that is shared out over the ranks of torchrun, layer by layer (FSDP2).

Each rank holds 1 / ranks of the weights of every layer and gathers those of one layer while it
runs, the next one's meanwhile. Embeddings, head and final norm, which are used by their weights
and not by a call, are whole on every rank, and so is all that is trained: adapters, token rows,
predictor and mask vector. So gradients, checkpoints and the target's factors are plain tensors.

A whole model is nowhere at any time: rank 0 reads the safetensors tensor by tensor, and of each
the ranks receive their part. A weight is gathered by all ranks at once, so that all must run the
same forwards and backwards, in the same order (`smbfast.objective`).
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from smbfast.base.digests import weight_files
from smbfast.model.decoder import HfModule, PackedDecoder, run_layer, run_layers

GATHERED = 3  # layers that are whole at a time: the one that runs, the next, and its message


def load_shared_out(lm: PreTrainedModel, path: str, device: torch.device) -> PreTrainedModel:
    """Give a causal LM on the meta device its weights, those of the layers shared out over ranks.

    Args:
        path: a folder, or a hub name, of which rank 0 reads the safetensors.
        device: of this rank.

    Raises:
        ValueError: if torchrun did not start this process, the packed decoder does not support the
            layers, they are quantised, or weights are missing.
    """
    if not dist.is_initialized():
        raise ValueError(
            "model.fsdp shares a backbone out over the processes of torchrun, got one process: "
            "start it as torchrun --nproc-per-node=2 -m smbfast.train ..., or leave model.fsdp out"
        )
    if getattr(lm.config, "quantization_config", None):
        raise ValueError(
            "model.fsdp shares out weights in float32 or bfloat16, got a quantised backbone; name "
            "one that is not quantised, or leave model.fsdp out"
        )
    if tuple(int(n) for n in version("peft").split(".")[:2]) < (0, 21):
        raise ValueError(
            f"model.fsdp needs PEFT 0.21 or newer, which sees whole shapes of shared weights, got "
            f"{version('peft')}; pip install -U peft"
        )
    decoder: HfModule = lm.base_model
    try:
        PackedDecoder(decoder)
    except ValueError as error:
        raise ValueError(f"without model.fsdp, this backbone may do: {error}") from None
    shapes = {name: parameter.shape for name, parameter in lm.named_parameters()}
    source = _Source(path, shapes, lm.base_model_prefix)
    decoder.rotary_emb = type(decoder.rotary_emb)(config=lm.config)  # it has no weights to read
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    in_layers = {id(p) for p in decoder.layers.parameters()}
    with torch.no_grad():
        for name, parameter in [*lm.named_parameters()]:
            if id(parameter) not in in_layers:
                whole = source.read(name, parameter, device)
                dist.broadcast(whole, 0)
                _replace(lm, parameter, nn.Parameter(whole))
        share_out(decoder, mesh)
        decoder.layers.to_empty(device=device)
        for name, parameter in lm.named_parameters():
            if isinstance(parameter, DTensor):
                whole = source.read(name, parameter, device)
                parameter.copy_(distribute_tensor(whole, mesh, parameter.placements))
    return lm.eval()


def share_out(decoder: HfModule, mesh: DeviceMesh) -> None:
    """Share out the weights of a decoder's layers; what else it holds stays as it is.

    The decoder is the root, so that the next layer is gathered while one runs. transformers calls
    decoder and layers, and our packed decoder their methods of the functions that it runs.
    """
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    runs: list[tuple[nn.Module, Callable]] = [(decoder, run_layers)]
    for module, run in [*runs, *((layer, run_layer) for layer in decoder.layers)]:
        setattr(module, run.__name__, MethodType(run, module))
        register_fsdp_forward_method(module, run.__name__)


def is_shared_out(decoder: nn.Module) -> bool:
    """Whether the layers of a decoder are shared out over ranks."""
    return isinstance(decoder, FSDPModule)


def gathered(weight: Tensor) -> Tensor:
    """Return a weight whole; if it is shared out, all ranks must ask for it at once."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights that this rank holds."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)


def gathered_bytes(decoder: HfModule) -> int:
    """Return the bytes of layers that are gathered at a time, at most; 0 if none is shared out."""
    layers = decoder.layers if is_shared_out(decoder) else []
    sizes = [
        sum(p.nbytes for p in layer.parameters() if isinstance(p, DTensor)) for layer in layers
    ]
    return GATHERED * max(sizes, default=0)


class _Source:
    """Tensors of a backbone's files, which rank 0 alone opens, one at a time."""

    def __init__(self, path: str, shapes: dict[str, torch.Size], prefix: str) -> None:
        """Look up all tensors by their headers, so that what is wrong is said before any is sent.

        Args:
            shapes: of the tensors that will be read.
            prefix: of the decoder's names, which files of a bare decoder lack.
        """
        self.is_main = dist.get_rank() == 0
        self._place: dict[str, tuple[Path, str]] = {}
        problem: list[str | None] = [None]
        if self.is_main:
            problem = [self._look_up(path, shapes, prefix)]
        dist.broadcast_object_list(problem, 0)
        if problem[0] is not None:
            raise ValueError(problem[0])

    def _look_up(self, path: str, shapes: dict[str, torch.Size], prefix: str) -> str | None:
        """Return what is wrong, or None."""
        there: dict[str, tuple[Path, str, list[int]]] = {}
        try:
            for file in weight_files(_folder(path)):
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt") as tensors:
                        for name in tensors.keys():  # noqa: SIM118
                            shape = tensors.get_slice(name).get_shape()
                            there[name] = there[f"{prefix}.{name}"] = file, name, shape
        except (OSError, ValueError, SafetensorError) as error:
            return f"`model.path` {path} must hold weights as safetensors; {error}"
        for name, shape in shapes.items():
            file, own, size = there.get(name, (Path(), "", None))
            if size != list(shape):
                what = "none" if size is None else f"one of {size}"
                return f"`model.path` {path} must hold a tensor {name} of {list(shape)}, got {what}"
            self._place[name] = file, own
        return None

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """Return a tensor whole; on other ranks than 0 room for it, with nothing in it."""
        if not self.is_main:
            return torch.empty(like.shape, dtype=like.dtype, device=device)
        file, own = self._place[name]
        with safe_open(file, "pt") as tensors:  # opened for each: pages that were read are let go
            return tensors.get_tensor(own).to(device, like.dtype)


def _folder(path: str) -> Path:
    """Return the folder of a model, which of a hub name is on this machine then."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def _replace(lm: PreTrainedModel, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter in every place of another; table and head may be one."""
    for module in lm.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new
