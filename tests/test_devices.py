"""extras/devices.py: recordings of other devices."""

import numpy as np
import pytest
import torch
from conftest import made_up, write_record
from probes import write_probe

import selfmis
from extras import devices


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """60 recordings of lead I: of the labels A, N and ~ twenty each, ~ upside down."""
    folder = tmp_path_factory.mktemp("device")
    x, _ = made_up(60)
    lines = []
    for i in range(60):
        label = "AN~"[i // 20]
        sign = -1 if label == "~" else 1
        write_record(folder / f"R{i:02}", sign * x[i, :1], ("I",))
        lines.append(f"R{i:02},{label}")
    (folder / "REFERENCE.csv").write_text("\n".join(lines))
    return folder


def test_scores_are_of_heads_that_did_not_see_the_record():
    """Features by which a record is known but not its label, and features that are the label."""
    y = np.random.default_rng(0).permutation(np.repeat([0, 1], 100))
    auc, draws = devices.held_out_auc(torch.eye(200), y)
    assert 0.4 < auc < 0.6 and draws.std() < 0.1
    told = torch.from_numpy(y[:, None] + np.random.default_rng(1).normal(0, 0.5, (200, 3))).float()
    auc, draws = devices.held_out_auc(told, y)
    low, high = selfmis.interval(draws)
    assert 0.9 < low < auc < high <= 1


def test_atrial_fibrillation_is_told_by_what_the_embedding_holds(device, tiny, monkeypatch, capsys):
    _, labels = devices.find_labelled(device, None, 100)
    assert labels.tolist() == [*20 * "A", *20 * "N", *20 * "~"]
    own = torch.from_numpy((labels == "A") + np.zeros((4, 60))).T.float()
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    by_file = {1: own, 12: noise}
    monkeypatch.setattr(devices, "embeddings", lambda encoder, *_: by_file[encoder.leads])
    files = f"{tiny[1]},{tiny[1]}"
    devices.main(["rhythm", str(device), "--encoder", f"told={files}", "--encoder", tiny[12]])
    title, *lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert title == "## Atrial fibrillation, 20 of 40 recordings"
    told, noise = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]
    assert told == ["told", "2", "1.000 (1.000 to 1.000)", ""]
    assert noise[0] == tiny[12] and float(noise[3][:6]) == pytest.approx(float(noise[2][:5]) - 1)


def test_a_random_encoder_is_built_like_the_file_and_is_another_for_each_seed(tiny):
    rows = devices.open_encoders([f"ours={tiny[1]}", "random=random,random"])
    (_, (ours,)), (_, (first, second)) = rows
    assert first.architecture == ours.architecture and first.preprocessing == ours.preprocessing
    states = [torch.cat([p.flatten() for p in e.parameters()]) for e in (ours, first, second)]
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    with pytest.raises(selfmis.UsageError, match="name a file too"):
        devices.open_encoders(["random"])


def test_embeddings_are_those_of_each_recording_alone(device, tiny):
    encoder = selfmis.load_encoder(tiny[12])
    found = devices.embeddings(encoder, device, "I")
    ecg = selfmis.read_ecg(device / "R07", ("I",), 100)
    x = torch.from_numpy(selfmis.preprocess(ecg, sample_rate_hz=100))[None]
    with torch.no_grad():
        alone = encoder(selfmis.with_empty_leads(x, encoder, "I"))[0]
    torch.testing.assert_close(found[7], alone, rtol=1e-4, atol=1e-5)


def test_alarms_are_those_of_the_detector_by_label_and_direction(
    device, tmp_path, monkeypatch, capsys
):
    probe = write_probe(tmp_path / "probe.pt")
    devices.main(["alarms", str(device), "--probe", f"ours={probe}"])
    text = capsys.readouterr().out
    warned = [line for line in text.splitlines() if line.startswith("| ~ ")]
    assert float(warned[0].split("|")[3].strip(" %")) >= 80  # they point down
    lines = [line for line in text.splitlines() if line.startswith("| ours")]
    detector = devices.load_detector(probe)
    threshold = devices.operating_point(detector.content)["threshold"]
    count = 0
    for i in range(20):
        ecg, rate_hz = selfmis.read_wfdb(device / f"R{i:02}", ("I",))
        probabilities = np.array(list(detector(ecg, rate_hz).values()))
        count += 1 - np.prod(1 - probabilities) >= threshold
    label, share = [cell.strip() for cell in lines[0].split("|")[2:4]]
    assert label == "A" and share == f"{count / 20:.1%}"
    validation = detector.content["validation"]
    without = validation["any_infarct"][~validation["infarct"]]
    label, share = [cell.strip() for cell in lines[4].split("|")[2:4]]
    assert label == "validation fold: no infarct"
    assert share == f"{(without >= threshold).double().mean():.1%}"


def test_what_a_device_may_do_to_a_record():
    x = made_up(1)[0][0, :1]  # (1, 1000)
    t = np.arange(1000) / 100
    one_hz = np.sin(2 * np.pi * t)[None]
    seven_hz = np.sin(2 * np.pi * 7 * t)[None]
    found = {
        name: [
            devices.disturb(ecg, *parts, torch.Generator().manual_seed(0)) for ecg in (x, one_hz)
        ]
        for name, parts in devices.disturbances(1000, 100).items()
    }
    np.testing.assert_allclose(found["as it is"][0], x, atol=1e-6)
    np.testing.assert_allclose(found["upside down"][0], -x, atol=1e-6)
    # At its cut-off a pole lets 1 / sqrt(2) pass, an eighth of a period early.
    ahead = np.sin(2 * np.pi * t + np.pi / 4)[None] / np.sqrt(2)
    np.testing.assert_allclose(found["high-pass, 1 Hz"][1], ahead, atol=1e-6)
    np.testing.assert_allclose(found["low-pass, 15 Hz"][1], one_hz, atol=1e-4)
    for name, size in (("noise, 5 to 40 Hz, a fifth", 0.2), ("wander, 0.2 to 1.5 Hz, as much", 1)):
        added = found[name][0] - x
        assert added.std() / x.std() == pytest.approx(size, rel=0.3)
        assert abs((added * seven_hz).mean()) < 0.1 * x.std()


def test_alarms_of_a_fold_behind_filters(ptbxl, tmp_path, capsys):
    probe = write_probe(tmp_path / "probe.pt")
    devices.main(["band", str(ptbxl), "--fold", "9", "--probe", f"ours={probe}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    detector = devices.load_detector(probe)
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    records = records[records.folds == 9]
    threshold = devices.operating_point(detector.content)["threshold"]
    for line, sign in ((lines[0], 1), (lines[6], -1)):
        scores = []
        for i in range(len(records)):
            p = detector(sign * records.read(i, ("I",), 100), 100)
            scores.append(1 - np.prod([1 - value for value in p.values()]))
        mi = [selfmis.STATEMENTS.index(t) for t in selfmis.MI_TYPES]
        infarct = records.labels[:, mi].any(1)
        share = np.mean(np.array(scores)[infarct] >= threshold)
        assert line.split("|")[4].strip() == f"{share:.1%}"
    assert "upside down" in lines[6]
    assert "first 6 s" in lines[9] and "first 4 s" in lines[10]
    assert "half the true one" in lines[11] and "twice the true one" in lines[12]
    for line, seconds, rate in ((lines[10], 4, 100), (lines[11], 10, 50), (lines[12], 10, 200)):
        cut = [records.read(i, ("I",), 100)[:, : 100 * seconds] for i in range(len(records))]
        scores = [1 - np.prod([1 - p for p in detector(x, rate).values()]) for x in cut]
        share = np.mean(np.array(scores)[infarct] >= threshold)
        assert line.split("|")[4].strip() == f"{share:.1%}"


def test_names_of_rows():
    assert devices.named("ours=a.pt,b.pt") == ("ours", ["a.pt", "b.pt"])
    for path in ("a.pt", "runs/lr=1e-3/best.pt"):
        assert devices.named(path) == (path, [path])


def test_retrieval_among_equally_many(tmp_path, ptbxl, tiny, monkeypatch, capsys):
    monkeypatch.setattr(devices, "AMONG", 4)
    same = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(devices, "embeddings", lambda *_: same)
    monkeypatch.setattr(selfmis, "retrieval", lambda s, m: {1: len(s), 5: 50, 10: 100})
    flags = ["--fold", "9", "--encoder", tiny[1], "--teacher", tiny[12]]
    devices.main(["retrieval", str(ptbxl), *flags])
    line = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in line[1:-1].split("|")]
    assert cells == ["no label", "8", "2", "4.0 %", "50.0 %", "100.0 %"]


def test_what_is_missing_is_said(device, capsys):
    for arguments, sentence in (
        (["rhythm", str(device)], "rhythm needs --encoder"),
        (["band", str(device)], "band needs --probe"),
        (["retrieval", str(device), "--encoder", "a.pt"], "retrieval needs --teacher"),
        (["retrieval", str(device), "--encoder", "a=b,c", "--teacher", "t"], "2 encoders"),
    ):
        with pytest.raises(SystemExit):
            devices.main(arguments)
        assert sentence in capsys.readouterr().err
