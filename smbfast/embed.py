"""python -m smbfast.embed: a checkpoint and MEDS labels to embeddings at decision nodes."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from smbfast.base.config import Settings, command_line
from smbfast.base.entry import entry


class EmbedSettings(Settings):
    """Embed patients at the prediction times of MEDS label files.

    Writes parquet with subject_id, prediction_time, split and embedding, one row a node.
    """

    model: str = Field(description="the `final` folder of a run")
    data: str = Field(description="a MEDS folder")
    labels: list[str] = Field(description="task folders, or names under <data>/labels")
    out: str = Field(description="parquet file to write")
    encoder: Literal["online", "target"] = Field("online", description="which one embeds")
    pool: Literal["last", "mean"] | None = Field(
        None, description="last token, or mean of the window; none: as the run was probed"
    )
    tokens: int = Field(16384, ge=64, description="tokens of one forward, nodes of many windows")
    path: Literal["shared", "reference"] = Field(
        "shared",
        description="nodes of a window from one forward, or from one for each trunk and branch",
    )
    device: str = Field("auto", description="auto, cpu, cuda")


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, a model, one call of `smbfast.probing.embedding`, what it counted."""
    settings = command_line(EmbedSettings, argv, prog="python -m smbfast.embed")
    with entry("smbfast.embed"):
        from smbfast.base.runtime import choose_device, few
        from smbfast.probing.embedding import embed_labels, write_embeddings
        from smbfast.run.checkpoint import restore_final

        device = choose_device(settings.device)
        encoder, target, record = restore_final(Path(settings.model), device)
        embedded = embed_labels(
            encoder,
            target,
            record,
            device,
            tokenizer=Path(settings.model),
            data=Path(settings.data),
            labels=settings.labels,
            which=settings.encoder,
            path=settings.path,
            tokens=settings.tokens,
            pool=settings.pool,
        )
        write_embeddings(embedded.table, Path(settings.out))
    num_nodes = len(embedded.table)
    print(f"embedded {num_nodes:,} nodes of {embedded.num_tasks} tasks: {settings.out}")
    print(", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in embedded.counts.items()))


if __name__ == "__main__":
    main()
