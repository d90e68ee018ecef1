"""A detector as ONNX and as a torch.export program: the same probabilities, the same verdict."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import made_up
from probes import KINDS, call, changed, rows_of, strict_json, validation_fold, write_probe

import extras.export
from extras.baselines.transformer import CONV_SIZES, ConvTransformer
from extras.detect import DISCLAIMER, describe_probe, load_detector, operating_point
from selfmis import MI_TYPES


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    return {name: write_probe(folder / f"{name}.pt", **kind) for name, kind in KINDS.items()}


def export(capsys, probe, out):
    return call(extras.export.main, capsys, probe, out)


def open_onnx(path):
    """(function of millivolts, metadata)."""
    import onnx
    import onnxruntime

    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in operators and "Einsum" not in operators
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def network(x):
        return session.run(["probability"], {"ecg": x})[0]

    return network, session.get_modelmeta().custom_metadata_map


def open_pt2(path):
    extra = {"about.json": ""}
    module = torch.export.load(path, extra_files=extra).module()

    def network(x):
        return module(torch.from_numpy(x)).detach().numpy()

    return network, json.loads(extra["about.json"])


@pytest.mark.parametrize(
    "name, ending", [("one", "onnx"), ("one of twelve", "pt2"), ("twelve", "pt2"), ("raw", "pt2")]
)
def test_an_exported_detector_agrees_with_the_detector(tmp_path, probes, name, ending, capsys):
    """Millivolts in, probabilities out, for batches of 1, 2 and 5; the verdict beside it."""
    out, detector = tmp_path / f"out.{ending}", load_detector(probes[name])
    code, text, errors = export(capsys, probes[name], out)
    assert (code, errors) == (0, []) and str(out) in text and list(tmp_path.iterdir()) == [out]
    assert f"(batch, {len(detector.leads)}, 1000) in mV" in text
    network, about = {"onnx": open_onnx, "pt2": open_pt2}[ending](out)
    x = made_up(8, seed=21)[0][:, rows_of(detector.leads)] + np.float32(0.3)
    for batch in (x[:1], x[1:3], x[3:]):
        want = np.stack(list(detector(batch, 100).values()), 1)
        np.testing.assert_allclose(network(batch), want, atol=1e-4)
    assert np.ptp(want, 0).max() > 0.02
    assert np.isfinite(network(np.zeros_like(x[:2]))).all()

    assert (about["types"].split(), about["leads"].split()) == (list(MI_TYPES), [*detector.leads])
    assert (about["sample_rate_hz"], about["unit"], about["seconds"]) == ("100", "mV", "10")
    assert about["limits"] == DISCLAIMER
    verdict = strict_json(about["any_infarct"])
    assert verdict.pop("score") == "1 - product of (1 - probability)"
    assert verdict == operating_point(detector.content)
    assert verdict["specificity"] == 0.9 and verdict["false_alarms_normal"] <= 0.1
    assert strict_json(about["probe"]) == describe_probe(detector.content)


def test_an_exported_detector_may_have_no_verdict(tmp_path, probes, capsys):
    few = validation_fold(np.linspace(0, 1, 12), np.arange(12) < 6, np.arange(12) >= 6)
    path = changed(probes["one"], tmp_path / "p.pt", validation=few, warnings=["not clean"])
    assert export(capsys, path, tmp_path / "x.pt2")[0] == 0
    about = open_pt2(tmp_path / "x.pt2")[1]
    verdict = strict_json(about["any_infarct"])
    assert verdict["threshold"] is None and "6 infarcts" in verdict["no_verdict"]
    assert strict_json(about["probe"])["warnings"] == ["not clean"]


def test_only_resnet1d_is_exported(tmp_path, probes, capsys):
    network = ConvTransformer(1, **CONV_SIZES["small"] | dict(layers=1))
    content = dict(network="ConvTransformer", architecture=network.architecture)
    path = changed(probes["one"], tmp_path / "p.pt", encoder=network.state_dict(), **content)
    code, _, errors = export(capsys, path, tmp_path / "x.pt2")
    assert code == 2 and errors == [f"error: {path}: a ConvTransformer: only ResNet1D is exported"]


def test_what_export_refuses(tmp_path, probes, tiny, capsys, monkeypatch):
    one = probes["one"]
    steps = {"normalize": "zscore", "filter": "ecgfounder"}
    filtered = changed(one, tmp_path / "filtered.pt", preprocessing=steps)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for probe, out, words in (
        (filtered, "x.pt2", "--filter ecgfounder"),
        (one, "x.zip", ".onnx or .pt2"),
        (one, "x", ".onnx or .pt2"),
        (tiny[1], "x.pt2", "calibrated head"),
        (one, "x.onnx", "pip install onnx"),
        (tmp_path / "nobody.pt", "x.pt2", "nobody.pt"),
    ):
        code, _, errors = export(capsys, probe, tmp_path / out)
        assert code == 2 and len(errors) == 1 and not (tmp_path / out).exists()
        assert errors[0].startswith("error: ") and words in errors[0]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_places_that_cannot_be_written(tmp_path, probes, capsys, ending):
    """A folder that is not there, one of that name, a file for a folder: one sentence each."""
    (tmp_path / f"folder.{ending}").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    places = [f"nowhere/x.{ending}", f"folder.{ending}", f"file/x.{ending}"]
    if ending == "pt2" and os.path.isdir("/proc/self"):  # where nobody can write
        places.append(f"/proc/self/x.{ending}")
    for place in places:
        code, _, errors = export(capsys, probes["one"], tmp_path / place)
        assert code == 2 and len(errors) == 1, errors
        assert errors[0].startswith(f"error: {tmp_path / place}: cannot be written (")
    assert sorted(tmp_path.iterdir()) == before
