"""python -m smbfast.train: SFT, then JEPA, then embeddings at decision nodes, probes and a report.

The loop is `train`, one flat function, read from top to bottom. What it stands on: `loader` (a step
is a pure function of seed and number), `reference` (the objective), `target` (the EMA),
`checkpoint`. What comes after the last step is in `smbfast.evaluation`.
"""

import json
import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch

from smbfast import checkpoint, console, evaluation
from smbfast.config import help_text, read_toml, to_toml
from smbfast.data.loader import WindowSet, make_step, prefetched
from smbfast.data.prepared import Prepared
from smbfast.files import cannot_write, write_text
from smbfast.metrics import Meter, MetricsLog, step_line
from smbfast.model.backbone import make_encoder
from smbfast.model.target import TargetEncoder
from smbfast.optim import learning_rate, make_optimizer, place, tau, total_steps
from smbfast.prepare import check_prepared, prepare
from smbfast.reference import jepa_sum, sft_sum
from smbfast.report import write_report
from smbfast.runtime import (
    choose_device,
    duration,
    peak_memory_gib,
    stop_on_signals,
    terminate_as_interrupt,
)
from smbfast.settings import TrainSettings, load, presets
from smbfast.simulate import simulate

PATIENCE = 3  # steps in a row with a gradient that is not finite before a run gives up
# what may differ between a run and its resumption: none of it changes a weight
FREE_KEYS = (
    "data.workers",
    "run.dir",
    "run.export",
    "run.resume",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.threads",
    "probe.",
)
EPILOG = f"""first argument: a preset ({", ".join(presets())}) or a .toml file; default `default`
  --print            show the resolved run as TOML and stop
  --resume=never     short for --run.resume=never
  --export=merged    short for --run.export=merged

examples
  python -m smbfast.train
  python -m smbfast.train --data.path=MEDS_FOLDER --probe.labels=mortality_1y
  python -m smbfast.train lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B"""


class RunFailed(RuntimeError):
    """Training itself broke; the message says where."""


def train(settings: TrainSettings, command: str) -> str:
    """Run all phases of `settings`, from the start or from the newest checkpoint.

    Returns "done", or "preempted" when a signal asked to stop (everything is saved then).

    Raises:
        ValueError: bad data, a model that does not load, a run folder that is of another run.
        RunFailed: the gradient was not finite several steps in a row.
    """
    started = time.monotonic()
    run = settings.folder
    device = choose_device(settings.run.device)
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    data, prepared = _prepared(settings, run)
    objective, total = settings.objective, total_steps(settings)
    windows = WindowSet.of(prepared.shards("train"), data.window, prepared.encoder.begin)
    tuning = WindowSet.of(prepared.shards("tuning"), data.window, prepared.encoder.begin)
    _check_windows(windows, tuning, data.path)
    tasks = evaluation.read_tasks(settings, data)  # a typo there must not cost a training run
    new_tokens = prepared.record["new_tokens"]
    encoder = make_encoder(settings, prepared.tokenizer, device, new_tokens)
    optimizer = make_optimizer(encoder, settings.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fixed = evaluation.fixed_batches(tuning, settings)
    found = checkpoint.latest(run)
    target, first, offset, best, seconds = None, 0, 0, {}, 0.0
    if found:
        target = checkpoint.load(found, encoder, optimizer)
        record = found.record
        first, offset, best = record["step"], record["metrics_offset"], record["best"]
        seconds = record["seconds"]
    log = MetricsLog(run, offset, first)
    if not found:  # nothing below is the user's to mend: from here on the folder is this run's
        write_text(run / "config.toml", to_toml(settings))
    header = console.header(settings, prepared, encoder, windows, tuning, first, device)
    if not found:
        log.write("header", **header)
    steps = [
        partial(
            make_step,
            windows,
            objective,
            step,
            batch=settings.optim.batch,
            micro_batch=settings.optim.micro_batch,
            seed=settings.run.seed,
            jepa=place(settings, step).phase.w_jepa > 0,
        )
        for step in range(first, total)
    ]
    health: dict = {}
    entry: dict = {}
    bad, saved = 0, first
    meter = Meter(total, first)
    fetched = time.monotonic()
    _status(run, "running", first, command)
    with stop_on_signals() as stop:
        for batch in prefetched(steps):
            waited = time.monotonic() - fetched
            step = batch.index
            at = place(settings, step)
            phase = at.phase
            if phase.w_jepa > 0 and target is None:
                target = TargetEncoder(
                    encoder,
                    objective.target_form,
                    rank=objective.tracked_rank,
                    every=objective.tracked_every,
                )
            if phase.w_jepa == 0:
                target = None
            if at.begins:
                health = entry = evaluation.evaluate(encoder, target, fixed, settings, phase)
                log.write("eval", step=step, phase=phase.name, **health)
            if phase.w_sft == 0 and batch.masked == 0:
                raise ValueError(
                    f"step {step + 1} has no masked position and phase `{phase.name}` no SFT: "
                    "raise data.window or optim.batch, or lower objective.min_future"
                )
            lr = learning_rate(settings, at)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sft = jepa = 0.0
            for micro in batch.micro:
                micro = micro.to(device)
                if phase.w_sft > 0 and batch.labels > 0:
                    loss = sft_sum(encoder, micro) / batch.labels
                    (phase.w_sft * loss).backward()
                    sft = sft + loss.detach()
                if phase.w_jepa > 0 and micro.masked > 0:
                    normalize = objective.target_norm == "layer"
                    loss = jepa_sum(encoder, target, micro, normalize=normalize) / batch.masked
                    (phase.w_jepa * loss).backward()
                    jepa = jepa + loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optim.clip)
            if torch.isfinite(grad_norm):
                optimizer.step()
                if target is not None:
                    target.update(tau(settings, step))
                bad = 0
            else:  # as if the step had never been: no update, no moment, no average
                bad += 1
                print(f"step {step + 1}: gradient not finite, step skipped", file=sys.stderr)
            optimizer.zero_grad(set_to_none=True)
            if bad == PATIENCE:
                raise RunFailed(
                    f"the gradient was not finite in {PATIENCE} steps in a row, up to step "
                    f"{step + 1} (phase `{phase.name}`); the last good checkpoint is kept"
                )
            done = step + 1
            meter.add(batch.tokens, waited)
            last = at.step + 1 == phase.steps
            if done % settings.run.log_every == 0 or last or done == first + 1:
                record = {
                    "step": done,
                    "phase": phase.name,
                    "sft": float(sft) if phase.w_sft > 0 else None,
                    "jepa": float(jepa) if phase.w_jepa > 0 and batch.masked else None,
                    "grad_norm": float(grad_norm) if bad == 0 else None,
                    "lr": lr,
                    **meter.read(done),
                    "memory_gib": peak_memory_gib(device),
                    "masked": batch.masked,
                    "labels": batch.labels,
                }
                log.write("step", **record)
                print(step_line(record, total, health if phase.w_jepa > 0 else None), flush=True)
            if done % settings.eval.every == 0 or last:
                health = evaluation.evaluate(encoder, target, fixed, settings, phase)
                log.write("eval", step=done, phase=phase.name, **health)
                console.warn(health, entry)
                if health["loss"] < best.get(phase.name, {}).get("loss", float("inf")):
                    best[phase.name] = {"loss": health["loss"], "step": done}
                    final = run / "best" / phase.name
                    info = evaluation.final_record(settings, prepared, encoder, data, done)
                    checkpoint.save_final(final, encoder, target, prepared.tokenizer, info)
            stopping = bool(stop)  # read once: a signal may come at any moment
            if (done % settings.run.save_every == 0 or last or stopping) and bad == 0:
                record = {
                    "metrics_offset": log.offset,
                    "best": best,
                    "seconds": seconds + time.monotonic() - started,
                }
                checkpoint.save(run, done, encoder, target, optimizer, record, settings.run.keep)
                saved = done
                _status(run, "running", saved, command)
            if stopping:
                _status(run, "preempted", saved, command)
                log.close()
                print(f"{stop.name}: stopped, step {saved} is saved; the same command goes on")
                return "preempted"
            fetched = time.monotonic()
    info = evaluation.final_record(settings, prepared, encoder, data, total)
    checkpoint.save_final(run / "final", encoder, target, prepared.tokenizer, info)
    seconds += time.monotonic() - started
    _export(settings, device)
    evaluation.finish(settings, data, tasks, prepared, encoder, target, device)
    log.write("end", step=total, seconds=seconds, best=best)
    log.close()
    write_report(run)
    _status(run, "done", total, command)
    console.end_card(run, settings, seconds, time.monotonic() - started, best, health)
    return "done"


def _export(settings: TrainSettings, device: torch.device) -> None:
    run = settings.folder
    if settings.run.export == "merged" and not (run / "merged").is_dir():
        print(checkpoint.export_merged(run / "final", run / "merged", device))


def _earlier(run: Path, settings: TrainSettings) -> str:
    """What the run folder holds of this very run: "new" (nothing), "resumed" or "done".

    Raises:
        ValueError: the folder holds another run, or any run with `run.resume=never`.
    """
    config = run / "config.toml"
    if not config.is_file():
        return "new"
    if settings.run.resume == "never":
        raise ValueError(
            f"{run} already holds a run and run.resume is never; name another --run.dir"
        )
    # a setting that did not exist yet when the run began had its default
    known = TrainSettings.model_construct().model_dump(mode="json", exclude={"phases"})
    then = _flat(known) | _flat(read_toml(config))
    now = _flat(settings.model_dump(mode="json"))
    keys = [k for k in {**then, **now} if not k.startswith(FREE_KEYS)]
    changed = [f"{k}: {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings; name another --run.dir, or take back\n  "
            + "\n  ".join(changed)
        )
    try:
        state = json.loads((run / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        state = "unknown"
    return "done" if state == "done" else "resumed"


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if isinstance(values, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in values.items()]
    elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(values)]
    else:
        return {} if values is None else {prefix: values}
    return {k: v for name, value in items for k, v in _flat(value, name).items()}


def _prepared(settings: TrainSettings, run: Path) -> tuple:
    """The data settings with paths filled in, and the token shards."""
    data = settings.data
    if data.path is None:
        # named by what it is: another number of patients is another cohort
        cohort = run / f"cohort-{settings.cohort.patients}-{settings.cohort.seed}"
        if not cohort.is_dir():
            simulate(cohort, settings.cohort.patients, settings.cohort.seed)
        data = data.model_copy(update={"path": str(cohort)})
    if data.prepared and (Path(data.prepared) / "prepare.json").is_file():
        prepared = Prepared.open(Path(data.prepared))
        check_prepared(prepared, data, settings.model.path)
        return data, prepared
    out = Path(data.prepared) if data.prepared else run / "prepared"
    return data, prepare(data, out, settings.model.path, ("train", "tuning"))


def _check_windows(windows: WindowSet, tuning: WindowSet, path: str | None) -> None:
    for split, found in (("train", windows), ("tuning", tuning)):
        if not len(found):
            raise ValueError(f"{path}: split `{split}` must have subjects with timed events; none")


def _status(run: Path, state: str, step: int, command: str) -> None:
    content = {"state": state, "step": step, "command": command}
    write_text(run / "status.json", json.dumps(content, indent=1))


def _ended(settings: TrainSettings | None, state: str) -> None:
    """A run that had begun and broke says so in its status, with the command that goes on."""
    try:
        status = settings.folder / "status.json"
        content = json.loads(status.read_text())
        if content["state"] == "running":
            write_text(status, json.dumps({**content, "state": state}, indent=1))
    except (OSError, ValueError, KeyError, AttributeError):
        return  # no run had begun, or its folder cannot be written: the error itself is told


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m smbfast.train"
    if {"-h", "--help"} & set(argv):
        print(help_text(TrainSettings, f"{prog} [preset]", EPILOG))
        return
    name = argv.pop(0) if argv and "=" not in argv[0] and not argv[0].startswith("-") else "default"
    show = "--print" in argv
    words = [a for a in argv if a != "--print"]
    for short in ("export", "resume"):  # `--export merged`, `--export=merged`
        words = [f"--run.{a[2:]}" if a.startswith(f"--{short}=") else a for a in words]
        if f"--{short}" in words[:-1]:
            at = words.index(f"--{short}")
            words[at : at + 2] = [f"--run.{short}={words[at + 1]}"]
    command = shlex.join([*prog.split(), name, *words])
    ours = None
    try:
        settings = load(name, words)
        terminate_as_interrupt()
        if show:
            print(to_toml(settings), end="")
            return
        start = time.monotonic()
        if _earlier(settings.folder, settings) == "done":
            _export(settings, choose_device(settings.run.device))
            console.already_done(settings.folder)
            return
        ours = settings  # from here on an error is one of this run
        state = train(settings, command)
    except (ValueError, RunFailed) as error:
        _ended(ours, "failed")
        raise SystemExit(f"smbfast.train: {error}") from None
    except OSError as error:
        _ended(ours, "failed")
        raise SystemExit(f"smbfast.train: {cannot_write(error)}") from None
    except BrokenProcessPool:
        raise SystemExit(
            "smbfast.train: a worker that prepared data was killed; go on with --data.workers=1"
        ) from None
    except KeyboardInterrupt:
        _ended(ours, "preempted")
        print("\nsmbfast.train: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(75) from None
    except BaseException:
        _ended(ours, "failed")
        raise
    if state == "preempted":
        raise SystemExit(75)  # EX_TEMPFAIL: run it again
    print(f"total {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
