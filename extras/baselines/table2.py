"""Table 2 and Fig. 1 of the paper at the scale of two cores: runs what is missing, then scores it.

    python -m extras.baselines.table2 PTBXL --val-fold 8 --test-fold 9 --out runs/table1

PTB-XL at 100 Hz, `small` networks, eight epochs in bf16.  The classifier is table1.py's teacher,
whose run is shared with it if --out is the same.  Draws OUT/generated.png.
"""

import argparse
from pathlib import Path

from extras import evidence
from extras.baselines import generated
from extras.baselines.table1 import BF16, FIRST, add_flags, run_missing, shared_flags
from extras.detect import run_command
from extras.evidence import PROBE

GENERATIVE = ("pix2pix", "cyclegan", "ekgan", "mcma")
TEACHER = (
    *(each for each in FIRST if each[0] == "teacher-#"),
    ("teacher-#-frozen", 1, f"{PROBE} @teacher-#"),
)


def all_runs(shared: list[str], out: Path) -> dict[str, list[str]]:
    runs = evidence.all_runs(TEACHER, shared, out)
    for name in GENERATIVE:
        runs[name] = [f"extras.baselines.{name}", *shared, *BF16.split(), "--out", str(out / name)]
    return runs


def run_table(flags: argparse.Namespace) -> None:
    shared, out = shared_flags(flags), flags.out
    if not flags.tables:
        run_missing(all_runs(shared, out), out, flags.jobs)
    folders = []
    for name in (*GENERATIVE, "fir"):
        folder = out / name
        source = "fir" if name == "fir" else str(folder / "best.pt")
        if not (folder / "generated.npy").exists():
            generated.main(["make", source, *shared, "--out", str(folder), "--sample-rate", "100"])
        folders.append(str(folder))
    probe = ["--probe", str(out / "teacher-0-frozen/probe.pt")]
    generated.main(["score", *folders, *shared, *probe, "--picture", str(out / "generated.png")])


def main(argv=None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    name = "python -m extras.baselines.table2"
    parser = argparse.ArgumentParser(
        name, None, __doc__, allow_abbrev=False, formatter_class=layout
    )
    add_flags(parser, Path("runs/table1"))
    run_command(run_table, parser, argv)


if __name__ == "__main__":
    main()
