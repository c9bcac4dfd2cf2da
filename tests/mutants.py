"""python tests/mutants.py: does each of these small mistakes still fail the test that names it?

A mutant is a small change that makes the program wrong. For each, the tracked files are copied to
a temporary folder, the change is made there, and its tests alone are run. A mutant is caught where
one of them fails; where they pass, it has survived. Before that, all tests that are named run once
without a change. Exit code 1 if a mutant survived or cannot be made.

    python tests/mutants.py --list
    python tests/mutants.py --only=mask-count-floored --only=clip-dropped
    python tests/mutants.py --only='*-off-by-one' --jobs=2
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds after which tests are stopped: they have hung, and caught nothing
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
]


def copy_tracked(folder: Path) -> None:
    """Copy the files that git tracks, as they are now."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(tree: Path, tests: list[str], cache: Path | None = None) -> tuple[int, str]:
    """Run tests of a copied tree; pytest's exit code (-1: stopped after `LIMIT`) and its output.

    Args:
        cache: where C++ is built, None: where it always is. The folder of a build is named by a
            digest of the sources, so no mutant can be taken for another; but none should stay.
    """
    # compiled bytecode is known by the size and second of its source, which a mutant may share
    more = {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    more |= {"COLUMNS": "240"}  # pytest cuts its summary to the width of the terminal
    more |= {"XDG_CACHE_HOME": str(cache)} if cache else {}
    command = [sys.executable, "-m", "pytest", "-x", "-q", *ALONE, "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env={"OMP_NUM_THREADS": "1", **os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return -1, f"stopped after {LIMIT} s"
    return done.returncode, done.stdout


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
    code, output = run_tests(tree, tests)
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
