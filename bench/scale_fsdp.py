"""python -m bench.scale_fsdp: the host memory that ranks take to load a backbone that they share.

A backbone of about 150 MB in fp32 is made, and 2 and 4 ranks on one machine load it, all at once.
This process reads their resident memory every few milliseconds. What counts is the largest sum of
all ranks, above what they had when they had imported everything and joined, over the bytes of the
backbone: 1.0 is one model on the machine, however many ranks there are. Pages of files count too.
"""

import os
import socket
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, Qwen3Config

from bench import records
from smbfast.model.backbone import load_lm
from smbfast.model.sharding import held_bytes

PAGE = os.sysconf("SC_PAGE_SIZE")
EVERY = 0.002  # seconds between two readings
LIMIT = 1.2  # models
LAYERS = 12
SHOWN = ("ranks", "shared", "peak_models", "after_models", "held_models", "seconds")
PROG = "python -m bench.scale_fsdp"


def make(folder: Path, layers: int) -> None:
    """Save a backbone with a small vocabulary, as tables are whole on every rank."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    width = 512 if layers == LAYERS else 64  # so small that its freed memory hides nothing
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=3 * width,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / str(layers))


def load(rank: int, world: int, port: int, folder: str, shared: bool, ends: list) -> None:
    """Be a rank: join, wait for the word, load, and say what this rank holds."""
    end: Connection = ends[rank]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    device = torch.device("cpu") if shared else None
    # of one layer: what is imported on first use and what gloo sets up is no part of a model
    load_lm(f"{folder}/1", torch.float32, device)
    dist.all_reduce(torch.zeros(1))
    end.send(0)
    end.recv()
    lm = load_lm(f"{folder}/{LAYERS}", torch.float32, device)
    end.send(held_bytes(lm))
    end.recv()
    dist.destroy_process_group()


def resident(pid: int) -> int:
    """Bytes of memory of a process, those of mapped files included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def measured(folder: Path, world: int, size: int, *, shared: bool) -> dict:
    """Let `world` ranks load the backbone; the peak of their sum, in models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [mp.Pipe() for _ in range(world)]
    ends = [end for _, end in pairs]
    arguments = (world, port, str(folder), shared, ends)
    ranks = mp.start_processes(load, arguments, world, join=False, start_method="fork")
    pids, peak, start = ranks.pids(), 0, 0.0
    for own, _ in pairs:
        own.recv()
    before = sum(map(resident, pids))
    for own, _ in pairs:
        own.send(0)
    start = time.perf_counter()
    while not all(own.poll() for own, _ in pairs):
        peak = max(peak, sum(map(resident, pids)) - before)
        time.sleep(EVERY)
    seconds = time.perf_counter() - start
    after = sum(map(resident, pids)) - before
    held = [own.recv() for own, _ in pairs]
    for own, _ in pairs:
        own.send(0)
    ranks.join()
    return {
        "ranks": world,
        "shared": shared,
        "backbone_mb": round(size / 1e6, 1),
        "peak_models": round(max(peak, after) / size, 3),
        "after_models": round(after / size, 3),
        "held_models": [round(h / size, 3) for h in held],
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Measure, print, and add the records where `--record` is given."""
    torch.set_num_threads(1)
    stamp = records.stamp("scale_fsdp", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for layers in (1, LAYERS):  # in another process, whose heap the ranks do not inherit
            maker = mp.get_context("spawn").Process(target=make, args=(Path(folder), layers))
            maker.start()
            maker.join()
        size = (Path(folder) / str(LAYERS) / "model.safetensors").stat().st_size
        cases = ((2, False), (2, True), (4, True))
        rows = [{**stamp, **measured(Path(folder), n, size, shared=s)} for n, s in cases]
    for row in rows:
        print({k: row[k] for k in SHOWN})
    if "--record" in sys.argv:
        print(records.append("scale_fsdp", rows))
    over = [row["ranks"] for row in rows if row["shared"] and row["peak_models"] > LIMIT]
    if over:
        raise SystemExit(f"{PROG}: more than {LIMIT} models with {over} ranks")


if __name__ == "__main__":
    main()
