"""What a run is: its id, its settings, and digests of all that its weights come from.

A run has an id from the moment it begins, in `run.json`. Every checkpoint records it beside the
settings and digests of data, token shards, encoder, backbone and adapter, and a run goes on only
from a checkpoint that agrees with what is there now. The folder of a model records the id and the
digests of data and backbone.
"""

import json
import secrets
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from smbfast.base.digests import CACHE, check_digest, short, weights_digest
from smbfast.base.files import digest_of, read_json, write_text
from smbfast.base.staging import clear_left
from smbfast.data.prepared import Prepared
from smbfast.run import checkpoint
from smbfast.run.checkpoint import Checkpoint
from smbfast.run.folder import changed_settings, compared_settings, run_id, status_of
from smbfast.run.model_record import FORMAT, RECORD
from smbfast.settings import TrainSettings

_PARTS = {  # of an identity, in the words of a message
    "data": "the MEDS data",
    "shards": "the token shards",
    "encoder": "the tokenizer or vocabulary of the shards",
    "backbone": "the weights of model.path",
    "adapter": "the weights of model.adapter",
}
_WAY_OUT = (
    "Put back what it was, name another --run.dir, or train from step 0 in this folder with "
    "--resume=restart"
)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with; digests are in hexadecimal digits."""

    run: str  # random, made when the run begins
    data: str  # of the MEDS files, as their token shards record it
    shards: str  # of the bytes of the token shards, and of what was fitted for them
    encoder: str  # of the tokenizer or vocabulary that knows the ids
    backbone: str | None  # of the weights of model.path; None without it
    adapter: str | None  # of the weights of model.adapter; None without it
    settings: dict[str, object]  # by dotted key; without those that may differ on a resume

    @classmethod
    def of(cls, settings: TrainSettings, prepared: Prepared) -> "Identity":
        """Return the identity of the run in the folder of `settings`; a new one has a new id.

        A backbone of the hub is left out: it is on this machine once it was loaded; see
        `with_backbone`.

        Raises:
            ValueError: if `run.json`, a backbone or an adapter cannot be read.
        """
        adapter = settings.model.adapter
        identity = cls(
            run=run_id(settings.folder) or secrets.token_hex(8),
            data=str(prepared.record["data"]),
            shards=shards_digest(prepared),
            encoder=str(prepared.record["encoder"]),
            backbone=None,
            adapter=weights_digest(adapter, settings.folder / CACHE) if adapter else None,
            settings=compared_settings(settings),
        )
        path = settings.model.path
        return identity.with_backbone(settings) if path and Path(path).is_dir() else identity

    def with_backbone(self, settings: TrainSettings) -> "Identity":
        """Return it with the digest of the backbone, whose files are on this machine now.

        Raises:
            ValueError: it cannot be read, or is not the one that `model.adapter` was trained on.
        """
        path = settings.model.path
        if not path:
            return self
        digest = weights_digest(path, settings.folder / CACHE)
        if (adapter := settings.model.adapter) and (Path(adapter) / RECORD).is_file():
            check_digest(read_json(Path(adapter) / RECORD), path, digest)
        return replace(self, backbone=digest)

    def record(self) -> dict:
        """Return what a checkpoint records."""
        values = asdict(self)
        settings = values.pop("settings")
        return {"identity": {"format_version": FORMAT, **values}, "settings": settings}

    def of_model(self) -> dict:
        """Return what `smbfast.json` of a model's folder records.

        `weights_digest` is that of the backbone, null for a model made from scratch.
        """
        return {
            "format_version": FORMAT,
            "run": self.run,
            "data_digest": self.data,
            "weights_digest": self.backbone,
        }

    def write(self, run: Path) -> None:
        """Write `run.json`, from which on the folder has this run's id."""
        write_text(run / "run.json", json.dumps({"format": FORMAT, "run": self.run}))

    def require(self, saved: Checkpoint) -> None:
        """Raise a ValueError that names all in which a checkpoint differs from this run."""
        then = saved.record.get("identity")
        if not isinstance(then, dict):
            raise ValueError(
                f"{saved.folder} must say which run, data and weights it is of; it was written by "
                "an earlier version, which did not record them and drew windows in another order"
            )
        differences = []
        if then.get("run") != self.run:
            differences.append(f"it is of run {then.get('run')}, and this folder of run {self.run}")
        for name, words in _PARTS.items():
            was, now = then.get(name), getattr(self, name)
            # a backbone of the hub is compared once it was loaded
            unread = name == "backbone" and now is None and self.settings.get("model.path")
            if was != now and not unread:
                differences.append(f"{words} had the digest {short(was)} and have {short(now)}")
        settings = saved.record.get("settings")
        recorded = settings if isinstance(settings, dict) else {}
        differences += changed_settings(recorded, self.settings)
        if differences:
            raise ValueError(
                f"{saved.folder} is of another run than this command's: {'; '.join(differences)}"
            )


def newest_checkpoint(
    settings: TrainSettings, prepared: Prepared, *, set_aside: bool
) -> tuple[Identity, Checkpoint | None]:
    """Return the run's identity, and the checkpoint that it goes on from or None at step 0.

    With `run.resume=restart`, checkpoints that cannot be gone on with are left behind: then it
    returns None, and the identity has a new id.

    Args:
        set_aside: whether to rename checkpoints that are damaged or left behind, and to remove what
            writes that were killed have left in the folder of the run, and more than `run.keep`.

    Raises:
        ValueError: if there are checkpoints and none is intact, if the newest intact one is not of
            this run, or if `config.toml` is missing. Then no checkpoint is renamed.
    """
    run, identity = settings.folder, Identity.of(settings, prepared)
    if set_aside:  # what kills have left, also beside what is not written again
        for name in ("", "checkpoints", "best", "prepared", "prepared/source", "prepared/windows"):
            clear_left(run / name)
    try:
        newest = _newest(run, identity, set_aside=set_aside)
    except ValueError as error:
        if settings.run.resume != "restart":
            raise ValueError(f"{error}. {_WAY_OUT}") from None
        print(f"smbfast: {error}; the run begins again at step 0", file=sys.stderr)
        if set_aside:
            checkpoint.leave_behind(run)
        return replace(identity, run=secrets.token_hex(8)), None
    if newest is not None and set_aside:  # a kill may have come before the oldest was removed
        checkpoint.rotate(run, newest.folder, settings.run.keep)
    return identity, newest


def _newest(run: Path, identity: Identity, *, set_aside: bool) -> Checkpoint | None:
    newest, damaged = checkpoint.latest(run)
    step = status_of(run).get("step")
    last = step if isinstance(step, int) else 0
    if newest is None:
        if damaged or checkpoint.were_damaged(run):
            raise ValueError(f"{run}/checkpoints must hold an intact checkpoint; all are damaged")
        if last:
            raise ValueError(
                f"{run} must hold a checkpoint, because its status.json says that step {last} was "
                "saved; there is none"
            )
        if (run / "config.toml").is_file():
            print(f"smbfast: {run} has no checkpoint yet; it begins at step 0", file=sys.stderr)
        return None
    for name in ("config.toml", "run.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run} must hold {name} beside its checkpoints; it is gone")
    identity.require(newest)
    if newest.step < last and not damaged:
        print(
            f"smbfast: {run} was saved after step {last}, and its newest checkpoint is of step "
            f"{newest.step}; it goes on from there",
            file=sys.stderr,
        )
    if set_aside:
        checkpoint.set_aside(damaged)
    _warn_of_log(run, newest)
    return newest


def _warn_of_log(run: Path, newest: Checkpoint) -> None:
    """Say if the log lacks what was in it when the checkpoint was written."""
    log = run / "metrics.jsonl"
    size, expected = (
        log.stat().st_size if log.is_file() else 0,
        newest.record.get("metrics_offset", 0),
    )
    if size < expected:
        print(
            f"smbfast: {log} must have {expected:,} bytes from the steps before {newest.step}; it "
            f"has {size:,}. The run goes on, and its log and report lack what is missing",
            file=sys.stderr,
        )


def shards_digest(prepared: Prepared) -> str:
    """Return a digest of the bytes of the shards, by their SHA-256, and of what was fitted."""
    record = prepared.record
    names = ("data_format", "format", "options", "section_rules", "classes")
    fitted = {key: record.get(key) for key in names}
    return digest_of(record["shards"], record["counts"], record["new_tokens"], fitted)
