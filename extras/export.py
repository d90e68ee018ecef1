"""A detector as ONNX or as a torch.export program: 10 s in mV at its own rate -> probabilities.

    python -m extras.export PROBE.pt OUT.onnx
    python -m extras.export PROBE.pt OUT.pt2

The z-score is part of the network. What no network does stands beside it in text: the verdict's
threshold and what it costs, what the probe was trained on (ONNX: metadata; .pt2: about.json).
"""

import argparse
import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path

import torch

from extras import command_parser, run_action
from extras.detect import (
    DISCLAIMER,
    CalibratedClassifier,
    Detector,
    describe_probe,
    load_detector,
    operating_point,
)
from selfmis import MI_TYPES, SECONDS, ResNet1D, UsageError, nan_to_none, write_atomically


def export_detector(path, out) -> str:
    """Writes OUT.onnx or OUT.pt2; returns a line that says what it takes and gives."""
    detector, out = load_detector(path), Path(out)
    normalize, filter = detector.preprocessing["normalize"], detector.preprocessing["filter"]
    if filter != "none":
        raise UsageError(f"{path}: --filter {filter} is no part of the network: not exported")
    if out.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{out}: give a name that ends in .onnx or .pt2")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: cannot be written (it is a folder, or in none)")
    encoder = detector.classifier.encoder
    if not isinstance(encoder, ResNet1D):
        kind = type(encoder).__name__
        raise UsageError(f"{path}: a {kind}: only ResNet1D is exported")
    network = CalibratedClassifier(encoder, detector.content, zscore=normalize == "zscore").eval()
    shape = len(detector.leads), round(SECONDS * detector.sample_rate_hz)  # (L, T)
    # The example has two records: torch takes a dimension of one for a constant.
    batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=batch)
    convert = to_onnx if out.suffix == ".onnx" else to_pt2
    write_atomically(out, convert(program, about_detector(detector)))
    gives = f"probability (batch, {len(MI_TYPES)}) of {', '.join(MI_TYPES)}"
    return f"{out}: input ecg (batch, {shape[0]}, {shape[1]}) in mV, output {gives}"


def about_detector(detector: Detector) -> dict[str, str]:
    """What a user of the exported network has to know, as text."""
    any_infarct = {"score": "1 - product of (1 - probability)"}
    any_infarct |= operating_point(detector.content)
    return {
        "types": " ".join(MI_TYPES),
        "leads": " ".join(detector.leads),
        "sample_rate_hz": f"{detector.sample_rate_hz:g}",
        "unit": "mV",
        "seconds": f"{SECONDS:g}",
        "longer": "average the probabilities of windows of 10 s, but for those without an ECG",
        "shorter": "how well it does with zeros behind the recording was not measured",
        "any_infarct": json.dumps(any_infarct),
        "probe": json.dumps(nan_to_none(describe_probe(detector.content))),
        "limits": DISCLAIMER,
    }


def to_pt2(program, about: dict[str, str]) -> bytes:
    """In memory, because torch ends in a RuntimeError of its own where a path cannot be written."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
    return file.getvalue()


def to_onnx(program, about: dict[str, str]) -> bytes:
    """Needs two packages that nothing else here needs; the sentence names those that lack."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"pip install {' '.join(missing)}, or export to .pt2"
        raise UsageError(f"writing ONNX needs {' and '.join(missing)}: {remedy}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages that are not needed here
    names = {"input_names": ["ecg"], "output_names": ["probability"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its own use of its own parts
        model = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    model.model.metadata_props.update(about)
    return model.model_proto.SerializeToString()


def main(argv=None) -> None:
    parser = command_parser("extras.export", __doc__)
    parser.add_argument("probe", help="probe.pt of train_probe.py")
    parser.add_argument("out", help="OUT.onnx or OUT.pt2")
    run_action(run_export, parser.parse_args(argv))


def run_export(arguments: argparse.Namespace) -> None:
    print(export_detector(arguments.probe, arguments.out))


if __name__ == "__main__":
    main()
