"""Synthetic 12-lead ECG with tunable infarction (first half of arXiv 2506.23259), and the chart.

    python -m extras.synthetic plot RECORD OUT.png                          a WFDB record
    python -m extras.synthetic plot --synthetic IMI --stage acute OUT.png   a synthetic patient
    python -m extras.synthetic sheet OUT.png                                six charts on one sheet

A beat is a sum of 16 Gaussian bumps with amplitudes in eight leads.  They are split into a dipole
(a vector through the chest: X left, Y foot, Z back, seen by Dower's lead vectors) and what the
dipole misses.  An infarct edits the dipole: injury current pulls ST and T towards the wall, a scar
takes away the forces that pointed to it.  Noise enters at nine electrodes.  III and the augmented
leads are derived last, so Einthoven's law holds to the last bit.

`synthesize` draws a block of patients (`Block`: types, hearts, noise, rhythm), then renders one
record after the other (`record_patient`).  Letters in shapes: n records, B patients of one block,
T samples.
"""

import argparse
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from extras import run_action
from extras.synthetic_tables import BEATS, DOWER, INDEPENDENT, INJURY, RESIDUAL, SCAR, TYPES
from selfmis import LEADS, MI_TYPES, STATEMENTS, UsageError, import_optional, lead_names, read_ecg

ABNORMAL = ("LVH", "ISCAL", "NST_", "NDT", "LAFB", "CLBBB", "CRBBB")  # neither normal nor infarct
SYNTHETIC_TYPES = ("NORM",) + MI_TYPES + ABNORMAL

# ------------------------------------------------------------------------------------------------
# Constants
#
# The times in WALLS and the spreads are fitted to PTB-XL, folds 1-7 (Wagner et al. 2020, PhysioNet,
# CC BY 4.0: keep this attribution), as are the long tables in extras/synthetic_tables.py.  STAGES,
# the directions of the walls and the noise are our own choice.
# ------------------------------------------------------------------------------------------------

INDEPENDENT_ROWS = [LEADS.index(lead) for lead in INDEPENDENT]
# The other leads as sums of I and II.
DERIVED = {"III": (-1, 1), "aVR": (-0.5, -0.5), "aVL": (1, -0.5), "aVF": (-0.5, 1)}

# fmt: off
# The bumps: two of P, eight of QRS, six of ST and T.
P, QRS, ST_T = slice(0, 2), slice(2, 10), slice(10, 16)
CENTRE = np.array([-168, -140, -30, -21, -12, -4, 4, 12, 20, 29,
                   62, 108, 154, 200, 246, 292], float)                            # ms after R
WIDTH = np.array([20, 20, 6, 6, 6, 6, 6, 6, 6, 7, 26, 31, 31, 31, 31, 31], float)  # ms

# X, Y, Z from the middle of the heart; when the wall's forces are lost (ms after R, width in ms);
# sign of its early T.
WALLS = {"septal":       (-.20,  .00, -.98, -14,  9,  1),
         "anterior":     ( .45, -.25, -.86,  -5, 10,  1),
         "high lateral": ( .65, -.75,  .10,  -4, 21,  1),
         "low lateral":  ( .90,  .10,  .42,  -4, 10,  1),
         "inferior":     (-.15,  .97,  .18,  -3, 13,  1),
         "posterior":    ( .20,  .18,  .96,   2,  9, -.6)}

# Each stage, uniform between two values at severity 1: ST and T along the injury (mV), lost forces
# (mV), share of T lost, strain.
STAGES = {"hyperacute": ((.03, .12), (.30, .70), (.00, .05), (.0, .0), (0, .2)),
          "acute":      ((.14, .40), (.10, .40), (.05, .40), (.0, .3), (0, .3)),
          "subacute":   ((.03, .12), (-.50, -.15), (.40, .80), (.2, .6), (0, 1)),
          "old":        ((-.02, .03), (-.14, .10), (.50, 1.1), (.1, .7), (0, 1))}
NO_INFARCT =           ((0, 0), (0, 0), (0, 0), (0, 0), (0, 1))
STAGE_SHARES = (.03, .07, .20, .70)  # PTB-XL's infarcts are mostly old
LATERAL = (1.1, .3, .25)  # X, Y, Z of the ST and T that are lost by strain

# How patients differ (standard deviations).
GAIN_SPREAD = np.array([.20, .30, .21, .33])                        # log: QRS, T with QRS, T, P
AXIS_SPREAD = np.array([[10, 12, 20], [6, 21, 14], [6, 9, 8]])      # degrees: P, QRS, ST and T
BUMP_SPREAD = np.repeat([.15, .08], (10, 6))[:, None]               # each bump, relative
LEAD_SPREAD = np.array([.08, .08, .09, .15, .12, .06, .04, .05])    # mV beyond the dipole
J_POINT_SPREAD = np.array([.03, .02, .04])                          # mV along X, Y, Z
SHORTEST_RR = .25                                                   # seconds
WANDER_GAIN = np.array([1, 1, 1.4, 1.3, 1.3, 1.3, 1.3, 1.3, 1.3])   # RA LA LL V1..V6
TONES_HZ = np.array([.05, .09, .13, .18, .23, .3, .4, .55, 50, 60]) # baseline wander, then mains
# fmt: on


# ------------------------------------------------------------------------------------------------
# Arrays that follow from the tables
# ------------------------------------------------------------------------------------------------


def gaussian(x, centre, width):
    return np.exp(-0.5 * ((x - centre) / width) ** 2)


def by_type(table: dict, shape) -> np.ndarray:
    """(17, *shape): the table's rows in the order of SYNTHETIC_TYPES, zeros where it has none."""
    return np.array([table.get(name, np.zeros(shape)) for name in SYNTHETIC_TYPES], float)


def fit_bumps(wave: slice, curve: np.ndarray) -> np.ndarray:
    """Weights with which the bumps of one wave add up to about this curve over FIT_MS."""
    bumps = gaussian(FIT_MS[:, None], CENTRE[wave], WIDTH[wave])
    ridge = 0.5 * np.eye(bumps.shape[1])
    return np.linalg.solve(bumps.T @ bumps + ridge, bumps.T @ curve)


AMPLITUDE = np.array([BEATS.get(name, BEATS["NORM"]) for name in SYNTHETIC_TYPES]) / 100
AMPLITUDE = AMPLITUDE.transpose(0, 2, 1).copy()  # (17, 16 bumps, 8 leads) mV
LEAD_VECTORS = np.array(DOWER)  # (8, 3)
TO_DIPOLE = np.linalg.pinv(LEAD_VECTORS).T  # (8, 3)
TYPE_SHARES, QRS_GAIN, T_GAIN, QRS_AXIS, QRS_WIDTH, ST_LOSS, T_LOSS, QRS_DELAY = by_type(TYPES, 8).T
IS_INFARCT = np.isin(SYNTHETIC_TYPES, MI_TYPES)  # (17,)
STATEMENT = np.array([STATEMENTS.index(name) for name in SYNTHETIC_TYPES])  # column in the labels
INJURED_WALLS, SCARRED_WALLS = by_type(INJURY, 6), by_type(SCAR, 6)  # (17, 6)
RESIDUAL_MV = by_type(RESIDUAL, (3, 8)) / 100  # (17, 3 shapes, 8 leads)
RESIDUAL_SHAPES = gaussian(np.array([[-18.0], [0.0], [18.0]]), CENTRE[QRS], 10)  # (3, 8 bumps)

# Patients without an infarct have a stage of their own, so that all of a block are drawn alike.
STAGE_NAMES = tuple(STAGES) + (None,)
STAGE_LOW, STAGE_HIGH = np.array(list(STAGES.values()) + [NO_INFARCT]).transpose(2, 0, 1)  # (5, 5)

FIT_MS = np.arange(-60.0, 420.0)
J_RISE = 1 / (1 + np.exp((45 - FIT_MS) / 6))
T_FALL = 1 + np.exp((FIT_MS - 250) / 22)
ST_PLATEAU = fit_bumps(ST_T, J_RISE / T_FALL)  # (6,)
T_WAVE = fit_bumps(ST_T, gaussian(FIT_MS, 258, np.where(FIT_MS < 258, 48, 34)))  # (6,)
WALL = np.array(list(WALLS.values()))  # (6, 6)
WALL_DIRECTION = WALL[:, :3] / np.linalg.norm(WALL[:, :3], axis=1, keepdims=True)
# (6 walls, 8 bumps): what is missing in QRS where a wall is dead.
LOST = np.array([fit_bumps(QRS, gaussian(FIT_MS, ms, width)) for ms, width in WALL[:, 3:5]])
EARLY_T_SIGN = WALL[:, 5]


# ------------------------------------------------------------------------------------------------
# A block of patients
# ------------------------------------------------------------------------------------------------


class Draws:
    """Random numbers of B records, each from its own generator, dealt in a fixed order.

    So a record does not depend on the block it is drawn in.  Another order, or one number more in
    between, gives other records.
    """

    def __init__(self, generators: Sequence[np.random.Generator], normals: int, uniforms: int):
        self.uniforms = np.stack([g.random(uniforms) for g in generators])
        self.normals = np.stack([g.standard_normal(normals) for g in generators])

    def normal(self, *shape) -> np.ndarray:  # (B, *shape)
        dealt, self.normals = np.split(self.normals, [math.prod(shape)], axis=1)
        return dealt.reshape((-1,) + shape)

    def uniform(self, count: int) -> np.ndarray:  # (B, count)
        dealt, self.uniforms = np.split(self.uniforms, [count], axis=1)
        return dealt


class Block:
    """All that is drawn for B patients, but for the noise of muscle.

    kind, stage (B,)        places in SYNTHETIC_TYPES and STAGE_NAMES
    severity (B,)           of the infarct, or of the strain without one, 0 to 2
    strain (B,)             how much of ST and T the left side has lost
    heart_rate (B,)         per minute
    amplitudes (B, 16, 8)   of the bumps in the independent leads, float32 mV
    clocks (B, 4)           delay of P (ms), stretch of QRS and of QT, delay of QRS (ms), float32
    r_times (B, beats)      seconds, from before 0 to after the end
    breathing (B, 2)        rad/s, phase
    tones (B, 9, 20)        sine and cosine of TONES_HZ at the nine electrodes, float32 mV
    muscle (B, 9, 1)        float32 mV
    burst (B, 3)            how much stronger muscle gets, when (0 to 1), for how many seconds
    slip (B, 3)             step of a slipping electrode (mV), when (0 to 1), which electrode
    """

    def __init__(self, generators: Sequence[np.random.Generator], given, seconds: float):
        """given: kind, stage, severity, heart rate of these patients, -1 where they are drawn."""
        draws = Draws(generators, normals=400 + int(seconds / SHORTEST_RR), uniforms=40)
        self.kind, self.stage, self.severity, self.heart_rate = draw_patients(draws, given)
        hearts = draw_hearts(draws, self.kind, self.stage, self.severity)
        self.amplitudes, self.clocks, self.strain = hearts
        self.tones, self.muscle, self.burst, self.slip = draw_disturbances(draws)
        self.r_times, self.breathing = draw_rhythms(draws, self.heart_rate, seconds)


def draw_patients(draws: Draws, given):
    """Kind, stage, severity and heart rate of a Block.

    Drawn also where given, so that the same patient can be seen with another infarct or rate.
    """
    chance, pace = draws.uniform(3), np.exp(0.165 * draws.normal(1)[:, 0])
    kind = np.searchsorted(np.cumsum(TYPE_SHARES)[:-1], chance[:, 0], "right")
    stage = np.searchsorted(np.cumsum(STAGE_SHARES)[:-1], chance[:, 1], "right")
    kind = np.where(given[0] < 0, kind, given[0])
    stage = np.where(given[1] < 0, stage, given[1])
    stage = np.where(IS_INFARCT[kind], stage, STAGE_NAMES.index(None))
    severity = np.where(given[2] < 0, 0.4 + 0.7 * chance[:, 2], given[2])
    usual_rate = np.where(kind == SYNTHETIC_TYPES.index("NORM"), 67, 72)
    heart_rate = np.where(given[3] < 0, usual_rate * pace, given[3])
    return kind, stage, severity, heart_rate


def draw_hearts(draws: Draws, kind, stage, severity):
    """Amplitudes, clocks and strain of a Block."""
    beats = Beats(draws, kind)
    # Every chest is a little different from Dower's.
    lead_vectors = LEAD_VECTORS * (1 + 0.10 * draws.normal(8, 3)) + 0.03 * draws.normal(8, 3)
    strain = beats.add_infarct(draws, kind, stage, severity)
    beats.add_strain(kind, strain)
    amplitudes = beats.dipole @ lead_vectors.transpose(0, 2, 1) + beats.rest  # (B, 16, 8)
    pr, width, qt = draws.normal(3).T
    qrs_stretch = np.exp(0.09 * width - 0.06) * QRS_WIDTH[kind]
    clocks = np.stack([14 * pr, qrs_stretch, np.exp(0.06 * qt), QRS_DELAY[kind]], axis=1)
    return amplitudes.astype(np.float32), clocks.astype(np.float32), strain


class Beats:
    """Amplitudes of the bumps in mV: a dipole (B, 16, 3), and what it misses, the rest (B, 16, 8).

    qrs_gain, t_gain (B,): how large a patient's waves are; what an infarct does grows with them.
    """

    def __init__(self, draws: Draws, kind: np.ndarray):
        """Without infarct: size of the waves, electrical axes, shape beyond the dipole."""
        size = draws.normal(3)  # (B, 3)
        self.qrs_gain = QRS_GAIN[kind] * np.exp(GAIN_SPREAD[0] * size[:, 0])
        t_size = np.exp(GAIN_SPREAD[1] * size[:, 0] + GAIN_SPREAD[2] * size[:, 1])
        self.t_gain = T_GAIN[kind] * t_size
        p_gain = np.exp(GAIN_SPREAD[3] * size[:, 2])
        gains = np.stack([p_gain, self.qrs_gain, self.t_gain], axis=1)
        gain = np.repeat(gains, (2, 8, 6), axis=1)[:, :, None]  # (B, 16, 1)

        dipole = AMPLITUDE[kind] @ TO_DIPOLE
        self.rest = gain * (AMPLITUDE[kind] - dipole @ LEAD_VECTORS.T)
        self.dipole = dipole * gain * (1 + BUMP_SPREAD * draws.normal(16, 1))
        for wave, spread in zip((P, QRS, ST_T), AXIS_SPREAD, strict=True):
            turn = draws.normal(3) * spread  # (B, 3) degrees
            if wave is QRS:
                turn[:, 2] += QRS_AXIS[kind]  # the axis of the limb leads turns about Z
            self.dipole[:, wave] = self.dipole[:, wave] @ rotations(turn).transpose(0, 2, 1)

        residual = RESIDUAL_SHAPES.T @ (draws.normal(3, 8) * LEAD_SPREAD)  # (B, 8 bumps, 8 leads)
        self.rest[:, QRS] += self.qrs_gain[:, None, None] * residual
        t_waves = self.t_gain[:, None, None] * T_WAVE[:, None]  # (B, 6, 1)
        self.rest[:, ST_T] += t_waves * draws.normal(1, 8) * LEAD_SPREAD * 0.5
        self.dipole[:, ST_T] += ST_PLATEAU[:, None] * draws.normal(1, 3) * J_POINT_SPREAD

    def add_infarct(self, draws: Draws, kind, stage, severity) -> np.ndarray:
        """T fades, injury pulls ST and T towards the wall, the scar takes its forces out of QRS.

        Returns the strain (B,).
        """
        low, high = STAGE_LOW[stage], STAGE_HIGH[stage]  # (B, 5) each
        effects = (low + (high - low) * draws.uniform(5)) * severity[:, None]
        st, t, lost, faded, strain = effects.T
        kept = (1 - np.clip(faded, 0, 0.95))[:, None, None]
        self.dipole[:, ST_T] *= kept
        self.rest[:, ST_T] *= kept

        direction = WALL_DIRECTION @ rotations(8 * draws.normal(3)).transpose(0, 2, 1)  # (B, 6, 3)
        varied = 1 + 0.2 * draws.normal(6)
        injury, scar = varied * INJURED_WALLS[kind], varied * SCARRED_WALLS[kind]  # (B, 6)
        t_injury = injury * np.where(t[:, None] > 0, EARLY_T_SIGN, 1.0)
        st_pull = (injury[:, None] @ direction) * (st * self.qrs_gain)[:, None, None]  # (B, 1, 3)
        t_pull = (t_injury[:, None] @ direction) * (t * self.t_gain)[:, None, None]
        self.dipole[:, ST_T] += ST_PLATEAU[:, None] * st_pull + T_WAVE[:, None] * t_pull

        lost = (lost * self.qrs_gain)[:, None]  # (B, 1) mV
        self.dipole[:, QRS] -= (LOST.T * (scar * lost)[:, None]) @ direction
        self.rest[:, QRS] += RESIDUAL_SHAPES.T @ (RESIDUAL_MV[kind] * lost[:, None])
        return strain

    def add_strain(self, kind: np.ndarray, strain: np.ndarray) -> None:
        """Strained, ischaemic and old hearts lose ST and T on the left side, infarct or not."""
        st, t = strain * ST_LOSS[kind], strain * T_LOSS[kind]  # (B,) mV
        loss = ST_PLATEAU * st[:, None] + T_WAVE * t[:, None]  # (B, 6)
        self.dipole[:, ST_T] -= loss[:, :, None] * LATERAL


def rotations(degrees: np.ndarray) -> np.ndarray:
    """Rotation matrices (B, 3, 3) from vectors (B, 3): Cayley's form, orthogonal for any size."""
    x, y, z = (degrees * (np.pi / 360)).T
    zero = np.zeros_like(x)
    half = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    return np.linalg.solve(np.eye(3) - half, np.eye(3) + half)


def draw_rhythms(draws: Draws, heart_rate: np.ndarray, seconds: float):
    """R times and breathing of a Block: RR swings with breath and with 0.1 Hz, blood pressure."""
    beats = int(seconds / SHORTEST_RR) + 3
    breath_hz, phase = 0.18 + 0.14 * draws.uniform(1), 2 * np.pi * draws.uniform(3)
    spread = 0.025 * np.exp(0.6 * draws.normal(1))
    start = draws.uniform(1)
    mean = 60 / heart_rate[:, None]  # (B, 1) seconds
    clock = np.arange(beats) * mean  # (B, beats)
    pressure = np.sin(2 * np.pi * 0.1 * clock + phase[:, :1])
    breath = np.sin(2 * np.pi * breath_hz * clock + phase[:, 1:2])
    change = spread * (pressure + breath + 0.5 * draws.normal(beats))
    rr = np.maximum(mean * np.clip(1 + change, 0.6, 1.5), SHORTEST_RR)
    r_times = np.cumsum(rr, axis=1) - rr[:, :1] * (1 + start)
    return r_times, np.concatenate([2 * np.pi * breath_hz, phase[:, 2:]], axis=1)


def draw_disturbances(draws: Draws):
    """Tones, muscle, burst and slip of a Block, at the electrodes RA, LA, LL, V1..V6."""
    wander = 0.032 * np.exp(0.75 * draws.normal(1) + 0.35 * draws.normal(9)) * WANDER_GAIN
    # Mains hum in 12 of 100 records, at 50 Hz in 60; a burst of muscle in 6, a slip in 4.
    chance = draws.uniform(4)
    hums, at_50_hz, bursts, slips = (chance < (0.12, 0.6, 0.06, 0.04)).T[:, :, None]  # (B, 1) each
    hum = np.where(hums, 0.012 * np.exp(0.6 * draws.normal(9)), 0.0015)  # (B, 9)
    mains = np.where(at_50_hz[:, None], (1.0, 0.0), (0.0, 1.0))  # (B, 1, 2)
    wander_tones = wander[:, :, None] * 0.5 * (TONES_HZ[:8] / 0.05) ** -0.5  # (B, 9, 8)
    level = np.concatenate([wander_tones, hum[:, :, None] * mains], axis=2)  # (B, 9, 10)
    tones = np.concatenate([level, level], axis=2) * draws.normal(9, 20)
    muscle = 0.009 * np.exp(0.4 * draws.normal(1) + 0.25 * draws.normal(9))
    muscle *= np.repeat([0.7, 1.25], (3, 6))  # limbs, chest
    burst = [bursts * (1 + 4 * draws.uniform(1)), draws.uniform(1), 0.2 + draws.uniform(1)]
    slip = [slips * 0.4 * draws.normal(1), draws.uniform(1), np.floor(9 * draws.uniform(1))]
    tones, muscle = tones.astype(np.float32), muscle.astype(np.float32)[:, :, None]
    return tones, muscle, np.concatenate(burst, axis=1), np.concatenate(slip, axis=1)


def label(block: Block) -> np.ndarray:
    """(B, 44) uint8 in STATEMENTS' columns."""
    labels = np.zeros((len(block.kind), len(STATEMENTS)), np.uint8)
    labels[np.arange(len(labels)), STATEMENT[block.kind]] = 1
    # In three of five records with hypertrophy PTB-XL's reader adds ischaemia.
    strained = (block.kind == SYNTHETIC_TYPES.index("LVH")) & (block.strain > 0.28)
    labels[strained, STATEMENTS.index("ISC_")] = 1
    return labels


# ------------------------------------------------------------------------------------------------
# One record
# ------------------------------------------------------------------------------------------------


@functools.lru_cache(4)  # a data set asks for one record at a time
class Recorder:
    """What is recorded of every patient, and at which times.

    columns: the independent leads that are needed; electrodes: how many, as their noise is drawn in
    order; step: slower records are decimated from at least 500 Hz; t (T,): seconds, before that;
    tones (20, T): sine and cosine of TONES_HZ.
    """

    def __init__(self, leads: tuple[str, ...], sample_rate_hz: float, seconds: float):
        needed = set(leads)
        if needed & set(DERIVED):
            needed |= {"I", "II"}
        self.leads = leads
        self.columns = [k for k, lead in enumerate(INDEPENDENT) if lead in needed]
        self.electrodes = max(self.columns, default=0) + 2  # RA, then I: LA, II: LL, V1: V1, ...
        self.step = math.ceil(500 / sample_rate_hz)
        rate_hz = sample_rate_hz * self.step
        self.t = np.arange(round(seconds * sample_rate_hz) * self.step) / rate_hz
        phase = 2 * np.pi * TONES_HZ[:, None] * np.arange(len(self.t)) / rate_hz
        self.tones = np.concatenate([np.sin(phase), np.cos(phase)]).astype(np.float32)


def record_patient(recorder: Recorder, generator, block: Block, i: int, noise: float):
    """Patient i of the block: (leads, T / step) float32 mV in steps of 1 uV, as PTB-XL."""
    signal = render_beats(recorder, block, i)  # (columns, T)
    if noise:
        electrodes = float(noise) * electrode_noise(recorder, generator, block, i)
        right_arm, terminal = electrodes[0], electrodes[:3].mean(0)  # Wilson's central terminal
        for row, column in zip(signal, recorder.columns, strict=True):
            reference = right_arm if INDEPENDENT[column] in ("I", "II") else terminal
            row += electrodes[column + 1] - reference
    if recorder.step > 1:
        signal = decimate(signal, recorder.step)
    signal = np.rint(signal * 1000) * 0.001
    ecg = {INDEPENDENT[column]: row for column, row in zip(recorder.columns, signal, strict=True)}
    for lead in set(recorder.leads) & set(DERIVED):  # halves are exact: the laws hold
        of_one, of_two = DERIVED[lead]
        ecg[lead] = of_one * ecg["I"] + of_two * ecg["II"]
    return np.stack([ecg[lead] for lead in recorder.leads])


def render_beats(recorder: Recorder, block: Block, i: int) -> np.ndarray:
    """What the heart gives to the independent leads: (columns, T) float32 mV.

    P keeps time with the next R, QRS with the nearest, ST and T with the last.
    """
    t, r_times = recorder.t, block.r_times[i]
    beat = np.repeat(np.arange(len(r_times) - 1), np.diff(np.searchsorted(t, r_times)))  # (T,)
    after_last = (1000 * (t - r_times[beat])).astype(np.float32)  # ms
    after_next = (1000 * (t - r_times[beat + 1])).astype(np.float32)  # ms, negative
    nearest = np.where(after_last < -after_next, after_last, after_next)

    p_delay, qrs_stretch, qt_stretch, qrs_delay = block.clocks[i]
    fridericia = ((0.9 / np.diff(r_times)) ** (1 / 3)).astype(np.float32)  # QT follows the rate
    bumps = np.empty((len(CENTRE), len(t)), np.float32)
    bumps[P] = after_next - p_delay
    bumps[QRS] = nearest / qrs_stretch - qrs_delay
    bumps[ST_T] = after_last * (fridericia / qt_stretch)[beat]
    bumps -= CENTRE[:, None].astype(np.float32)
    bumps *= (1 / WIDTH)[:, None].astype(np.float32)
    bumps *= bumps
    bumps *= -0.5
    np.exp(np.maximum(bumps, -30, out=bumps), out=bumps)  # below -30: denormal, hence slow
    breath_rad_s, phase = block.breathing[i]
    bumps *= 1 + 0.04 * np.sin((breath_rad_s * t + phase).astype(np.float32))
    # Row by row: a product's last bit depends on its shape, and a lead must not on the others.
    amplitudes = block.amplitudes[i][:, recorder.columns]  # (16, columns)
    return (amplitudes.T[:, None] @ bumps)[:, 0]


def electrode_noise(recorder: Recorder, generator, block: Block, i: int) -> np.ndarray:
    """Potentials (electrodes, T) float32 mV that do not come from the heart."""
    t, electrodes = recorder.t, recorder.electrodes
    noise = generator.standard_normal((electrodes, len(t)), np.float32)
    noise[:, 1:] += noise[:, :-1] * 0.5  # skin and filters pass less at high frequencies
    noise *= block.muscle[i, :electrodes]
    strength, when, width = block.burst[i]
    if strength:
        noise *= (1 + strength * gaussian(t, when * t[-1], width)).astype(np.float32)
    noise += (block.tones[i, :electrodes, None] @ recorder.tones)[:, 0]  # row by row, as above
    jump, when, electrode = block.slip[i]
    if jump and electrode < electrodes:
        after = t - when * t[-1]
        slip = jump * (after > 0) * np.exp(-np.maximum(after, 0) / 0.6)
        noise[int(electrode)] += slip.astype(np.float32)
    return noise


def decimate(signal: np.ndarray, step: int) -> np.ndarray:
    """Every `step`-th sample of (L, T) after a low-pass at 0.42 of the new rate: no aliasing."""
    taps = np.arange(-8 * step, 8 * step + 1) / step
    taps = np.sinc(0.84 * taps) * np.cos(np.pi * taps / 17) ** 2
    taps = (taps / taps.sum()).astype(np.float32)
    padded = np.pad(signal, ((0, 0), (8 * step, 8 * step)), mode="edge")
    length = signal.shape[1]
    return sum(tap * padded[:, k : k + length : step] for k, tap in enumerate(taps))


# ------------------------------------------------------------------------------------------------
# From settings to records
# ------------------------------------------------------------------------------------------------

BLOCK_SIZE = 32  # patients drawn together: their arrays stay in the processor's cache


def synthesize(
    n: int,
    seed: int = 0,
    *,
    first: int = 0,
    types: str | Sequence[str] | None = None,
    stage: str | Sequence[str] | None = None,
    severity: float | Sequence[float] | None = None,
    sample_rate_hz: float = 500,
    seconds: float = 10.0,
    noise: float = 1.0,
    heart_rate: float | Sequence[float] | None = None,
    leads: str | Sequence[str] = LEADS,
    details: bool = False,
):
    """ECG of n patients: (x (n, len(leads), T) float32 mV, y (n, 44) uint8 in STATEMENTS' columns).

    Record first + i depends on (seed, first + i) and the settings only, not on n, the order or the
    process.  types (NORM, one of MI_TYPES or ABNORMAL), stage (hyperacute, acute, subacute, old),
    severity (of infarct or strain: 0 none, 1 typical, 2 at most; the type keeps its label) and
    heart_rate (per minute) are one value for all, one per record, or None: drawn.  noise: 0 is
    clean, 1 about as in PTB-XL (lead I wanders too much: RESULTS.md).  leads=() gives labels alone.
    details=True adds a dict of lists: type, stage, severity, heart_rate and r_times (seconds) of
    each record.  UsageError for a number out of range, an unknown name, or too many or too few.
    """
    check_range("n", n, 0, 10**9)
    check_range("seed", seed, 0, math.inf)
    check_range("first", first, 0, math.inf)
    check_range("noise", noise, 0, 10)
    check_range("sample_rate_hz", sample_rate_hz, 50, 2000)
    check_range("seconds", seconds, 1, 3600)
    leads = lead_names(leads)
    if not set(leads) <= set(LEADS):
        raise UsageError(f"leads={leads!r}: choose from {', '.join(LEADS)}")
    given = (  # what draw_patients takes
        places("types", types, n, SYNTHETIC_TYPES),
        places("stage", stage, n, tuple(STAGES)),
        numbers("severity", severity, n, 0, 2),
        numbers("heart_rate", heart_rate, n, 20, 220),
    )
    recorder = Recorder(leads, sample_rate_hz, seconds)
    x = np.empty((n, len(leads), len(recorder.t) // recorder.step), np.float32)
    y = np.zeros((n, len(STATEMENTS)), np.uint8)
    drawn = {"type": [], "stage": [], "severity": [], "heart_rate": [], "r_times": []}
    for begin in range(0, n, BLOCK_SIZE):
        rows = range(begin, min(begin + BLOCK_SIZE, n))
        generators = [np.random.Generator(np.random.SFC64([seed, first + row])) for row in rows]
        block = Block(generators, [values[rows] for values in given], seconds)
        y[rows] = label(block)
        if leads:
            for i, row in enumerate(rows):
                x[row] = record_patient(recorder, generators[i], block, i, noise)
        drawn["type"] += [SYNTHETIC_TYPES[kind] for kind in block.kind]
        drawn["stage"] += [STAGE_NAMES[stage] for stage in block.stage]
        drawn["severity"] += block.severity.tolist()
        drawn["heart_rate"] += block.heart_rate.tolist()
        drawn["r_times"] += [r[(r >= 0) & (r < seconds)] for r in block.r_times]
    if details:
        return x, y, drawn
    return x, y


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        raise UsageError(f"{name}={value} is out of range: choose from {low} to {high}")


def numbers(name: str, values, n: int, low: float, high: float) -> np.ndarray:
    """(n,) numbers from one or one for each record; -1, to be drawn, from None."""
    if values is None:
        return np.full(n, -1.0)
    for value in np.unique(values):
        check_range(name, value, low, high)
    return one_for_each(name, values, n).astype(float)


def places(name: str, values, n: int, choices: Sequence[str]) -> np.ndarray:
    """(n,) places among the choices from one name or one for each record; or -1, to be drawn."""
    if values is None:
        return np.full(n, -1)
    for value in np.unique(values):
        if value not in choices:
            allowed = ", ".join(choices)
            raise UsageError(f"{name}={str(value)!r} is unknown: choose from {allowed}")
    return np.array([choices.index(value) for value in one_for_each(name, values, n)], int)


def one_for_each(name: str, values, n: int) -> np.ndarray:
    shape = np.shape(values)
    if shape not in ((), (n,)):
        raise UsageError(f"{name} has shape {shape}: give one value or one for each of {n} records")
    return np.broadcast_to(values, (n,))


# ------------------------------------------------------------------------------------------------
# The chart
# ------------------------------------------------------------------------------------------------

CHART_MM = (260, 140)  # of 10 s
PICTURES = (".png", ".pdf", ".svg")


def ecg_paper(wide: float, tall: float, below: float = 0):
    """(figure, axes) of ECG paper in true size: wide x tall mm, and `below` mm left free under it.

    The axes are in mm, the first row's zero at y = 0.
    """
    # Without pyplot the caller's backend and figures stay as they are.
    matplotlib_figure = import_optional("matplotlib.figure", "drawing")
    figure = matplotlib_figure.Figure((wide / 25.4, (tall + below) / 25.4))
    share = below / (tall + below)
    axes = figure.add_axes((0, share, 1, 1 - share), xlim=(-5, wide - 5), ylim=(30 - tall, 30))
    axes.axis("off")
    for step, width in ((1, 0.25), (5, 0.6)):
        line = {"colors": "#f0b4b4", "linewidths": width}
        axes.vlines(np.arange(0, wide - 9.9, step), 35 - tall, 20, **line)
        axes.hlines(np.arange(35 - tall, 20.1, step), 0, wide - 10, **line)
    return figure, axes


def plot_ecg(ecg, path: str | os.PathLike, *, sample_rate_hz: float = 500, title: str = "") -> None:
    """The usual chart of the first 10 s of a 12-lead record (12, T) in mV, at least one second.

    UsageError: another shape, or a path that cannot be written (see save_picture).
    """
    ecg = np.asarray(ecg, float)
    if ecg.ndim != 2 or len(ecg) != 12 or not 1 <= ecg.shape[1] / sample_rate_hz:
        expected = "plot_ecg draws (12, T) in mV, one second or longer"
        raise UsageError(f"ecg has shape {ecg.shape}: {expected}")
    ecg = ecg[:, : int(10 * sample_rate_hz)]
    figure, axes = ecg_paper(25 * ecg.shape[1] / sample_rate_hz + 10, CHART_MM[1])
    draw_chart(axes, ecg, sample_rate_hz, title)
    save_picture(figure, path)


def draw_chart(axes, ecg, sample_rate_hz: float, title: str, left: float = 0, top: float = 0):
    """Three rows of four leads and a rhythm strip of II, 30 mm each, from (left, top) mm on."""
    samples = ecg.shape[1]
    mm = left + 25 * np.arange(samples) / sample_rate_hz
    edges = np.linspace(0, samples, 5).astype(int)
    pieces = [(k, k % 3, edges[k // 3], edges[k // 3 + 1]) for k in range(12)]
    pieces.append((LEADS.index("II"), 3, 0, samples))
    for lead, row, start, stop in pieces:
        axes.plot(mm[start:stop], top - 30 * row + 10 * ecg[lead, start:stop], "k", linewidth=0.8)
    ink = np.concatenate([line.get_xydata() for line in axes.lines])  # (points, 2) mm
    for lead, row, start, _ in pieces:
        write_lead_name(axes, LEADS[lead], mm[start] + 0.3, top - 30 * row, ink)
    caption = f"{title}   25 mm/s, 10 mm/mV".strip()
    axes.text(left, top + 23, caption, fontsize=9, parse_math=False)  # $ in a name is no formula


def write_lead_name(axes, name: str, x: float, zero: float, ink: np.ndarray) -> None:
    """At the usual height where no trace passes, else at the emptiest of some others."""
    wide, tall = 0.3 + 2 * len(name), 2.5  # mm
    near = ink[(ink[:, 0] > x) & (ink[:, 0] < x + wide), 1]
    heights = zero + np.array([9, 10, 8, 11, 12, 13, 14, 15, 7, 6, -9, -10, -11, -12, -13, -14])
    crossed = [np.sum((near > y - 1) & (near < y + tall)) for y in heights]
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    axes.text(x, heights[np.argmin(crossed)], name, fontsize=8, weight="bold", bbox=paper)


def save_picture(figure, path: str | os.PathLike, pixels_per_mm: int = 4) -> None:
    """Write a figure under exactly this name; UsageError where that cannot be done."""
    if Path(path).suffix.lower() not in PICTURES:  # matplotlib would choose another name
        raise UsageError(f"{path}: give the picture a name that ends in {', '.join(PICTURES)}")
    try:
        figure.savefig(path, dpi=25.4 * pixels_per_mm)  # whole pixels: an even grid
    except OSError as error:  # no such folder, a folder of that name, a full disk
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

SHEET = (
    ("NORM", "old", "normal"),
    ("PMI", "acute", "acute posterior infarct"),
    ("IMI", "acute", "acute inferior infarct"),
    ("IMI", "old", "old inferior infarct"),
    ("ASMI", "acute", "acute anteroseptal infarct"),
    ("ASMI", "old", "old anteroseptal infarct"),
)


def run_plot(arguments: argparse.Namespace) -> None:
    kind, stage = arguments.synthetic, arguments.stage
    if (arguments.record is None) == (kind is None):
        raise UsageError("plot: give either a record or --synthetic TYPE")
    if kind is None:
        ecg, title = read_ecg(arguments.record), Path(arguments.record).stem
    else:
        ecg = synthesize(1, arguments.seed, types=kind, stage=stage)[0][0]
        title = f"synthetic {kind}"
        if kind in MI_TYPES:
            title += f", {stage}"
    plot_ecg(ecg, arguments.out, title=title)
    print(f"{title}: {arguments.out}")


def run_sheet(arguments: argparse.Namespace) -> None:
    """One patient six times: normal, then with infarcts of three walls."""
    wide, tall = CHART_MM
    figure, axes = ecg_paper(2 * wide, 3 * tall)
    for k, (kind, stage, words) in enumerate(SHEET):
        patient = {"first": 172, "severity": 1.0, "noise": 0.4, "heart_rate": 66}
        ecg = synthesize(1, 11, types=kind, stage=stage, **patient)[0][0]
        draw_chart(axes, ecg, 500, f"{kind}, {words}", left=k % 2 * wide, top=-(k // 2) * tall)
    save_picture(figure, arguments.out, pixels_per_mm=3)
    print(f"six synthetic charts: {arguments.out}")


def main(argv: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m extras.synthetic",
        description=__doc__,
        formatter_class=layout,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="plot|sheet")
    plot = commands.add_parser("plot", help="the usual 12-lead chart", allow_abbrev=False)
    plot.add_argument("record", nargs="?", help="a WFDB record, with or without .hea")
    plot.add_argument("--synthetic", choices=SYNTHETIC_TYPES, help="instead of a record")
    plot.add_argument("--stage", choices=tuple(STAGES), default="old", help="of the infarct")
    plot.add_argument("--seed", type=int, default=0, help="which synthetic patient")
    plot.set_defaults(run=run_plot)
    sheet = commands.add_parser("sheet", help="six synthetic charts", allow_abbrev=False)
    sheet.set_defaults(run=run_sheet)
    for command in (plot, sheet):
        command.add_argument("out", help="the picture: .png, .pdf or .svg")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    run_action(arguments.run, arguments)


if __name__ == "__main__":
    main()
