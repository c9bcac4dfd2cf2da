"""python -m smbfast.check: what training would meet, met before it, in a minute or so."""

import shlex
import sys

from smbfast.base.config import build
from smbfast.base.entry import entry
from smbfast.base.help_page import help_text
from smbfast.base.locks import locked
from smbfast.base.ours import require_run_folder
from smbfast.base.terminal import say_first
from smbfast.settings import (
    PlanSettings,
    decided_data,
    kernel_choice,
    load,
    plan_arguments,
    presets,
    require_backbone,
    run_arguments,
    run_help,
    run_schema,
)

EPILOG = f"""This command takes the arguments of python -m smbfast.train and tries, in about a
minute, what that training run would do. PRESET is one of
{", ".join(presets())}, or a .toml file of your own.
The exit code is 0 if the run may start; otherwise it is 1, and one line says what to change. It is
called ready if nothing was warned of.

With --gpus, --gpu, --events or another key of a plan, which stand at the end of this page, it plans
instead: what the run would take on GPUs that need not be here.

The stages
  data        Read the MEDS folder and its labels; prepare the token shards if there are none;
              print the data card: what was lost, odd or left out, what each step can predict, and
              which labels match. Data that a model could not learn from are refused.
  model       Load the tokenizer and the backbone; let LoRA find the layers it adapts.
  kernels     Say which implementation each operation runs on.
  memory      Choose the size of a micro-batch and predict the largest memory of a step.
  plan        Plan the first steps of each phase, find the largest micro-batch, and say how many
              positions a step with JEPA masks.
  worst pack  Run that micro-batch forward and backward; compare its memory with the prediction.
  self-check  Compare the shared forward with the reference.
  time        Time a step of each phase and estimate the whole run.
  checkpoint  Save a checkpoint, load it again and compare the two bit for bit.

Examples

  Check the default run:
    python -m smbfast.check

  Check LoRA training of a pretrained backbone:
    python -m smbfast.check lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B"""


def main(argv: list[str] | None = None) -> None:
    """The command: the arguments of a run, then one call of `smbfast.run.preflight`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with entry("smbfast.check", stopped="nothing of a run was changed"):
        if "--schema" in argv:
            print(run_schema())
            return
        own, rest = plan_arguments(argv)
        if {"-h", "--help"} & set(argv):
            print(run_help(rest, "python -m smbfast.check", EPILOG))
            print(f"\n{help_text(PlanSettings, 'python -m smbfast.check [PRESET] --gpus=N')}")
            return
        settings = load(*run_arguments(rest))
        if settings.model.fsdp and not own:
            raise ValueError(
                "this command is one process, and model.fsdp shares the backbone out over several: "
                "add --gpus=N to plan the run, or --model.fsdp=false where the backbone fits"
            )
        # refused at once, before the imports that take seconds
        require_backbone(settings, weights=not own)
        decided_data(settings)
        command = shlex.join(["python", "-m", "smbfast.train", *rest])
        say_first("smbfast.check")
        if own:
            plan = build(PlanSettings, {}, own)
            from smbfast.run.plan_table import show

            show(settings, plan, command)
            return
        require_run_folder(settings.folder)
        with locked(settings.folder, "smbfast.check"):  # a run under way is left alone
            from smbkernels import use

            from smbfast.run.preflight import check

            everywhere, by_op = kernel_choice(settings.kernels)
            with use(everywhere, **by_op):
                check(settings, command)


if __name__ == "__main__":
    main()
