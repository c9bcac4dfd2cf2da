"""Checkpoints to resume a run from, and the final folder that PEFT and transformers load.

Everything is safetensors or JSON, and nothing is ever unpickled. A checkpoint is a committed folder
`step-000123/`. A damaged one is skipped with a message, and the next older one is used. The step is
the loader's only state, and draws are seeded by identity, so a checkpoint holds no random state.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smbfast.base.files import committed_folder, verify_folder
from smbfast.model.backbone import PatientEncoder, load_adapter, load_lm, merged
from smbfast.model.decoder import HfModule
from smbfast.model.target import TargetEncoder
from smbfast.model.vocabulary import grow
from smbfast.run.optim import trained
from smbfast.settings.data import VOCABULARY


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified: its folder and the content of its `record.json`."""

    folder: Path
    record: dict


def save(
    run: Path,
    step: int,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    optimizer: torch.optim.Optimizer,
    record: dict,
    keep: int,
) -> Path:
    """Write `checkpoints/step-NNNNNN` and delete all but the newest `keep` checkpoints.

    Args:
        step: the number of steps done.
        record: written to `record.json`, with the step and the optimizer's counts.
        keep: at least 1.

    Raises:
        ValueError: if a tensor is not finite. Then nothing is written and older checkpoints stay.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    tensors = {f"model.{n}": p.detach() for n, p in trained(encoder).items()}
    moments, steps = _optimizer_state(encoder, optimizer)
    tensors |= moments
    if target is not None:
        tensors |= {f"target.{n}": w for n, w in target.state().items()}
    _refuse_non_finite(tensors)
    content = {
        **record,
        "step": step,
        "optimizer_steps": steps,
        "target_updates": target.updates if target else None,
    }
    with committed_folder(folder, replace=True) as staging:
        save_file(_contiguous(tensors), staging / "state.safetensors")
        (staging / "record.json").write_text(json.dumps(content, indent=1))
    for old in [f for f in _folders(run) if f != folder][: -keep + 1 or None]:
        _remove(old)
    return folder


def latest(run: Path, *, set_aside: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None.

    A damaged one is named on stderr. With `set_aside` it is also renamed to `damaged-step-...`, so
    that it does not count among the checkpoints to keep.
    """
    for folder in reversed(_folders(run)):
        try:
            verify_folder(folder)
            return Checkpoint(folder, json.loads((folder / "record.json").read_text()))
        except ValueError as error:
            print(f"smbfast: skipping a damaged checkpoint: {error}", file=sys.stderr)
            if set_aside:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
    return None


def load(
    checkpoint: Checkpoint, encoder: PatientEncoder, optimizer: torch.optim.Optimizer
) -> TargetEncoder | None:
    """Restore encoder and optimizer in place; return the target encoder if one was saved.

    Raises:
        ValueError: if names or shapes are not those of this model.
    """
    tensors = load_file(checkpoint.folder / "state.safetensors")
    restore(encoder, _part(tensors, "model."), checkpoint.folder)
    parameters = trained(encoder)
    for name, parameter in parameters.items():
        steps = checkpoint.record["optimizer_steps"].get(name)
        if steps is not None:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    averages = _part(tensors, "target.")
    if not averages:
        return None
    target = TargetEncoder.of_state(encoder, averages)
    target.updates = checkpoint.record["target_updates"]
    return target


def restore(encoder: PatientEncoder, state: dict[str, Tensor], source: Path) -> None:
    """Copy saved trained parameters into the encoder.

    Args:
        source: the folder that messages name.

    Raises:
        ValueError: if names or shapes are not those of this model.
    """
    parameters = trained(encoder)
    if set(parameters) != set(state):
        raise ValueError(
            f"{source} must hold the {len(parameters)} trained tensors of this model; it holds "
            f"{len(set(state) & set(parameters))} of them and {len(set(state) - set(parameters))} "
            "others, so it is of another model"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"{source}: {name} must be {list(parameter.shape)}, got {list(state[name].shape)}; "
                "the checkpoint is of another model"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def save_final(
    folder: Path,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    tokenizer: PreTrainedTokenizerBase,
    record: dict,
    vocabulary: Path | None = None,
) -> None:
    """Write a folder that `AutoTokenizer` and PEFT load (transformers, if all weights are trained).

    Beside the adapter or model it holds `predictor.safetensors` (predictor and mask vector),
    `smbfast.json` (`record`) and `target.safetensors`: the averages by their names in the decoder.
    In merged form, `<name>` is the averaged weight; where it is bf16, `<name>.remainder` restores
    fp32 (`smbkernels.ema.join`). In tracked form, the averaged weight of a linear is the base
    weight plus lora_alpha / r `<linear>.u` `<linear>.v`. `token_rows` holds the average of the
    trained rows of the embedding.

    Args:
        vocabulary: the file of the vocabulary of codes, which is copied beside the tokenizer.

    Raises:
        ValueError: if a trained tensor is not finite. Then nothing is written.
    """
    _refuse_non_finite({f"model.{n}": p for n, p in trained(encoder).items()})
    with committed_folder(folder, replace=True) as staging:
        # by itself PEFT would save whole tables that have grown; the rows that it trains are all
        options = {} if encoder.trained_rows() is None else {"save_embedding_layers": False}
        lm: HfModule = encoder.lm
        lm.save_pretrained(str(staging), **options)
        tokenizer.save_pretrained(staging)
        if vocabulary is not None:
            shutil.copy(vocabulary, staging / vocabulary.name)
        extra = {f"predictor.{n}": p for n, p in encoder.predictor.state_dict().items()}
        extra["mask_vector"] = encoder.mask_vector.detach()
        save_file(_contiguous(extra), staging / "predictor.safetensors")
        if target is not None:
            save_file(_contiguous(target.state()), staging / "target.safetensors")
        (staging / "smbfast.json").write_text(json.dumps(record, indent=1))


def _refuse_non_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} must be finite to be saved; it is not, so nothing was written"
            )


def _optimizer_state(
    encoder: PatientEncoder, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors, steps = {}, {}
    for name, parameter in trained(encoder).items():
        state = optimizer.state.get(parameter)
        if state:
            tensors[f"exp_avg.{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
            steps[name] = int(state["step"])
    return tensors, steps


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}


def _folders(run: Path) -> list[Path]:
    return sorted(f for f in (run / "checkpoints").glob("step-??????") if f.is_dir())


def _remove(folder: Path) -> None:
    """Rename before deleting, so that a crash never leaves a checkpoint with half its files."""
    trash = folder.with_name(folder.name + ".trash")
    folder.rename(trash)
    shutil.rmtree(trash)


def restore_final(
    folder: Path, device: torch.device
) -> tuple[PatientEncoder, TargetEncoder | None, dict]:
    """Load the encoder of a final folder, its target encoder or None, and its record.

    Raises:
        ValueError: if it is no final folder, is damaged, or its backbone cannot be found.
    """
    folder = Path(folder)
    if not (folder / "smbfast.json").is_file():
        raise ValueError(f"{folder} must be the `final` folder of a run; it has no smbfast.json")
    manifest = verify_folder(folder)
    record = json.loads((folder / "smbfast.json").read_text())
    is_lora, dtype = record["trains"] == "lora", getattr(torch, record["dtype"])
    base = load_lm(record["backbone"] if is_lora else str(folder), dtype)
    lm: PreTrainedModel | PeftModel = base
    if is_lora:
        grow(base, record["vocabulary"])
        lm = load_adapter(base, str(folder), trainable=True)
    computes = getattr(torch, record.get("compute", record["dtype"]))  # older records lack it
    narrow = None if computes == dtype else computes
    encoder = PatientEncoder(lm, record["predictor_layers"], narrow).to(device)
    extra = load_file(folder / "predictor.safetensors")
    encoder.predictor.load_state_dict(_part(extra, "predictor."))
    with torch.no_grad():
        encoder.mask_vector.copy_(extra["mask_vector"])
    if "target.safetensors" not in manifest["files"]:
        return encoder, None, record
    target = TargetEncoder.of_state(encoder, load_file(folder / "target.safetensors"))
    return encoder, target, record


@torch.no_grad()
def export_merged(final: Path, folder: Path, device: torch.device) -> str:
    """Write a final folder as a plain Hugging Face model; return a line about its logits."""
    encoder, _, _ = restore_final(final, device)
    tokenizer = AutoTokenizer.from_pretrained(final, local_files_only=True)
    ids = torch.arange(64, device=device)[None] % len(tokenizer)
    logits = encoder.lm(input_ids=ids).logits.float()
    lm = merged(encoder)
    with committed_folder(folder, replace=True) as staging:
        lm.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if (final / VOCABULARY).is_file():
            shutil.copy(final / VOCABULARY, staging / VOCABULARY)
    plain: HfModule = load_lm(str(folder), lm.dtype)
    plain = plain.to(device)
    gap = (plain(input_ids=ids).logits.float() - logits).abs().max().item()
    return f"exported {folder}: largest difference of a logit to the trained model {gap:.1e}"
