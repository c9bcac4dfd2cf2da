"""Embeds the decision nodes of a run with the trained and untrained encoders, and probes them.

Nodes of train and tuning are embedded first, by each pool that the run may choose from. The pool of
each encoder is then chosen, and those of held_out are embedded by it alone, in forwards of their
own: so figures of tuning do not depend on whether the run is judged on held_out.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import smbfast
from smbfast.base.files import MANIFEST, digest_of, read_json, write_text
from smbfast.base.helpers import helper
from smbfast.base.progress import AHEAD
from smbfast.base.runtime import few
from smbfast.data.labels import Labels, without_held_out
from smbfast.data.meds import MedsDataset
from smbfast.data.node_parts import NodeSource
from smbfast.data.nodes import HELD_OUT, Nodes, distinct_nodes
from smbfast.data.source_index import FOLDER
from smbfast.model.backbone import make_encoder
from smbfast.model.target import TargetEncoder
from smbfast.probing.embedding import Model, packed_of, untrained
from smbfast.probing.embedding_file import EmbeddingFile, embedding_file
from smbfast.probing.embedding_parts import PartFolder, embed_parts, part_folder
from smbfast.probing.read_out import Choice, candidates, choose_pool
from smbfast.probing.run_probe import run_probe
from smbfast.reporting.sample import sample_of
from smbfast.run.checkpoint import amend_final, write_card
from smbfast.run.folder import compared_settings
from smbfast.run.model_card import merged_card, model_card
from smbfast.run.model_record import RECORD
from smbfast.run.open_run import OpenRun
from smbfast.run.origin import origin_of
from smbfast.run.outlook import PROBES
from smbfast.run.risk import write_simulated
from smbfast.settings import Pool, ProbeCommandSettings


def probe_run(
    run: OpenRun,
    target: TargetEncoder | None,
    *,
    final: bool = False,
    command: str = "python -m smbfast.train --final",
) -> None:
    """Embed decision nodes with the trained and the untrained encoder, and probe both.

    All ranks of a run call this, and embed; the main one alone chooses pools, writes and probes.
    The folder `final` of the run must be there; the pool by which it was probed goes into its
    record. A finished run may be probed again, opened at its last checkpoint: a pool that it has
    chosen then stays chosen.

    Args:
        final: whether to judge on held_out instead of tuning; without it no held-out patient is
            embedded.
        command: what is recorded beside the run if it is final.
    """
    settings, probe, prepared = run.settings, run.settings.probe, run.prepared
    if settings.data.path is None and run.ranks.is_main:
        with helper("the report's sample"):
            sample = sample_of(prepared, settings)
            write_text(run.folder / "sample.json", json.dumps(sample))
    if not run.tasks:
        return
    index = prepared.folder / FOLDER
    dataset = MedsDataset.open(run.data.folder, index=index, split=run.data.split)
    asked = [labels if final else without_held_out(labels) for _, labels in run.tasks]
    files = _embedded(run, target, dataset, asked)
    if not run.ranks.is_main:
        return
    AHEAD.begin(PROBES)
    probed = run_probe(
        ProbeCommandSettings(
            embeddings=files[probe.encoder],
            untrained=[path for name, path in files.items() if name != probe.encoder],
            model=run.folder / "final",
            data=dataset.path,
            split=run.data.split,
            labels=[str(folder) for folder, _ in run.tasks],
            competing=probe.competing,
            out=run.folder,
            bootstraps=probe.bootstraps,
            few_shot=probe.few_shot,
            seed=settings.run.seed,
            final=final,
        ),
        index=index,
        command=command,
    )
    _write_cards(run, target, probed)
    if not run.encoder.is_shared_out:  # a forward is of all ranks there, and this one is alone
        with helper("the risk of a simulated patient"):
            packed = packed_of(run.encoder, target, probe.encoder, settings.objective.path)
            write_simulated(run, Model(packed), dataset, [labels for _, labels in run.tasks])


def _embedded(
    run: OpenRun, target: TargetEncoder | None, dataset: MedsDataset, tasks: list[Labels]
) -> dict[str, Path]:
    """Embed the nodes of `tasks` and settle the pools; return the file of each encoder by name.

    Each encoder has a read-out of its own: that which is best for the trained one may be a poor one
    of first weights.
    """
    settings, probe = run.settings, run.settings.probe
    probed = packed_of(run.encoder, target, probe.encoder, settings.objective.path)
    models = {probe.encoder: Model(probed)} | _untrained(run)
    paths = {name: run.folder / "embeddings" / f"{name}.parquet" for name in models}
    embedding = _Embedding(run, dataset, distinct_nodes(tasks), models)
    pools, left_out = run.ranks.decide(lambda: _pools(run))
    free, wide = _free_pools(run)
    asked = {name: pools if name == probe.encoder else free for name in models}
    with ExitStack() as stack:
        files = {
            name: {
                pool: stack.enter_context(embedding_file(path, embedding.nodes))
                for pool in asked[name]
            }
            for name, path in paths.items()
            if run.ranks.is_main
        }
        first = stack.enter_context(embedding.stage(asked, held_out=False))

        def chosen_pools() -> dict[str, list[Pool]]:
            first.fill(files)
            for name, path in paths.items():
                own, out = files[name], left_out if name == probe.encoder else wide
                choice = choose_pool(tasks, own, out) if len(own) > 1 else None
                pool = choice.pool if choice else next(iter(own))
                if choice:
                    print(f"embeddings/{path.name}: {choice.text()}")
                if name == probe.encoder:
                    _settle(run, target, pool, choice)
                files[name] = {pool: own[pool]}
            return {name: list(own) for name, own in files.items()}

        chosen = run.ranks.decide(chosen_pools)
        last = stack.enter_context(embedding.stage(chosen, held_out=True))
        if run.ranks.is_main:
            last.fill(files)
            for name, path in paths.items():
                for pool, file in files[name].items():
                    file.write(origin_of(run.folder / "final", name, pool))
                print(f"embeddings/{path.name}: {embedding.counted()}")
            first.folder.remove()
            last.folder.remove()
    return paths


def _pools(run: OpenRun) -> tuple[list[Pool], dict[Pool, str]]:
    """Return the pools to embed by, narrowest first; of a run that chooses, also why others are
    left out."""
    record = read_json(run.folder / "final" / "smbfast.json")
    if run.settings.probe.pool == "auto" and record.get("pool_choice"):
        return [record["pool"]], {}
    return _free_pools(run)


def _free_pools(run: OpenRun) -> tuple[list[Pool], dict[Pool, str]]:
    """Return `_pools` of an encoder whose pool is not chosen yet."""
    pool = run.settings.probe.pool
    if pool != "auto":
        return [pool], {}
    return candidates(run.encoder.width, run.encoder.base.config.num_hidden_layers)


def _settle(run: OpenRun, target: TargetEncoder | None, pool: Pool, choice: Choice | None) -> None:
    """Let the record of `final` name the pool that the run is probed by, and why it was chosen."""
    final = run.folder / "final"
    record = read_json(final / "smbfast.json")
    if choice is None and record["pool"] == pool:
        return
    amend_final(
        final,
        {"pool": pool, "pool_choice": choice.record() if choice else None},
        lambda record: _card(run, target, record),
    )


def _card(
    run: OpenRun, target: TargetEncoder | None, record: dict, probe: dict | None = None
) -> str:
    """Return the card of `final`, with the figures of `probe` where the tasks were probed."""
    return model_card(
        record,
        run.folder / "final",
        run.prepared.record,
        run.progress.best,
        run.settings,
        target=target is not None,
        probe=probe,
    )


def _write_cards(run: OpenRun, target: TargetEncoder | None, probe: dict) -> None:
    """Write the figures of the probes into the card of `final`, and of `merged` if it is there."""
    final, merged = run.folder / "final", run.folder / "merged"
    card = _card(run, target, read_json(final / RECORD), probe)
    write_card(final, card)
    if (merged / MANIFEST).is_file():
        write_card(merged, merged_card(card, merged))


@dataclass(frozen=True)
class _Stage:
    """Embeddings of a part of the nodes: `place_M` in all of them."""

    folder: PartFolder
    place_M: np.ndarray

    def fill(self, files: dict[str, dict[Pool, EmbeddingFile]]) -> None:
        """Put them into files, by name of the model and by pool."""
        by_both = {(name, pool): f for name, own in files.items() for pool, f in own.items()}
        self.folder.fill(by_both, self.place_M)


@dataclass
class _Embedding:
    """Decision nodes on their way into files, a part of their splits at a time."""

    run: OpenRun
    dataset: MedsDataset
    nodes: Nodes
    models: dict[str, Model]

    def __post_init__(self) -> None:
        self._counts: dict[str, int] = {}

    @contextmanager
    def stage(self, pools: dict[str, list[Pool]], *, held_out: bool) -> Iterator["_Stage"]:
        """Embed the nodes of held_out, or all others, by the pools of each model by name.

        Any number of processes do that together, and parts that are there after a kill stand. Nodes
        are divided and read as the command does it, so that it embeds to the same bits.
        """
        run, probe = self.run, self.run.settings.probe
        place_M = np.flatnonzero((self.nodes.split_K == HELD_OUT) == held_out)
        serializer = run.prepared.serializer(self.dataset)
        nodes = self.nodes[place_M]
        source = NodeSource(self.dataset, serializer, nodes, run.data.window)
        request = {"key": _key(run, pools, nodes), "data": source.state()}
        name = "held_out.parts" if held_out else "parts"
        path = run.folder / "embeddings" / name
        with part_folder(path, request, len(source.parts)) as folder:
            models = {name: (model, pools[name]) for name, model in self.models.items()}
            numbers, commits = None, True
            if run.encoder.is_shared_out:  # a forward is of all ranks, so each runs all
                left = sorted(set(range(folder.num_parts)) - folder.done())
                numbers, commits = run.ranks.tell(left), run.ranks.is_main
            embed_parts(
                folder,
                source,
                models,
                run.device,
                tokens=probe.tokens,
                numbers=numbers,
                commits=commits,
            )
            if run.ranks.is_main:
                for key, count in source.counted(folder.counts()).items():
                    self._counts[key] = self._counts.get(key, 0) + count
            yield _Stage(folder, place_M)

    def counted(self) -> str:
        """Return in words how many nodes there were, and what was lost."""
        return ", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in self._counts.items())


def _key(run: OpenRun, pools: dict[str, list[Pool]], nodes: Nodes) -> str:
    """Return a digest of all that the embeddings of the nodes depend on but the data.

    The pool in the record of `final` is left out: it is chosen by these embeddings.
    """
    settings, final = run.settings, run.folder / "final"
    files, record = (read_json(final / name) for name in (MANIFEST, "smbfast.json"))
    weights = {name: entry for name, entry in files["files"].items() if name != "smbfast.json"}
    record = {key: value for key, value in record.items() if key not in ("pool", "pool_choice")}
    made = record, compared_settings(settings), settings.run.seed, settings.probe.untrained
    by = pools, settings.probe.tokens, run.device.type, torch.__version__
    return digest_of(smbfast.__version__, weights, made, by, nodes.digest())


def _untrained(run: OpenRun) -> dict[str, Model]:
    """Return the encoder as it was before training, and with other first weights, by name.

    A pretrained backbone has one form, which LoRA still holds; any other is made a second time. The
    first weights are those of the run.
    """
    settings = run.settings
    if run.encoder.is_lora:
        return {"untrained": untrained(run.encoder, settings.objective.path)}
    num_inits = settings.probe.untrained if settings.model.path is None else 1
    return {
        f"untrained-{number}" if number else "untrained": _made_again(run, number)
        for number in range(num_inits)
    }


def _made_again(run: OpenRun, number: int) -> Model:
    settings, prepared = run.settings, run.prepared
    seed = settings.run.seed
    if number:
        seed = int(digest_of("untrained", seed, number)[:8], 16)
    seeded = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": seed})})
    again = make_encoder(seeded, prepared.tokenizer, run.device, prepared.new_tokens)
    return Model(packed_of(again, None, "online", settings.objective.path))
