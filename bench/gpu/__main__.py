"""python -m bench.gpu: the half hour on a rented GPU, in stages of which each leaves a result.

Three calls of nine, eight and six minutes:

  python -m bench.gpu --wheels=build/wheels            where there is a network
  python -m bench.gpu --call=1 --install=build/wheels --out=$OUT/gpu.jsonl
  cat FETCHED/gpu.jsonl >> bench/results/gpu.jsonl     what the next call goes on from
  python -m bench.gpu --call=2 ...                     and so on

Every stage is a process of its own and appends a record for each item it measures; what has a
record is skipped. A backend that stage `ops` finds wrong is not used by the stages after it.
bench/README.md has the commands in full, and what the stages measure.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu.driver import RESULTS, Run, chosen, listed, pack, restore, run_stages, unpack
from bench.gpu.plan import CALLS, STAGES
from bench.gpu.wheels import download


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--call", type=int, choices=CALLS, help="stages of this call, then what others left")
    add("--only", default="", help="these stages instead, with commas between them")
    add("--minutes", type=float, help="end after so many; default: what the call may take")
    add("--again", action="append", default=[], help="forget this key (stage or stage/item...)")
    add("--list", action="store_true", help="print the stages and what is known of them")
    add("--out", type=Path, help="records go here; its name with .log is what was printed")
    add("--work", type=Path, help="folder for unpacked wheels and compiled kernels")
    add("--install", type=Path, help="unpack the wheels of this folder first")
    add("--caches", type=Path, help="caches.tar.gz of an earlier machine, unpacked first")
    add("--git", default="", help="commit to record where the checkout has no repository")
    add("--wheels", type=Path, help="download the wheels into this folder, and end")
    add("--rehearse", choices=("cpu", "fake"), default="", help="tiny on a CPU; a pretended GPU")
    add("--slack", type=float, default=1.0, help="all limits times this, on a busy machine")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process of a stage as well
    if given.wheels:
        print(download(given.wheels))
        return
    only = [name for name in given.only.split(",") if name]
    names = [s.name for s in STAGES]
    for name in (*only, *(key.partition("/")[0] for key in given.again)):
        if name not in names:
            parser.error(f"a stage must be one of {', '.join(names)}, got {name!r}")
    stages = chosen(given.call, only, given.rehearse)
    work = given.work or Path(tempfile.gettempdir()) / "bench-gpu"
    minutes = given.minutes or sum(CALLS[c] for c in CALLS if given.call in (None, c)) / 60
    run = Run(
        out=given.out or (work / "rehearsal.jsonl" if given.rehearse else RESULTS),
        work=work,
        deadline=time.monotonic() + 60 * minutes * given.slack,
        rehearsal=given.rehearse,
        git=given.git,
        log=given.out.with_suffix(".log") if given.out else work / "gpu.log",
        slack=given.slack,
        again=given.again,
    )
    if given.list:
        print(listed(run, stages))
        return
    if given.install and (reason := unpack(run, given.install)):
        sys.exit(f"the wheels are not unpacked: {reason}")
    if given.caches:
        restore(run, given.caches)
    good = run_stages(run, stages)
    if given.out:
        print(pack(run))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
