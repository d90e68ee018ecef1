"""The generative baselines: their networks, judges and losses, and what scores them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import spy
from methods import GENERATIVE
from probes import write_probe

import selfmis
from extras.baselines import common, cyclegan, ekgan, gan, generated, mcma, pix2pix
from extras.baselines.gan import PatchDiscriminator, UNet, UNetGenerator, as_image
from extras.baselines.mcma import MCMAGenerator
from selfmis import UsageError


def count(module):
    return sum(p.numel() for p in module.parameters())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name, published, small",
    [
        ("pix2pix", 13_907_840, 871_904),
        ("cyclegan", 27_814_656, 1_743_552),
        ("ekgan", 26_108_480, 1_636_496),
        ("mcma", 18_186_968, 4_554_304),
    ],
)
def test_parameters(name, published, small):
    method, config = GENERATIVE[name]
    with torch.device("meta"):
        assert count(method(config())) == published
        assert count(method(config(size="small"))) == small


def test_parameters_of_the_parts():
    with torch.device("meta"):
        assert count(UNet()) == 12_524_672 and count(UNet(skips=False)) == 11_147_904
        assert count(PatchDiscriminator(2)) == 1_383_168
        assert count(PatchDiscriminator(1)) == 1_382_656
        assert count(ekgan.SampleDiscriminator()) == 2_435_904
        assert count(MCMAGenerator(last_norm=True)) == 18_186_836
        assert round(count(MCMAGenerator(kernel_size=5)) / 1e6, 2) == 7.00


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def test_an_image_is_the_leads_between_rows_of_zeros():
    ecg = normal(2, 12, 64)
    image = as_image(ecg)
    assert image.shape == (2, 1, 16, 64)
    assert not image[:, :, [0, 1, 14, 15]].any() and torch.equal(gan.as_leads(image), ecg)
    repeated = gan.as_leads(gan.repeat_lead(ecg[:, :1]))
    assert torch.equal(repeated, ecg[:, :1].expand(-1, 12, -1))


@pytest.mark.parametrize("skips", [True, False])
def test_the_u_net_keeps_the_size_and_without_skips_all_goes_through_the_narrowest(skips):
    unet = UNet(4, skips=skips).eval()
    image = normal(2, 1, 16, 512)
    made, narrowest = unet(image)
    assert made.shape == image.shape and narrowest.shape == (2, 64, 1, 16)
    unet.down_norms[-1].register_forward_hook(lambda *call: 0 * call[-1])
    other = unet(2 * image)[0]
    unet.down_norms[-1].register_forward_hook(lambda *call: 0 * call[-1])
    assert torch.equal(unet(image)[0], other) is not skips


def test_judges_have_a_logit_for_each_piece_and_for_each_sample():
    assert PatchDiscriminator(2, 4)(normal(3, 2, 16, 512)).shape == (3, 1, 5, 65)
    judge = ekgan.SampleDiscriminator(4).eval()
    image = normal(3, 2, 16, 512)
    logits = judge(image)
    assert logits.shape == (3, 1, 16, 512)
    image[:, :, 5] += 1  # a row is judged on its own
    is_changed = (judge(image) != logits).any(3).any(0)[0]
    assert is_changed.tolist() == [row == 5 for row in range(16)]


@pytest.mark.parametrize(
    "generator",
    [UNetGenerator(width=4), UNetGenerator(width=4, norm="instance"), MCMAGenerator(width=4)],
    ids=["batch norm", "instance norm", "mcma"],
)
@torch.no_grad()
def test_a_record_is_made_alone_as_among_others_of_any_length_and_lead_I_stays(generator):
    generator.eval().scale.fill_(0.2)
    lead = 0.3 * normal(5, 1, 1000)
    made = generator(lead)
    assert made.shape == (5, 12, 1000) and torch.equal(made[:, :1], lead)
    torch.testing.assert_close(generator(lead[3:4]), made[3:4], rtol=1e-4, atol=1e-6)
    assert generator(lead[:1, :, :512]).shape == (1, 12, 512)
    generator.scale.fill_(0.4)
    torch.testing.assert_close(generator(2 * lead), 2 * made, rtol=1e-4, atol=1e-5)


def test_mcma_can_draw_what_lies_below():
    torch.manual_seed(0)
    generator = MCMAGenerator(width=4)
    known = mcma.keep_one(normal(4, 12, 64), None)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (generator.fill(known) + 3).square().mean().backward()
        optimizer.step()
    assert generator.fill(known).mean() < -2  # a sum of two GELUs ends at -0.34


@torch.no_grad()
def test_mcma_keeps_the_amplitude_but_as_published():
    for last_norm in (False, True):
        torch.manual_seed(0)
        generator = MCMAGenerator(width=4, last_norm=last_norm).eval()
        known = mcma.keep_one(normal(2, 12, 512), None)
        ratio = generator.fill(10 * known).std(2) / generator.fill(known).std(2)
        assert ((ratio - 1).abs().max() < 1e-3) == last_norm


def test_one_lead_is_known_and_bit_equal():
    ecg = normal(4000, 12, 3)
    known = mcma.keep_one(ecg, None)
    assert torch.equal(known[:, 0], ecg[:, 0]) and not known[:, 1:].any()
    known = mcma.keep_one(ecg, common.random_stream(0))
    is_kept = (known == ecg).all(2)
    assert (is_kept.sum(1) == 1).all() and not known[~is_kept].any()
    assert (is_kept.double().mean(0) - 1 / 12).abs().max() < 0.02


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def test_what_a_judge_loses():
    assert float(gan.loss_if_real(torch.zeros(3))) == pytest.approx(math.log(2))
    assert float(gan.loss_if_made(torch.zeros(3))) == pytest.approx(math.log(2))
    sure = torch.full((3,), 50.0)
    assert float(gan.loss_if_real(sure)) < 1e-20 and float(gan.loss_if_made(-sure)) < 1e-20
    assert float(gan.loss_if_real(-sure)) == float(gan.loss_if_made(sure)) == 50


@pytest.mark.parametrize("name", ["pix2pix", "cyclegan", "ekgan"])
def test_each_side_learns_from_its_own_loss(name, monkeypatch):
    """Without the judges' loss no judge has a gradient, and only with it do judges have one."""
    method_class, config = GENERATIVE[name]
    torch.manual_seed(0)
    method = method_class(config(size="small"))
    x = 0.2 * normal(2, 12, 1000)

    def gradients():
        method.zero_grad()
        method(x, None, common.random_stream(0))[0].backward()
        return {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}

    full = gradients()
    judges = {key for key in full if key.startswith("judge")}
    assert judges and all(full[key].any() for key in judges)
    module = cyclegan if name == "cyclegan" else gan
    monkeypatch.setattr(module, "judge_loss", lambda *_: torch.zeros(()))
    without = gradients()
    assert set(without) == set(full) - judges
    for key in without:
        torch.testing.assert_close(without[key], full[key])


def method_and_images(name, **settings):
    """A method, two records in mV, and the pieces that it sees: lead I and twelve as images."""
    method_class, config_class = GENERATIVE[name]
    torch.manual_seed(0)
    method = method_class(config_class(size="small", **settings))
    method.encoder.scale.fill_(0.25)
    ecg = 0.2 * normal(2, 12, 1000)
    piece = common.random_segment(ecg, common.random_stream(0), 512) / 0.25
    return method, ecg, gan.repeat_lead(piece[:, :1]), as_image(piece)


def fooled_and_judged(judge, true, made):
    """The losses of a generator and of its judge, from the judge's probabilities."""
    p, q = (torch.sigmoid(judge(image).double()) for image in (made, true))
    return -p.log().mean(), -q.log().mean() - (1 - p).log().mean()


@torch.no_grad()
def test_pix2pix_by_hand():
    method, ecg, given, true = method_and_images("pix2pix", error_weight=7.0)
    loss, _ = method(ecg, None, common.random_stream(0))
    made = method.encoder.unet(given)[0]
    pairs = (torch.cat([given, image], 1) for image in (true, made))
    fooled, judged = fooled_and_judged(method.judge, *pairs)
    expected = fooled + judged + 7 * (made - true).abs().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_cyclegan_by_hand():
    method, ecg, single, multi = method_and_images("cyclegan")
    loss, _ = method(ecg, None, common.random_stream(0))

    def there(image):
        return method.encoder.unet(image)[0]

    def back(image):
        return method.back(image)[0]

    fooled_multi, judged_multi = fooled_and_judged(method.judge_multi, multi, there(single))
    fooled_single, judged_single = fooled_and_judged(method.judge_single, single, back(multi))
    circles = (back(there(single)) - single).abs().mean()
    circles = circles + (there(back(multi)) - multi).abs().mean()
    kept = (there(multi) - multi).abs().mean() + (back(single) - single).abs().mean()
    expected = fooled_multi + fooled_single + 10 * circles + 2.5 * kept
    expected = expected + (judged_multi + judged_single) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_ekgan_by_hand_and_the_label_network_learns_from_its_own_error_alone():
    method, ecg, given, true = method_and_images("ekgan")
    loss, _ = method(ecg, None, common.random_stream(0))
    loss.backward()
    made, narrowest = method.encoder.unet(given)
    drawn, known = method.label(true)
    pairs = (torch.cat([given, image], 1) for image in (true, made))
    fooled, judged = fooled_and_judged(method.judge, *pairs)
    label_error = (drawn - true).abs().mean()
    expected = fooled + judged + 50 * (made - true).abs().mean()
    expected = expected + (narrowest - known).abs().mean() + label_error
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    gradients = torch.autograd.grad(label_error, list(method.label.parameters()))
    for p, gradient in zip(method.label.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_circles_of_networks_that_change_nothing_are_closed(monkeypatch):
    class Same(nn.Module):
        def forward(self, image):
            return image, None

    method = cyclegan.CycleGAN(cyclegan.CycleGANConfig(size="small"))
    method.encoder.unet = method.back = Same()
    _, numbers = method(0.2 * normal(2, 12, 1000), None, common.random_stream(0))
    assert float(numbers["circles"]) == 0
    assert float(numbers["error"]) > 0.5  # lead I is not the twelve leads


def test_the_scale_is_that_of_the_first_batch():
    method = mcma.MCMA(mcma.MCMAConfig(size="small"))
    method.pieces(3 * torch.ones(2, 12, 1000), common.random_stream(0))
    assert torch.equal(
        method.pieces(torch.ones(2, 12, 1000), common.random_stream(0))[0, 0, :2] * 3, torch.ones(2)
    )
    assert float(method.encoder.scale) == 3


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(500, 6)) * [1, 2, 3, 1, 1, 1]
    z -= z.mean(0)
    shift = rng.normal(size=6)
    assert generated.frechet_distance(z, z) == pytest.approx(0, abs=1e-6)
    found = generated.frechet_distance(z, z + shift)
    assert found == pytest.approx(np.square(shift).sum(), rel=1e-6)
    total = np.trace(np.cov(z.T, bias=True))
    assert generated.frechet_distance(z, 3 * z) == pytest.approx(4 * total, rel=1e-6)
    orthogonal = np.linalg.qr(rng.normal(size=(500, 2)) - 0)[0]
    orthogonal -= orthogonal.mean(0)
    white = np.linalg.qr(orthogonal)[0] * np.sqrt(500)  # mean 0, covariance 1
    one, two = white * [1, 2], white * [3, 5]
    assert generated.frechet_distance(one, two) == pytest.approx((3 - 1) ** 2 + (5 - 2) ** 2)


def test_likeness_against_a_loop():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(2, 3, 12, 50))
    found = generated.likeness(real, made)
    for lead in (0, 7):
        error = np.mean([(made[i, lead] - real[i, lead]) ** 2 for i in range(3)])
        r = np.mean([np.corrcoef(made[i, lead], real[i, lead])[0, 1] for i in range(3)])
        variance = sum(made[i, lead].var() for i in range(3))
        variance /= sum(real[i, lead].var() for i in range(3))
        assert found.error[lead] == pytest.approx(error)
        assert found.correlation[lead] == pytest.approx(r)
        assert found.variance[lead] == pytest.approx(variance)
    assert generated.likeness(real, 0 * real).correlation.tolist() == [0] * 12


def test_filters_that_made_the_leads_are_found():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(12, 31))
    ecg = rng.normal(size=(4, 12, 300))
    for record in ecg:
        lead = record[0].copy()
        for k in range(1, 12):
            record[k] = np.convolve(lead, true[k][::-1], "same")
    filters = generated.fit_filters(ecg, 31)
    np.testing.assert_allclose(filters[1:], true[1:], atol=1e-5)
    np.testing.assert_allclose(generated.apply_filters(ecg[0, 0], filters), ecg[0], atol=1e-4)


def test_filters_are_fitted_on_the_training_folds_and_applied_to_the_test_fold(
    tmp_path, ptbxl, monkeypatch
):
    read = spy(monkeypatch, generated, "read_mv")
    command = ["make", "fir", "--sample-rate", "100", "--out", str(tmp_path), "--data", str(ptbxl)]
    generated.main([*command, "--val-fold", "8", "--test-fold", "9"])
    folds = [set(records.folds.tolist()) for (records, _), _ in read]
    assert folds == [{1, 2, 3, 4, 5, 6, 7, 10}, {9}]
    names = json.loads((tmp_path / "generated.json").read_text())["records"]
    assert {int(Path(name).name[:5]) % 10 + 1 for name in names} == {9}  # as ptbxl deals them out


def test_made_written_scored_and_drawn(tmp_path, ptbxl, capsys):
    shared = ["--data", str(ptbxl), "--val-fold", "8", "--test-fold", "9"]
    settings = dict(data=[str(ptbxl)], size="small", batch_size=8, workers=0, epochs=1)
    settings |= dict(val_fold=8, test_fold=9, cache=str(tmp_path / "cache"))
    for name, (method, config) in GENERATIVE.items():
        common.main(method, config(**settings, out=str(tmp_path / name)))
        with pytest.raises(UsageError, match="a network '(UNet|MCMA)Generator'"):
            selfmis.load_encoder(tmp_path / name / "best.pt")
    command = capsys.readouterr().out.splitlines()[-1].partition("generated ")[2].split()
    generated.main(command)
    generated.main(["make", "fir", "--sample-rate", "100", "--out", f"{tmp_path}/fir", *shared])
    content = json.loads((tmp_path / "mcma/generated.json").read_text())
    made = np.load(tmp_path / "mcma/generated.npy")
    assert made.shape == (8, 12, 1000) and made.dtype == np.float32
    for i in range(8):
        own = selfmis.read_ecg(content["records"][i], ("I",), 100)[0]
        np.testing.assert_array_equal(made[i, 0], own)

    probe = write_probe(tmp_path / "probe.pt", leads=12, lead="all")
    picture = str(tmp_path / "a.png")
    folders = [f"{tmp_path}/mcma", f"{tmp_path}/fir"]
    generated.main(["score", *folders, *shared, "--probe", str(probe), "--picture", picture])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert {"real leads", "mcma", "fir", "lead I in all rows", "lead I and zeros"} < set(rows)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    chart = str(tmp_path / "chart.png")
    generated.main(["chart", folders[0], *shared, "--picture", chart])
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        generated.main(["chart", folders[0], *shared])
    assert "chart needs one folder and --picture" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generated.main(["score", str(tmp_path), *shared, "--probe", str(probe)])
    assert "no generated.json" in capsys.readouterr().err
    content = selfmis.read_checkpoint(probe)
    del content["head"]
    selfmis.save(tmp_path / "encoder.pt", content)
    with pytest.raises(SystemExit):
        generated.main(["score", folders[0], *shared, "--probe", f"{tmp_path}/encoder.pt"])
    assert "no head in it; give probe.pt" in capsys.readouterr().err


def test_a_rate_at_which_a_record_holds_no_piece_is_refused():
    with pytest.raises(UsageError, match="ten seconds must hold 512 samples"):
        pix2pix.Pix2PixConfig(sample_rate=50.0)
