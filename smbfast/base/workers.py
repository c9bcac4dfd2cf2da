"""Worker processes that stop with their parent, and only with it; or those of a running cluster."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from smbfast.base.entry import RunFailed

ENGINES = {"dask": "distributed", "ray": "ray"}  # scheme of an address to the package
_ADDRESS = re.compile(r"(dask|ray)://(?:local(?:\?workers=[1-9]\d*)?|[^/?#\s]+:\d+)")
_PATIENCE = 30  # seconds in which a cluster must answer


class Pool(Protocol):
    """What takes work: the part of `concurrent.futures.Executor` that is used."""

    def submit(self, do: Callable[..., Any], /, *args: Any) -> Future:
        """Have the function called in another process."""


class Workers:
    """Processes that do work for this one; those of this machine start with the first work."""

    def __init__(self, num: int, on: str | None = None) -> None:
        """Name up to `num` processes of this machine, or the cluster at the address `on`."""
        self._num, self._on, self._stack = num, on, ExitStack()
        self._pool: Pool | None = None

    @property
    def many(self) -> bool:
        """Whether there is more than this process could do by itself."""
        return self._on is not None or self._num > 1

    @property
    def remote(self) -> bool:
        """Whether they are those of a cluster."""
        return self._on is not None

    def pool(self) -> Pool:
        """Return what takes the work.

        Raises:
            ValueError: there is no cluster at the address, or its package is not installed.
        """
        if self._pool is None:
            self._pool = self._stack.enter_context(
                worker_pool(self._num) if self._on is None else cluster(self._on)
            )
        return self._pool

    def __enter__(self) -> "Workers":
        if self.remote:
            self.pool()  # a cluster that is not there is said before anything is made
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


def num_cores() -> int:
    """Return how many cores this process may use: a job of a shared machine has a part of them."""
    known = hasattr(os, "sched_getaffinity")  # Linux alone has it
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes; if the block fails, they are ended at once.

    Signals that a job's processes all get, such as Ctrl-C, are for the parent to answer.
    """
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_begin
    ) as pool:
        try:
            yield pool
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()  # what they were writing is cleared by the next write
            for process in processes:
                process.join()
            raise


def _begin() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def cluster(on: str) -> Iterator[Pool]:
    """Yield what hands work to the running cluster at an address of `engine_of`.

    Raises:
        ValueError: the package is not installed, or the cluster does not answer.
        RunFailed: the cluster has lost the work.
    """
    engine = engine_of(on)
    if find_spec(ENGINES[engine]) is None:
        raise ValueError(
            f"--on={on} needs the package {ENGINES[engine]}, which is not installed: "
            f"pip install 'smbfast[{engine}]', here and where the workers of the cluster are"
        )
    with (_dask if engine == "dask" else _ray)(on) as pool:
        yield pool


def engine_of(on: str) -> str:
    """Return whose cluster an address names, `dask` or `ray`.

    `dask://local?workers=2` starts a cluster on this machine, to try it.

    Raises:
        ValueError: it is of another form.
    """
    named = _ADDRESS.fullmatch(on)
    if named is None:
        raise ValueError(
            "must be the address of a running cluster, dask://HOST:PORT or ray://HOST:PORT"
        )
    return named[1]


@contextmanager
def _dask(on: str) -> Iterator[Pool]:
    from distributed import Client, KilledWorker, LocalCluster

    with ExitStack() as stack:
        if (num := _num_local(on)) is not None:
            # a thread each: the interpreter's lock would let one work at a time
            whole = LocalCluster(n_workers=num, threads_per_worker=1, dashboard_address=None)
            place = stack.enter_context(whole)
        else:
            place = f"tcp://{urlsplit(on).netloc}"
        try:
            client = stack.enter_context(Client(place, timeout=_PATIENCE))
        except OSError:
            raise _silent(on, "a Dask scheduler") from None
        try:
            yield client.get_executor()
        except (KilledWorker, CancelledError):
            raise _lost(on) from None


class _Ray:
    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._remote: dict[Callable, Any] = {}

    def submit(self, do: Callable[..., Any], /, *args: Any) -> Future:
        if do not in self._remote:
            self._remote[do] = self._ray.remote(do)
        return self._remote[do].remote(*args).future()


@contextmanager
def _ray(on: str) -> Iterator[Pool]:
    import ray

    num = _num_local(on)
    try:
        if num is not None:
            ray.init(num_cpus=num, include_dashboard=False)
        else:
            ray.init(on)
    except (ConnectionError, OSError):
        raise _silent(on, "the client server of a Ray cluster") from None
    try:
        yield _Ray(ray)
    except ray.exceptions.RayTaskError as error:  # what the work itself has raised
        raise error.cause from None
    except (ray.exceptions.RayError, ConnectionError):
        raise _lost(on) from None
    finally:
        ray.shutdown()


def _num_local(on: str) -> int | None:
    """Return how many workers to start on this machine; None for a cluster that is running."""
    address = urlsplit(on)
    return int(address.query.partition("=")[2] or 2) if address.netloc == "local" else None


def _silent(on: str, what: str) -> ValueError:
    return ValueError(f"`on` must be the address of {what}; {on} did not answer in {_PATIENCE} s")


def _lost(on: str) -> RunFailed:
    return RunFailed(
        f"the cluster {on} has lost pieces of work, perhaps because its workers ran out of memory; "
        "the same command goes on"
    )
