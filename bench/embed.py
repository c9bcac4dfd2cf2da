"""python -m bench.embed: embeddings of decision nodes, ours against one plain forward a node.

The rival is the loop that a user would write: for each node its text, one forward of the Hugging
Face model without head and without padding, in `torch.inference_mode`, the last state; then one
parquet file. Both make the text, use the same weights and threads and write the same embeddings,
which are compared first of all. Patients are divided into parts, and each part is embedded by both
in turn, so that other work on the machine hits both alike.

Legend: K nodes, T tokens, D width.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.base.progress import Progress
from smbfast.data.labels import find_tasks, read_labels, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import SPLIT_NAMES, Nodes, NodeText, distinct_nodes, node_texts
from smbfast.data.preparing import prepare
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.probing.embedding import Model, embed_into, packed_of
from smbfast.probing.embedding_file import embedding_file
from smbfast.settings import load
from smbfast.simulation.dataset import simulate

PROG = "python -m bench.embed"
CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 768}
TINY = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64}
EIGHT = 8  # nodes of a window of the synthetic case
TAIL = 8  # tokens of such a node that are its own
# how much faster than the rival ours has to be: no slower where nodes share nothing (3 % are
# allowed for noise), four times as fast where eight nodes share a window
BARS = {"mimic": 0.97, "eicu": 0.97, "eight": 4.0}
FOLDERS = {"mimic": "mimic-iv-demo", "eicu": "eicu-demo"}
# both sum at most 1,024 terms in each of a few dozen fp32 products, in another order
TOLERANCE = 1e-4
Texts = Callable[[Nodes], Iterator[NodeText]]


class EmbedBench(Settings):
    """Measure how fast decision nodes are embedded, against one plain forward for each node.

    The labels of two demo datasets, whose nodes share little, and a synthetic case with eight nodes
    a window. Models are Qwen3 with random weights, width 256 and 6 layers, in fp32 on a CPU; a
    window has 1,024 tokens. Times hold everything from the events to the parquet file.

    Embeddings that differ from the rival's end the command with status 1, and so does a case that
    is slower than its bar.
    """

    epilog: ClassVar[str] = """Examples

  See in seconds that it runs; these figures mean nothing:
    python -m bench.embed --quick

  The first hundred nodes of one dataset:
    python -m bench.embed --only=mimic --nodes=100

  Everything, appended to bench/results/embed.jsonl:
    python -m bench.embed --save"""

    only: list[str] = Field(
        [], description="Cases to measure, of mimic, eicu and eight. If empty, all are measured."
    )
    nodes: int = Field(
        0, ge=0, description="Nodes of each case that are embedded, at least; 0 takes all of them."
    )
    threads: int = Field(1, ge=1, description="Threads of the CPU that each forward uses.")
    quick: bool = Field(
        False,
        description="Take a tiny model, a simulated cohort and a few nodes, to see that the bench "
        "runs. No bar is judged.",
    )
    save: bool = Field(False, description="Append the results to bench/results/embed.jsonl.")


@dataclass(frozen=True)
class Case:
    """Nodes to embed, and what embeds them."""

    name: str
    encoder: PatientEncoder
    texts: Texts
    parts: list[Nodes]  # whole patients each


@dataclass(frozen=True)
class Times:
    """Seconds that each part took."""

    cpu: list[float]
    wall: list[float]


def labelled(name: str, data: Path, work: Path, size: dict[str, int], window: int) -> Case:
    """The nodes of all tasks of a MEDS folder, as text of a tokenizer that is trained on it."""
    settings = _settings(size, window, data)
    prepared = prepare(settings.data, work / f"{name}-shards", None, ("train",))
    dataset = MedsDataset.open(data)
    names = sorted(p.name for p in (data / "labels").iterdir() if p.is_dir())
    tasks = find_tasks(names, data)
    nodes = distinct_nodes([with_splits(read_labels(folder), dataset) for folder in tasks])

    def texts(part: Nodes) -> Iterator[NodeText]:
        return node_texts(dataset, prepared.serializer(dataset), part, window, {})

    encoder = make_encoder(settings, prepared.tokenizer, CPU)
    return Case(name, encoder, texts, _parts(nodes, 40))


def eight_nodes(size: dict[str, int], window: int, windows: int, work: Path) -> Case:
    """Windows of random tokens; an eighth further each, a node with a few tokens of its own."""
    cohort = work / "cohort-of-the-tokenizer"
    simulate(cohort, 64, 0)
    settings = _settings(size, window, cohort)
    tokenizer = prepare(settings.data, work / "eight-shards", None, ("train",)).tokenizer
    encoder = make_encoder(settings, tokenizer, CPU)
    subject_K, time_K = np.divmod(np.arange(windows * EIGHT), EIGHT)
    nodes = Nodes(subject_K, time_K, np.ones(len(subject_K), np.int8))

    def texts(part: Nodes) -> Iterator[NodeText]:
        for k, (subject, time_) in enumerate(zip(part.subject_K, part.time_K, strict=True)):
            random = np.random.default_rng(subject)
            trunk_T = random.integers(3, len(tokenizer), window).astype(np.int32)
            ids_T = trunk_T[: (time_ + 1) * window // EIGHT].copy()
            if time_ + 1 < EIGHT:
                own = np.random.default_rng((subject, time_))
                ids_T[-TAIL:] = own.integers(3, len(tokenizer), TAIL)
            yield NodeText(k, int(subject), int(time_), 0, ids_T)

    return Case("eight", encoder, texts, _parts(nodes, 2 * EIGHT))


def ours(case: Case, part: Nodes, out: Path) -> None:
    """Embed as `python -m smbfast.embed` does with a part of its nodes."""
    model = Model(packed_of(case.encoder, None, "online", "shared"))
    with embedding_file(out, part) as file:
        sinks = [({"last": file}, model)]
        embed_into(sinks, len(part.subject_K), case.texts(part), CPU, tokens=16384)
        file.write()


@torch.inference_mode()
def plain(case: Case, part: Nodes, out: Path) -> None:
    """Embed by one forward of the Hugging Face model for each node."""
    lm = case.encoder.decoder
    rows, states = [], []
    for node in case.texts(part):
        ids_1T = torch.from_numpy(node.ids_T.astype(np.int64))[None]
        states.append(lm(input_ids=ids_1T, use_cache=False).last_hidden_state[0, -1].numpy())
        rows.append(node.index)
    order = np.argsort(rows)
    index_K, values_KD = np.array(rows)[order], np.stack(states)[order]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values_KD.ravel()), values_KD.shape[1])
    columns = {
        "subject_id": part.subject_K[index_K],
        "prediction_time": part.time_K[index_K].astype("datetime64[us]"),
        "split": np.array(SPLIT_NAMES)[part.split_K[index_K]],
        "embedding": vectors,
    }
    pq.write_table(pa.table(columns), out)


VARIANTS = {"plain": plain, "smbfast": ours}


def measure(case: Case, work: Path) -> tuple[dict[str, Times], float]:
    """Times of both, part by part in turn, and the largest difference relative to the largest."""
    times = {name: Times([], []) for name in VARIANTS}
    files = {name: work / f"{case.name}-{name}.parquet" for name in VARIANTS}
    for name, embed in VARIANTS.items():  # compiles and allocates what the first call does
        embed(case, _some(case.parts[0], np.arange(2)), files[name])
    gap = 0.0
    progress = Progress(PROG, sum(len(p.subject_K) for p in case.parts), "nodes")
    for turn, part in enumerate(case.parts):
        for name in sorted(VARIANTS, reverse=bool(turn % 2)):
            wall, cpu = time.perf_counter(), time.process_time()
            VARIANTS[name](case, part, files[name])
            times[name].cpu.append(time.process_time() - cpu)
            times[name].wall.append(time.perf_counter() - wall)
        gap = max(gap, _difference(*(pq.read_table(file) for file in files.values())))
        progress.add(len(part.subject_K))
    return times, gap


def _difference(expected: pa.Table, own: pa.Table) -> float:
    keys = ["subject_id", "prediction_time", "split"]
    if not expected.select(keys).equals(own.select(keys)):
        return float("inf")
    one, other = (np.stack(t["embedding"].to_numpy(zero_copy_only=False)) for t in (expected, own))
    return float(np.abs(one - other).max() / np.abs(one).max())


def _settings(size: dict[str, int], window: int, data: Path):
    words = [f"--data.path={data}", f"--data.window={window}"]
    return load("default", [*words, *(f"--model.{key}={value}" for key, value in size.items())])


def _parts(nodes: Nodes, size: int) -> list[Nodes]:
    """Whole patients, evenly drawn, of `size` nodes together, or as many as the last one adds."""
    own: list[list[np.ndarray]] = [[]]
    order = np.random.default_rng(0).permutation(np.unique(nodes.subject_K))
    for subject in order:
        if sum(map(len, own[-1])) >= size:
            own.append([])
        own[-1].append(np.flatnonzero(nodes.subject_K == subject))
    return [_some(nodes, np.sort(np.concatenate(k))) for k in own]


def _some(nodes: Nodes, index_M: np.ndarray) -> Nodes:
    return Nodes(nodes.subject_K[index_M], nodes.time_K[index_M], nodes.split_K[index_M])


def _cases(settings: EmbedBench, work: Path) -> Iterator[Case]:
    """The cases that were asked for, and of each as many parts.

    Raises:
        ValueError: a case that there is not, or whose dataset is missing.
    """
    if unknown := set(settings.only) - set(BARS):
        names = ", ".join(sorted(unknown))
        raise ValueError(f"`only` must be among {', '.join(BARS)}; {names} is not")
    size, window = (TINY, 128) if settings.quick else (MODEL, 1024)
    for name in settings.only or BARS:
        data = SHARED / FOLDERS.get(name, "")
        if name == "eight":
            case = eight_nodes(size, window, 2 if settings.quick else 24, work)
        elif settings.quick:
            data = work / name
            simulate(data, 64, list(BARS).index(name))
            case = labelled(name, data, work, size, window)
        elif data.is_dir():
            case = labelled(name, data, work, size, window)
        elif settings.only:
            raise ValueError(f"the case {name} needs the dataset {data}; there is no such folder")
        else:
            print(f"{name}: not measured, {data} is not here")
            continue
        sizes = np.cumsum([len(part.subject_K) for part in case.parts])
        wanted = min(settings.nodes or sizes[-1], sizes[-1])
        yield Case(name, case.encoder, case.texts, case.parts[: 1 + (sizes < wanted).sum()])


def main(argv: list[str] | None = None) -> None:
    settings = command_line(EmbedBench, argv, prog=PROG)
    torch.set_num_threads(settings.threads)
    stamp = records.stamp("embed", "cpu")
    lines, bad = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for case in _cases(settings, Path(folder)):
                lines.append({**stamp, **_result(case, *measure(case, Path(folder)))})
                print(_line(lines[-1]), flush=True)
                bad += _bad(lines[-1], judged=not settings.quick)
        except ValueError as error:
            raise SystemExit(f"{PROG}: {error}") from None
    if settings.quick:
        print("a quick run: its times mean nothing, and no bar is judged")
    if settings.save:
        print(f"{len(lines)} records appended to {records.append('embed', lines)}")
    if bad:
        raise SystemExit("\n".join(bad))


def _result(case: Case, times: dict[str, Times], gap: float) -> dict:
    """What a record says of a case."""
    own, rival = times["smbfast"], times["plain"]
    ratios = np.array(rival.cpu) / np.array(own.cpu)
    return {
        "case": case.name,
        "nodes": sum(len(part.subject_K) for part in case.parts),
        "parts": len(case.parts),
        "ratio": sum(rival.cpu) / sum(own.cpu),
        "ratio_p20_p80": np.quantile(ratios, [0.2, 0.8]).tolist(),
        "ratio_wall": sum(rival.wall) / sum(own.wall),
        "cpu_s": {name: sum(t.cpu) for name, t in times.items()},
        "wall_s": {name: sum(t.wall) for name, t in times.items()},
        "error": gap,
        "tolerance": TOLERANCE,
        "bar": BARS[case.name],
    }


def _line(record: dict) -> str:
    low, high = record["ratio_p20_p80"]
    rates = {name: record["nodes"] / seconds for name, seconds in record["cpu_s"].items()}
    return (
        f"{record['case']}: {record['nodes']:,} nodes, smbfast {rates['smbfast']:.2f} and plain "
        f"{rates['plain']:.2f} nodes a CPU second: {record['ratio']:.2f} x ({low:.2f} to "
        f"{high:.2f} over {record['parts']} parts; wall {record['ratio_wall']:.2f} x), bar "
        f"{record['bar']}, error {record['error']:.1e}"
    )


def _bad(record: dict, *, judged: bool) -> list[str]:
    name, bad = record["case"], []
    if not record["error"] <= record["tolerance"]:
        bad.append(f"{name}: the embeddings differ by {record['error']:.1e} of the largest")
    if judged and record["ratio"] < record["bar"]:
        bad.append(f"{name}: {record['ratio']:.2f} x, and the bar is {record['bar']}")
    return bad


if __name__ == "__main__":
    main()
