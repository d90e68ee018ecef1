"""Makes the detector that comes with this repository, extras/weights/lead_I_small.pt.

    python -m extras.ship PTBXL --val-fold 8 --test-fold 9 --handheld FOLDER --out runs/table1

Three runs of extras/baselines/table1.py, which are not repeated where they are there: a teacher of
twelve leads with labels, an encoder of lead I by CLOCS without any, and that encoder aligned to the
teacher on halves through simple recorders; then the better of two heads on the validation fold.
About an hour on one core.  The encoder is kept in 16 bits.  --handheld: WFDB records of a hand-held
device with the labels that extras/devices.py reads; how many of a normal rhythm are called positive
stands in every answer.
"""

import argparse
from pathlib import Path

import numpy as np

import selfmis
from extras import command_parser, devices, evidence, run_action
from extras.baselines import table1
from extras.detect import WEIGHTS
from selfmis import UsageError

RUNS = ("teacher-0", "clocs-resnet-1-0", "recorders-0", "recorders-0-probe")


def halve(content: dict) -> dict:
    """A checkpoint whose encoder takes half the space; loading makes it float32 again."""
    encoder = {name: value.half() for name, value in content["encoder"].items()}
    return content | dict(encoder=encoder)


def normal_recordings(folder: Path) -> list[tuple[np.ndarray, float]]:
    """Signals and rates of those of a normal rhythm."""
    records, labels = devices.find_labelled(folder, None, 100)
    normal = np.flatnonzero(labels == "N")
    if not len(normal):
        raise UsageError(f"--handheld {folder}: its REFERENCE.csv labels no record N")
    return devices.read_filled(records, normal)


def handheld_rate(probe: Path, recordings: list[tuple[np.ndarray, float]]) -> dict:
    """How often a detector calls a normal rhythm on a hand-held device positive."""
    answers = devices.verdicts(probe, recordings)
    known = np.isfinite(answers)
    return dict(recordings=int(known.sum()), positive=float(answers[known].mean()))


def ship(flags: argparse.Namespace) -> None:
    recordings = normal_recordings(flags.handheld)  # refused before, not after an hour
    plan = (*table1.FIRST, *table1.THEN)
    runs = table1.all_runs(plan, evidence.shared_flags(flags), flags.out)
    table1.run_chains({name: runs[name] for name in RUNS}, flags.out, jobs=1)
    probe = flags.out / RUNS[-1] / "probe.pt"
    content = selfmis.read_checkpoint(probe)
    content["config"] |= dict(data=["ptb-xl"], encoder="", out="")  # not where they lie here
    halved = flags.out / "detector.pt"  # in 16 bits, as it will answer
    selfmis.save(halved, halve(content))
    content["handheld"] = handheld_rate(halved, recordings)
    selfmis.save(WEIGHTS, halve(content))
    size = f"{WEIGHTS.stat().st_size / 1e6:.2f} MB"
    measured = content["handheld"]
    alarms = f"{measured['positive']:.1%} of {measured['recordings']:,} normal rhythms"
    print(f"{WEIGHTS}: {size}; on a hand-held device {alarms} are called positive")


def main(argv=None) -> None:
    parser = command_parser("extras.ship", __doc__)
    evidence.add_run_flags(parser, Path("runs/table1"))
    parser.add_argument("--handheld", type=Path, required=True, metavar="FOLDER")
    run_action(ship, parser.parse_args(argv))


if __name__ == "__main__":
    main()
