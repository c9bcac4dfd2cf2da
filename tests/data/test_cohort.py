"""The simulated cohort and its oracles: against enumeration, against outcomes, by identity."""

from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from smbfast.simulation import cohort, oracles
from smbfast.simulation.cohort import BLOCK, DAY, DEAD, Z

BLOCKS = 24


@pytest.fixture(scope="module")
def drawn():
    """Outcomes of a few thousand patients: {task: (label, bayes, latent)}."""
    found = {task: [] for task in oracles.TASKS}
    for number in range(BLOCKS):
        block = cohort.draw_block(11, number)
        nodes = cohort.draw_nodes(block, 11, 1)
        for task, o in oracles.outcomes(block, nodes).items():
            found[task].append((o.label_M, o.bayes_M, o.latent_M))
    return {
        task: tuple(np.concatenate(p) for p in zip(*parts, strict=True))
        for task, parts in found.items()
    }


def seen_probability(block, row, month, z, *, afternoon):
    """P(what was seen in a month | z), written down line by line."""
    if not block.visit_BT[row, month]:
        return 1 - cohort.VISIT_Z[z]
    chance = cohort.VISIT_Z[z]
    for value, lab in zip(block.lab_BTL[row, month], cohort.LABS, strict=True):
        if np.isnan(value):
            chance *= 1 - lab.measured
            continue
        half = 0.5 * lab.step
        low = 0.0 if value <= lab.least else norm.cdf(value - half, lab.mean_Z[z], lab.sd)
        chance *= lab.measured * (norm.cdf(value + half, lab.mean_Z[z], lab.sd) - low)
    if afternoon:
        chance *= cohort.STAGE_CODE[cohort.STAGE_Z[z], block.stage_BT[row, month]]
        for has, code in zip(block.code_BTC[row, month], cohort.YES_NO, strict=True):
            chance *= code.chance_Z[z] if has else 1 - code.chance_Z[z]
    return chance


@pytest.mark.parametrize("months", [1, 2, 3])
def test_filter_equals_enumeration_of_all_paths(months):
    block = cohort.draw_block(3, 0)
    # a patient with a visit in the last of these months and no more than `months` of history
    row = int(np.nonzero(block.visit_BT[:, months - 1] & (block.state_BT[:, 0] < DEAD))[0][0])
    noon, evening = oracles.filter_states(block)
    band, last = block.band_B[row], months - 1
    prior, move = cohort.prior()[band], cohort.transition()[band]
    early = [
        [seen_probability(block, row, m, z, afternoon=True) for z in range(Z)]
        for m in range(months)
    ]
    for afternoon, posterior in ((False, noon), (True, evening)):
        final = [seen_probability(block, row, last, z, afternoon=afternoon) for z in range(Z)]
        total = np.zeros(Z)
        for path in product(range(Z), repeat=months):
            weight = prior[path[0]] * final[path[-1]]
            for month in range(last):
                weight *= early[month][path[month]] * move[path[month], path[month + 1]]
            total[path[-1]] += weight
        # the plain difference of two cdf loses digits in the upper tail, hence an atol as well
        np.testing.assert_allclose(posterior[row, last], total / total.sum(), 1e-9, 1e-12)


def test_tables_are_distributions():
    np.testing.assert_allclose(cohort.prior().sum(1), 1)
    np.testing.assert_allclose(cohort.transition().sum(2), 1)
    np.testing.assert_allclose(cohort.STAGE_CODE.sum(1), 1)
    assert (cohort.transition() >= 0).all()
    chances = np.array([code.chance_Z for code in cohort.YES_NO])
    assert ((chances > 0) & (chances < 1)).all()
    assert ((cohort.VISIT_Z > 0) & (cohort.VISIT_Z < 1)).all()


@pytest.mark.parametrize("task", list(oracles.HORIZON_DAYS))
def test_oracles_are_calibrated(drawn, task):
    label, *predicted = drawn[task]
    for chance in predicted:
        for part in np.array_split(np.argsort(chance), 4):
            spread = np.sqrt((chance[part] * (1 - chance[part])).sum())
            assert abs(label[part].sum() - chance[part].sum()) < 4 * spread


@pytest.mark.parametrize("task", list(oracles.HORIZON_DAYS))
def test_latent_beats_the_filter_and_the_filter_is_worth_having(drawn, task):
    label, bayes, latent = drawn[task]
    filtered = roc_auc_score(label, bayes)
    assert roc_auc_score(label, latent) > filtered - 0.01
    assert 0.75 < filtered < 0.92


@pytest.mark.parametrize("task", list(oracles.HORIZON_DAYS))
def test_chances_equal_a_simulation_of_the_chain_from_one_state(task):
    """`pos` and `neg` from a fixed state against futures drawn month by month, censored too."""
    rng = np.random.default_rng(5)
    block = cohort.draw_block(11, 0)
    nodes = cohort.draw_nodes(block, 11, 1)
    evening = 0 if nodes.evening_N[0] else 1
    at = np.array([0, int(np.nonzero(nodes.evening_N == bool(evening))[0][0])])
    weigh = oracles._progression if task == "progression_1y" else oracles._death
    pos, neg = weigh(block, nodes, at, oracles.HORIZON_DAYS[task])
    runs, z = 40_000, 8
    told = cohort.STAGE_CODE_ZS[:, list(cohort.ADVANCED)].sum(1)
    for place, node in enumerate(at):
        row, month = nodes.row_N[node], nodes.month_N[node]
        start = block.entry_B[row] + month * 30
        node_day = (nodes.time_N[node] / DAY) - start
        horizon = node_day + oracles.HORIZON_DAYS[task]
        cumulative = np.cumsum(cohort.transition()[block.band_B[row]], axis=1)
        state, event, died = np.full(runs, z), np.full(runs, np.inf), np.full(runs, np.inf)
        followed = rng.geometric(cohort.LOSS, runs) * 30.0
        if task == "progression_1y" and not nodes.evening_N[node]:
            event[rng.random(runs) < told[z]] = node_day
        for k in range(1, int(horizon // 30) + 1):
            state = np.minimum((rng.random(runs)[:, None] >= cumulative[state]).sum(1), DEAD)
            now = (state == DEAD) & np.isinf(died)
            died[now] = k * 30 + 30 * rng.random(now.sum())
            living = np.minimum(state, Z - 1)
            visit = (state < DEAD) & (rng.random(runs) < cohort.VISIT_Z[living] * told[living])
            day = k * 30 + rng.integers(0, 30, runs) + cohort.DIAGNOSIS_MINUTE / 1440
            event = np.where(visit & np.isinf(event), day, event)
        if task != "progression_1y":
            event = died
        event = np.where(event < followed, event, np.inf)
        true = event <= horizon
        false = ~true & ((followed >= horizon) | (died < followed))
        for mass, found in ((pos, true), (neg, false)):
            error = np.sqrt(mass[place, z] * (1 - mass[place, z]) / runs)
            assert abs(found.mean() - mass[place, z]) < 4 * error


def test_nothing_after_the_node_enters_the_filter():
    block = cohort.draw_block(7, 1)
    nodes = cohort.draw_nodes(block, 7, 1)
    assert 0 < nodes.evening_N.mean() < 1
    changed = replace(
        block,
        visit_BT=block.visit_BT.copy(),
        lab_BTL=block.lab_BTL.copy(),
        stage_BT=block.stage_BT.copy(),
        code_BTC=block.code_BTC.copy(),
    )
    for row, month, evening in zip(nodes.row_N, nodes.month_N, nodes.evening_N, strict=True):
        changed.visit_BT[row, month + 1 :] = False
        later = month + int(evening)
        changed.stage_BT[row, later:] = 0
        changed.code_BTC[row, later:] = True
    before, after = oracles.filter_states(block), oracles.filter_states(changed)
    at = (nodes.row_N, nodes.month_N)
    for kind, evening in ((0, False), (1, True)):
        these = tuple(axis[nodes.evening_N == evening] for axis in at)
        np.testing.assert_array_equal(before[kind][these], after[kind][these])
    noon = tuple(axis[~nodes.evening_N] for axis in at)
    assert np.abs(before[1][noon] - after[1][noon]).max() > 0.01


def test_events_of_the_same_day_follow_nodes_at_noon_only():
    block = cohort.draw_block(7, 2)
    nodes, rows = cohort.draw_nodes(block, 7, 1), cohort.rows(block)
    after = np.zeros(len(nodes.row_N), int)
    for i, (row, time) in enumerate(zip(nodes.row_N, nodes.time_N, strict=True)):
        mine = rows.time_E[rows.row_E == row]
        same_day = mine // DAY == time // DAY
        assert (mine[same_day] <= time).any()
        after[i] = (mine[same_day] > time).sum()
    assert (after[nodes.evening_N] == 0).all()
    assert (after[~nodes.evening_N] > 0).mean() > 0.5


def test_labels_follow_from_the_rows_of_a_patient():
    block = cohort.draw_block(7, 3)
    nodes, rows = cohort.draw_nodes(block, 7, 3), cohort.rows(block)
    advanced = [i for i, (code, _) in enumerate(cohort.CODES) if code[-4:] in ("CKD4", "CKD5")]
    death = [code for code, _ in cohort.CODES].index("MEDS_DEATH")
    for task, days in oracles.HORIZON_DAYS.items():
        outcome = oracles.outcomes(block, nodes)[task]
        assert outcome.label_M.any() and not outcome.label_M.all()
        for node, label in zip(outcome.node_M, outcome.label_M, strict=True):
            start = nodes.time_N[node]
            mine = rows.row_E == nodes.row_N[node]
            target = np.isin(rows.code_E, advanced if task == "progression_1y" else [death])
            times = rows.time_E[mine & target]
            assert label == ((times > start) & (times <= start + days * DAY)).any()
            if task == "progression_1y":
                assert (times > start).all()


def test_nodes_do_not_change_the_patient_and_draws_that_meet_are_one():
    block = cohort.draw_block(7, 4)
    one, many = cohort.draw_nodes(block, 7, 1), cohort.draw_nodes(block, 7, 4)
    keys = set(zip(many.row_N.tolist(), many.time_N.tolist(), strict=True))
    assert len(keys) == len(many.row_N) > len(one.row_N)
    assert set(zip(one.row_N.tolist(), one.time_N.tolist(), strict=True)) <= keys
    again = cohort.draw_block(7, 4)
    for field in fields(block):
        np.testing.assert_array_equal(getattr(block, field.name), getattr(again, field.name))
    assert block.index_B[0] == 4 * BLOCK
