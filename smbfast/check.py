"""python -m smbfast.check: what training would meet, met before it, in a minute or so."""

import sys

from smbfast.base.config import help_text
from smbfast.base.entry import entry
from smbfast.settings import TrainSettings, kernel_choice, load, presets, run_arguments

EPILOG = f"""the arguments of python -m smbfast.train: a preset or a .toml file, then settings
({", ".join(presets())}). Exit code 0 if a run may start, 1 with one line that says what to mend.

  data        the MEDS folder, its labels, the token shards (prepared if they are not there)
  model       the tokenizer and the backbone load, LoRA finds its linears
  kernels     what each operation runs on
  memory      tokens of one forward, and the peak that is predicted
  worst pack  the largest pack of the plan forward and backward: memory as predicted and measured
  self-check  the shared forward against the reference
  time        a step of each phase, and an estimate of the whole run
  checkpoint  saved, verified, loaded again, compared bit for bit

examples
  python -m smbfast.check
  python -m smbfast.check lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B"""


def main(argv: list[str] | None = None) -> None:
    """The command: the arguments of a run, then one call of `smbfast.run.preflight`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(TrainSettings, "python -m smbfast.check [preset]", EPILOG))
        return
    with entry("smbfast.check", stopped="nothing of a run was changed"):
        settings = load(*run_arguments(argv))
        from smbkernels import use

        from smbfast.run.preflight import check

        everywhere, by_op = kernel_choice(settings.kernels)
        with use(everywhere, **by_op):
            check(settings)


if __name__ == "__main__":
    main()
