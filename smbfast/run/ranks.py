"""Ranks: the processes that torchrun starts, which train one model together (data parallel).

Every rank draws the same plan of a step, runs its own micro-batches of it, and adds its gradients
to those of the others. Losses are divided by counts of the whole step, so the sum is the gradient
of one process with the whole batch. Rank 0, the main rank, alone decides, writes and prints.

Two messages a step: a few bytes between hosts, for which no GPU is waited, and one flat all-reduce
of all gradients. For LoRA of an 8B backbone these are 0.3 GB: by their bytes about 12 ms at 50 GB/s
(not measured) beside a step of seconds, so they need no buckets, no overlap and no DDP.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smbfast.base.entry import RunFailed
from smbfast.base.files import digest_of
from smbfast.run.watch import Watch

# for the main one alone at work, on windows or probes; a rank that ends is noticed sooner, by the
# next message or by torchrun
PATIENCE = timedelta(hours=12)
_DIGEST = 8  # bytes of a plan's digest
_TRANSPORT = "gloo/transport"  # in what gloo says of a connection
_NOTICE = 2.0  # seconds until a connection to a rank that has died is known to be closed
_CONNECT = timedelta(seconds=60)  # torchrun's own store is there before its ranks


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    store: dist.Store | None = None  # of those that torchrun started, where they leave a word
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one decides, writes and prints."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """Return what the main rank gives, as JSON carries it; waits for it."""
        if self.world == 1:
            return value
        raw = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(raw)])
        self._send(lambda: dist.broadcast(size, 0))
        box = raw if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        self._send(lambda: dist.broadcast(box, 0))
        return json.loads(bytes(box.tolist()))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main rank run the block, then the others; if it fails there, these end too."""
        if not self.is_main and not self.tell(None):
            raise SystemExit(1)  # the main rank says why
        done = False
        try:
            yield
            done = True
        finally:
            if self.is_main:
                self.tell(done)

    def decide(self, make: Callable[[], Any]) -> Any:
        """Return what `make` gives on the main rank, as JSON carries it; if it fails, all end."""
        made = None
        with self.main_first():
            if self.is_main:
                made = make()
        return self.tell(made)

    @contextmanager
    def loss_is_failure(self, on_end: Callable[[str], None] | None = None) -> Iterator[None]:
        """Turn an interrupt or an error into RunFailed if it came of another rank's death.

        Where a rank has died torchrun sends a TERM to the others, as it does when all are to stop.
        A rank that is asked says so before it leaves, so one that is gone without a word has died.
        Where ranks share a backbone, the layers gather what they need with messages of torch's own.

        Args:
            on_end: called with "failed" before this process ends for a rank that does not answer.
        """
        if self.watch is not None:
            self.watch.on_end = on_end
        try:
            yield
        except KeyboardInterrupt:
            self.say("asked")
            is_orphan = self.watch is not None and self.watch.is_orphan
            lost = None if is_orphan else self._lost_soon()
            if lost is None:
                raise
            raise self._failed(lost) from None
        except RuntimeError as error:
            if isinstance(error, RunFailed) or (lost := self._lost()) is None:
                raise
            raise self._failed(lost) from None
        finally:
            if self.watch is not None:
                self.watch.on_end = None

    def say(self, word: str) -> None:
        """Leave a word for the others why this rank ends."""
        if self.store is not None:
            with suppress(RuntimeError):  # its host has died
                self.store.set(f"word {self.rank}", word)

    def _word(self, rank: int) -> str:
        try:
            if self.store is not None and self.store.check([f"word {rank}"]):
                return self.store.get(f"word {rank}").decode()
        except RuntimeError:
            pass
        return ""

    def _is_gone(self, rank: int) -> bool:
        try:
            dist.isend(torch.zeros(1), rank, tag=1)  # fails at once if it is gone; is not received
        except RuntimeError:
            return True
        return False

    def _words_of_gone(self) -> dict[int, str]:
        gone = [r for r in range(self.world) if r != self.rank and self._is_gone(r)]
        return {rank: self._word(rank) for rank in gone}

    def _lost(self) -> int | None:
        """Return the rank that has died first, as far as can be known, or None."""
        if self.world == 1:
            return None
        words = self._words_of_gone()
        silent = [rank for rank, word in words.items() if not word]
        # one that has left because it lost another says which
        named = [int(word) for word in words.values() if word.isdecimal()]
        return next(iter(silent + [rank for rank in named if rank != self.rank]), None)

    def _lost_soon(self) -> int | None:
        """Return `_lost` once its connection is closed; None once all others were asked too."""
        end = time.monotonic() + _NOTICE
        while (lost := self._lost()) is None and time.monotonic() < end:
            if all(self._word(r) == "asked" for r in range(self.world) if r != self.rank):
                break
            time.sleep(0.02)
        return lost

    def _failed(self, lost: int) -> RunFailed:
        self.say(str(lost))
        return RunFailed(
            f"rank {lost} has ended; torchrun says below how, and the same command goes on from "
            "the last checkpoint"
        )

    def least(self, number: int) -> int:
        """Return the least of the numbers of all ranks."""
        return min(row[0] for row in self.gathered([number]))

    def require_same(self, values: dict[str, object]) -> None:
        """Raise a ValueError that names the values which a rank has otherwise than rank 0."""
        own = {name: digest_of(value) for name, value in values.items()}
        expected = self.tell(own)
        bits = sum(1 << i for i, name in enumerate(expected) if own.get(name) != expected[name])
        for rank, (unlike,) in enumerate(self.gathered([bits])):
            names = [name for i, name in enumerate(expected) if unlike >> i & 1]
            if names:
                raise ValueError(
                    f"all ranks must have the same {', '.join(names)}; rank {rank} has other than "
                    "rank 0. Give every machine the same command, version and prepared folder"
                )

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all ranks."""
        if self.world == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        self._send(lambda: dist.all_reduce(flat))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def summed(
        self, parameters: Sequence[nn.Parameter], losses: Tensor, stop: bool, plan: bytes
    ) -> tuple[Tensor, bool]:
        """Sum the gradients of all ranks in place; nothing of it waits for a GPU.

        A gradient that any rank has is summed with zeros for ranks that have none. One that no
        rank has stays None, so that the optimizer passes the parameter over: zeros would let it
        decay.

        Args:
            parameters: in the same order on all ranks.
            losses: scaled losses of this rank, [number of losses].
            stop: whether this rank was asked to stop.
            plan: the digest of the step's plan.

        Returns:
            The losses of the step, and whether any rank was asked to stop.

        Raises:
            RunFailed: if the plans differ, or another rank has ended.
        """
        if self.world == 1:
            return losses, stop
        has = [p.grad is not None for p in parameters]
        own = plan[:_DIGEST]
        # the greatest bytes, and by their complements the least: equal where all plans are
        words = torch.tensor([stop, *has, *own, *(255 - byte for byte in own)], dtype=torch.uint8)
        self._send(lambda: dist.all_reduce(words, dist.ReduceOp.MAX))
        any_stop, *any_has = words[: -2 * len(own)].tolist()
        greatest, least = words[-2 * len(own) :].view(2, -1)
        if not greatest.equal(255 - least):
            raise RunFailed(
                "the ranks have planned a step otherwise, so windows would be trained twice or "
                "never: their data, settings or versions differ. Nothing of this step was applied"
            )
        live = [p for p, is_live in zip(parameters, any_has, strict=True) if is_live]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in live]
        dtype = torch.float32
        for grad in grads:
            dtype = torch.promote_types(dtype, grad.dtype)
        flat = torch.cat([*(g.flatten().to(dtype) for g in grads), losses.to(dtype)])
        self._send(lambda: dist.all_reduce(flat))
        *sums, total = flat.split([*(p.numel() for p in live), len(losses)])
        for parameter, part in zip(live, sums, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return total.to(losses.dtype), bool(any_stop)

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        """Return the numbers of all ranks, each as many."""
        if self.world == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        self._send(lambda: dist.all_gather(rows, own))
        return [row.tolist() for row in rows]

    def _send(self, message: Callable[[], object]) -> None:
        """Exchange a message; say in words if another rank has ended, or the network has failed."""
        try:
            message()
        except RuntimeError as error:
            lost = self._lost()
            if lost is not None:
                raise self._failed(lost) from None
            if "asked" in self._words_of_gone().values():
                raise KeyboardInterrupt from None  # this one will be asked as well
            words = (str(error).strip().splitlines() or ["no reason"])[-1].partition(". ")[0]
            if not isinstance(error, dist.DistError) and _TRANSPORT not in words:
                raise  # it is not of the network: memory, or a mistake
            raise RunFailed(
                f"a message between the ranks has failed, and none of them has ended ({words}); "
                "the same command goes on from the last checkpoint"
            ) from None


ALONE = Ranks()


@contextmanager
def joined(launcher: int | None = None) -> Iterator[Ranks]:
    """Yield this process's place among those that torchrun started; alone where it did not.

    Other ranks than the main one print nothing in the block but the error with which they end.

    Args:
        launcher: the parent that this process began with; None is the present one.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    _require_launch()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    watch = Watch(launcher or os.getppid())
    store, rank, world = _rendezvous()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    watch.listen(store, rank, world)
    ranks = Ranks(rank, world, store, watch)
    try:
        if ranks.is_main:
            yield ranks
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as null,
            redirect_stdout(null),
            redirect_stderr(null),
        ):
            yield ranks
        ranks.say("done")  # the main one goes on, and has not lost it
    except SystemExit as end:
        if isinstance(end.code, str) and not ranks.is_main:
            raise SystemExit(f"rank {ranks.rank}: {end.code}") from None
        raise
    finally:
        watch.end()
        dist.destroy_process_group()


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Return the store, this rank, and how many there are.

    Raises:
        RunFailed: if torchrun has ended meanwhile.
    """
    has_own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = _CONNECT if has_own else PATIENCE  # without it, rank 0 may still have to start
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=patience)))
    except dist.DistNetworkError:
        raise RunFailed("torchrun has ended, or cannot be reached; start it again") from None
    store.set_timeout(PATIENCE)
    return store, rank, world


def _require_launch() -> None:
    """Refuse an environment that says half of what torchrun says, in which ranks wait for ever."""
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    address = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    numbers = [int(v) for v in given.values() if v.isdecimal()]
    if address or len(numbers) < 2 or numbers[0] >= numbers[1]:
        words = ", ".join(f"{name}={value or 'nothing'}" for name, value in given.items())
        missing = f" and no {' or '.join(address)}" if address else ""
        raise ValueError(
            "RANK must be a number below WORLD_SIZE, beside MASTER_ADDR and MASTER_PORT; the "
            f"environment has {words}{missing}. Start several processes by torchrun, or unset RANK"
        )


def launched(command: str) -> str:
    """Return the command with the words of the torchrun that started this process before it."""
    if "RANK" not in os.environ:
        return command
    own = command.removeprefix("python ")
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        first = next(i for i, w in enumerate(words) if w.endswith(("torchrun", "distributed.run")))
        given = words[first + 1 : words.index("-m", first + 1)]
        return f"{shlex.join(['torchrun', *given])} {own}"
    except (OSError, ValueError, StopIteration):  # no such folder, or started in another way
        nodes, each = (os.environ.get(n, "1") for n in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        many = f"--nnodes={nodes} " if nodes != "1" else ""
        return f"torchrun {many}--nproc-per-node={each} {own}"
