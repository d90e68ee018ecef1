"""Table 2 and Fig. 1 of the paper at the scale of two cores: runs what is missing, then scores it.

    python -m extras.baselines.table2 PTBXL --val-fold 8 --test-fold 9 --out runs/table1

PTB-XL at 100 Hz, `small` networks, eight epochs in bf16, one seed, but three of MCMA; no rate was
searched for.  The classifier is table1.py's teacher, whose run is shared with it if --out is the
same.  Draws OUT/generated.png.
"""

import argparse
from pathlib import Path

from extras import command_parser, evidence, run_action
from extras.baselines import generated
from extras.baselines.table1 import BF16, FIRST, add_flags, run_chains
from extras.evidence import PROBE, shared_flags
from selfmis import UsageError

GENERATIVE = ("pix2pix", "cyclegan", "ekgan", "mcma", "mcma-1", "mcma-2")  # method and seed
TEACHER = (
    *(each for each in FIRST if each[0] == "teacher-#"),
    ("teacher-#-frozen", 1, f"{PROBE} @teacher-#"),
)


def all_runs(shared: list[str], out: Path) -> dict[str, list[str]]:
    runs = evidence.all_runs(TEACHER, shared, out)
    for name in GENERATIVE:
        method, _, seed = name.partition("-")
        own = ["--seed", seed or "0", "--out", str(out / name)]
        runs[name] = [f"extras.baselines.{method}", *shared, *BF16.split(), *own]
    return runs


def is_stale(folder: Path) -> bool:
    """Whether nothing was made yet, or the generator is younger than what it made."""
    made, weights = folder / generated.CONTENT, folder / "best.pt"
    if not made.exists():
        return True
    return weights.exists() and weights.stat().st_mtime > made.stat().st_mtime


def run_table(flags: argparse.Namespace) -> None:
    shared, out = shared_flags(flags), flags.out
    debug = ["--debug"] if flags.debug else []
    if not flags.tables:
        run_chains(all_runs(shared, out), out, flags.jobs)
    for name in (*GENERATIVE, "fir"):
        source = "fir" if name == "fir" else str(out / name / "best.pt")
        if not flags.tables and is_stale(out / name):
            rate = ["--sample-rate", "100"]
            generated.main(["make", source, *shared, *debug, *rate, "--out", str(out / name)])
    folders = [out / name for name in (*GENERATIVE, "fir")]
    folders = [str(folder) for folder in folders if (folder / generated.CONTENT).exists()]
    if not folders:
        raise UsageError(f"{out}: no generated leads in it; start without --tables")
    probe = ["--probe", str(out / "teacher-0-frozen/probe.pt")]
    picture = ["--picture", str(out / "generated.png")]
    generated.main(["score", *folders, *shared, *debug, *probe, *picture])


def main(argv=None) -> None:
    parser = command_parser("extras.baselines.table2", __doc__)
    add_flags(parser, Path("runs/table1"))
    run_action(run_table, parser.parse_args(argv))


if __name__ == "__main__":
    main()
