"""Pre-training on synthetic ECG: networks, masks and loss by hand; runs; the table's commands."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import spy, write_record, stopped_after_an_epoch

import selfmis
import train_probe
from extras import evidence
from extras.baselines import common, synthetic_pretraining, synthetic_table
from extras.baselines.common import random_stream, zscore
from extras.baselines.losses import statement_loss
from extras.baselines.synthetic_pretraining import PatchRecurrent, SyntheticPretraining
from extras.baselines.synthetic_pretraining import SyntheticPretrainingConfig, TokenTransformer
from extras.baselines.synthetic_pretraining import random_mask
from selfmis import UsageError

assert_close = torch.testing.assert_close
TOKEN_NETWORKS = pytest.mark.parametrize("network", ["transformer", "lstm", "gru"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=random_stream(seed))


def some_labels(B):
    labels = (torch.rand(B, 44, generator=random_stream(7)) < 0.1).float()
    labels[:, 0] = 1
    return labels


def make_method(device="cpu", **settings):
    torch.manual_seed(0)
    with torch.device(device):
        return SyntheticPretraining(SyntheticPretrainingConfig(**settings)).eval()


@pytest.fixture
def tiny_networks(monkeypatch):
    """Networks that train in seconds."""
    small = dict(width=64, layers=1)

    def make_encoder(config):
        if config.network == "transformer":
            return TokenTransformer(config.leads, heads=2, feed_forward=64, **small)
        return PatchRecurrent(config.leads, cell=config.network, **small)

    monkeypatch.setattr(SyntheticPretraining, "make_encoder", staticmethod(make_encoder))


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads", [1, 12])
@TOKEN_NETWORKS
def test_parameters(network, leads):
    method = make_method("meta", network=network, leads=leads)
    D, patch, h = method.encoder.embedding_dim, 20 * leads, 256
    expected = patch * h + h + h  # embedding and hole
    expected += (D + 1) * patch + (D + 1) * 44  # heads
    if network == "transformer":
        assert D == h
        layer = 4 * (h * h + h) + (h * 1024 + 1024) + (1024 * h + h) + 2 * 2 * h
        expected += 5 * layer + 2 * h
    else:
        assert D == 2 * h
        gates = 4 if network == "lstm" else 3
        expected += 2 * h + sum(2 * gates * h * (i + h + 2) for i in (h, 2 * h))
    assert sum(p.numel() for p in method.parameters()) == expected


@pytest.mark.parametrize("leads", [1, 12])
def test_a_token_is_200_ms_of_all_leads(leads):
    encoder, x = PatchRecurrent(leads, cell="gru", width=8), normal(2, leads, 1000)
    patches = encoder.patches(x)
    assert patches.shape == (2, 50, 20 * leads)
    for n in range(50):
        for lead in range(leads):
            found = patches[:, n, 20 * lead : 20 * lead + 20]
            assert torch.equal(found, x[:, lead, 20 * n : 20 * n + 20])


@TOKEN_NETWORKS
@torch.no_grad()
def test_an_embedding_is_the_mean_of_unmasked_tokens_and_ignores_the_company(network):
    encoder, x = make_method(network=network).encoder, normal(3, 1, 1000)
    found = encoder(x)
    assert torch.equal(encoder(x), found) and found.dtype == torch.float32
    tokens = encoder.contextualise(encoder.embed(encoder.patches(x)))
    assert tokens.shape == (3, 50, encoder.embedding_dim)
    assert_close(found, tokens.mean(1))
    assert_close(encoder(x[1:2]), found[1:2], rtol=0, atol=1e-5)
    again = type(encoder)(**encoder.architecture)
    again.load_state_dict(encoder.state_dict())
    assert_close(again.eval()(x), found)


@TOKEN_NETWORKS
@torch.no_grad()
def test_each_token_knows_those_before_and_behind_it_and_the_order(network):
    encoder, tokens = make_method(network=network).encoder, normal(1, 50, 256)
    other = tokens.clone()
    other[0, 25] = normal(256, seed=1)
    changed = (encoder.contextualise(other) != encoder.contextualise(tokens)).any(2)[0]
    assert changed[20:31].all()
    backwards = encoder.contextualise(tokens.flip(1)).mean(1)
    assert (backwards - encoder.contextualise(tokens).mean(1)).abs().max() > 1e-3


def test_a_recurrent_network_is_fine_tuned_from_eval_mode():
    """In which cuDNN refuses a gradient."""
    encoder = PatchRecurrent(1, cell="lstm", width=8).eval()
    assert not encoder.training and encoder.recurrent.training and encoder.recurrent.dropout == 0


# --------------------------------------------------------------------------------------------------
# Masks and loss
# --------------------------------------------------------------------------------------------------


def test_twenty_tokens_are_masked_other_ones_in_each_record():
    is_masked = random_mask(400, random_stream(0))
    assert is_masked.shape == (400, 50) and (is_masked.sum(1) == 20).all()
    assert len({tuple(row) for row in is_masked.tolist()}) == 400
    assert is_masked.double().mean(0).sub(0.4).abs().max() < 0.1  # from anywhere
    assert torch.equal(is_masked, random_mask(400, random_stream(0)))
    assert not torch.equal(is_masked, random_mask(400, random_stream(1)))


@TOKEN_NETWORKS
@torch.no_grad()
def test_what_stands_under_a_mask_does_not_reach_the_network(network, monkeypatch):
    method, ecg = make_method(network=network, alpha=1.0, leads=12), normal(4, 12, 1000)
    calls = spy(monkeypatch, method.encoder, "contextualise")
    method(ecg, None, random_stream(3))
    (((entered,), _),) = calls
    is_masked = random_mask(4, random_stream(3))
    plain = method.encoder.embed(method.encoder.patches(zscore(ecg)))
    assert (entered[is_masked] == method.hole).all()
    assert_close(entered[~is_masked], plain[~is_masked])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@TOKEN_NETWORKS
@torch.no_grad()
def test_the_loss_is_a_loop(network, alpha):
    method, ecg = make_method(network=network, alpha=alpha), normal(4, 12, 1000)
    labels = some_labels(4)
    labels[2] = 0  # a record without a statement: it only fills holes
    given = [labels] if method.uses_labels else []
    loss, numbers = method(3 + 5 * ecg, None, random_stream(3), *given)

    x = ecg[:, 0].double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    is_masked = random_mask(4, random_stream(3))
    tokens = method.encoder.embed(method.encoder.patches(x[:, None].float()))
    tokens[is_masked] = method.hole
    tokens = method.encoder.contextualise(tokens)
    squares, entropies = [], []
    for b in range(4):
        for n in range(50):
            if alpha > 0 and is_masked[b, n]:
                guess = method.fill(tokens[b, n]).double()
                squares += ((guess - x[b, 20 * n : 20 * n + 20]) ** 2).tolist()
        if alpha < 1 and b != 2:
            for logit, y in zip(method.classify(tokens[b].mean(0)), labels[b], strict=True):
                p = 1 / (1 + math.exp(-float(logit)))
                entropies.append(-math.log(p if y else 1 - p))
    expected = {}
    if alpha > 0:
        assert len(squares) == 4 * 20 * 20
        expected["reconstruction"] = np.mean(squares)
    if alpha < 1:
        assert len(entropies) == 3 * 44
        expected["classification"] = 44 * np.mean(entropies)
    assert {name: float(value) for name, value in numbers.items()} == pytest.approx(expected, 1e-5)
    weights = dict(reconstruction=alpha, classification=1 - alpha)
    total = sum(weights[name] * value for name, value in expected.items())
    assert float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("network", ["transformer", "lstm", "gru", "resnet"])
def test_only_heads_with_a_weight_are_there_and_every_parameter_learns(network):
    """A parameter without a gradient would stop training in several processes."""
    for alpha in (0.0, 0.5, 1.0)[: 1 if network == "resnet" else 3]:
        method = make_method(network=network, alpha=alpha).train()
        assert (hasattr(method, "fill"), hasattr(method, "classify")) == (alpha > 0, alpha < 1)
        ecg, given = normal(4, 12, 1000), [some_labels(4)] if method.uses_labels else []
        ecg[1] = 0.3  # a flat record
        method(ecg, None, random_stream(0), *given)[0].backward()
        for name, p in method.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_twelve_leads_or_lead_i_is_what_it_sees():
    for leads in (1, 12):
        method, ecg = make_method(network="gru", leads=leads), normal(2, 12, 1000)
        before = method.encoder(common.to_view(ecg, leads))
        for lead in range(12):
            other = ecg.clone()
            other[:, lead] = normal(2, 1000, seed=9)
            is_same = torch.equal(method.encoder(common.to_view(other, leads)), before)
            assert is_same == (leads == 1 and lead > 0)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(sample_rate=500), "--sample-rate 500: its patches are for 100 Hz"),
        (dict(alpha=1.5), "--alpha 1.5: expected a number from 0 to 1"),
        (dict(network="resnet"), "--network resnet: it has no tokens to mask; give --alpha 0"),
    ],
)
def test_what_does_not_fit_is_refused(flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        SyntheticPretrainingConfig(**flags)


def test_records_without_labels_do_not_count_in_the_classification():
    logits, labels = normal(4, 44), some_labels(4)
    labels[2:] = 0
    both = statement_loss(logits, labels)
    assert torch.allclose(both, statement_loss(logits[:2], labels[:2]))
    assert statement_loss(logits, torch.zeros(4, 44)) == 0


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def make_config(tmp_path, data, **changed):
    default = dict(data=[str(data)], epochs=2, batch_size=8, warmup=0, workers=0)
    default |= dict(cache=str(tmp_path / "cache"), out=str(tmp_path / "out"))
    return SyntheticPretrainingConfig(**default | changed)


def probe_config(tmp_path, data, **changed):
    default = dict(data=[str(data)], encoder=str(tmp_path / "out/best.pt"), workers=0, epochs=1)
    default |= dict(cache=str(tmp_path / "cache"), out=str(tmp_path / "probe"), batch_size=8)
    return train_probe.ProbeConfig(**default | changed)


@pytest.mark.parametrize("network, leads", [("transformer", 1), ("lstm", 12), ("gru", 1)])
def test_a_run_resumes_to_the_same_weights_and_is_fine_tuned(
    tmp_path, ptbxl, tiny_networks, monkeypatch, capsys, network, leads
):
    more = dict(network=network, leads=leads)
    synthetic_pretraining.main(make_config(tmp_path, ptbxl, **more))
    assert "64 records, 8 steps an epoch; 8 validate; their labels are used" in (
        capsys.readouterr().out
    )

    cut = make_config(tmp_path, ptbxl, out=str(tmp_path / "cut"), **more)
    with stopped_after_an_epoch(monkeypatch):
        synthetic_pretraining.main(cut)
    synthetic_pretraining.main(dataclasses.replace(cut, resume=True))
    encoders = [selfmis.load_encoder(tmp_path / run / "best.pt") for run in ("out", "cut")]
    for key, value in encoders[0].state_dict().items():
        assert torch.equal(value, encoders[1].state_dict()[key]), key
    encoder = encoders[0]
    assert (encoder.lead, encoder.sample_rate_hz) == ("I" if leads == 1 else "all", 100)
    assert not encoder.training

    for more in (dict(finetune=True), dict(head="logistic", overwrite=True)):
        results = train_probe.main(probe_config(tmp_path, ptbxl, lead="I", **more))
        assert np.isfinite([run["diagnostic"] for run in results["runs"]]).all()
    assert "trained on fold" not in capsys.readouterr().out


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_checkpoint_says_whether_labels_were_used(
    tmp_path, ptbxl, mimic, tiny_networks, monkeypatch, capsys, alpha
):
    calls = spy(monkeypatch, SyntheticPretraining, "forward")
    config = make_config(tmp_path, ptbxl, network="gru", alpha=alpha, epochs=1)
    if alpha == 1:
        config.data.append(str(mimic))  # has no labels
    synthetic_pretraining.main(config)
    uses_labels = alpha < 1
    text = "their labels are used" if uses_labels else "no label is used"
    assert text in capsys.readouterr().out
    for entry in selfmis.load_encoder(tmp_path / "out/best.pt").training_data:
        assert entry["labels"] == uses_labels and entry["use"] == "training"
    assert {len(arguments) for arguments, _ in calls} == {5 if uses_labels else 4}


def test_records_without_any_label_are_refused(tmp_path):
    for i in range(40):
        write_record(tmp_path / f"wfdb/R{i:02}", normal(12, 1000, seed=i).numpy())
    with pytest.raises(UsageError, match="no record that trains has a label"):
        synthetic_pretraining.main(make_config(tmp_path, tmp_path / "wfdb", network="gru"))
    synthetic_pretraining.main(make_config(tmp_path, tmp_path / "wfdb", network="gru", alpha=1.0))


def test_labels_and_patients_are_those_of_the_batch(tmp_path, ptbxl, tiny_networks, monkeypatch):
    read = spy(monkeypatch, common.BaselineTraining, "patients")
    trained = spy(monkeypatch, SyntheticPretraining, "forward")
    synthetic_pretraining.main(make_config(tmp_path, ptbxl, network="gru", epochs=1))
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    assert len(read) == 9  # eight steps, one batch that validates
    for ((_, rows), patients), ((*_, labels), _) in zip(read, trained, strict=True):
        assert np.array_equal(records.patient_keys()[rows], patients.numpy())
        assert np.array_equal(records.labels[rows], labels.numpy())


def test_an_untrained_network_is_the_one_that_pre_training_starts_from(tmp_path, ptbxl, capsys):
    config = make_config(tmp_path, ptbxl, network="gru", untrained=True, seed=3)
    synthetic_pretraining.main(config)
    torch.manual_seed(3)
    first = SyntheticPretraining(make_config(tmp_path, ptbxl, network="gru")).encoder.state_dict()
    encoder = selfmis.load_encoder(tmp_path / "out/best.pt")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, first[key]), key
    assert encoder.training_data == [] and encoder.lead == "I" and encoder.sample_rate_hz == 100
    written = (tmp_path / "out/best.pt").stat().st_mtime_ns
    synthetic_pretraining.main(dataclasses.replace(config, resume=True))
    assert (tmp_path / "out/best.pt").stat().st_mtime_ns == written
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="holds a run"):
        synthetic_pretraining.main(config)


@pytest.mark.parametrize(
    "network, alpha, epochs, number, value",
    [
        ("gru", 1.0, 5, "reconstruction", 0.8),  # 1 is that of guessing the mean
        ("transformer", 0.0, 14, "train_loss", 3.0),  # 3.11 is that of guessing the frequencies
    ],
)
def test_it_learns(tmp_path, tiny_networks, network, alpha, epochs, number, value):
    more = dict(batch_size=32, lr=3e-3, amp="off", epochs=epochs)
    config = make_config(tmp_path, "synthetic:1000", network=network, alpha=alpha, **more)
    synthetic_pretraining.main(config)
    lines = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert [line for line in lines if "val_loss" in line][-1][number] < value


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

SHARED = ["--data", "ptb-xl"]
PRETRAINING = synthetic_table.pretraining_runs(synthetic_table.NETWORKS, SHARED, Path("runs"))
FINETUNING = synthetic_table.finetuning_runs(
    synthetic_table.NETWORKS, synthetic_table.SHARES, 3, SHARED, Path("runs")
)


def test_every_command_has_flags_that_exist_and_needs_earlier_runs_only():
    for run, (script, *flags) in PRETRAINING.items():
        assert script == "extras.baselines.synthetic_pretraining"
        config = selfmis.parse_flags(SyntheticPretrainingConfig, "", flags)
        assert config.out == f"runs/{run}"
        assert config.data == ["ptb-xl" if run.endswith("real") else "synthetic:19000"]
        assert run.endswith("scratch") == config.untrained
    for run, (script, *flags) in FINETUNING.items():
        assert script == "train_probe.py"
        config = selfmis.parse_flags(train_probe.ProbeConfig, "", flags)
        network, start, share, seed = run.split("-")
        weights = "scratch" if start == "longer" else start
        assert config.encoder == f"runs/{network}-{weights}/best.pt"
        assert f"{network}-{weights}" in PRETRAINING and config.out == f"runs/{run}"
        assert config.finetune and config.data == ["ptb-xl"] and config.lr == 5e-4
        assert (config.fractions, config.seed) == ([float(share)], int(seed))
    # Two networks of six starts, one of three; nine runs of the small shares and three more.
    assert len(FINETUNING) == (2 * 6 + 3) * (3 * 3 + 3)


@pytest.mark.parametrize("share", synthetic_table.SHARES)
def test_all_starts_have_twenty_epochs_and_longer_the_steps_of_pre_training_on_top(share):
    configs = {}
    for start in synthetic_table.STARTS:
        flags = ["--finetune", *synthetic_table.schedule(share, start)]
        config = configs[start] = selfmis.parse_flags(train_probe.ProbeConfig, "", SHARED + flags)
        steps = len(train_probe.share_of(np.arange(15_000), share, 0)) // config.batch_size
        assert config.patience == 20
        if start == "longer":
            more = config.epochs - configs["scratch"].epochs
            assert 944 <= steps * more < 944 + steps
            continue
        assert config.epochs == 20 and steps * config.epochs >= 360
        assert config == configs["scratch"]


def test_table_and_picture_show_what_is_there(tmp_path, ptbxl, tiny_networks, capsys):
    out = tmp_path / "runs"
    synthetic_pretraining.main(make_config(tmp_path, ptbxl, network="gru", untrained=True))
    more = dict(finetune=True, fractions=[0.5], val_fold=8, test_fold=9)
    for run, epochs in (("gru-scratch-0.01-0", 1), ("gru-labels-0.01-0", 2)):
        train_probe.main(probe_config(tmp_path, ptbxl, out=str(out / run), epochs=epochs, **more))
    shutil.copytree(out / "gru-scratch-0.01-0", out / "gru-longer-0.01-0")
    for start in ("scratch", "labels", "longer"):
        shutil.copytree(out / f"gru-{start}-0.01-0", out / f"gru-{start}-0.01-2")
    shutil.copytree(out / "gru-labels-0.01-0", out / "gru-joint-0.01-0")  # of one seed only
    evidence.scores.cache_clear()
    capsys.readouterr()
    synthetic_table.main([str(ptbxl), "--out", str(out), "--tables"])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| 32 ")]
    scratch, longer, joint, labels = ([cell.strip() for cell in row] for row in rows)
    assert scratch[:3] == ["32", "from scratch", "2"]
    assert [cell[:6] for cell in scratch[6:]] == ["", "", "+0.000", "+0.000"]
    assert [cell[:6] for cell in longer[6:]] == ["+0.000", "+0.000", "", ""]
    assert joint[2] == "1" and joint[6:] == [""] * 4  # no difference to other shares of the labels
    assert labels[3].endswith(" ± 0.000")
    assert labels[:3] == ["32", "synthetic, labels (a = 0)", "2"]
    results = {}
    for start, row in (("scratch", scratch), ("labels", labels)):
        results[start] = json.loads((out / f"gru-{start}-0.01-0/results.json").read_text())
        summary = results[start]["heads"]["finetune"]
        assert row[3][:5] == f"{summary['six']['mean']:.3f}"
        assert row[4][:5] == f"{summary['any']['NORM']['auc']:.3f}"
        assert row[5][:5] == f"{summary['diagnostic']['mean']:.3f}"
    for group, cell in (("six", labels[6]), ("diagnostic", labels[7])):
        difference = results["labels"][group]["mean"] - results["scratch"][group]["mean"]
        assert float(cell[:6]) == pytest.approx(difference, abs=1e-3)
    assert labels[8:] == labels[6:8]
    assert (out / "synthetic.png").stat().st_size > 5000
    assert "transformer" not in text
    with pytest.raises(SystemExit):
        synthetic_table.main([str(ptbxl), "--out", str(tmp_path / "typo"), "--tables"])
    assert "typo: no finished run of transformer, gru, resnet" in capsys.readouterr().err
