"""python -m smbfast.train: SFT, then JEPA, then embeddings, probes and a report."""

import shlex
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from smbfast.base.config import to_toml
from smbfast.base.entry import STOPPED, entry
from smbfast.base.locks import locked
from smbfast.base.ours import require_run_folder
from smbfast.base.progress import duration
from smbfast.base.terminal import say_first
from smbfast.settings import (
    TrainSettings,
    decided_data,
    kernel_choice,
    load,
    presets,
    require_backbone,
    run_arguments,
    run_help,
)

if TYPE_CHECKING:
    from smbfast.run.ranks import Ranks

EPILOG = f"""PRESET is one of {", ".join(presets())},
or a .toml file of your own, which may begin from a preset with the line base = "default". Without
it the preset `default` is used. In a file, a setting that is none is left out.

  --print            Print the settings of the run as TOML, and stop.
  --schema           Print the JSON schema of a .toml file, for an editor, and stop.
  --resume=never     Short for --run.resume=never; likewise --resume=restart.
  --export=merged    Short for --run.export=merged.
  --profile=3        Short for --run.profile=3.
  --final            Short for --probe.final=true: judge the probes on held-out
                     patients, at the end of the run or once it is finished.

Examples

  Train a small model on a simulated cohort, in a few minutes on a CPU:
    python -m smbfast.train

  Train a small model on your own patients and probe one task:
    python -m smbfast.train --data.path=MEDS_FOLDER --probe.labels=mortality_1y

  Train LoRA adapters of a pretrained backbone:
    python -m smbfast.train lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B

  Train on 8 GPUs of this machine, on data that were prepared before:
    torchrun --nproc-per-node=8 -m smbfast.train lora --data.path=MEDS_FOLDER \\
        --data.prepared=SHARDS --model.path=Qwen/Qwen3-8B

  Judge the finished run on held-out patients, once, when nothing is chosen any more:
    python -m smbfast.train --final

  See the settings of a preset with their explanations:
    python -m smbfast.train lora --help"""
_entry = partial(entry, "smbfast.train", stopped="the same command goes on")


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, then one call of `smbfast.run.loop`."""
    argv, prog = list(sys.argv[1:] if argv is None else argv), "python -m smbfast.train"
    name, words = run_arguments([a for a in argv if a != "--print"])
    command, start = shlex.join([*prog.split(), name, *words]), time.monotonic()
    with _entry() as began:
        if {"-h", "--help", "--schema"} & set(argv):
            print(run_help(argv, prog, EPILOG))
            return
        settings = load(name, words)
        if "--print" in argv:
            print(to_toml(settings), end="")
            return
        require_backbone(settings)  # refused at once, before the imports that take seconds
        decided_data(settings)
        require_run_folder(settings.folder)
        say_first("smbfast.train")
        from smbfast.run.ranks import joined, launched

        with joined(began.parent) as ranks, ExitStack() as stack:
            ranks.decide(lambda: stack.enter_context(locked(settings.folder, "smbfast.train")))
            _run(settings, launched(command), start, ranks)


def _run(settings: TrainSettings, command: str, start: float, ranks: "Ranks") -> None:
    from smbkernels import use

    from smbfast.base.runtime import choose_device
    from smbfast.run import console, loop
    from smbfast.run.folder import earlier, write_end

    everywhere, by_op = kernel_choice(settings.kernels)
    if ranks.decide(lambda: earlier(settings.folder, settings)) == "done":
        if ranks.is_main:
            loop.export(settings, choose_device(settings.run.device))
        with use(everywhere, **by_op):
            if settings.probe.final:
                loop.judge(settings, command, ranks)
        console.already_done(settings)
        return
    # from here on how it ends is written to the run's status
    end = partial(write_end, settings)
    shown = _entry(on_end=end, private=not settings.run.share)
    with shown as signals, ranks.loss_is_failure(end):
        with use(everywhere, **by_op):
            outcome = loop.train(settings, command, ranks)
        if outcome == "preempted":
            signals.ignore()  # a rank that left now would end the main one while it saves
            ranks.tell(None)  # the main rank has saved: torchrun ends all once one has ended
            raise SystemExit(STOPPED)
    print(f"total {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
