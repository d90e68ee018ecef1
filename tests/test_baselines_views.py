"""The views of SimCLR, 3KG and CLOCS: disturbances one by one, turned hearts, what is compared.

What test_baselines.py says about views (limb leads, the dipole there and back, no turn is no
change) is not repeated here.
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import spy
from methods import METHODS

from extras.baselines import crops
from extras.baselines.common import random_segment, random_stream, recompute_limbs, zscore
from extras.baselines.losses import info_nce, nt_xent, patient_nt_xent
from extras.baselines.simclr import MILD, PUBLISHED, augment, blank_leads
from extras.baselines.three_kg import DOWER as FROM_DIPOLE
from extras.baselines.three_kg import INVERSE_DOWER, blank_half, random_turn
from extras.baselines.three_kg import rotation, turn
from extras.synthetic import INDEPENDENT_ROWS
from extras.synthetic_tables import DOWER

SILENCE = dict(powerline=0.0, muscle=0.0, step=0.0, shift=(0.0, 0.0), wander=0.0, gain=(1.0, 1.0))
STRENGTHS = pytest.mark.parametrize("strength", [MILD, PUBLISHED], ids=["mild", "published"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=random_stream(seed), dtype=torch.float64)


def only(strength, name, probability=1.0):
    """One disturbance, drawn each time."""
    kept = ("step", "shift") if name == "step" else (name,)
    rest = {key: value for key, value in SILENCE.items() if key not in kept}
    return strength._replace(probability=probability, **rest)


def disturbance(strength, name, B=200, T=500, rate=500, probability=1.0):
    """(B, 12, T) float64 mV: what it adds to nothing."""
    silence = torch.zeros(B, 12, T, dtype=torch.float64)
    return augment(silence, random_stream(0), rate, only(strength, name, probability))


def views(draw, ecg):
    """Every view there is, from one stream of random numbers."""
    mild, published = (augment(ecg, draw, 500, strength) for strength in (MILD, PUBLISHED))
    turned = [turn(ecg, *random_turn(len(ecg), draw), published=p) for p in (False, True)]
    return [mild, published, *turned, blank_leads(ecg, draw), blank_half(ecg, draw)]


def test_a_crop_is_half_of_the_scored_lead_at_another_gain_in_each_record():
    """What the network of crops.py sees, against every half that there is."""
    method = crops.Crops(crops.CropsConfig(size="small"))
    ecg, labels = torch.randn(20, 12, 60, generator=random_stream(0)), torch.ones(20, 44)
    method.encoder.forward = seen = mock.Mock(return_value=torch.zeros(20, 512))
    method.classify.bias.data.fill_(-1.0)
    loss, _ = method(ecg, None, random_stream(1), labels)
    assert loss.item() == pytest.approx(44 * math.log(1 + math.e))
    (view,) = seen.call_args.args
    gains, starts = [], []
    for half, record in zip(view, ecg, strict=True):
        scored = (record[0] - record[0].mean()) / record[0].std(correction=0)
        halves = scored.unfold(0, 30, 1)  # (31, 30)
        gain = (halves @ half[0]) / halves.square().sum(1)  # (31,) least squares
        errors = (half - gain[:, None] * halves).square().sum(1)
        assert errors.min() < 1e-9
        starts.append(int(errors.argmin()))
        gains.append(float(gain[starts[-1]]))
    assert len(set(starts)) > 2 and 0.4 < min(gains) < 0.9 < 1.1 < max(gains) < 2.5


# --------------------------------------------------------------------------------------------------
# All views
# --------------------------------------------------------------------------------------------------


def test_a_view_is_a_function_of_its_draw_and_leaves_the_record_alone():
    """So that a resumed run sees the same views: nothing comes from torch's own stream."""
    ecg = normal(6, 12, 300)
    before, state = ecg.clone(), torch.get_rng_state()
    first, again, other = (views(random_stream(seed), ecg) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(ecg, before)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.shape == ecg.shape and a.dtype == ecg.dtype and a.isfinite().all()
    assert all(view.dtype == torch.float32 for view in views(random_stream(1), ecg.float()))


def test_records_of_a_batch_are_disturbed_apart():
    ecg = normal(1, 12, 300).expand(40, 12, 300)
    strength = MILD._replace(probability=1.0)
    for view in (augment(ecg, random_stream(0), 500, strength), *views(random_stream(0), ecg)[1:]):
        for i in range(1, len(view)):
            assert not torch.equal(view[0], view[i])


# --------------------------------------------------------------------------------------------------
# SimCLR
# --------------------------------------------------------------------------------------------------


@STRENGTHS
def test_the_hum_is_one_of_50_or_60_hz_in_all_electrodes(strength):
    hum = disturbance(strength, "powerline")
    power = torch.fft.rfft(hum[:, 0]).abs() ** 2  # a bin a hertz
    at = power.argmax(1)
    assert set(at.tolist()) == {50, 60} and 0.35 < float((at == 50).double().mean()) < 0.65
    assert (power.amax(1) > 0.999 * power.sum(1)).all()
    torch.testing.assert_close(hum[:, 1:2].expand(-1, 6, -1), hum[:, 6:])  # II as V1 to V6
    assert (hum[:, 2] == 0).all()  # III = II - I
    amplitude = hum.abs().amax((1, 2))
    assert 0.95 * strength.powerline < amplitude.max() <= strength.powerline
    assert amplitude.min() < 0.05 * strength.powerline


@STRENGTHS
@pytest.mark.parametrize("rate", [50, 100, 120])
def test_no_hum_where_it_would_fold(strength, rate):
    assert (disturbance(strength, "powerline", rate=rate) == 0).all()


@STRENGTHS
def test_muscles_are_white_noise_of_each_electrode(strength):
    noise = disturbance(strength, "muscle", T=2000)
    measured = noise[:, [0, 1, *range(6, 12)]]  # III, aVR, aVL, aVF follow
    deviation = measured.std(2)  # (B, 8)
    assert 0.95 * strength.muscle < deviation.max() < 1.08 * strength.muscle
    assert float(deviation.mean()) == pytest.approx(strength.muscle / 2, rel=0.05)
    assert (deviation.amax(1) > 1.2 * deviation.amin(1)).all()  # each lead has its own
    unit = measured / deviation[..., None]
    between = (unit[:, 0] * unit[:, 1]).mean(1)
    later = (unit[:, :, 1:] * unit[:, :, :-1]).mean(2)
    assert between.abs().max() < 0.12 and later.abs().max() < 0.12


@STRENGTHS
def test_wander_is_slow_and_of_one_shape_in_all_leads(strength):
    T, rate = 2500, 25  # 100 s, so that 0.2 Hz is bin 20
    wander = disturbance(strength, "wander", B=300, T=T, rate=rate)
    window = torch.hann_window(T, dtype=torch.float64)
    power = torch.fft.rfft(wander[:, 0] * window).abs() ** 2
    assert (power[:, :24].sum(1) > 0.999 * power.sum(1)).all()
    values = torch.linalg.svdvals(wander[:, 6:])
    assert (values[:, 1] < 1e-5 * values[:, 0]).all()
    # Three waves of a mean amplitude of a half, so that the mean power of a lead of share s is
    # 3 s^2 E[a^2] / 2 = s^2 maximum^2 / 2, and E[s^2] = 1.25.
    rms = float((wander[:, 6:] ** 2).mean().sqrt())
    assert rms == pytest.approx(strength.wander * (1.25 / 2) ** 0.5, rel=0.12)
    between = wander[:, 6:].var(1).mean() / (wander[:, 6:] ** 2).mean()
    assert float(between) == pytest.approx(0.25 / 1.25, rel=0.15)
    # One amplitude for all three would double the spread of the power.
    power = (wander[:, 6:] ** 2).mean((1, 2))
    assert 0.5 < float(power.std() / power.mean()) < 0.8


@STRENGTHS
def test_the_step_is_one_piece_of_a_fifth_of_the_segment(strength):
    T = 500
    step = disturbance(strength, "step", B=1000, T=T)[:, 6]
    is_raised = step != 0
    assert (is_raised.int().diff(dim=1) == 1).sum(1).max() <= 1
    sizes = step.abs().amax(1, keepdim=True)
    torch.testing.assert_close(step.abs(), is_raised * sizes)
    length = is_raised.double().sum(1) / T
    assert float(length.mean()) == pytest.approx(0.2, abs=0.005)
    assert float(length.std()) == pytest.approx(0.04, abs=0.005)
    start = is_raised.int().argmax(1) / T
    assert start.min() < 0.02 and 0.7 < start.max() < 0.95


@STRENGTHS
def test_the_step_has_a_sign_for_each_lead_and_one_size_for_all(strength):
    """Published: 1 or -1 mV in each lead, less up to 0.25 mV in all of them."""
    step = disturbance(strength, "step", B=500)[:, [0, 1, *range(6, 12)]]
    size = torch.where(step.sum(2) > 0, step.amax(2), step.amin(2))  # (B, 8)
    sign = size.sign() * strength.step
    shared = size - sign
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, 8), rtol=0, atol=1e-6)
    low, high = strength.shift
    assert low - 1e-6 <= shared.min() < 0.95 * low
    assert shared.max() <= high + 1e-6
    is_up = (size > 0).double()
    assert (is_up.mean(0) - 0.5).abs().max() < 0.08
    together = torch.corrcoef(is_up.T) - torch.eye(8)
    assert (together.abs().max() < 0.2) == (strength is PUBLISHED)


def test_the_gain_is_one_number_a_record():
    ecg = recompute_limbs(normal(500, 12, 20))
    ratio = augment(ecg, random_stream(0), 500, only(MILD, "gain")) / ecg
    gain = ratio[:, :1, :1]
    torch.testing.assert_close(ratio, gain.expand_as(ratio), rtol=1e-6, atol=0)
    assert 0.8 <= gain.min() < 0.81 and 1.24 < gain.max() <= 1.25
    assert torch.equal(augment(ecg, random_stream(0), 500, only(PUBLISHED, "gain")), ecg)


def test_each_mild_disturbance_spares_half_of_the_records():
    for name in ("powerline", "muscle", "step", "wander"):
        drawn = disturbance(MILD, name, B=1000, T=50, probability=MILD.probability)
        share = float((drawn != 0).any(2).any(1).double().mean())
        assert 0.44 < share < 0.56, name
        assert (disturbance(PUBLISHED, name, B=1000, T=50) != 0).any(2).any(1).all(), name
    ecg = recompute_limbs(normal(1000, 12, 5))
    gained = augment(ecg, random_stream(0), 500, only(MILD, "gain", MILD.probability))
    assert 0.44 < float((gained == ecg).all(2).all(1).double().mean()) < 0.56


def test_half_of_the_leads_are_blank_and_the_others_untouched():
    ecg = normal(2000, 12, 3)
    view = blank_leads(ecg, random_stream(0))
    is_blank = (view == 0).all(2)
    torch.testing.assert_close(view, ecg * ~is_blank[..., None], rtol=0, atol=0)
    share = is_blank.double().mean(0)  # of each lead
    assert (share - 0.5).abs().max() < 0.05
    together = torch.corrcoef(is_blank.double().T) - torch.eye(12)
    assert together.abs().max() < 0.1


# --------------------------------------------------------------------------------------------------
# 3KG
# --------------------------------------------------------------------------------------------------


def test_the_matrix_inverts_dowers_vectors_lead_by_lead():
    """X left, Y foot, Z back, and the leads in the order of the rows."""
    vectors = torch.tensor(DOWER, dtype=torch.float64)  # (8, 3)
    torch.testing.assert_close(INVERSE_DOWER @ vectors, torch.eye(3).double(), rtol=0, atol=0.01)
    assert INDEPENDENT_ROWS == [0, 1, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "axis, start, end",
    [(0, (1, 0, 0), (0, 1, 0)), (1, (0, 0, 1), (1, 0, 0)), (2, (0, 1, 0), (0, 0, 1))],
)
def test_a_quarter_turn_about_each_axis(axis, start, end):
    """The angles are those about z, y and x, right-handed."""
    angles = torch.zeros(1, 3, dtype=torch.float64)
    angles[0, axis] = math.pi / 2
    found = rotation(angles)[0] @ torch.tensor(start, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(end, dtype=torch.float64))


def test_a_turn_goes_about_z_then_y_then_x_whose_axes_stay():
    a, b, c = 0.3, -0.5, 0.7
    Rz = [[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]
    Ry = [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    Rx = [[1, 0, 0], [0, math.cos(c), -math.sin(c)], [0, math.sin(c), math.cos(c)]]
    found = rotation(torch.tensor([[a, b, c]], dtype=torch.float64))[0].numpy()
    np.testing.assert_allclose(found, np.array(Rx) @ np.array(Ry) @ np.array(Rz), atol=1e-15)


@pytest.mark.parametrize("published", [False, True])
def test_a_turned_heart_is_turned_then_stretched_record_by_record(published):
    ecg = normal(5, 12, 40)
    angles, factors = random_turn(5, random_stream(0))
    found = turn(ecg, angles, factors, published)
    to_dipole, R = INVERSE_DOWER.numpy(), rotation(angles.double()).numpy()
    for i in range(5):
        x = ecg[i, INDEPENDENT_ROWS].numpy()
        dipole = to_dipole @ x
        moved = np.diag(factors[i].double().numpy()) @ (R[i] @ dipole)
        expected = np.linalg.pinv(to_dipole) @ moved
        if not published:
            expected += x - np.linalg.pinv(to_dipole) @ dipole
        np.testing.assert_allclose(
            found[i, INDEPENDENT_ROWS].numpy(), expected, rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(found, recompute_limbs(found), rtol=0, atol=0)


def test_what_the_dipole_cannot_hold_stays_or_goes():
    ecg = normal(4, 12, 30)
    kept = FROM_DIPOLE @ INVERSE_DOWER
    angles, factors = random_turn(4, random_stream(0))
    outside = torch.eye(8).double() - kept
    stays, goes = (turn(ecg, angles, factors, p)[:, INDEPENDENT_ROWS] for p in (False, True))
    torch.testing.assert_close(outside @ stays, outside @ ecg[:, INDEPENDENT_ROWS])
    torch.testing.assert_close(outside @ goes, torch.zeros(4, 8, 30).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(kept @ stays, goes)


def test_angles_and_factors_are_uniform_and_their_own():
    angles, factors = random_turn(4000, random_stream(0))
    scaled = torch.cat([angles / (math.pi / 2) + 0.5, 2 * (factors - 1)], 1).double()  # (0, 1)
    assert scaled.min() >= 0 and scaled.max() <= 1
    assert (scaled.mean(0) - 0.5).abs().max() < 0.03
    assert (scaled.var(0) - 1 / 12).abs().max() < 0.006
    assert (torch.corrcoef(scaled.T) - torch.eye(6)).abs().max() < 0.06


@pytest.mark.parametrize("T", [500, 501])
def test_the_blank_window_begins_anywhere_and_goes_round_the_end(T):
    ecg = normal(100, 12, T)
    view = blank_half(ecg, random_stream(0))
    is_blank = view == 0
    assert (is_blank.sum(2) == T // 2).all()
    torch.testing.assert_close(view, ecg * ~is_blank, rtol=0, atol=0)
    turns = is_blank.int() - is_blank.int().roll(1, 2)
    assert ((turns == 1).sum(2) == 1).all()  # one window on a circle
    start = (turns == 1).int().argmax(2).double() / T
    assert start.min() < 0.01 and start.max() > 0.99
    assert float(start.mean()) == pytest.approx(0.5, abs=0.03)
    assert (start.std(1) > 0).all()  # each lead has its own


# --------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------


def compare(monkeypatch, name, ecg, patients=None, **settings):
    """The loss of a method, its two views and their embeddings; its draws are random_stream(1)."""
    torch.manual_seed(0)
    method_class, config_class = METHODS[name]
    method = method_class(config_class(size="small", network="resnet", **settings))
    calls = spy(monkeypatch, method, "embed")
    loss, _ = method(ecg, patients, random_stream(1))
    return loss, [view for (view,), _ in calls], [z for _, z in calls]


@pytest.mark.parametrize("leads", [1, 12])
@torch.no_grad()
def test_clocs_compares_the_two_halves_of_a_scored_record(monkeypatch, leads):
    ecg = 3 + 5 * normal(4, 12, 200).float()
    loss, views, embeddings = compare(monkeypatch, "clocs", ecg, leads=leads)
    assert torch.equal(torch.cat(views, 2), zscore(ecg[:, :leads]))
    assert torch.equal(loss, info_nce(*embeddings))


@pytest.mark.parametrize("leads", [1, 12])
@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_simclr_compares_a_segment_that_is_disturbed_twice(monkeypatch, leads, published):
    ecg, settings = 3 + 5 * normal(4, 12, 200).float(), dict(leads=leads, published=published)
    loss, views, embeddings = compare(monkeypatch, "simclr", ecg, **settings)
    draw = random_stream(1)
    segment = random_segment(ecg, draw)
    for view in views:
        disturbed = augment(segment, draw, 20, PUBLISHED if published else MILD)
        expected = zscore(disturbed[:, :leads])
        if leads == 12:
            expected = blank_leads(expected, draw)
        torch.testing.assert_close(view, expected)
    assert not torch.equal(*views)
    assert torch.equal(loss, nt_xent(*embeddings))


@pytest.mark.parametrize("leads", [1, 12])
@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_3kg_compares_two_turns_of_a_segment_and_knows_the_patients(monkeypatch, leads, published):
    ecg, settings = 3 + 5 * normal(4, 12, 200).float(), dict(leads=leads, published=published)
    patients = torch.tensor([0, 0, 1, 2])
    loss, views, embeddings = compare(monkeypatch, "three_kg", ecg, patients, **settings)
    draw = random_stream(1)
    segment = random_segment(ecg, draw)
    for view in views:
        turned = turn(segment, *random_turn(4, draw), published)
        torch.testing.assert_close(view, blank_half(zscore(turned[:, :leads]), draw))
    assert not torch.equal(*views)
    assert torch.equal(loss, patient_nt_xent(torch.cat(embeddings), patients.repeat(2)))
