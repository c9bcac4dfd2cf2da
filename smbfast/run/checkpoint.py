"""Checkpoints to resume a run from, and the final folder that PEFT and transformers load.

Everything is safetensors or JSON, and nothing is ever unpickled. A checkpoint is a committed folder
`step-000123/`. A damaged one is skipped with a message, and the next older one is used; one of
another format is refused. Which run it is of is the matter of `smbfast.run.identity`. The step is
the loader's only state, and draws are seeded by identity, so a checkpoint holds no random state.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smbfast.base.digests import CACHE, check_weights, local_model
from smbfast.base.files import (
    MANIFEST,
    ForeignFormat,
    committed_folder,
    link,
    read_json,
    remove_folder,
    require_files,
    standing,
    verify_folder,
    write_text,
)
from smbfast.base.hub_names import is_repository, model_inside
from smbfast.base.replace import foreign, sha256
from smbfast.model.backbone import PatientEncoder, load_adapter, load_lm, merged, require_layers
from smbfast.model.codes_head import CodesHead
from smbfast.model.decoder import HfModule
from smbfast.model.target import TargetEncoder
from smbfast.model.vocabulary import grow
from smbfast.run.background import Buffer
from smbfast.run.model_card import CARD, merged_card
from smbfast.run.model_record import FORMAT, check_record
from smbfast.run.optim import trained
from smbfast.settings.data import VOCABULARY

_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})$")
# what transformers, PEFT or this file would read of a final folder if it were there
_READ = re.compile(
    r".*\.safetensors(\.index\.json)?|((generation|adapter|tokenizer)_)?config\.json|codes\.json|"
    r"tokenizer\.(json|model)|(special_tokens_map|added_tokens|vocab)\.json|chat_template\..*"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified: its folder and the content of its `record.json`."""

    folder: Path
    record: dict

    @property
    def step(self) -> int:
        """The number of steps done."""
        return self.record["step"]


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
    buffer = Buffer(0, encoder.mask_vector.device)
    snapshot = taken(step, encoder, target, optimizer, record, buffer)
    try:
        return write(run, snapshot, keep)
    finally:
        buffer.close()


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment: a copy of its tensors, and its record as JSON."""

    step: int
    record: str
    tensors: Buffer


def taken(
    step: int,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    optimizer: torch.optim.Optimizer,
    record: dict,
    buffer: Buffer,
) -> Snapshot:
    """Copy what a checkpoint holds, each tensor once; for the arguments see `save`.

    Args:
        buffer: that is copied into; what it held is gone.
    """
    tensors = {f"model.{n}": p.detach() for n, p in trained(encoder).items()}
    moments, steps = _optimizer_state(encoder, optimizer)
    tensors |= moments
    if target is not None:
        tensors |= {f"target.{n}": w for n, w in target.state().items()}
    content = {
        **record,
        "step": step,
        "optimizer_steps": steps,
        "target_updates": target.updates if target else None,
    }
    buffer.copy(tensors)
    return Snapshot(step, json.dumps(content, indent=1), buffer)


def write(run: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a snapshot as `save` does, which has the arguments and what is raised."""
    folder = run / "checkpoints" / _name(snapshot.step)
    snapshot.tensors.require_finite()
    with committed_folder(folder, replace=True) as staging:
        snapshot.tensors.write(staging / "state.safetensors")
        (staging / "record.json").write_text(snapshot.record)
    rotate(run, folder, keep)
    return folder


def rotate(run: Path, newest: Path, keep: int) -> None:
    """Delete all checkpoints but `newest` and the newest `keep - 1` beside it."""
    for old in [f for f in folders(run) if f != newest][: -keep + 1 or None]:
        remove_folder(old)


def latest(run: Path) -> tuple[Checkpoint | None, list[Path]]:
    """Return the newest checkpoint that is intact, or None, and the damaged ones that are newer.

    A damaged one is named on stderr; see `set_aside`.

    Raises:
        ForeignFormat: if the newest that is not damaged has the format of another version.
    """
    damaged: list[Path] = []
    for folder in reversed(folders(run)):
        try:
            return _verified(folder), damaged
        except ForeignFormat:
            raise
        except ValueError as error:
            print(f"smbfast: skipping a damaged checkpoint: {error}", file=sys.stderr)
            damaged.append(folder)
    return None, damaged


def _verified(folder: Path) -> Checkpoint:
    """Read a checkpoint's record once all its bytes are those that were written."""
    require_files(verify_folder(folder), folder, ("state.safetensors", "record.json"))
    record = read_json(folder / "record.json")
    identity = record.get("identity")
    version = identity.get("format_version") if isinstance(identity, dict) else FORMAT
    if version != FORMAT:
        raise ForeignFormat(
            f"{folder} has format {version}, and this version reads {FORMAT} alone; go on with the "
            "version that wrote it"
        )
    step, updates = record.get("step"), record.get("target_updates")
    whole = isinstance(step, int) and isinstance(record.get("metrics_offset", 0), int)
    counts = record.get("optimizer_steps")
    whole &= isinstance(counts, dict) and all(isinstance(n, int) for n in counts.values())
    if not whole or not isinstance(updates, int | None) or "target_updates" not in record:
        raise ValueError(f"{folder / 'record.json'} must be the record of a checkpoint; it is not")
    if folder.name != _name(record["step"]):
        raise ValueError(f"{folder} must be of the step that it is named by, got {step}")
    return Checkpoint(folder, record)


def set_aside(damaged: list[Path]) -> None:
    """Rename damaged checkpoints, so that they do not count among those that stay."""
    for folder in damaged:
        folder.rename(_free(folder.with_name(f"damaged-{folder.name}")))


def leave_behind(run: Path) -> None:
    """Rename all checkpoints, also damaged ones, so that the run begins again at step 0."""
    for folder in [*folders(run), *were_damaged(run)]:
        name = folder.name.removeprefix("damaged-")
        folder.rename(_free(folder.with_name(f"unused-{name}")))


def were_damaged(run: Path) -> list[Path]:
    """Return the checkpoints that `set_aside` has renamed."""
    return sorted((run / "checkpoints").glob("damaged-step-*"))


def _free(folder: Path) -> Path:
    """Return the path, with a number behind it if it exists already."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def load(
    checkpoint: Checkpoint, encoder: PatientEncoder, optimizer: torch.optim.Optimizer
) -> TargetEncoder | None:
    """Restore encoder and optimizer in place; return the target encoder if one was saved.

    Raises:
        ValueError: if names or shapes are not those of this model.
    """
    tensors, record = _tensors(checkpoint.folder / "state.safetensors"), checkpoint.record
    restore(encoder, _part(tensors, "model."), checkpoint.folder)
    averages = _part(tensors, "target.")
    _require_state(checkpoint, tensors, averages)
    parameters = trained(encoder)
    for name, parameter in parameters.items():
        steps = record["optimizer_steps"].get(name)
        if steps is not None:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    if not averages:
        return None
    target = TargetEncoder.of_state(encoder, averages)
    target.updates = record["target_updates"]
    return target


def _require_state(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], averages: dict[str, Tensor]
) -> None:
    """Raise a ValueError unless the tensors are those that the record says were saved."""
    steps, updates = checkpoint.record["optimizer_steps"], checkpoint.record["target_updates"]
    moments = {f"{kind}.{name}" for name in steps for kind in ("exp_avg", "exp_avg_sq")}
    saved = {name for name in tensors if name.startswith(("exp_avg.", "exp_avg_sq."))}
    if moments != saved or (updates is None) != (not averages):
        raise ValueError(
            f"{checkpoint.folder} must hold the optimizer's moments and the target encoder that "
            "its record.json says were saved; it does not. Move it away to go on from an older one"
        )


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
    card: str | None = None,
) -> None:
    """Write a folder that `AutoTokenizer` and PEFT load (transformers, if all weights are trained).

    Beside the adapter or model it holds `predictor.safetensors` (predictor, mask vector, and the
    head of codes to come where the run has one),
    `smbfast.json` (`record`) and `target.safetensors`: the averages by their names in the decoder.
    In merged form, `<name>` is the averaged weight; where it is bf16, `<name>.remainder` restores
    fp32 (`smbkernels.ema.join`). In tracked form, the averaged weight of a linear is the base
    weight plus lora_alpha / r `<linear>.u` `<linear>.v`. `token_rows` holds the average of the
    trained rows of the embedding.

    Args:
        vocabulary: the file of the vocabulary of codes, which is copied beside the tokenizer.
        card: the text of README.md.

    Raises:
        ValueError: if a trained tensor is not finite. Then nothing is written.
    """
    _refuse_non_finite({f"model.{n}": p for n, p in trained(encoder).items()})
    with committed_folder(folder, replace=True) as staging:
        # by itself PEFT would save whole tables that have grown; the rows that it trains are all
        options = {} if encoder.trained_rows() is None else {"save_embedding_layers": False}
        lm: HfModule = encoder.lm
        if encoder.is_lora:  # PEFT would write a relative path, which holds in one folder only
            lm.peft_config["default"].base_model_name_or_path = record["backbone"]
            lm.peft_config["default"].revision = record.get("backbone_revision")
        lm.save_pretrained(str(staging), **options)
        if encoder.is_lora:
            _in_order(staging / "adapter_config.json")
        tokenizer.save_pretrained(staging)
        if vocabulary is not None:
            shutil.copy(vocabulary, staging / vocabulary.name)
        extra = {f"predictor.{n}": p for n, p in encoder.predictor.state_dict().items()}
        extra["mask_vector"] = encoder.mask_vector.detach()
        if encoder.codes is not None:
            extra |= {f"codes.{n}": p for n, p in encoder.codes.state_dict().items()}
        save_file(_contiguous(extra), staging / "predictor.safetensors")
        if target is not None:
            save_file(_contiguous(target.state()), staging / "target.safetensors")
        (staging / "smbfast.json").write_text(json.dumps(record, indent=1))
        if card is not None:  # in place of PEFT's empty one
            (staging / CARD).write_text(card, encoding="utf-8")


def _in_order(file: Path) -> None:
    """Sort the names of the linears with an adapter, a set whose order is that of a process."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def amend_final(folder: Path, changes: dict, card: Callable[[dict], str]) -> None:
    """Write the record of a final folder anew with other values, and its card.

    The other files are linked into the new folder, so that a large model is not written twice, and
    at any moment there is the old or the new folder, whole.

    Args:
        changes: keys of `smbfast.json` with their new values.
        card: from the record to the text of README.md.

    Raises:
        ValueError: see `verified_final`.
    """
    record = verified_final(folder) | changes
    names = read_json(folder / MANIFEST)["files"].keys() - {"smbfast.json"}
    with committed_folder(folder, replace=True) as staging:
        for name in sorted(names):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            link(folder / name, staging / name)
        (staging / "smbfast.json").write_text(json.dumps(record, indent=1))
        (staging / CARD).write_text(card(record), encoding="utf-8")


def write_card(folder: Path, card: str) -> None:
    """Write the card of a model anew, unless somebody has edited it.

    The manifest, which names cards as notes, follows; weights are neither read nor written.
    """
    if CARD in foreign(folder):
        return
    manifest = read_json(folder / MANIFEST)
    write_text(folder / CARD, card)
    entry = ((folder / CARD).stat().st_size, sha256(folder / CARD))
    manifest["notes"] = {**manifest.get("notes", {}), CARD: entry}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


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


def folders(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in the order of their steps."""
    names = (run / "checkpoints").glob("step-*")
    return sorted((f for f in names if _NAME.match(f.name) and f.is_dir()), key=_step_of)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def verified_final(folder: Path) -> dict:
    """Return the record of a final folder, `smbfast.json`, whose files are all as written.

    Raises:
        ValueError: if it is no final folder, a file is damaged or missing, a file that would be
            read is not in the manifest, or the record is not one that this version can use.
    """
    folder = Path(folder)
    if not (folder / "smbfast.json").is_file():
        raise ValueError(
            f"{folder} must be the `final` folder of a run; it has no smbfast.json"
            f"{model_inside(folder)}"
        )
    manifest = verify_folder(folder)
    require_files(manifest, folder, ("smbfast.json", "predictor.safetensors"))
    record = check_record(folder / "smbfast.json")
    is_lora = record["trains"] == "lora"
    needed = ("adapter_config.json", "adapter_model.safetensors") if is_lora else ("config.json",)
    require_files(manifest, folder, needed)
    for file in sorted(folder.iterdir()):
        known = file.name in manifest["files"] or file.name == MANIFEST
        if _READ.fullmatch(file.name) and not known:
            raise ValueError(f"{file} must be named by {MANIFEST}, as it would be read; it is not")
    return record


def restore_final(
    folder: Path, device: torch.device, path: str | None = None
) -> tuple[PatientEncoder, TargetEncoder | None, dict]:
    """Load the encoder of a final folder, its target encoder or None, and its record.

    Args:
        path: of a LoRA adapter, where its backbone is now; None for where it was in training.

    Raises:
        ValueError: if it is no final folder, is damaged, its record and its tensors do not fit
            each other, or its backbone cannot be read or is not the one it was trained on.
    """
    folder = standing(Path(folder))
    record = verified_final(folder)
    extra = _tensors(folder / "predictor.safetensors")
    _require_sizes(folder, record, extra)
    is_lora, dtype = record["trains"] == "lora", getattr(torch, record["dtype"])
    if path is not None and not is_lora:
        raise ValueError(f"{folder} holds all weights of its model: leave out --model.path={path}")
    base = load_lm(_backbone(record, folder, path) if is_lora else str(folder), dtype)
    table: HfModule = base.get_input_embeddings()  # the configuration may have other widths
    width, layers = table.weight.shape[-1], record["predictor_layers"]
    lm: PreTrainedModel | PeftModel = base
    if is_lora:
        grow(base, record["vocabulary"])
        lm = load_adapter(base, str(folder), trainable=True)
    computes = getattr(torch, record.get("compute") or record["dtype"])  # older records lack it
    narrow = None if computes == dtype else computes
    try:
        codes, horizons = _part(extra, "codes."), _num_horizons(_part(extra, "predictor."), width)
        head = CodesHead.of_state(codes, width) if codes else None
        encoder = PatientEncoder(lm, layers, narrow, num_horizons=horizons, codes=head).to(device)
        encoder.predictor.load_state_dict(_part(extra, "predictor."))
        with torch.no_grad():
            encoder.mask_vector.copy_(extra["mask_vector"])
    except (KeyError, RuntimeError):
        raise ValueError(
            f"{folder / 'predictor.safetensors'} must hold the predictor and the mask vector of "
            "this model; it does not"
        ) from None
    if not (folder / "target.safetensors").is_file():
        return encoder, None, record
    try:
        target = TargetEncoder.of_state(encoder, _tensors(folder / "target.safetensors"))
    except (KeyError, RuntimeError, IndexError):
        raise ValueError(
            f"{folder / 'target.safetensors'} must hold the averages of this model; it does not"
        ) from None
    return encoder, target, record


def _num_horizons(predictor: dict[str, Tensor], width: int) -> int:
    """Return the number of horizons of a predictor; 0 without horizon JEPA.

    Raises:
        RuntimeError: a tensor is of another width, so that more would be made of it than it holds.
    """
    embedding = predictor.get("horizon_HD", torch.empty(0, width))
    weights = [tensor for name, tensor in predictor.items() if name.endswith(".weight")]
    if embedding.shape[1:] != (width,) or any(w.shape != (width, width) for w in weights):
        raise RuntimeError(f"a tensor of the predictor is not of width {width}")
    return len(embedding)


def _backbone(record: dict, folder: Path, moved: str | None) -> str:
    """Return the folder of the backbone of an adapter, which has the weights it was trained on.

    Args:
        moved: where the backbone is now, if not where it was.
    """
    named = moved or record["backbone"]
    revision = None if moved else record.get("backbone_revision")
    path = (local_model(named, revision) if revision else None) or local_model(named)
    if path is None and moved:
        raise ValueError(
            f"the backbone of {folder} must be a folder of this machine, or a model of the Hub's "
            f"cache; {moved} is neither"
        )
    if path is None:
        how = "if it moved, name its folder now: --model.path=FOLDER"
        if is_repository(named):
            more = f" --revision {revision}" if revision else ""
            how = f"`hf download {named}{more}` fetches it, or {how}"
        raise ValueError(
            f"{folder} holds an adapter of the backbone {named}, which is not on this machine; "
            + how
        )
    cache = folder.parent / CACHE  # of the run, where it is still there
    if warning := check_weights(record, path, cache if cache.is_file() else None):
        print(f"smbfast: {warning}", file=sys.stderr)
    return str(path)


def _require_sizes(folder: Path, record: dict, extra: dict[str, Tensor]) -> None:
    """Raise a ValueError if the record asks for other sizes than the tokenizer and tensors have.

    So nothing is made of a size that only a record claims.
    """
    layers = sum(name.endswith(".weight") for name in _part(extra, "predictor."))
    if record["trains"] == "all":
        require_layers(folder)  # before the tokenizer, which reads the configuration too
    try:
        ids = len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception:  # transformers and tokenizers raise many types, also plain ones
        raise ValueError(f"{folder} must hold a tokenizer that transformers loads") from None
    for key, size in (("predictor_layers", layers), ("vocabulary", ids)):
        if record[key] != size:
            raise ValueError(
                f"{folder / 'smbfast.json'}: {key} must be {size}, as the files beside it have it, "
                f"got {record[key]}"
            )


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read a file of tensors; a ValueError if it is not safetensors."""
    try:
        return load_file(file)
    except SafetensorError:
        raise ValueError(f"{file} must be a safetensors file; it is not") from None


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
        if (final / CARD).is_file():
            card = (final / CARD).read_text(encoding="utf-8")
            (staging / CARD).write_text(merged_card(card, folder), encoding="utf-8")
    plain: HfModule = load_lm(str(folder), lm.dtype)
    plain = plain.to(device)
    gap = (plain(input_ids=ids).logits.float() - logits).abs().max().item()
    return f"exported {folder}: largest difference of a logit to the trained model {gap:.1e}"
