"""Draws a simulated cohort: a hidden chain of a multi-stage disease, and what a clinic sees of it.

It is fiction: the words are borrowed from kidney disease so that a record reads like one, but no
number here was estimated from anybody, and nothing learned on it says anything about a real
population. It exists because its best possible predictions can be computed (`oracles`).

**Chain.** A step is a month of 30 days, counted from the registration of the patient. The latent
state of month t is z_t = (stage 0..4, comorbidity 0/1, treated 0/1), 20 living states, or dead:

    z_0 ~ prior(age band)                      P(z_t+1 | z_t, age band) = transition
    death           DEATH[stage] * 1.7 if comorbid * AGE_DEATH[age band]
    and if alive, independently of each other:
    stage + 1       PROGRESS[stage] * 1.7 if comorbid * 0.35 if treated
    comorbidity     onset 0.004, for good
    treatment       start START[stage], stop 0.012

**Emissions.** Given z_t everything of month t is independent of all other months. With
probability VISIT[z] there is one visit, on a uniform day of the month. In the morning blood
pressure and each laboratory value with its own probability (normal around a mean that depends on
z, rounded, cut at a least value), in the afternoon at most one stage diagnosis (often off by one),
and yes/no codes with probability `chance_Z[z]`; some codes and one lab do not depend on z at all.
Not visiting is information too: the sick come more often.

**End of the record.** Death in month m happens at a uniform second of it. At the end of each month
the patient is lost with probability LOSS whatever the state; the study ends on a fixed date.

**Randomness.** 256 consecutive patients are a block with a Philox generator of its own, seeded by
(seed, block), and a block is always drawn whole. So patient i is the same whatever the number of
patients or files.

Dimensions: B patients of a block, T months, Z living states, L labs, C yes/no codes, A age bands,
S stage codes (0 = none), N decision nodes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

BLOCK = 256
DAY = 86_400_000_000  # microseconds
STEP_DAYS = 30
FIRST_ENTRY = np.datetime64("2012-01-01", "D").astype(np.int64)  # days since 1970
STUDY_END = np.datetime64("2020-01-01", "D").astype(np.int64)
ENTRY_DAYS = 730
MONTHS = int(STUDY_END - FIRST_ENTRY) // STEP_DAYS
LOSS = 0.005
EARLIEST_NODE, LATEST_NODE = 20, 36  # months; both included
NOON, EVENING = 12, 18  # hours of prediction

Z = 20
DEAD = Z
STAGE_Z = np.arange(Z) // 4
COMORBID_Z = np.arange(Z) // 2 % 2
TREATED_Z = np.arange(Z) % 2

AGE_FROM = (40, 55, 70)  # each band is 15 years wide
AGE_SHARE = (0.3, 0.4, 0.3)
AGE_DEATH = (0.5, 1.0, 1.9)
AGE_STAGE = (
    (0.52, 0.26, 0.13, 0.06, 0.03),
    (0.36, 0.29, 0.19, 0.11, 0.05),
    (0.24, 0.28, 0.24, 0.16, 0.08),
)
AGE_COMORBID = (0.2, 0.3, 0.4)
DEATH = np.array([0.0006, 0.0014, 0.0040, 0.0130, 0.0480])
PROGRESS = np.array([0.014, 0.018, 0.022, 0.026, 0.0])
START = np.array([0.004, 0.012, 0.025, 0.035, 0.035])
TREATED_AT_ENTRY = (0.02, 0.10, 0.25, 0.40, 0.45)
VISIT_STAGE = np.array([0.085, 0.100, 0.125, 0.160, 0.210])
VISIT_Z = VISIT_STAGE[STAGE_Z] * np.where(COMORBID_Z == 1, 1.3, 1.0)
# rows: the true stage; columns: no code, then the codes of stages 1..5
STAGE_CODE = np.array(
    [
        [0.86, 0.09, 0.04, 0.008, 0.0015, 0.0005],
        [0.66, 0.08, 0.18, 0.07, 0.008, 0.002],
        [0.50, 0.02, 0.11, 0.27, 0.09, 0.01],
        [0.45, 0.005, 0.015, 0.14, 0.31, 0.08],
        [0.42, 0.002, 0.008, 0.03, 0.16, 0.38],
    ]
)
STAGE_CODE_ZS = STAGE_CODE[STAGE_Z]
ADVANCED = (4, 5)  # the stage codes that count as progression
STAGE_CODES = [(f"DIAGNOSIS//CKD{stage}", f"CKD stage {stage}") for stage in range(1, 6)]


@dataclass(frozen=True)
class Lab:
    """A morning measurement, reported on a grid of `step` and never below `least`.

    `measured` is its chance at a visit; `mean_Z` fp64 [Z] and `sd` give its normal law.
    """

    code: str
    description: str
    step: float
    measured: float
    mean_Z: np.ndarray
    sd: float
    least: float


@dataclass(frozen=True)
class YesNo:
    """An afternoon code: `chance_Z` fp64 [Z] at a visit."""

    code: str
    description: str
    chance_Z: np.ndarray


def _by(stage: list[float], comorbid: float = 0.0, treated: float = 0.0) -> np.ndarray:
    return np.array(stage)[STAGE_Z] + comorbid * COMORBID_Z + treated * TREATED_Z


LABS = [
    Lab("VITAL//SBP//mmHg", "Systolic BP", 5, 1.0,
        _by([126, 128, 131, 134, 137], 8, -3), 15.0, 70),
    Lab("LAB//EGFR//mL/min", "eGFR", 5, 0.80, _by([88, 74, 58, 41, 25], 0, 2), 12.0, 5),
    Lab("LAB//HEMOGLOBIN//g/dL", "Hemoglobin", 0.5, 0.50,
        _by([14.0, 13.7, 13.1, 12.2, 11.1], -0.2), 1.3, 5),
    Lab("LAB//POTASSIUM//mmol/L", "Potassium", 0.2, 0.30,
        _by([4.2, 4.25, 4.4, 4.6, 4.9], 0, 0.15), 0.45, 2.4),
    Lab("LAB//HBA1C//%", "HbA1c", 0.5, 0.30, _by([5.6] * 5, 1.2), 0.8, 4),
    Lab("LAB//TSH//mIU/L", "TSH", 0.5, 0.15, _by([2.4] * 5), 0.9, 0.5),
]  # fmt: skip

YES_NO = [
    YesNo("DIAGNOSIS//DIABETES", "Type 2 diabetes", _by([0.05] * 5, 0.35)),
    YesNo("DIAGNOSIS//HEART_FAILURE", "Heart failure", _by([0.02, 0.03, 0.05, 0.09, 0.15], 0.08)),
    YesNo("DIAGNOSIS//HYPERTENSION", "Hypertension", _by([0.15, 0.18, 0.2, 0.22, 0.24], 0.1)),
    YesNo("MEDICATION//NEPHROSTAT", "Nephrostat tablet", _by([0.03] * 5, 0, 0.67)),
    YesNo("MEDICATION//METFORMIN", "Metformin tablet", _by([0.03] * 5, 0.3)),
    YesNo("MEDICATION//FUROSEMIDE", "Furosemide tablet", _by([0.03, 0.04, 0.08, 0.16, 0.26])),
    YesNo("MEDICATION//IRON", "Iron tablet", _by([0.03, 0.04, 0.06, 0.12, 0.2])),
    YesNo("PROCEDURE//KIDNEY_ULTRASOUND", "Kidney ultrasound", _by([0.03, 0.05, 0.08, 0.1, 0.1])),
    YesNo("PROCEDURE//VASCULAR_ACCESS", "Vascular access", _by([0.003, 0.003, 0.006, 0.03, 0.14])),
    YesNo("DIAGNOSIS//BACK_PAIN", "Back pain", _by([0.12] * 5)),
    YesNo("DIAGNOSIS//COMMON_COLD", "Common cold", _by([0.10] * 5)),
    YesNo("MEDICATION//VITAMIN_D", "Vitamin D capsule", _by([0.12] * 5)),
    YesNo("PROCEDURE//FLU_VACCINE", "Influenza vaccination", _by([0.08] * 5)),
]

OTHER_CODES = [
    ("GENDER//F", "Female"),
    ("GENDER//M", "Male"),
    ("MEDS_BIRTH", "Birth"),
    ("MEDS_DEATH", "Death"),
    ("VISIT//REGISTRATION", "Registration with the clinic"),
]
# the order in which lines of one moment stand; a code's number is its place here
CODES: list[tuple[str, str]] = [
    *OTHER_CODES,
    *((lab.code, lab.description) for lab in LABS),
    *STAGE_CODES,
    *((code.code, code.description) for code in YES_NO),
]
_CODE_ID = {code: number for number, (code, _) in enumerate(CODES)}
_LAB_ID = np.array([_CODE_ID[lab.code] for lab in LABS])
_STAGE_ID = np.array([-1, *(_CODE_ID[code] for code, _ in STAGE_CODES)])
_YES_NO_ID = np.array([_CODE_ID[code.code] for code in YES_NO])
# minutes after midnight at which the lines of a visit begin, before a shift of up to an hour
DIAGNOSIS_MINUTE = 780
_SECTION_START = {
    "VITAL": 480,
    "LAB": 570,
    "DIAGNOSIS": DIAGNOSIS_MINUTE,
    "PROCEDURE": 850,
    "MEDICATION": 920,
}
_STARTS = np.array([_SECTION_START.get(code.split("//")[0], 0) for code, _ in CODES])


@dataclass(frozen=True)
class Block:
    """256 patients. What lies behind the end of a record is already removed, except `state_BT`.

    `index_B` int64, `band_B` int, `female_B` bool, `entry_B` and `birth_B` int64 days since 1970;
    `split_B` strings; `study_B` whole months from entry to the end of the study; `followed_B`
    months observed if nobody died; `death_B` int64 microseconds since 1970, or -1 where no death
    was observed; `state_BT` int (`DEAD` = dead); `visit_BT` bool; `day_BT` int 0..29;
    `shift_BT` int minutes; `lab_BTL` fp64, nan where not measured; `stage_BT` int 0..5;
    `code_BTC` bool.
    """

    index_B: np.ndarray
    band_B: np.ndarray
    female_B: np.ndarray
    entry_B: np.ndarray
    birth_B: np.ndarray
    split_B: np.ndarray
    study_B: np.ndarray
    followed_B: np.ndarray
    death_B: np.ndarray
    state_BT: np.ndarray
    visit_BT: np.ndarray
    day_BT: np.ndarray
    shift_BT: np.ndarray
    lab_BTL: np.ndarray
    stage_BT: np.ndarray
    code_BTC: np.ndarray


@dataclass(frozen=True)
class Nodes:
    """Decision nodes of a block: `row_N` patient of the block, `month_N`, `evening_N` bool,
    `time_N` int64 microseconds since 1970 (noon or 18:00 on the day of a visit)."""

    row_N: np.ndarray
    month_N: np.ndarray
    evening_N: np.ndarray
    time_N: np.ndarray


@dataclass(frozen=True)
class Rows:
    """MEDS rows sorted by patient and time: `row_E` patient of the block, `time_E` int64
    microseconds (int64 min = static), `code_E` place in `CODES`, `value_E` fp32, nan = none."""

    row_E: np.ndarray
    time_E: np.ndarray
    code_E: np.ndarray
    value_E: np.ndarray


def prior() -> np.ndarray:
    """Return P(z_0 | age band), fp64 [A, Z]."""
    treated = np.array(TREATED_AT_ENTRY)[STAGE_Z]
    stage_AZ = np.array(AGE_STAGE)[:, STAGE_Z]
    comorbid_A1 = np.array(AGE_COMORBID)[:, None]
    comorbid_AZ = np.where(COMORBID_Z == 1, comorbid_A1, 1 - comorbid_A1)
    return stage_AZ * comorbid_AZ * np.where(TREATED_Z == 1, treated, 1 - treated)


def transition() -> np.ndarray:
    """Return P(z_t+1 | z_t, age band), fp64 [A, Z + 1, Z + 1]; the last state is death."""
    worse = np.where(COMORBID_Z == 1, 1.7, 1.0)
    progress = PROGRESS[STAGE_Z] * worse * np.where(TREATED_Z == 1, 0.35, 1.0)
    onset = np.where(COMORBID_Z == 1, 1.0, 0.004)
    treat = np.where(TREATED_Z == 1, 1 - 0.012, START[STAGE_Z])
    rise = STAGE_Z[None, :] - STAGE_Z[:, None]
    move_ZZ = np.select([rise == 0, rise == 1], [(1 - progress)[:, None], progress[:, None]], 0.0)
    move_ZZ = move_ZZ * np.where(COMORBID_Z[None, :] == 1, onset[:, None], (1 - onset)[:, None])
    move_ZZ = move_ZZ * np.where(TREATED_Z[None, :] == 1, treat[:, None], (1 - treat)[:, None])
    full = np.zeros((len(AGE_FROM), Z + 1, Z + 1))
    for band, factor in enumerate(AGE_DEATH):
        death_Z = DEATH[STAGE_Z] * worse * factor
        full[band, :Z, :Z] = move_ZZ * (1 - death_Z)[:, None]
        full[band, :Z, DEAD] = death_Z
    full[:, DEAD, DEAD] = 1.0
    return full


def _pick(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Invert a cumulative distribution along the last axis; its top entry, about 1, is not used."""
    return (uniform[..., None] >= cumulative[..., :-1]).sum(-1)


def draw_block(seed: int, block: int) -> Block:
    """Draw patients `256 * block` to `256 * block + 255` of cohort `seed`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, block, 0])))
    fixed = rng.random((8, BLOCK))
    monthly = rng.random((4 + 2 * len(LABS) + len(YES_NO), BLOCK, MONTHS))
    step_BT, visit_u, day_u, stage_u = monthly[:4]
    measured_u, value_u = monthly[4 : 4 + len(LABS)], monthly[4 + len(LABS) : 4 + 2 * len(LABS)]
    code_u = monthly[4 + 2 * len(LABS) :]

    band_B = _pick(np.cumsum(AGE_SHARE), fixed[0])
    entry_B = FIRST_ENTRY + (fixed[1] * ENTRY_DAYS).astype(np.int64)
    age_days = (np.array(AGE_FROM)[band_B] + 15 * fixed[2]) * 365.25
    study_B = (STUDY_END - entry_B) // STEP_DAYS
    stays = np.floor(np.log1p(-fixed[3]) / np.log1p(-LOSS)).astype(np.int64) + 1
    followed_B = np.minimum(stays, study_B)

    state_BT = np.empty((BLOCK, MONTHS), np.int64)
    state_BT[:, 0] = _pick(np.cumsum(prior(), axis=1)[band_B], fixed[4])
    cumulative = np.cumsum(transition(), axis=2)
    for month in range(1, MONTHS):
        state_BT[:, month] = _pick(cumulative[band_B, state_BT[:, month - 1]], step_BT[:, month])

    month_T = np.arange(MONTHS)
    alive_BT = state_BT < DEAD
    living_BT = np.minimum(state_BT, Z - 1)
    visit_BT = alive_BT & (month_T < followed_B[:, None]) & (visit_u < VISIT_Z[living_BT])

    lab_BTL, stage_BT, code_BTC = _draw_visits(
        living_BT, visit_BT, measured_u, value_u, stage_u, code_u
    )
    died_B = np.where(alive_BT.all(1), MONTHS, (~alive_BT).argmax(1))
    second_B = (fixed[5] * STEP_DAYS * 86_400).astype(np.int64)
    death_B = (entry_B + died_B * STEP_DAYS) * DAY + second_B * 1_000_000
    return Block(
        index_B=block * BLOCK + np.arange(BLOCK),
        band_B=band_B,
        female_B=fixed[6] < 0.5,
        entry_B=entry_B,
        birth_B=entry_B - age_days.astype(np.int64),
        split_B=np.array(["train", "tuning", "held_out"])[
            _pick(np.array([0.6, 0.75, 1]), fixed[7])
        ],
        study_B=study_B,
        followed_B=followed_B,
        death_B=np.where(died_B < followed_B, death_B, -1),
        state_BT=state_BT,
        visit_BT=visit_BT,
        day_BT=(day_u * STEP_DAYS).astype(np.int64),
        # the digits that the day leaves over are as good as a new draw
        shift_BT=(day_u * STEP_DAYS % 1 * 60).astype(np.int64),
        lab_BTL=lab_BTL,
        stage_BT=stage_BT,
        code_BTC=code_BTC,
    )


def _draw_visits(
    living_BT: np.ndarray,
    visit_BT: np.ndarray,
    measured_u: np.ndarray,
    value_u: np.ndarray,
    stage_u: np.ndarray,
    code_u: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what is recorded at the visits: `lab_BTL`, `stage_BT` and `code_BTC` of `Block`.

    Args:
        living_BT: the living state of each month (any, where the patient is dead).
        measured_u, value_u, stage_u, code_u: uniform numbers, [L, B, T], [L, B, T], [B, T] and
            [C, B, T].
    """
    lab_BTL = np.full((BLOCK, MONTHS, len(LABS)), np.nan)
    at = np.nonzero(visit_BT)
    for number, lab in enumerate(LABS):
        value = lab.mean_Z[living_BT[at]] + lab.sd * ndtri(np.maximum(value_u[number][at], 1e-300))
        value = np.maximum(np.round(value / lab.step) * lab.step, lab.least)
        lab_BTL[at[0], at[1], number] = np.where(
            measured_u[number][at] < lab.measured, value, np.nan
        )
    stage_BT = np.zeros((BLOCK, MONTHS), np.int64)
    stage_BT[at] = _pick(np.cumsum(STAGE_CODE_ZS, axis=1)[living_BT[at]], stage_u[at])
    code_BTC = np.zeros((BLOCK, MONTHS, len(YES_NO)), bool)
    for number, code in enumerate(YES_NO):
        code_BTC[at[0], at[1], number] = code_u[number][at] < code.chance_Z[living_BT[at]]
    return lab_BTL, stage_BT, code_BTC


def draw_nodes(block: Block, seed: int, count: int) -> Nodes:
    """Draw decision nodes: for each of `count` draws, the first visit from a random month on.

    The month (uniform in EARLIEST_NODE..LATEST_NODE) and noon or evening are drawn independently of
    everything else. So whether a visit becomes a node depends on nothing but the history up to it
    and chance, and the posterior given the history needs no correction for having been chosen.
    Draws that meet at one visit are one node. Sorted by patient, then time.
    """
    number = int(block.index_B[0]) // BLOCK
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, 1])))
    draws = [rng.random((2, BLOCK)) for _ in range(count)]
    chosen: dict[tuple[int, int], bool] = {}
    for month_u, evening_u in draws:
        least_B = EARLIEST_NODE + (month_u * (LATEST_NODE - EARLIEST_NODE + 1)).astype(np.int64)
        later_BT = block.visit_BT & (np.arange(MONTHS) >= least_B[:, None])
        for row in np.nonzero(later_BT.any(1))[0]:
            chosen.setdefault((int(row), int(later_BT[row].argmax())), bool(evening_u[row] < 0.5))
    keys = sorted(chosen)
    row_N = np.array([row for row, _ in keys], np.int64)
    month_N = np.array([month for _, month in keys], np.int64)
    evening_N = np.array([chosen[key] for key in keys], bool)
    day_N = block.entry_B[row_N] + month_N * STEP_DAYS + block.day_BT[row_N, month_N]
    hour_N = np.where(evening_N, EVENING, NOON)
    return Nodes(row_N, month_N, evening_N, day_N * DAY + hour_N * (DAY // 24))


def rows(block: Block) -> Rows:
    """Return the block as MEDS rows; the value of a lab is the rounded one, in fp32."""
    everyone = np.arange(BLOCK)
    static, dead = np.iinfo(np.int64).min, np.nonzero(block.death_B >= 0)[0]
    sex_B = np.where(block.female_B, _CODE_ID["GENDER//F"], _CODE_ID["GENDER//M"])
    parts = [
        (everyone, np.full(BLOCK, static), sex_B, None),
        (everyone, block.birth_B * DAY, np.full(BLOCK, _CODE_ID["MEDS_BIRTH"]), None),
        (everyone, block.entry_B * DAY, np.full(BLOCK, _CODE_ID["VISIT//REGISTRATION"]), None),
        (dead, block.death_B[dead], np.full(len(dead), _CODE_ID["MEDS_DEATH"]), None),
    ]

    def at_visits(row: np.ndarray, month: np.ndarray, code: np.ndarray, value=None) -> None:
        minute = _STARTS[code] + block.shift_BT[row, month]
        day = block.entry_B[row] + month * STEP_DAYS + block.day_BT[row, month]
        parts.append((row, day * DAY + minute * (DAY // 1440), code, value))

    row, month, lab = np.nonzero(~np.isnan(block.lab_BTL))
    at_visits(row, month, _LAB_ID[lab], block.lab_BTL[row, month, lab])
    row, month = np.nonzero(block.stage_BT)
    at_visits(row, month, _STAGE_ID[block.stage_BT[row, month]])
    row, month, code = np.nonzero(block.code_BTC)
    at_visits(row, month, _YES_NO_ID[code])

    row_E, time_E, code_E = (np.concatenate([part[i] for part in parts]) for i in range(3))
    value_E = np.concatenate([np.full(len(p[0]), np.nan) if p[3] is None else p[3] for p in parts])
    order = np.lexsort((code_E, time_E, row_E))
    return Rows(row_E[order], time_E[order], code_E[order], value_E[order].astype(np.float32))
