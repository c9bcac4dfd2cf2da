"""python -m smbfast.embed: a checkpoint and MEDS labels to embeddings at decision nodes."""

from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import EmbedSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, a model, one call of `smbfast.probing.embedding`, what it counted."""
    settings = command_line(EmbedSettings, argv, prog="python -m smbfast.embed")
    with entry("smbfast.embed"):
        from smbfast.base.files import standing
        from smbfast.base.runtime import choose_device, few
        from smbfast.probing.embedding import embed_labels
        from smbfast.run.checkpoint import restore_final
        from smbfast.run.matmul import recorded

        device, model = choose_device(settings.device), standing(Path(settings.model))
        encoder, target, record = restore_final(model, device)
        with recorded(record.get("matmul"), device):
            embedded = embed_labels(
                encoder,
                target,
                record,
                device,
                tokenizer=model,
                data=Path(settings.data),
                labels=settings.labels,
                out=Path(settings.out),
                which=settings.encoder,
                path=settings.path,
                tokens=settings.tokens,
                pool=settings.pool,
            )
    num_nodes = embedded.counts["embedded"]
    print(f"embedded {few(num_nodes)} nodes of {embedded.num_tasks} tasks: {settings.out}")
    print(", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in embedded.counts.items()))


if __name__ == "__main__":
    main()
