"""python tests/mutants.py: does each of these small mistakes still fail the test that names it?

A mutant is a small change that makes the program wrong. For each, the tracked files are copied to
a temporary folder, the change is made there, and its tests alone are run. A mutant is caught where
one of them fails; where they pass, it has survived. Before that, all tests that are named run once
without a change. Exit code 1 if a mutant survived or cannot be made. Libraries are imported once:
tests run in forked processes.

Those named `defect-...` bring back what was once wrong (docs/reliability.md): their tests are the
ones that failed before it was mended.

    python tests/mutants.py --list
    python tests/mutants.py --only=mask-count-floored --only=clip-dropped
    python tests/mutants.py --only='defect-*' --jobs=2
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds after which tests are stopped: they have hung, and caught nothing
EACH = 60  # seconds more for each test where those of all mutants run together
# what tests/conftest.py says before libraries are imported
BEFORE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# where the suite runs in several processes, one is enough for a test
ALONE = ["-n", "0"] if find_spec("xdist") else []
TESTS_FAILED = 1  # exit code of pytest; others say that no test could be run
EQUIVALENCE = "tests/test_equivalence.py::test_adapters_alone[1.0-none]"
MEASURED = (
    "tests/test_equivalence.py::test_measured_losses_and_states_are_the_same"
    "[lora-merged-tied-fp64-visible]"
)
THREE_STEPS = (
    "tests/test_second_oracle.py::test_three_steps_are_those_of_transformers_and_peft"
    "[qwen3-whole-merged-tied-shared]"
)
JUDGE = "tests/test_horizon_judge.py"
AHEAD_STEPS = (
    f"{JUDGE}::test_three_steps_are_those_of_the_judge[qwen3-whole-merged-tied-shared-codes-drop]"
)
FROZEN = "tests/test_phases.py::test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own"
MASKS = "tests/data/test_loader.py::test_masks_cuts_and_batches"
ATTENTION = "tests/ops/test_timeline_attention.py::test_sdpa_in_fp64_is_exact"
MOMENT = "tests/data/test_prefix_law.py::test_a_node_sees_its_own_moment_and_nothing_later"


@dataclass(frozen=True)
class Mutant:
    """A change, and the tests that must fail."""

    name: str
    breaks: str  # what becomes wrong, for a reader
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]
    more: tuple[tuple[str, str, str], ...] = ()  # the same elsewhere, where one guard has another

    @property
    def edits(self) -> tuple[tuple[str, str, str], ...]:
        """Each change: its file, the old text and the new one."""
        return (self.file, self.old, self.new), *self.more


def mutant(
    name: str,
    breaks: str,
    file: str,
    old: str,
    new: str,
    *tests: str,
    more: tuple[tuple[str, str, str], ...] = (),
) -> Mutant:
    """A mutant of the list."""
    return Mutant(name, breaks, file, old, new, tests, more)


def changed(mutant: Mutant, tree: Path) -> dict[Path, str]:
    """Return the files of a tree that a mutant changes, with their text then.

    Raises:
        ValueError: if an old text is not there once.
    """
    texts: dict[Path, str] = {}
    for name, old, new in mutant.edits:
        file = tree / name
        text = texts.get(file) or file.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"its old text occurs {text.count(old)} times")
        texts[file] = text.replace(old, new)
    return texts


def require_made(mutant: Mutant) -> None:
    """Fail unless each old text occurs once, and what the change makes can be read."""
    for file, text in changed(mutant, ROOT).items():
        assert text != file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            compile(text, str(file), "exec")


OBJECTIVE = [
    mutant(
        "prediction-scaled",
        "the fast path predicts 1 % too much",
        "smbfast/objective.py",
        "    return value_MD",
        "    return 1.01 * value_MD",
        EQUIVALENCE,
    ),
    mutant(
        "last-visible-off-by-one",
        "the trivial prediction copies the token after the last that is visible",
        "smbfast/objective.py",
        "return batch.target_M - (",
        "return batch.target_M + 1 - (",
        MEASURED,
    ),
    mutant(
        "masked-token-as-context",
        "before a masked first token of a future, the trivial prediction copies that token itself",
        "smbfast/objective.py",
        "p - 1) for",
        "p) for",
        "tests/test_equivalence.py::test_what_precedes_a_masked_first_token_is_the_context",
    ),
    mutant(
        "target-without-final-norm",
        "predictions are compared with states before the final norm",
        "smbfast/objective.py",
        "norm_weight_D, norm_eps = target.final_norm()",
        "norm_weight_D, norm_eps = None, target.final_norm()[1]",
        EQUIVALENCE,
    ),
    mutant(
        "jepa-mean-over-labels",
        "the JEPA loss is divided by the number of labels",
        "smbfast/run/step.py",
        "counts = (num_labels, num_masked, num_pairs)",
        "counts = (num_labels, num_labels, num_pairs)",
        THREE_STEPS,
    ),
    mutant(
        "backward-of-sft-alone",
        "the JEPA loss is reported and not trained",
        "smbfast/run/step.py",
        "torch.autograd.backward(present)",
        "torch.autograd.backward(present[:1])",
        THREE_STEPS,
    ),
]

AHEAD = [
    mutant(
        "death-is-censored",
        "a record that ends with a death is followed no further than one that is lost",
        "smbfast/data/horizons.py",
        "return (followed_BH | known[..., None]) & before_B[:, None]",
        "return followed_BH & before_B[:, None]",
        f"{JUDGE}::test_every_death_within_a_horizon_is_a_pair",
    ),
    mutant(
        "no-end-of-follow-up",
        "pairs that end after a record's last event are kept",
        "smbfast/data/horizons.py",
        'if horizons.censored == "none":',
        'if horizons.censored != "none":',
        f"{JUDGE}::test_pairs_are_usable_where_what_comes_is_known",
    ),
    mutant(
        "horizon-without-its-end",
        "what comes at the very end of a horizon is left out",
        "smbfast/data/pairs.py",
        'time_B.searchsorted(time_B[:, None] + horizons.spans_H, side="right")',
        'time_B.searchsorted(time_B[:, None] + horizons.spans_H, side="left")',
        f"{JUDGE}::test_a_window_has_the_pairs_tokens_and_classes_of_its_record",
    ),
    mutant(
        "codes-end-with-the-window",
        "codes to come are read as far as the window reaches",
        "smbfast/data/windows.py",
        "lines_ahead(whole, start, end, self.horizons.longest)",
        "lines_ahead(whole, start, end, 0)",
        f"{JUDGE}::test_a_window_has_the_pairs_tokens_and_classes_of_its_record",
    ),
    mutant(
        "end-of-a-bucket-that-goes-on",
        "a position stands in the middle of a moment",
        "smbfast/data/pairs.py",
        "if window.goes_on:",
        "if window.goes_on is None:",
        f"{JUDGE}::test_a_window_has_the_pairs_tokens_and_classes_of_its_record",
    ),
    mutant(
        "mean-with-the-position",
        "the last token that is known is averaged with those to come",
        "smbfast/objective.py",
        "row_S >= pairs.first_Q[own, None]",
        "row_S >= pairs.first_Q[own, None] - 1",
        AHEAD_STEPS,
    ),
    mutant(
        "scale-of-a-micro-batch",
        "each micro-batch moves the scale on which the next one compares",
        "smbfast/run/step.py",
        "        backward(terms)\n",
        "        backward(terms)\n        if scale:\n"
        '            scale.update(options["sums"], num_by_horizon)\n',
        AHEAD_STEPS,
    ),
    mutant(
        "first-step-without-a-scale",
        "the targets of the first step are compared as they are",
        "smbfast/run/step.py",
        "        scale.begin(sums)\n",
        "",
        AHEAD_STEPS,
    ),
    mutant(
        "scale-without-correction",
        "running means begin at nothing",
        "smbfast/model/horizon_scale.py",
        "own.count_H1, own.first_HD, own.second_HD)\n        moved",
        "own.count_H1.clamp_min(1), own.first_HD, own.second_HD)\n        moved",
        AHEAD_STEPS,
    ),
    mutant(
        "frozen-decoder-learns",
        "a predictor warm-up trains the decoder as well",
        "smbfast/objective.py",
        'with torch.no_grad() if freeze == "decoder" else nullcontext():',
        "with nullcontext():",
        f"{FROZEN}[whole-merged-tied-shared-mask]",
    ),
    mutant(
        "frozen-horizons-learn",
        "a frozen predictor learns the embeddings of its horizons",
        "smbfast/objective.py",
        "table_HD: Tensor = own_HD.detach() if frozen else own_HD",
        "table_HD: Tensor = own_HD",
        f"{FROZEN}[whole-merged-tied-shared-horizon]",
    ),
    mutant(
        "target-not-synced",
        "a phase that syncs goes on with the teacher of the phase before",
        "smbfast/run/loop.py",
        "if phase.w_jepa == 0 or (phase.sync and at.begins_phase):",
        "if phase.w_jepa == 0:",
        "tests/test_phases.py::test_a_run_of_five_phases_freezes_and_syncs",
    ),
    mutant(
        "horizon-behind-the-predictor",
        "the horizon is added to what is predicted, so that it and the patient never meet",
        "smbfast/objective.py",
        "predict(encoder, state_QD + F.embedding(pairs.horizon_Q, table_HD), frozen=frozen)",
        "predict(encoder, state_QD, frozen=frozen) + F.embedding(pairs.horizon_Q, table_HD)",
        AHEAD_STEPS,
    ),
    mutant(
        "code-that-comes-unweighted",
        "of a rare code only its absence weighs more",
        "smbfast/model/codes_head.py",
        "logit_Z = logit_Z * weight_HK.flatten()[place_Z]",
        "pass",
        f"{JUDGE}::test_fp32_loses_nothing_but_rounding[shared]",
    ),
    mutant(
        "nothing-to-predict-is-missed",
        "a target without spread, whose rounding nobody can predict, has an R2 far below 0",
        "smbfast/run/diagnostics.py",
        "if variance > NO_SPREAD else 0.0",
        "if variance > 0 else 0.0",
        "tests/test_diagnostics.py::test_a_target_that_equals_its_running_mean_has_r2_zero",
    ),
    mutant(
        "constant-encoder-is-healthy",
        "an online encoder that gives all patients the same state is no finding",
        "smbfast/reporting/verdict.py",
        'if kind != "target" and size < CONSTANT:',
        'if kind != "target" and size < 0 * CONSTANT:',
        "tests/test_health.py::test_a_constant_encoder_is_called_collapsed_at_the_next_evaluation",
    ),
    mutant(
        "alarm-in-small-print",
        "a task below chance is one sentence of the report among others",
        "smbfast/reporting/probes.py",
        '"alarms": [verdict for verdict in verdicts if verdict.below_chance],',
        '"alarms": [],',
        "tests/test_report.py::test_a_figure_below_chance_is_the_red_first_sentence",
    ),
    mutant(
        "bias-decays",
        "the bias of codes to come is pulled towards one half",
        "smbfast/run/optim.py",
        "not partial and not is_bias",
        "not partial",
        AHEAD_STEPS,
    ),
]

LOADER = [
    mutant(
        "mask-count-floored",
        "the number of masked tokens is cut off, not rounded",
        "smbfast/data/masking.py",
        "max(1, round(objective.mask_ratio",
        "max(1, int(objective.mask_ratio",
        MASKS,
    ),
    mutant(
        "label-after-repeated-demographics",
        "the first token after repeated demographics is not predicted",
        "smbfast/data/loader.py",
        "labels[: max(window.labels_from - 1, 0)]",
        "labels[: window.labels_from]",
        "tests/data/test_loader.py::test_labels[5]",
    ),
    mutant(
        "future-too-long",
        "a future goes one token beyond the horizon",
        "smbfast/data/masking.py",
        "cut + (objective.horizon",
        "cut + 1 + (objective.horizon",
        MASKS,
    ),
    mutant(
        "mask-of-every-step",
        "a window has the same masks whenever it has the same cut",
        "smbfast/data/masking.py",
        'generator(seed, "mask", step,',
        'generator(seed, "mask", 0,',
        "tests/data/test_loader.py::test_cuts_are_uniform_and_masks_differ_between_cuts",
    ),
    mutant(
        "cut-of-every-step",
        "a window is cut at the same place in every epoch",
        "smbfast/data/masking.py",
        '(seed, "cut", step,',
        '(seed, "cut", 0,',
        "tests/data/test_loader.py::test_cuts_are_uniform_and_masks_differ_between_cuts",
    ),
    mutant(
        "strata-share-an-order",
        "all strata of a step go through their windows in the same order",
        "smbfast/data/loader.py",
        '"stratum", epoch, s)',
        '"stratum", epoch)',
        "tests/data/test_loader.py::test_strata_and_epochs_have_orders_of_their_own",
    ),
    mutant(
        "jepa-on-any-window",
        "a phase with JEPA takes windows without a cut",
        "smbfast/data/masking.py",
        'return (jepa and objective.jepa == "mask") or objective.sft_labels == "future"',
        'return objective.sft_labels == "future"',
        "tests/data/test_loader.py::test_only_windows_with_a_cut_take_part_where_cuts_are_needed",
    ),
    mutant(
        "cut-flag-without-horizon",
        "a window whose futures within the horizon hold no event counts as one with a cut",
        "smbfast/data/masking.py",
        "if objective.horizon is None:",
        "if True:",
        "tests/data/test_windows.py::test_the_table_says_what_the_windows_are",
    ),
    mutant(
        "skeleton-read",
        "the shared forward reads the skeleton's ids, which the batch has set to 0",
        "smbfast/objective.py",
        "batch.segments, batch.replaced_R)",
        "batch.segments, batch.masked_M)",
        "tests/test_equivalence.py::test_every_setting",
    ),
    mutant(
        "tau-over-the-run",
        "the EMA's decay moves in phases without JEPA as well",
        "smbfast/run/optim.py",
        "        if phase.w_jepa > 0:\n            done +=",
        "        if True:\n            done +=",
        "tests/test_optim.py::test_tau_moves_at_steps_with_jepa_alone",
    ),
    mutant(
        "target-row-off-by-one",
        "a masked token is compared with the state of the token before it",
        "smbfast/batch.py",
        "rows[2].append(target_start + prefix + mask)",
        "rows[2].append(target_start + prefix + mask - 1)",
        THREE_STEPS,
    ),
    mutant(
        "target-read-one-short",
        "the target encoder does not read the last masked token",
        "smbfast/batch.py",
        "prefix + int(mask[-1]) + 1)",
        "prefix + int(mask[-1]))",
        THREE_STEPS,
    ),
    mutant(
        "micro-batch-over-capacity",
        "a micro-batch holds more tokens than it may",
        "smbfast/data/packing.py",
        "room_M >= tokens",
        "room_M > 0",
        "tests/data/test_packing.py::test_rows_are_full[0]",
    ),
    mutant(
        "shortest-rule-wins",
        "a code is in the section of the shortest rule that fits",
        "smbfast/data/sections.py",
        "sorted(ends, reverse=True)",
        "sorted(ends)",
        "tests/data/test_sections.py::test_the_longest_match_up_to_a_boundary_wins",
    ),
]

LEAKS = [
    mutant(
        "node-sees-the-next-moment",
        "a decision node sees events one microsecond after it",
        "smbfast/data/nodes.py",
        'node_time, side="right"',
        'node_time + 1, side="right"',
        MOMENT,
    ),
    mutant(
        "node-sees-its-whole-bucket",
        "the bucket of a decision node counts as complete",
        "smbfast/data/nodes.py",
        "bucket_time_B, serializer.bucket_key(time_K))",
        'bucket_time_B, serializer.bucket_key(time_K), side="right")',
        MOMENT,
    ),
    mutant(
        "count-sees-the-future",
        "code counts of a decision node hold the event after it",
        "smbfast/probing/counts.py",
        'time_K[node_J], side="right"',
        'time_K[node_J] + 1, side="right"',
        "tests/probing/test_counts.py::test_no_event_after_the_prediction_time_is_seen",
    ),
    mutant(
        "penalty-by-train",
        "the penalty of a probe is chosen on the rows it is fitted on",
        "smbfast/probing/logistic.py",
        "log_loss(logit_N[tuning_N], true_N[tuning_N])",
        "log_loss(logit_N[train_N], true_N[train_N])",
        "tests/probing/test_fits.py::test_the_binary_probe_is_the_protocol_spelled_out",
    ),
    mutant(
        "calibrated-by-all",
        "probabilities are calibrated on held-out rows too",
        "smbfast/probing/logistic.py",
        "calibrate(fit.score_N[tuning_N], true_N[tuning_N])",
        "calibrate(fit.score_N, true_N)",
        "tests/probing/test_fits.py::test_held_out_features_cannot_change_the_model",
    ),
    mutant(
        "scaled-by-all",
        "features are scaled by held-out rows too",
        "smbfast/probing/logistic.py",
        "scaled = scaling(train, standardise",
        "scaled = scaling(feature_NF, standardise",
        "tests/probing/test_fits.py::test_held_out_features_cannot_change_the_model",
    ),
    mutant(
        "wins-first",
        "the printed verdicts begin with what was won",
        "smbfast/judging/headline.py",
        '("worse", "undecided", "better", "unmeasured")',
        '("better", "undecided", "worse", "unmeasured")',
        "tests/judging/test_judge.py::test_verdicts_stand_worst_first_and_below_chance_leads",
    ),
    mutant(
        "weakest-rival",
        "the rival of a verdict is the worst baseline",
        "smbfast/judging/judge.py",
        "return max(values, key",
        "return min(values, key",
        "tests/judging/test_judge.py::test_primary_figures_are_of_first_nodes",
    ),
    mutant(
        "ties-after-breslow",
        "the Cox regression counts all hazards of a tie for each of its events",
        "smbfast/probing/survival.py",
        "part_E = self._share_E *",
        "part_E = 0 * self._share_E *",
        "tests/probing/test_fits.py::test_cox_is_the_regression_of_lifelines",
    ),
    mutant(
        "last-is-a-birth",
        "`--at=last` takes a birth that is recorded late for a patient's last event",
        "smbfast/data/moments.py",
        "np.where(birth_N, STATIC, batch.time_N)",
        "batch.time_N",
        "tests/test_serving.py::test_births_are_nobody_s_last_event",
    ),
    mutant(
        "rows-resampled",
        "the bootstrap draws label rows, not patients",
        "smbfast/statistics/resample.py",
        "    patient_N = np.unique(subject_N, return_inverse=True)[1]\n",
        "    patient_N = np.arange(len(subject_N))\n",
        "tests/statistics/test_resample.py::test_all_rows_of_a_patient_move_together",
    ),
    mutant(
        "competing-is-censored",
        "a competing event takes its row out of the risk set of Harrell's C",
        "smbfast/statistics/survival.py",
        "key_N[competing_N] = len(time_U)",
        "pass",
        "tests/statistics/test_survival.py::"
        "test_a_competing_event_keeps_a_row_in_the_risk_set_to_the_end",
    ),
    mutant(
        "censoring-before-events",
        "at a time with both, censorings leave the risk set before events",
        "smbfast/statistics/incidence.py",
        "risk_U = all_U[::-1].cumsum()[::-1] - ended_U",
        "risk_U = all_U[::-1].cumsum()[::-1]",
        "tests/statistics/test_survival.py::test_ipcw_metrics_are_those_of_scikit_survival",
    ),
    mutant(
        "competing-hazard-left-out",
        "the predicted incidence forgets those whom a competing event has taken",
        "smbfast/statistics/incidence.py",
        "free_MU = np.exp(-_exp(risk_M1 + log_own_U[:-1]) - other_U[:-1])",
        "free_MU = np.exp(-_exp(risk_M1 + log_own_U[:-1]))",
        "tests/statistics/test_survival.py::"
        "test_the_incidence_under_competing_events_is_that_of_the_cohort",
    ),
    mutant(
        "few-seeds-vary-too-little",
        "draws of few training seeds are not stretched",
        "smbfast/statistics/seeds.py",
        "known * np.sqrt(seeds / (seeds - 1)) * (count_BS - 1) / seeds",
        "(count_BS - 1) / seeds",
        "tests/test_bench_cohorts.py::test_drawn_seeds_vary_as_much_as_their_mean_is_uncertain",
    ),
]

DECODER = [
    mutant(
        "query-norm-of-keys",
        "Qwen3 norms queries with the weight of its keys",
        "smbfast/model/decoder.py",
        "(attention.q_norm, attention.k_norm)",
        "(attention.k_norm, attention.k_norm)",
        EQUIVALENCE,
    ),
    mutant(
        "positions-of-the-row",
        "RoPE counts along the packed row, not along each branch",
        "smbfast/model/decoder.py",
        "position_T[None])",
        "position_T.new_ones(len(position_T)).cumsum(0)[None])",
        EQUIVALENCE,
    ),
    mutant(
        "mlp-residual-dropped",
        "a layer returns its MLP alone",
        "smbfast/model/decoder.py",
        "return hidden_TD, _mlp(",
        "return 0.0 * hidden_TD, _mlp(",
        EQUIVALENCE,
    ),
    mutant(
        "adapted-linear-without-bias",
        "a linear with an adapter loses its bias",
        "smbfast/model/decoder.py",
        "bias=[_base(m).bias for m in adapted] if biased else None",
        "bias=None",
        "tests/test_shared_step.py::test_linears_with_bias[lora-merged-tied-targets0]",
    ),
    mutant(
        "pool-of-the-whole-trunk",
        "a pool of a node reaches to the end of its trunk",
        "smbfast/probing/pooling.py",
        "seen_ED[np.searchsorted(end_E, prefix)]",
        "seen_ED[-1]",
        "tests/test_embed.py::test_nothing_a_node_does_not_see_changes_a_bit_of_it",
    ),
    mutant(
        "pool-chosen-on-held-out",
        "held-out patients decide which pool a run takes",
        "smbfast/probing/read_out.py",
        'np.isin(labels.split_N, ("train", "tuning"))) for labels in tasks]\n',
        'labels.split_N != "tuning") for labels in tasks]\n'
        "    for labels in read:\n"
        '        labels.split_N[labels.split_N == "held_out"] = "tuning"\n',
        "tests/probing/test_read_out.py::test_held_out_patients_have_no_say",
    ),
    mutant(
        "held-out-in-the-same-forwards",
        "held-out patients share forwards with those of tuning, whose bits they change",
        "smbfast/probing/embedding.py",
        "window.nodes[0].held_out",
        "False",
        "tests/test_embed.py::test_held_out_patients_have_forwards_of_their_own",
    ),
    mutant(
        "choice-not-recorded",
        "the model does not say which pool its run has chosen",
        "smbfast/run/probes.py",
        "        _settle(run, target, pool, choice)\n",
        "",
        "tests/test_embed.py::test_a_run_chooses_its_pool_and_the_model_says_which",
    ),
    mutant(
        "untrained-with-trained-rows",
        "the untrained encoder reads the token rows that LoRA has trained",
        "smbfast/model/backbone.py",
        "if adapter is None or (row_RD is None and table.disable_adapters):",
        "if adapter is None:",
        "tests/test_embed.py::test_the_untrained_encoder_is_that_of_a_second_load",
    ),
    mutant(
        "packed-embeddings-in-fp32",
        "the packed forward of a model that computes in bf16 reads fp32 embeddings",
        "smbfast/model/backbone.py",
        "return self._narrow(table(ids_T))",
        "return table(ids_T)",
        "tests/test_bf16_compute.py::test_a_forward_is_that_of_the_model_in_bf16[llama-True]",
    ),
    mutant(
        "bins-alike",
        "all bins of a code start as one vector",
        "smbfast/model/vocabulary.py",
        "math.pi * place_R1 * order_K",
        "0 * place_R1 * order_K",
        "tests/test_vocabulary.py::test_rows_of_one_code_differ_in_bf16",
    ),
    mutant(
        "adapter-without-rows",
        "an adapter that does not know the new tokens leaves their rows frozen",
        "smbfast/model/backbone.py",
        "[*rows[name], *new_tokens]",
        "rows[name]",
        "tests/test_vocabulary.py::test_an_adapter_without_the_new_rows_trains_them[True-own0]",
    ),
]

TARGET = [
    mutant(
        "tau-complement",
        "the target follows with 1 - tau in the place of tau",
        "smbfast/model/averages.py",
        "_move(self._average, self.sources, tau,",
        "_move(self._average, self.sources, 1 - tau,",
        "tests/test_target.py::test_tau_of_zero_is_the_online_encoder_and_of_one_changes_nothing"
        "[merged]",
    ),
    mutant(
        "token-rows-not-averaged",
        "the target reads the online encoder's trained token rows",
        "smbfast/model/target.py",
        "[*sources, Source(ROWS, rows[1])] if rows else sources",
        "sources",
        "tests/test_objective.py::test_the_target_covers_every_trained_weight_of_the_trunk",
    ),
    mutant(
        "tracked-rank-one-less",
        "a tracked average keeps one column less than asked",
        "smbfast/model/averages.py",
        "min(rank * r, n, k)",
        "min(rank * r, n, k) - 1",
        "tests/test_target.py::test_memory_is_foretold",
    ),
    mutant(
        "new-adapter-not-weighted",
        "a tracked average takes the online adapter in whole",
        "kernels/smbkernels/tracked_ema.py",
        "mul_(1 - tau)",
        "mul_(1)",
        "tests/ops/test_tracked_ema.py::test_append_is_the_average[0.9]",
    ),
    mutant(
        "truncation-from-anywhere",
        "block power iteration begins at noise, not at the columns of the last truncation",
        "kernels/smbkernels/tracked_ema.py",
        "start_MQR.scatter_(1, order_MR[:, None], 1.0)",
        "start_MQR.scatter_(1, order_MR[:, None], 0.0)",
        "tests/ops/test_tracked_ema.py::"
        "test_block_power_is_what_it_says_and_its_bound_is_exact[12-1.0]",
    ),
    mutant(
        "truncation-waits",
        "the Cholesky factor of a truncation is checked, for which a GPU is waited for",
        "kernels/smbkernels/tracked_ema.py",
        "torch.linalg.cholesky_ex(matrix_MQQ + torch.diag_embed(added_MQ))[0]",
        "torch.linalg.cholesky(matrix_MQQ + torch.diag_embed(added_MQ))",
        "tests/test_shared_step.py::test_nothing_waits_for_the_device[lora-tracked-tied]",
    ),
    mutant(
        "lent-weights-not-put-back",
        "after a forward of the target the online encoder has the target's weights",
        "smbfast/model/target.py",
        "parameters[key] = own",
        "parameters[key] = parameters[key]",
        "tests/test_target.py::test_every_module_has_its_own_parameters_again"
        "[False-lora-tracked-tied]",
    ),
    mutant(
        "head-gradient-beside-its-label",
        "the kernel of the cross-entropy subtracts 1 in the column after the label's",
        "kernels/smbkernels/cross_entropy/triton.py",
        "tl.where(start + offs == label,",
        "tl.where(start + offs == label + 1,",
        "tests/ops/test_linear_cross_entropy_triton.py::test_a_label_in_any_column",
    ),
    mutant(
        "tf32-for-all-that-follows",
        "the switch to TF32 stays on after the predictor",
        "smbfast/model/tf32.py",
        "matmul.allow_tf32, matmul.fp32_precision = before",
        "pass",
        "tests/test_tf32.py::test_the_switch_is_turned_back_after_an_error",
    ),
    mutant(
        "target-not-updated",
        "the target stays where it began",
        "smbfast/run/step.py",
        "target.update(tau)",
        "target.update(1.0)",
        THREE_STEPS,
    ),
]

UPDATE = [
    mutant(
        "clip-dropped",
        "gradients are never clipped",
        "smbfast/run/step.py",
        "clip_grad_norm_(self.parameters, self.clip)",
        'clip_grad_norm_(self.parameters, float("inf"))',
        THREE_STEPS,
    ),
    mutant(
        "bad-gradient-not-skipped",
        "a gradient that is not finite goes into the weights",
        "smbfast/run/step.py",
        "self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()",
        "self.optimizer.found_inf = torch.zeros_like(grad_norm)",
        "tests/test_step.py::test_a_gradient_that_is_not_finite_moves_no_weight_and_no_moment[nan]",
    ),
    mutant(
        "warm-up-off-by-one",
        "the first step of a phase has a learning rate of 0",
        "smbfast/run/optim.py",
        "(at.phase_step + 1) / warmup",
        "at.phase_step / warmup",
        "tests/test_optim.py::test_warm_up_and_cosine_by_hand",
    ),
    mutant(
        "weight-decay-on-adapters",
        "LoRA's factors are decayed",
        "smbfast/run/optim.py",
        '("lora_", "trainable_tokens")',
        '("trainable_tokens",)',
        "tests/test_optim.py::test_weight_decay_spares_lora_norms_biases_and_the_mask_vector[True]",
    ),
]

RESUMING = [
    mutant(
        "second-moments-forgotten",
        "a resumed AdamW begins with second moments of zero",
        "smbfast/run/checkpoint.py",
        '"exp_avg_sq": tensors',
        '"exp_avg_sq": 0 * tensors',
        "tests/test_checkpoint.py::test_a_loaded_checkpoint_takes_the_next_step_that_was_saved[merged]",
    ),
    mutant(
        "digest-not-compared",
        "a damaged file of the right size is trusted",
        "smbfast/base/files.py",
        "sha256(file) != digest",
        "not digest",
        "tests/test_checkpoint.py::test_one_damaged_bit_is_passed_over[state.safetensors]",
    ),
    mutant(
        "micro-batch-of-today",
        "a resumed run, and its preflight, take the micro-batch that would fit today",
        "smbfast/run/open_run.py",
        "encoder, progress.micro_tokens, num_horizons)",
        "encoder, None, num_horizons)",
        "tests/test_check.py::test_a_resumed_run_is_predicted_with_its_own_micro_batches",
    ),
    mutant(
        "changed-setting-accepted",
        "a run goes on with other settings",
        "smbfast/run/folder.py",
        "for k, a, b in pairs if a != b]",
        "for k, a, b in pairs if a is None]",
        "tests/test_before_training.py"
        "::test_a_folder_that_holds_a_run_of_other_settings_is_refused",
    ),
]

KERNELS = [
    mutant(
        "far-call-alone-is-differentiated",
        "the prefix call's backward starts from its own output instead of the merged one",
        "kernels/smbkernels/attention/two_calls.py",
        "part_of(lse_HT, rows, 1))",
        "part_of(lse_HT, rows, 1).clone())",
        "tests/ops/test_flash.py::test_two_calls_are_exact",
    ),
    mutant(
        "prefixes-in-place-shifted",
        "of prefixes that are read in place, the last key is missed and the next begins early",
        "kernels/smbkernels/attention/two_calls.py",
        "with_gaps.append((num, _size(f.key)))",
        "with_gaps.append((num, _size(f.key) - 1))",
        "tests/ops/test_flash.py::test_two_calls_are_exact",
    ),
    mutant(
        "prefix-gradient-of-the-last-branch",
        "keys that several branches see get the gradient of the last one alone",
        "kernels/smbkernels/attention/two_calls.py",
        "part_of(total_TNC, rows).add_(part)",
        "part_of(total_TNC, rows).copy_(part)",
        "tests/ops/test_flash.py::test_two_calls_are_exact",
        "tests/ops/test_cudnn.py::test_dense_calls_are_exact",
    ),
    mutant(
        "runs-of-other-lengths",
        "segments of two lengths are one dense call",
        "kernels/smbkernels/attention/cudnn.py",
        "if runs and runs[-1][1] == r[LENGTH]:",
        "if runs and runs[-1][1] >= r[LENGTH]:",
        "tests/ops/test_cudnn.py::test_dense_calls_are_exact",
    ),
    mutant(
        "branch-sees-a-token-more",
        "a branch sees the first token of the future that it predicts",
        "kernels/smbkernels/attention/sdpa.py",
        "seen = [x.narrow(2, trunk_start, prefix)",
        "seen = [x.narrow(2, trunk_start, prefix + 1)",
        ATTENTION,
    ),
    mutant(
        "cpp-branch-sees-a-token-more",
        "on a CPU a branch sees the first token of the future that it predicts",
        "csrc/timeline_attention.cpp",
        "body(family.segments[0].offset + j, s.prefix - j, false)",
        "body(family.segments[0].offset + j, s.prefix + 1 - j, false)",
        "tests/ops/test_timeline_attention_cpp.py::test_values_and_gradients",
    ),
    mutant(
        "last-branch-alone-counts",
        "a trunk's keys get the gradient of one branch only",
        "kernels/smbkernels/attention/sdpa.py",
        "prefix).add_(dk.squeeze(1))",
        "prefix).copy_(dk.squeeze(1))",
        ATTENTION,
    ),
    mutant(
        "lora-gradient-without-scale",
        "gradients of LoRA's input and A lack alpha / r",
        "kernels/smbkernels/lora/fused.py",
        "b[i].to(dtype), scale[i])",
        "b[i].to(dtype), 1.0)",
        "tests/ops/test_lora_linear.py::test_fused_backward_by_finite_differences",
    ),
    mutant(
        "padding-is-not-cut",
        "a product by oneDNN has the rows that were added to it",
        "kernels/smbkernels/matmul/products.py",
        "return x_PN if len(x_PN) == T else",
        "return x_PN if len(x_PN) >= T else",
        "tests/ops/test_linear.py::test_values_and_gradients[all-onednn-1000-96-256]",
    ),
    mutant(
        "padding-is-not-zero",
        "a weight's gradient by oneDNN sums rows that were never written",
        "kernels/smbkernels/matmul/products.py",
        "x_PK[T:].zero_()",
        "x_PK[T:].fill_(1.0)",
        "tests/ops/test_linear.py::test_values_and_gradients[all-onednn-1000-96-256]",
    ),
    mutant(
        "amx-is-taken-for-fp32",
        "oneDNN multiplies where it may compute in bf16",
        "kernels/smbkernels/matmul/products.py",
        "if torch.cpu._is_amx_tile_supported():",
        "if False:",
        "tests/ops/test_linear.py::test_amx_is_refused",
    ),
    mutant(
        "resumed-run-measures-again",
        "a resumed run multiplies by what is fastest now, not by what it began with",
        "smbfast/run/matmul.py",
        "if earlier or step:",
        "if not earlier and step:",
        "tests/test_matmul.py::test_what_a_run_began_with_is_kept",
    ),
    mutant(
        "embeddings-by-another-library",
        "nodes are embedded by torch's own products, not by those of the training",
        "smbfast/run/loop.py",
        "    with run.matmul.used():\n        probe_run(run, target,",
        "    if True:\n        probe_run(run, target,",
        "tests/test_matmul.py::test_a_run_says_and_saves_what_it_measured",
    ),
    mutant(
        "last-chunk-forgotten",
        "the head's gradient lacks the last chunk of rows",
        "kernels/smbkernels/cross_entropy/chunked.py",
        "if needs_weight:",
        "if needs_weight and chunk.stop < N:",
        "tests/ops/test_linear_cross_entropy.py::test_strided_inputs",
    ),
    mutant(
        "layer-norm-eps",
        "targets are normed with an eps of 1e-6",
        "kernels/smbkernels/jepa_mse/op.py",
        "LAYER_NORM_EPS = 1e-5",
        "LAYER_NORM_EPS = 1e-6",
        "tests/ops/test_references.py::test_masked_jepa_mse[rows2-True]",
    ),
    mutant(
        "layer-norm-eps-in-cpp",
        "on a CPU targets are normed with an eps of 1e-6",
        "csrc/masked_jepa_mse.cpp",
        "LAYER_NORM_EPS = 1e-5",
        "LAYER_NORM_EPS = 1e-6",
        "tests/ops/test_cpp_kernels.py::test_statistics_of_a_long_row_far_from_zero",
    ),
    mutant(
        "gradient-of-the-stream-dropped-in-cpp",
        "on a CPU a norm's gradient is written without that of the residual stream",
        "csrc/layer.cpp",
        "if (other_D != nullptr) {",
        "if (other_D != nullptr && d < 0) {",
        "tests/ops/test_add_rms_norm.py::test_values_and_gradients[cpp-3-7-sum-frozen]",
    ),
    mutant(
        "gradient-of-the-stream-dropped-in-triton",
        "on a GPU a norm's gradient is written without that of the residual stream",
        "kernels/smbkernels/norm/triton.py",
        "dx += tl.load(other_start",
        "dx += 0.0 * tl.load(other_start",
        "tests/ops/test_add_rms_norm.py::test_values_and_gradients[triton-3-7-sum-frozen]",
    ),
    mutant(
        "weight-gradient-of-one-block",
        "on a CPU the gradient of a norm's weight is that of the first 64 rows",
        "csrc/layer.cpp",
        "block < shares_BW.size(0)",
        "block < std::min<int64_t>(1, shares_BW.size(0))",
        "tests/ops/test_add_rms_norm.py"
        "::test_several_blocks_of_rows_have_a_share_of_the_weight_s_gradient[cpp]",
    ),
    mutant(
        "heads-turned-back-the-wrong-way-in-cpp",
        "on a CPU gradients of RoPE are turned the way that values are",
        "csrc/layer.cpp",
        "low * load(at.cos + c, n) + high * load(at.sin + half + c, n)",
        "low * load(at.cos + c, n) - high * load(at.sin + half + c, n)",
        "tests/ops/test_qk_norm_rope.py::test_values_and_gradients[cpp-3-3-1-6-none]",
    ),
    mutant(
        "slope-of-silu-without-its-gate",
        "on a CPU the gradient of silu is the sigmoid alone",
        "csrc/layer.cpp",
        "share * (Pair(1.f) + g * (Pair(1.f) - share))",
        "share * (Pair(1.f) + Pair(0.f) * (Pair(1.f) - share))",
        "tests/ops/test_swiglu.py::test_values_and_gradients[cpp-3-7]",
    ),
    mutant(
        "halves-to-even-in-cpp",
        "high halves of averages round a tie to even: the remainder overflows",
        "csrc/ema_update.cpp",
        "(kept + 0x8000u) >> 16",
        "(kept + 0x7FFFu + ((kept >> 16) & 1u)) >> 16",
        "tests/ops/test_ema_update.py::test_an_exact_tie_rounds_up[cpp]",
    ),
    mutant(
        "halves-to-even-in-triton",
        "high halves of averages round a tie to even: the remainder overflows",
        "kernels/smbkernels/ema/triton.py",
        "(bits_NK + 0x8000) >> 16",
        "(bits_NK + 0x7FFF + ((bits_NK >> 16) & 1)) >> 16",
        "tests/ops/test_ema_update.py::test_an_exact_tie_rounds_up[triton]",
    ),
    mutant(
        "explicit-choice-falls-back",
        "a backend that was asked for and cannot run gives way to the reference",
        "kernels/smbkernels/operation.py",
        "            if reason:\n",
        "            if reason:\n                return self.reference(*args, **kwargs)\n"
        "            if reason:\n",
        "tests/ops/test_registry.py::test_an_explicit_choice_never_falls_back",
    ),
]

ON_A_GPU = [
    mutant(
        "spans-through-the-host",
        "the host reads where each mean begins, in every micro-batch",
        "smbfast/objective.py",
        "row_S >= pairs.first_Q[own, None]",
        "row_S >= pairs.first_Q.cpu().to(row_S.device)[own, None]",
        "tests/test_fake_gpu.py::test_losses_that_look_ahead_wait_for_nothing",
    ),
    mutant(
        "loss-read-in-a-step",
        "the host waits for the GPU in every micro-batch",
        "smbfast/objective.py",
        "sft = _sft(encoder, hidden_TD, batch, sft_scale)",
        "sft = _sft(encoder, hidden_TD, batch, sft_scale)\n        sft.item()",
        "tests/test_fake_gpu.py::test_nothing_but_log_lines_waits_for_the_gpu",
    ),
    mutant(
        "attention-through-the-host",
        "every layer copies the output of its attention to the CPU and back",
        "smbfast/model/decoder.py",
        "out_THC[..., :C].flatten(1)",
        "out_THC[..., :C].flatten(1).cpu().to(x_TD.device)",
        "tests/test_fake_gpu.py::test_nothing_but_log_lines_waits_for_the_gpu",
    ),
    mutant(
        "sum-begun-on-the-cpu",
        "a scalar is made on the CPU in every step, and its copy waits",
        "smbfast/run/step.py",
        "total = [torch.zeros((), device=device)]",
        "total = [torch.zeros(()).to(device)]",
        "tests/test_fake_gpu.py::test_no_copy_to_the_gpu_waits",
    ),
    mutant(
        "needless-kernel-in-a-layer",
        "every layer has a kernel more",
        "smbfast/model/decoder.py",
        '    if recompute == "mlp":\n',
        '    hidden_TD = hidden_TD + 0\n    if recompute == "mlp":\n',
        "tests/test_fake_gpu.py::test_kernels_and_bytes_are_within_budget",
    ),
]

TOGETHER = "tests/test_ranks.py::test_ranks_train_as_one_process[2-400-mask-text-merged-full]"
AHEAD_TOGETHER = (
    "tests/test_ranks.py::test_ranks_train_as_one_process[2-4096-horizon-text-tracked-full]"
)
UNLIKE = "tests/test_ranks.py::test_what_ranks_have_otherwise_is_named"
RANKS = [
    mutant(
        "counts-of-a-rank",
        "each rank divides its losses by what it has itself to predict",
        "smbfast/run/loop.py",
        "scales = LossScales.of_batch(phase, batch)",
        "own = batch.micro_batches\n            scales = LossScales.of(phase.w_sft, phase.w_jepa, "
        "sum(m.num_labels for m in own), sum(m.num_masked for m in own))",
        TOGETHER,
    ),
    mutant(
        "zeros-for-no-gradient",
        "a predictor without gradients decays where ranks train together",
        "smbfast/run/ranks.py",
        "zip(parameters, any_has, strict=True) if is_live]",
        "zip(parameters, any_has, strict=True)]",
        TOGETHER,
    ),
    mutant(
        "scale-of-a-rank",
        "the scale of each rank moves by its own pairs",
        "smbfast/run/step.py",
        '        ranks.add(options["sums"].tensors)\n',
        "",
        AHEAD_TOGETHER,
    ),
    mutant(
        "first-scale-of-a-rank",
        "the first step of a horizon compares on a scale of each rank's own pairs",
        "smbfast/run/step.py",
        "        ranks.add(sums.tensors)\n",
        "",
        AHEAD_TOGETHER,
    ),
    mutant(
        "micro-tokens-of-a-rank",
        "each rank plans with the tokens that fit on its own device",
        "smbfast/run/open_run.py",
        "tokens = ranks.least(tokens)",
        "ranks.least(tokens)",
        "tests/test_ranks.py::test_all_ranks_plan_with_the_least_that_fits",
    ),
    mutant(
        "shards-not-compared",
        "ranks train together on other shards",
        "smbfast/run/open_run.py",
        '            "token shards": shards_digest(prepared),\n',
        "",
        f"{UNLIKE}[shards]",
    ),
    mutant(
        "plan-not-compared",
        "ranks that have planned a step otherwise train some windows twice",
        "smbfast/run/ranks.py",
        "if not greatest.equal(255 - least):",
        "if len(greatest) != len(least):",
        f"{UNLIKE}[plan]",
    ),
    mutant(
        "weights-not-compared",
        "ranks go on with weights that differ",
        "smbfast/run/evaluation.py",
        "require_same_state(run.ranks, run.encoder, run.optimizer, target)",
        "pass",
        f"{UNLIKE}[weights]",
        more=(
            (
                "smbfast/run/open_run.py",
                "        require_same_state(self.ranks, self.encoder, self.optimizer, target)\n",
                "",
            ),
        ),
    ),
]

GPU_BENCH = [
    mutant(
        "cut-line-takes-the-next",
        "a record that follows one that was cut off is lost with it",
        "bench/gpu/journal.py",
        '(b"\\n" if cut else b"")',
        'b""',
        "tests/test_bench_gpu.py::test_a_line_that_was_cut_off_is_left_behind",
    ),
    mutant(
        "wrong-backend-is-used",
        "stages after the first use the backend that it refused",
        "bench/gpu/child.py",
        "if b not in backends",
        "if b in backends",
        "tests/test_bench_gpu.py::test_a_refused_backend_gives_way_to_the_next",
    ),
    mutant(
        "hanging-item-is-nobody-s",
        "an item over its own limit ends its stage",
        "bench/gpu/driver.py",
        'return None, slack * item["limit"]',
        "return None, 0.0",
        "tests/test_bench_gpu.py::test_an_item_over_its_own_limit_is_named",
    ),
]
SHARING = [
    mutant(
        "fetched-unverified",
        "a file of the Hub that is not the one of the manifest is loaded",
        "smbfast/run/hub.py",
        "        verify_folder(manifest.parent)\n",
        "        pass\n",
        "tests/test_hub.py::test_what_is_absent_or_has_changed_is_refused",
    ),
    mutant(
        "any-file-fetched",
        "a manifest of a stranger says what is written into the cache",
        "smbfast/run/hub.py",
        "        if not MODEL_FILES.fullmatch(file):",
        "        if False:",
        "tests/test_hub.py::test_a_manifest_that_names_anything_else_is_refused_before_it_is_asked_for",
    ),
    mutant(
        "small-cell-in-card",
        "a card shows figures of ten patients with the outcome",
        "smbfast/run/model_card.py",
        "return min(positives, rows - positives) > FEW",
        "return min(positives, rows - positives) >= FEW",
        "tests/test_share.py::test_figures_of_a_card_have_intervals_and_no_small_cell",
    ),
    mutant(
        "rare-entries-pushed",
        "a vocabulary of fewer than ten patients goes to the Hub",
        "smbfast/run/shipping.py",
        "least < _MIN_PATIENTS:",
        "least < 1:",
        "tests/test_share.py::test_what_must_not_go_out_is_refused[a rare entry]",
    ),
    mutant(
        "pushed-to-a-public-place",
        "a model goes into a repository that everybody may read",
        "smbfast/run/shipping.py",
        "if not settings.public and is_private is not True:",
        "if False:",
        "tests/test_share.py::test_a_public_repository_is_no_private_one",
    ),
    mutant(
        "adapter-on-any-backbone",
        "an adapter goes on with weights that it was not trained on",
        "smbfast/run/identity.py",
        "            check_digest(read_json(Path(adapter) / RECORD), path, digest)",
        "            pass",
        "tests/test_identity.py::"
        "test_an_adapter_goes_on_with_the_weights_that_it_was_trained_on_alone",
    ),
]
# what was once wrong, as docs/reliability.md names it, brought back
HARM, IDENTITY = "tests/test_harm.py", "tests/test_identity.py"
SWAP = f"{IDENTITY}::test_a_swap_is_refused_by_name_and_nothing_is_written"
RECORD = f"{IDENTITY}::test_a_record_is_checked_before_anything_is_made_of_it"
FOREIGN = f"{IDENTITY}::test_a_final_folder_of_anyone_is_refused_in_one_line"
KILLED = f"{HARM}::test_after_a_kill_there_is_the_old_or_the_new_and_the_next_write_clears"
SMALL = "tests/probing/test_probe.py::test_small_counts_are_in_no_output"
FINISHED = f"{IDENTITY}::test_finished_is_what_has_a_whole_final_folder"
WEIGHTS = "tests/test_before_training.py::test_weights_that_are_no_good_are_not_the_kernels_fault"
FUZZED = "tests/test_fuzzed.py::test_what_once_broke_a_reader_is_refused"
DEFECTS = [
    mutant(
        "defect-d1-events-by-a-thread",
        "TensorBoard's events go through a thread, which ends silently at the first failed write",
        "smbfast/run/board.py",
        'self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")',
        'self._writer = __import__("tensorboardX").event_file_writer.EventFileWriter('
        "str(folder), 1000)\n            self._writer.write_event = self._writer.add_event",
        f"{HARM}::test_tensorboard_whose_disk_is_full_one_day_says_so_once",
    ),
    mutant(
        "defect-d2-tokens-by-occurrence",
        "what one patient's texts repeat becomes a token",
        "smbfast/data/tokens.py",
        "if num_texts[word] >= MIN_SUBJECTS",
        "if uses[word] >= MIN_SUBJECTS",
        "tests/data/test_tokens.py::test_every_token_lies_in_a_word_that_ten_texts_have",
    ),
    mutant(
        "defect-d2-files-of-the-umask",
        "the model, its tokenizer and all records can be read by other users",
        "smbfast/base/entry.py",
        "before = os.umask(0o077)",
        "before = os.umask(0o022)",
        f"{HARM}::test_files_are_for_their_writer_alone",
    ),
    mutant(
        "defect-d3-data-by-size",
        "other data of the same size are taken for those that were prepared",
        "smbfast/data/meds.py",
        "parts.append((split, names, self._source.digests_of(files)))",
        "parts.append((split, names, [file.stat().st_size for file in files]))",
        f"{SWAP}[data of equal sizes]",
    ),
    mutant(
        "defect-d4-no-mask-no-word",
        "a phase without a single masked position is not said to have none",
        "smbfast/reporting/signals.py",
        "if weight > 0 and without:",
        "if weight > 0 and without < 0:",
        "tests/test_signals.py::test_a_phase_that_trains_nothing_is_warned_of[no mask]",
    ),
    mutant(
        "defect-d4-nothing-to-predict",
        "a run without a token to predict begins, and ends as any other",
        "smbfast/run/data_card.py",
        "    return refusals[:1]  # of further",
        "    return []  # of further",
        "tests/test_data_card.py::test_a_phase_without_a_token_to_predict_is_refused",
    ),
    mutant(
        "defect-d4-phase-without-signal",
        "a phase in which no step had a signal ends as any other",
        "smbfast/reporting/signals.py",
        "if not steps or max(nothing, zero + skipped) < steps:",
        "if not steps or True:",
        "tests/test_signals.py::test_a_phase_without_any_signal_says_why",
    ),
    mutant(
        "defect-d4-a-dead-model",
        "a loss far above its start, with a gradient of exactly 0, is not said",
        "smbfast/reporting/signals.py",
        "        said: list[Said] = [*self._lacking(weights), *self._gradients()]\n",
        "        said: list[Said] = [*self._lacking(weights)]\n",
        "tests/test_signals.py::test_a_phase_that_trains_nothing_is_warned_of[gradient 0]",
    ),
    mutant(
        "defect-d4-a-loss-of-millions",
        "a loss far above its start is not said",
        "smbfast/reporting/signals.py",
        "FAR = 2.0",
        "FAR = 1e9",
        "tests/test_signals.py::test_a_phase_that_trains_nothing_is_warned_of"
        "[loss far above its start]",
    ),
    mutant(
        "defect-d4-kernels-blamed",
        "a model that has diverged is said to be the fault of a kernel",
        "smbfast/run/startup.py",
        "        _require_trainable(encoder, expected[0], phase, step)\n",
        "",
        f"{WEIGHTS}[1000.0-and a guess has 4\\\\.11]",
    ),
    mutant(
        "defect-d5-other-base-weights",
        "LoRA goes on over base weights that have changed",
        "smbfast/run/identity.py",
        '    "backbone": "the weights of model.path",\n',
        "",
        f"{SWAP}[base weights]",
    ),
    mutant(
        "defect-d5-adapter-on-other-weights",
        "an adapter is loaded onto other base weights than it was trained on",
        "smbfast/run/checkpoint.py",
        "if warning := check_weights(record, path, cache if cache.is_file() else None):",
        "if warning := None:",
        f"{FOREIGN}[another base]",
    ),
    mutant(
        "defect-d5-checkpoints-of-another-run",
        "a run goes on from checkpoints of another run",
        "smbfast/run/identity.py",
        '        if then.get("run") != self.run:\n',
        "        if False:\n",
        f"{SWAP}[all checkpoints of a twin]",
    ),
    mutant(
        "defect-d5-settings-gone",
        "a run whose config.toml is gone goes on with any settings",
        "smbfast/run/folder.py",
        'if resume != "restart" and (left := _left_by_a_run(run)):',
        "if (left := None):",
        f"{SWAP}[config.toml gone]",
        more=(
            (
                "smbfast/run/identity.py",
                '    for name in ("config.toml", "run.json"):',
                '    for name in ("run.json",):',
            ),
            (
                "smbfast/run/identity.py",
                "        differences += changed_settings(recorded, self.settings)\n",
                "        changed_settings(recorded, self.settings)\n",
            ),
        ),
    ),
    mutant(
        "defect-d5-all-damaged-begins-again",
        "a run whose checkpoints are all damaged begins again at step 0 in silence",
        "smbfast/run/identity.py",
        "    if newest is None:\n",
        "    if newest is None:\n        return None\n    if newest is None:\n",
        f"{SWAP}[all checkpoints damaged]",
    ),
    mutant(
        "defect-d5-an-empty-manifest-vouches",
        "a manifest that names no file vouches for any",
        "smbfast/base/files.py",
        "    if not entries:\n",
        "    if False:\n",
        f"{IDENTITY}::test_an_emptied_manifest_is_damage_and_the_older_checkpoint_is_used",
        more=(
            (
                "smbfast/run/checkpoint.py",
                "    require_files(verify_folder(folder), folder, "
                '("state.safetensors", "record.json"))\n',
                "    verify_folder(folder)\n",
            ),
        ),
    ),
    mutant(
        "defect-d5-any-format",
        "a manifest of another format is read as one of this",
        "smbfast/base/files.py",
        "    if version != FORMAT:\n",
        "    if version is None:\n",
        f"{SWAP}[manifest of format 2]",
    ),
    mutant(
        "defect-d6-no-lock",
        "two runs write into one folder",
        "smbfast/base/locks.py",
        "    handle = _taken(folder, what)\n",
        "    handle = None\n",
        f"{HARM}::test_a_folder_has_one_writer_who_is_named_and_a_kill_frees_it[alone]",
    ),
    mutant(
        "defect-d6-training-takes-no-lock",
        "a run trains in a folder that another one has",
        "smbfast/train.py",
        'ranks.decide(lambda: stack.enter_context(locked(settings.folder, "smbfast.train")))',
        "pass",
        "tests/test_before_training.py::test_a_folder_in_use_is_left_to_the_run_that_has_it",
    ),
    mutant(
        "defect-d7-families-by-events",
        "a family of codes that one patient has often is printed",
        "smbfast/data/unmapped.py",
        "        return len(self.subjects[name]) >= MIN_SUBJECTS",
        "        return self.events[name] >= MIN_SUBJECTS",
        "tests/data/test_unmapped.py::test_a_family_of_one_subject_is_in_no_record",
    ),
    mutant(
        "defect-d7-complements-printed",
        "what a count leaves of its whole is printed though it is small",
        "smbfast/judging/small_cells.py",
        'positives = {s: hidden(n, small, rows[s]) for s, n in task["positives"].items()}',
        'positives = {s: hidden(n, small) for s, n in task["positives"].items()}',
        SMALL,
    ),
    mutant(
        "defect-d7-raw-counts-recorded",
        "probe.json has the counts that the page hides",
        "smbfast/probing/run_probe.py",
        "    tasks = [without_small_cells(task, config.small_cells) for task in tasks]\n",
        "",
        SMALL,
    ),
    mutant(
        "defect-d8-finished-by-status",
        "a run is finished because its status says so, though its model is gone",
        "smbfast/run/folder.py",
        "    problem = _final_problem(run) if done else None\n",
        "    problem = None\n",
        FINISHED,
    ),
    mutant(
        "defect-d8-finished-though-damaged",
        "a run is finished though a bit of its model has flipped",
        "smbfast/run/folder.py",
        "        record = checkpoint.verified_final(final)\n",
        '        record = read_json(final / "smbfast.json")\n',
        FINISHED,
    ),
    mutant(
        "defect-d9-a-full-disk-is-a-traceback",
        "a full disk in the words of a library ends with its traceback",
        "smbfast/base/disk.py",
        "    text = str(error)\n",
        "    if not isinstance(error, OSError):\n        return None\n    text = str(error)\n",
        f"{HARM}::test_a_full_disk_is_one_line_in_the_words_of_any_library",
    ),
    mutant(
        "defect-d9-a-file",
        "of a full disk, the name of the file is not said",
        "smbfast/base/files.py",
        "        name = Path(os.fsdecode(known.filename or content))\n",
        "        if not known.filename:\n            raise\n"
        "        name = Path(os.fsdecode(known.filename or content))\n",
        f"{HARM}::test_a_full_disk_is_one_line_in_the_words_of_any_library",
    ),
    mutant(
        "defect-d10-usr1-kills",
        "outside of the loop SIGUSR1 kills",
        "smbfast/base/entry.py",
        "SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)",
        "SIGNALS = (signal.SIGTERM, signal.SIGINT)",
        f"{HARM}::test_every_signal_of_a_scheduler_stops_a_command",
    ),
    mutant(
        "defect-d10-interrupts-are-lost",
        "an interrupt that Python drops is not repeated",
        "smbfast/base/entry.py",
        "signal.setitimer(signal.ITIMER_REAL, _AGAIN)",
        "pass",
        f"{HARM}::test_an_interrupt_that_python_drops_is_repeated",
        more=(("smbfast/base/entry.py", "signal.setitimer(signal.ITIMER_REAL, _SOON)", "pass"),),
    ),
    mutant(
        "defect-d11-whole-notes-cleaned",
        "a note is cleaned to its end for its first 64 characters",
        "smbfast/data/clean.py",
        "    read = 2 * least + 32\n",
        "    read = len(text)\n",
        "tests/data/test_long_texts.py::test_a_note_is_not_read_to_its_end",
    ),
    mutant(
        "defect-d11-rows-not-bytes",
        "rows are read by their number, however long their texts are",
        "smbfast/data/long_texts.py",
        "return min(ROWS, TEXT_ROWS, max(LEAST_ROWS, int(TEXT_BYTES / max(most, 1))))",
        "return ROWS",
        "tests/data/test_long_texts.py::test_rows_at_once_are_bounded_by_bytes",
    ),
    mutant(
        "defect-d11-batches-of-any-size",
        "texts that are decoded together are bounded by their rows alone",
        "smbfast/data/long_texts.py",
        "if held and (rows + batch.num_rows > ROWS or size + new > TEXT_BYTES):",
        "if held and rows + batch.num_rows > ROWS:",
        "tests/data/test_long_texts.py::test_texts_that_are_decoded_together_are_bounded_by_bytes",
    ),
    mutant(
        "defect-d12-neither-name",
        "after a kill between two renames no reader sees the folder that was there",
        "smbfast/base/staging.py",
        "retired.is_dir():\n            return retired\n",
        "retired.is_dir():\n            return path\n",
        f"{KILLED}[between]",
    ),
    mutant(
        "defect-d12-two-renames",
        "a folder is replaced by two renames where the system could exchange them",
        "smbfast/base/replace.py",
        "    if exchange(content, path):\n        return content\n",
        "",
        f"{KILLED}[exchanged]",
    ),
    mutant(
        "defect-d12-no-rollback",
        "where the second of two renames fails, the folder that was there is lost",
        "smbfast/base/replace.py",
        "    except BaseException:\n        os.rename(free, path)\n        raise\n",
        "    except BaseException:\n        raise\n",
        f"{HARM}::test_a_folder_that_cannot_be_removed_ends_nothing",
        more=(
            (
                "smbfast/base/staging.py",
                "    if retired.is_dir() and not os.path.lexists(path):",
                "    if False:",
            ),
        ),
    ),
    mutant(
        "defect-d13-left-for-ever",
        "what a kill left of a checkpoint stays for ever",
        "smbfast/base/staging.py",
        "    for left in _left(parent):\n",
        "    for left in ():\n",
        f"{IDENTITY}::test_what_kills_have_left_is_gone_once_a_run_goes_on",
    ),
    mutant(
        "defect-d13-rotation-forgotten",
        "checkpoints that a kill left over stay, where none is saved again",
        "smbfast/run/identity.py",
        "    if newest is not None and set_aside:  #",
        "    if False:  #",
        f"{IDENTITY}::test_checkpoints_that_a_kill_has_left_over_go_though_none_is_saved_again",
    ),
    mutant(
        "defect-d13-a-failed-removal-ends-the-run",
        "an old checkpoint that cannot be removed ends the run",
        "smbfast/base/files.py",
        "    with suppress(OSError), staged(path) as staging:",
        "    with staged(path) as staging:",
        f"{HARM}::test_a_folder_that_cannot_be_removed_ends_nothing",
    ),
    mutant(
        "defect-d14-no-mask-no-step",
        "JEPA alone ends at the first step without a mask",
        "smbfast/run/step.py",
        "    if present:\n        torch.autograd.backward(present)",
        "    sum(present).backward()",
        "tests/test_step.py::test_a_step_without_anything_to_predict_has_no_gradient",
    ),
    mutant(
        "defect-d15-keys-unchecked",
        "a model's record without one of its keys is a traceback",
        "smbfast/run/model_record.py",
        "    record = _validated(_ModelRecord, content, file)\n",
        "    if content:\n        return content\n"
        "    record = _validated(_ModelRecord, content, file)\n",
        f"{RECORD}[dtype-missing]",
    ),
    mutant(
        "defect-d15-any-pool",
        "a pool of no known name means the mean",
        "smbfast/run/model_record.py",
        "    pool: Pool\n",
        "    pool: str\n",
        f"{RECORD}[pool-odd]",
    ),
    mutant(
        "defect-d15-any-vocabulary",
        "a model's record may claim a vocabulary of any size",
        "smbfast/run/checkpoint.py",
        'for key, size in (("predictor_layers", layers), ("vocabulary", ids)):',
        'for key, size in (("predictor_layers", layers),):',
        f"{RECORD}[vocabulary-odd]",
    ),
    mutant(
        "defect-d15-any-section",
        "a rule may map codes to a section that is not there",
        "smbfast/run/model_record.py",
        "    if not all(0 <= section < len(SECTIONS) for section in "
        "record.section_rules.rules.values()):",
        "    if False:",
        f"{RECORD}[section_rules-odd]",
    ),
    mutant(
        "defect-d15-deep-record",
        "a record of brackets without end is a traceback",
        "smbfast/base/files.py",
        "    except (OSError, ValueError, RecursionError):\n        content = None",
        "    except (OSError, ValueError):\n        content = None",
        f"{FOREIGN}[a deep record]",
    ),
    mutant(
        "defect-d15-deep-manifest",
        "a manifest of brackets without end is a traceback",
        "smbfast/base/files.py",
        "    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):",
        "    except (OSError, ValueError, KeyError, AttributeError, TypeError):",
        f"{HARM}::test_a_manifest_of_brackets_is_refused",
    ),
    mutant(
        "defect-d15-broken-predictor",
        "a file of tensors that is none is a traceback",
        "smbfast/run/checkpoint.py",
        "        return load_file(file)\n    except SafetensorError:",
        "        return load_file(file)\n    except KeyError:",
        f"{FOREIGN}[a predictor that is none]",
    ),
    mutant(
        "defect-d15-cut-predictor",
        "a predictor whose tensors are not those of its record is a traceback",
        "smbfast/run/checkpoint.py",
        "    except (KeyError, RuntimeError):\n        raise ValueError(\n"
        "            f\"{folder / 'predictor",
        "    except IndexError:\n        raise ValueError(\n            f\"{folder / 'predictor",
        f"{FOREIGN}[a mask vector of another width]",
    ),
    mutant(
        "defect-d15-empty-target",
        "a target without its averages is a traceback",
        "smbfast/model/averages.py",
        "    if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in state.items()}:",
        "    if False:",
        f"{FOREIGN}[an empty target]",
        more=(
            (
                "smbfast/run/checkpoint.py",
                "    except (KeyError, RuntimeError, IndexError):",
                "    except ZeroDivisionError:",
            ),
        ),
    ),
    mutant(
        "defect-d15-any-alpha",
        "an adapter with a scale beyond all numbers is loaded",
        "smbfast/model/backbone.py",
        "or not all(abs(scale) < _MOST_ALPHA for scale in scales)",
        "",
        f"{FOREIGN}[a scale that is not finite]",
    ),
    mutant(
        "defect-d15-a-folder-asks-the-network",
        "a folder that is not there is asked for on the network",
        "smbfast/base/hub_names.py",
        "    if not _HUB_NAME.fullmatch(name) or Path(name).exists():\n        return True\n"
        '    return "/" in name and Path(name).parent.exists()\n',
        "    return Path(name).exists()\n",
        "tests/test_model_names.py::test_a_name_that_looks_like_a_folder_opens_no_socket",
    ),
    mutant(
        "defect-d16-foreseen-names",
        "a file is written under a name that somebody has linked elsewhere before",
        "smbfast/base/files.py",
        "        content = staging / path.name\n        with _named(content, path):\n"
        "            if private:\n"
        "                os.close(os.open(content, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))\n",
        '        content = path.with_name(f"{path.name}.tmp")\n'
        "        with _named(content, path):\n"
        "            if private:\n"
        "                content.touch(0o600)\n",
        f"{HARM}::test_names_that_can_be_guessed_are_no_way_in",
    ),
    mutant(
        "defect-d16-open-while-written",
        "under an open umask a private file can be read while it is written",
        "smbfast/base/files.py",
        "os.O_EXCL, 0o600)",
        "os.O_EXCL, 0o666)",
        f"{HARM}::test_names_that_can_be_guessed_are_no_way_in",
    ),
    mutant(
        "defect-d16-a-folder-stays-open",
        "a run in a folder that was there before leaves it open to others",
        "smbfast/base/entry.py",
        "            path.chmod((0o777",
        "            ((0o777",
        f"{IDENTITY}::test_a_run_that_goes_on_is_shared_or_no_longer",
    ),
    mutant(
        "defect-d17-nan-is-the-kernels-fault",
        "a backbone of NaN is said to be the fault of a kernel",
        "smbfast/run/startup.py",
        "        if not all(math.isfinite(float(t.detach().norm())) "
        "for t in tensors if t is not None):",
        "        if False:",
        f"{WEIGHTS}[nan-hold NaN]",
    ),
    mutant(
        "defect-d17-a-checkpoint-that-is-not-there",
        "before the first step it is said that the last good checkpoint is kept",
        "smbfast/run/startup.py",
        '                "another --run.dir with a lower learning rate"\n',
        '                "another --run.dir with a lower learning rate. "\n'
        '                "The last good checkpoint is kept"\n',
        f"{WEIGHTS}[nan-hold NaN]",
    ),
    mutant(
        "defect-d17-nan-in-the-log",
        "the log holds NaN, which is not JSON",
        "smbfast/run/metrics.py",
        'json.dumps(legal({"kind": kind, **values}), allow_nan=False)',
        'json.dumps({"kind": kind, **values})',
        "tests/test_trackers.py::test_a_line_of_the_log_is_legal_json_whatever_the_loss",
    ),
    mutant(
        "defect-d17-half-a-log",
        "a run whose log is gone goes on without a word",
        "smbfast/run/identity.py",
        "    if size < expected:\n",
        "    if False:\n",
        f"{IDENTITY}::test_data_that_moved_and_are_equal_are_the_same",
    ),
    mutant(
        "defect-d17-six-digits",
        "checkpoints from step 1,000,000 on are not seen",
        "smbfast/run/checkpoint.py",
        r'_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})$")',
        r'_NAME = re.compile(r"step-(\d{6})$")',
        f"{IDENTITY}::test_steps_of_seven_digits_come_after_those_of_six",
    ),
    mutant(
        "defect-d17-deep-settings",
        "a setting of brackets without end is a traceback",
        "smbfast/base/config.py",
        "    except (tomllib.TOMLDecodeError, RecursionError):\n        return value\n",
        "    except tomllib.TOMLDecodeError:\n        return value\n",
        "tests/bad_input/test_bad_settings.py::test_brackets_without_end_on_the_command_line",
    ),
    mutant(
        "defect-d17-times-wrap",
        "times at the ends of 64 bits wrap, and their order is lost",
        "smbfast/data/meds.py",
        "    if far.any():\n",
        "    if False:\n",
        "tests/data/test_wild_meds.py::test_times_that_would_wrap",
    ),
    mutant(
        "defect-d17-tmp-of-a-kill",
        "the temporary folder of a killed write stays",
        "smbfast/base/staging.py",
        "    make_folder(path.parent)\n    clear_left(path.parent)\n",
        "    make_folder(path.parent)\n",
        f"{KILLED}[inside]",
    ),
    mutant(
        "defect-ranks-outlive-torchrun",
        "ranks whose torchrun was killed train on",
        "smbfast/run/watch.py",
        "if self._parent is not None and os.getppid() != self._parent:",
        "if False:",
        "tests/test_watch.py::test_a_rank_whose_launcher_is_gone_saves_and_ends",
    ),
    mutant(
        "defect-ranks-wait-for-a-silent-one",
        "a rank that was stopped, or whose machine is gone, is waited for for 12 hours",
        "smbfast/run/watch.py",
        "            if self._silent >= SILENCE:\n",
        "            if False:\n",
        "tests/test_watch.py::test_a_rank_that_falls_silent_is_not_waited_for",
    ),
    mutant(
        "defect-ranks-any-error-is-a-death",
        "any error of a message is called the death of another rank",
        "smbfast/run/ranks.py",
        "            if not isinstance(error, dist.DistError) and _TRANSPORT not in words:\n"
        "                raise  #",
        '            if words:\n                raise RunFailed("another rank has ended") from None'
        "  #",
        "tests/test_ranks_signals.py::test_an_error_of_a_message_is_no_death",
    ),
    mutant(
        "defect-bits-of-moments",
        "bits that flip in the moments of one rank are saved",
        "smbfast/run/agreement.py",
        '        ("second moments of the optimizer", "exp_avg_sq"),\n',
        "",
        "tests/test_agreement.py::test_a_flipped_bit_of_any_kind_is_named",
    ),
    mutant(
        "defect-bits-of-the-target",
        "bits that flip in the target of one rank are saved",
        "smbfast/run/agreement.py",
        "{n: t for n, t in averages.items() if n not in scale}",
        "{}",
        "tests/test_agreement.py::test_a_flipped_bit_of_any_kind_is_named",
    ),
    mutant(
        "defect-bits-of-frozen-weights",
        "bits that flip in the frozen weights of one rank are saved",
        "smbfast/run/agreement.py",
        '    state["frozen weights"] = _frozen(encoder, own)\n',
        "",
        "tests/test_agreement.py::test_a_flipped_bit_of_any_kind_is_named",
    ),
    mutant(
        "defect-horizons-scale-of-nan",
        "a first step of horizons that is not finite counts as one that gave them a scale",
        "smbfast/model/horizon_scale.py",
        "if self.lacks(num_by_horizon) and bool(finite):",
        "if self.lacks(num_by_horizon):",
        "tests/test_target.py::test_a_first_step_that_is_not_finite_gives_horizons_no_scale",
    ),
    mutant(
        "defect-index-of-other-subjects",
        "a subject that only a damaged index has is looked for in its file, with a traceback",
        "smbfast/data/source_index.py",
        "    if not len(rows):",
        "    if False:",
        "tests/test_fuzzed.py::test_what_once_broke_a_reader_is_refused",
    ),
    mutant(
        "defect-width-of-embeddings",
        "a model is compared with the width of its layers, which OPT's embeddings do not have",
        "smbfast/run/checkpoint.py",
        "width, layers = table.weight.shape[-1],",
        "width, layers = base.config.hidden_size,",
        "tests/test_vocabulary.py::"
        "test_a_model_whose_embeddings_have_a_width_of_their_own_is_loaded_again",
    ),
    mutant(
        "defect-columns-of-a-tracked-average",
        "a tracked average takes as many columns as its settings say",
        "smbfast/model/target.py",
        "if not 1 <= self.every <= most or self.rank < 1:",
        "if self.rank < 1:",
        "tests/test_target.py::test_a_tracked_average_of_settings_that_none_has_takes_no_memory",
    ),
    mutant(
        "defect-skips-of-one-rank",
        "a rank that alone skipped a step compares nothing, and the others wait for it",
        "smbfast/run/open_run.py",
        "        require_same_state(self.ranks, self.encoder, self.optimizer, target)\n"
        "        if skipped:\n            return\n",
        "        if skipped:\n            return\n"
        "        require_same_state(self.ranks, self.encoder, self.optimizer, target)\n",
        "tests/test_agreement.py::test_ranks_are_compared_where_a_step_was_skipped_on_one_of_them",
    ),
    mutant(
        "defect-sealed-deep-header",
        "a shard whose header is brackets without end is a traceback",
        "smbfast/data/array_file.py",
        "    except (ValueError, KeyError, TypeError, RecursionError):\n        whole = False",
        "    except (ValueError, KeyError, TypeError):\n        whole = False",
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-index-of-any-kind",
        "a shard's index may be a number",
        "smbfast/data/array_file.py",
        'isinstance(header["index"], dict) and isinstance(header["arrays"], dict)',
        'bool(header) and isinstance(header["arrays"], dict)',
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-places-of-any-kind",
        "an array of a shard may begin at half a byte",
        "smbfast/data/array_file.py",
        "    if not (isinstance(dtype, str) and isinstance(at, int) and isinstance(num, int)):",
        "    if not isinstance(dtype, str):",
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-record-unchecked",
        "the record of a prepared folder may hold anything",
        "smbfast/data/prepared.py",
        '        require_record(folder / "prepare.json", record)\n',
        "",
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-windows-unchecked",
        "a table of windows may have other columns and sums",
        "smbfast/data/window_index.py",
        "    if not (whole and all(isinstance(value, int) for value in sums.values())):",
        "    if False:",
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-deep-notes",
        "what is noted of shards that were read once is a traceback if it is brackets without end",
        "smbfast/data/verified.py",
        "    except (OSError, ValueError, RecursionError):\n        return {}",
        "    except (OSError, ValueError):\n        return {}",
        f"{FUZZED}[shards]",
    ),
    mutant(
        "defect-sealed-column-twice",
        "a table of codes with a column twice is a traceback",
        "smbfast/data/parquet.py",
        "        if schema.names.count(name) > 1:",
        "        if False:",
        f"{FUZZED}[events]",
    ),
    mutant(
        "defect-sealed-columns-of-two-lengths",
        "a table of codes whose columns differ in length is a traceback",
        "smbfast/data/code_table.py",
        "    except pa.ArrowIndexError:",
        "    except ZeroDivisionError:",
        f"{FUZZED}[events]",
    ),
    mutant(
        "defect-sealed-target-not-told",
        "a checkpoint's record may say nothing of its target",
        "smbfast/run/checkpoint.py",
        ' or "target_updates" not in record:',
        ":",
        f"{FUZZED}[models]",
    ),
    mutant(
        "defect-sealed-counts-of-any-kind",
        "a checkpoint's counts of steps may be lists",
        "smbfast/run/checkpoint.py",
        "    whole &= isinstance(counts, dict) and "
        "all(isinstance(n, int) for n in counts.values())\n",
        "    whole &= isinstance(counts, dict)\n",
        f"{FUZZED}[models]",
    ),
    mutant(
        "defect-writes-kill-before-the-marker",
        "the temporary folder of a write that was killed before its marker stays for ever",
        "smbfast/base/staging.py",
        "        return _is_old(folder)\n    except OSError:",
        "        return False\n    except OSError:",
        f"{HARM}::test_what_a_kill_left_around_its_marker_is_cleared_a_minute_later[no marker]",
    ),
    mutant(
        "defect-writes-marker-without-content",
        "a marker that a power cut has emptied keeps its folder for ever",
        "smbfast/base/staging.py",
        "            return got is not False and _is_old(folder)\n",
        "            return False\n",
        f"{HARM}::"
        "test_what_a_kill_left_around_its_marker_is_cleared_a_minute_later[an empty marker]",
    ),
    mutant(
        "defect-writes-marker-held",
        "a write that failed at its marker holds its lock for the life of the process",
        "smbfast/base/staging.py",
        "        _OWN.discard(folder)\n        release(marker)\n        raise\n",
        "        raise\n",
        f"{HARM}::test_a_disk_that_takes_nothing_any_more_is_no_obstacle_later",
    ),
    mutant(
        "defect-writes-new-folder-not-synced",
        "a power cut takes a folder that was made for a write, and what was saved in it",
        "smbfast/base/replace.py",
        "        fsync(path.parent)\n    except PermissionError:",
        "        pass\n    except PermissionError:",
        f"{HARM}::test_names_and_copies_are_on_the_disk_before_a_write_ends",
    ),
    mutant(
        "defect-writes-copies-not-synced",
        "a power cut takes the copies of files that others have put into a folder",
        "smbfast/base/replace.py",
        "            shutil.copy2(source, target)\n            fsync(target)\n",
        "            shutil.copy2(source, target)\n",
        f"{HARM}::test_names_and_copies_are_on_the_disk_before_a_write_ends",
    ),
    mutant(
        "defect-writes-files-of-others-deleted",
        "where a manifest cannot be read for a moment, files of others are deleted with ours",
        "smbfast/base/replace.py",
        "    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):",
        "    except OSError:",
        f"{HARM}::test_a_manifest_that_cannot_be_read_now_costs_nobody_a_file",
    ),
    mutant(
        "defect-writes-left-twice",
        "a removal that failed half way leaves an empty folder beside the second",
        "smbfast/base/replace.py",
        "if not os.path.lexists(left) or (left.is_dir() and not any(left.iterdir())):",
        "if not os.path.lexists(left):",
        f"{HARM}::test_a_removal_that_failed_half_way_leaves_one_folder",
    ),
    mutant(
        "defect-writes-folder-made-anew",
        "a folder that vanished while it was filled is taken for whole with what came after",
        "smbfast/base/files.py",
        "            if not os.path.samestat(made, content.stat()):",
        "            if False:",
        f"{HARM}::test_a_folder_that_was_gone_while_it_was_filled_is_not_taken_for_whole",
    ),
    mutant(
        "defect-helpers-one-after-the-other",
        "trackers that hang are waited for one after the other",
        "smbfast/run/trackers.py",
        "        tracker.wait(until)\n",
        "        tracker.wait(time.monotonic() + PATIENCE)\n",
        "tests/test_trackers.py::test_trackers_that_hang_are_waited_for_together",
    ),
    mutant(
        "defect-helpers-no-thread-no-run",
        "a tracker whose thread cannot start ends the run",
        "smbfast/run/trackers.py",
        "        except RuntimeError as error:  # the system starts",
        "        except ZeroDivisionError as error:  # the system starts",
        "tests/test_trackers.py::test_a_tracker_without_a_thread_is_left",
    ),
    mutant(
        "defect-helpers-full-disk-at-the-end",
        "a full disk that the log meets as it is closed has no name",
        "smbfast/run/metrics.py",
        "            with self._named():  # writes again",
        "            if True:  # writes again",
        "tests/test_trackers.py::test_on_a_full_disk_the_log_is_named_also_when_it_is_closed",
    ),
    mutant(
        "defect-signals-before-a-command",
        "a signal in the first tenths of a second is a traceback, or kills",
        "smbfast/base/early.py",
        '    if (program == "-m" and ours) or os.path.basename(program) == "smbfast":',
        "    if program == ours:",
        f"{HARM}::test_a_command_that_has_not_begun_is_stopped_with_a_line",
    ),
    mutant(
        "defect-signals-status-of-an-error",
        "most commands end with 1 after a signal, as after an error",
        "smbfast/base/entry.py",
        "    status: int = STOPPED,\n",
        "    status: int = 1,\n",
        f"{HARM}::test_an_interrupt_that_python_drops_is_repeated",
    ),
    mutant(
        "defect-signals-through-source-text",
        "a command that is stopped while a library is imported ends by SIGINT",
        "smbfast/base/entry.py",
        '            exec("")\n',
        "",
        f"{HARM}::test_an_interrupt_through_source_text_ends_with_75_too",
    ),
    mutant(
        "defect-counts-small-rests",
        "a count is printed although it leaves few of its whole",
        "smbfast/base/counts.py",
        'return f"all but {FEW_TEXT}" if 0 < whole - count <= FEW < count else few(count)',
        "return few(count)",
        "tests/test_data_card.py::test_no_small_count_and_no_small_rest_is_shown",
    ),
    mutant(
        "defect-counts-bins-of-few",
        "a bin of a calibration curve tells of a few patients",
        "smbfast/statistics/binary.py",
        "any(0 < n <= _FEW for n in people)",
        "any(n < 0 for n in people)",
        "tests/statistics/test_binary.py::test_bins_that_tell_of_ten_people_or_fewer_join",
    ),
    mutant(
        "defect-ranks-a-death-while-gathering",
        "a rank that loses another while it gathers layers ends with a traceback",
        "smbfast/run/ranks.py",
        "            if isinstance(error, RunFailed) or (lost := self._lost()) is None:\n",
        "            if (lost := None) is None:\n",
        "tests/test_fsdp.py::test_a_rank_that_dies_while_layers_are_gathered_is_named[0]",
    ),
]
MUTANTS = [
    *OBJECTIVE,
    *AHEAD,
    *LOADER,
    *LEAKS,
    *DECODER,
    *TARGET,
    *UPDATE,
    *RESUMING,
    *KERNELS,
    *ON_A_GPU,
    *RANKS,
    *GPU_BENCH,
    *SHARING,
    *DEFECTS,
]


def copy_tracked(folder: Path) -> None:
    """Copy the files that git tracks, as they are now."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(
    tree: Path, tests: list[str], cache: Path | None = None, limit: float = LIMIT
) -> tuple[int, str]:
    """Run tests of a copied tree; pytest's exit code (-1: stopped at the limit) and its output.

    Args:
        cache: where C++ is built, None: where it always is. The folder of a build is named by a
            digest of the sources, so no mutant can be taken for another; but none should stay.
        limit: seconds after which they are stopped.
    """
    running = importlib.import_module("tests.reliability.running")
    running.import_libraries()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        pid = os.fork()
        if not pid:
            _be_pytest(tree, tests, cache, output.fileno(), running.enter)
        code = _ended(pid, limit)
        output.seek(0)
        end = "" if code >= 0 else f"\nended by a signal, or stopped after {limit} s"
        return code, output.read() + end


def _be_pytest(
    tree: Path,
    tests: list[str],
    cache: Path | None,
    output: int,
    enter: Callable[[Path], None],
) -> NoReturn:
    """Run tests in a forked process, which ends here; it has a group of its own."""
    code = 3  # as pytest says of an error of its own
    try:
        os.setpgid(0, 0)
        for stream, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(to, stream)
        os.environ["COLUMNS"] = "240"  # pytest cuts its summary to the width of the terminal
        if cache:
            os.environ["XDG_CACHE_HOME"] = str(cache)
        enter(tree)
        pytest = importlib.import_module("pytest")
        code = int(pytest.main(["-x", "-q", *ALONE, "-p", "no:cacheprovider", *tests]))
    except BaseException:  # whatever it is, this process must not go on as its parent would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ended(pid: int, limit: float) -> int:
    """Wait for a forked process; its exit code, or -1 if it was stopped or ended by a signal."""
    end, code = time.monotonic() + limit, -1
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = max(-1, os.waitstatus_to_exitcode(status))
            break
        time.sleep(0.05)
    with suppress(ProcessLookupError):  # and what it has left running
        os.killpg(pid, signal.SIGKILL)
    if code < 0:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return code


def reason_of(output: str) -> str:
    """What pytest's summary says of the first failure, to tell a finding from a crash."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].partition(" - ")[2] if lines else "no summary"


def try_mutant(mutant: Mutant, tree: Path) -> str:
    """Make the change, run its tests, take it back: "caught: why", or what else happened."""
    try:
        texts = changed(mutant, tree)
    except ValueError as error:
        return f"NOT MADE: {error}"
    before = {file: file.read_text(encoding="utf-8") for file in texts}
    _write(texts)
    try:
        with tempfile.TemporaryDirectory() as cache:
            compiled = Path(cache) if mutant.file.startswith("csrc/") else None
            code, output = run_tests(tree, list(mutant.tests), compiled)
    finally:
        _write(before)
    if code == TESTS_FAILED:
        return f"caught: {reason_of(output)}"
    if code == 0:
        return "SURVIVED"
    return f"NOT RUN: exit code {code} of pytest\n{output}"


def _write(texts: dict[Path, str]) -> None:
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")


def check_unmutated(mutants: list[Mutant], tree: Path) -> None:
    """Run all named tests without a change; exit if one fails or is skipped."""
    began = time.monotonic()
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    code, output = run_tests(tree, tests, limit=LIMIT + EACH * len(tests))
    last = output.strip().splitlines()[-1]
    if code or "skipped" in last:
        raise SystemExit(f"{output}\nwithout a mutant, all tests must pass and none be skipped")
    print(f"without a mutant: {last} ({time.monotonic() - began:.0f} s with imports)", flush=True)


def main() -> None:
    """Try mutants, say of each whether it was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this one; `*` is any; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    words = parser.parse_args()
    asked = words.only or ["*"]
    unknown = [name for name in asked if not any(fnmatchcase(m.name, name) for m in MUTANTS)]
    if unknown:
        parser.error(f"--only must name a mutant (see --list), got {', '.join(sorted(unknown))}")
    mutants = [m for m in MUTANTS if any(fnmatchcase(m.name, name) for name in asked)]
    if words.list:
        for m in mutants:
            print(f"{m.name}: {m.breaks}\n  {m.file}\n  " + "\n  ".join(m.tests))
        return
    for name, value in BEFORE.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        trees: Queue[Path] = Queue()
        for number in range(max(1, words.jobs)):
            tree = Path(temporary) / str(number)
            copy_tracked(tree)
            trees.put(tree)
        check_unmutated(mutants, tree)

        def tried(mutant: Mutant) -> bool:
            tree, began = trees.get(), time.monotonic()
            try:
                outcome = try_mutant(mutant, tree)
            finally:
                trees.put(tree)
            print(f"{mutant.name}: {outcome} ({time.monotonic() - began:.1f} s)", flush=True)
            return outcome.startswith("caught")

        with ThreadPoolExecutor(max(1, words.jobs)) as pool:
            caught = list(pool.map(tried, mutants))
    print(f"{sum(caught)} of {len(mutants)} mutants caught")
    raise SystemExit(0 if all(caught) else 1)


if __name__ == "__main__":
    main()
