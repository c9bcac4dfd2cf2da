"""python -m smbfast.embed: a trained model and patients' events to embeddings at any moment."""

from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.hub_names import refuse_missing
from smbfast.base.terminal import say_first
from smbfast.settings import EmbedSettings, require_meds_folder


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, a model, one call of `smbfast.serving`, what it counted."""
    settings = command_line(EmbedSettings, argv, prog="python -m smbfast.embed")
    with entry("smbfast.embed", stopped="the same command goes on with the parts that are done"):
        if Path(settings.out).is_dir():
            raise ValueError(f"`out` must be a parquet file to write; {settings.out} is a folder")
        data = Path(settings.data)
        require_meds_folder(data)  # refused before the imports that take seconds
        events = data / "data" if (data / "data").is_dir() else data
        if events.resolve() in Path(settings.out).resolve().parents:
            raise ValueError(
                f"`out` must be outside of {events}, where every parquet file is read as events, "
                f"got {settings.out}"
            )
        refuse_missing(settings.model, "model")
        say_first("smbfast.embed")
        from smbfast.base.counts import of_whole
        from smbfast.data.moments import read_moments
        from smbfast.serving import load

        moments = None if settings.at is None else read_moments(settings.at)
        model = load(settings.model, path=settings.backbone, device=settings.device)
        counts = model.write(
            Path(settings.out),
            Path(settings.data),
            labels=settings.labels,
            at=moments,
            encoder=settings.encoder,
            pool=settings.pool,
            path=settings.path,
            tokens=settings.tokens,
        )
    if counts is None:
        print(f"{settings.out} holds these embeddings; another process has written it")
        return
    shown = {name: of_whole(count, counts["nodes"]) for name, count in counts.items()}
    print(f"embedded {shown['embedded']} nodes: {settings.out}")
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in shown.items()))


if __name__ == "__main__":
    main()
