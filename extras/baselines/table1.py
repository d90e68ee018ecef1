"""Table 1 of the paper at the scale of two cores: runs what is missing, then prints the table.

    python -m extras.baselines.table1 PTBXL --val-fold 8 --test-fold 9 --out runs/table1
    python -m extras.baselines.table1 PTBXL --val-fold 8 --test-fold 9 --out runs/table1 --tables

PTB-XL at 100 Hz, `small` networks, eight epochs (sixteen of halves) in bf16, one probe for all.
--jobs runs at once, of one thread each; some fifteen core-hours.  What was cut off goes on, what is
finished stays. SelfMIS and most of what runs on ResNet1D have three seeds and a rate of 1e-3, the
published networks one seed and 5e-4 (ST-MEM 1e-3), supervised training on whole records Adam and
5e-4; no rate was searched for.  A difference is to the same seeds of SelfMIS by InfoNCE.  Minutes
are those of the run itself, without its teacher's or its start's.
"""

import argparse
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import train_probe
from extras import command_parser, evidence, run_action
from extras.evidence import PROBE, shared_flags, with_seeds

SMALL = "--size small --sample-rate 100"
BF16 = f"{SMALL} --amp bf16"
SUPERVISED = f"train_probe.py --finetune --epochs 8 {BF16}"
BUDGET = "--lr 1e-3 --warmup 50 --epochs 8 --amp bf16"
ALIGN = f"train_pretrain.py {BUDGET}"
START = "--loss softmax --multi @teacher-0 --single @clocs-resnet-1-#"
RESNET = "--network resnet --lr 1e-3"
CLOCS, SIMCLR, THREE_KG = (f"extras.baselines.{name}" for name in ("clocs", "simclr", "three_kg"))
METHODS = ("simclr", "wav2vec2", "three_kg", "clocs", "w2v_cmsc", "st_mem", "heartlang")

# As evidence.RUNS: (name, number of seeds, command).
FIRST = (
    ("random-#", 3, f"{PROBE} random --lead I {SMALL}"),
    ("scratch-#", 3, f"{SUPERVISED} --lead I"),
    ("scratch-#-frozen", 3, f"{PROBE} @scratch-#"),
    ("crops-#", 3, f"extras.baselines.crops {BF16}"),
    ("teacher-#", 1, f"{SUPERVISED} --lead all"),
    ("clocs-resnet-12-#", 3, f"{CLOCS} {BF16} {RESNET} --leads 12"),
    ("clocs-resnet-1-#", 3, f"{CLOCS} {BF16} {RESNET} --leads 1"),
    ("clocs-resnet-1-2epochs-#", 1, f"{CLOCS} {BF16} {RESNET} --leads 1 --epochs 2"),
    ("clocs-resnet-1-4epochs-#", 1, f"{CLOCS} {BF16} {RESNET} --leads 1 --epochs 4"),
    ("clocs-resnet-cut-#", 3, f"{CLOCS} {BF16} {RESNET} --self-cut"),
    ("simclr-resnet-12-#", 3, f"{SIMCLR} {BF16} {RESNET} --leads 12"),
    ("simclr-resnet-1-#", 3, f"{SIMCLR} {BF16} {RESNET} --leads 1"),
    ("three_kg-resnet-12-#", 3, f"{THREE_KG} {BF16} {RESNET} --leads 12"),
    ("three_kg-resnet-1-#", 3, f"{THREE_KG} {BF16} {RESNET} --leads 1"),
    *((f"{name}-1-#", 1, f"extras.baselines.{name} {BF16} --leads 1") for name in METHODS),
    *((f"{name}-12-#", 1, f"extras.baselines.{name} {BF16} --leads 12") for name in METHODS),
)
THEN = (  # what needs the weights of those
    ("paper-#", 3, f"{ALIGN} --loss paper --multi @teacher-0"),
    ("softmax-#", 3, f"{ALIGN} --loss softmax --multi @teacher-0"),
    ("paper-free-#", 3, f"{ALIGN} --loss paper --multi @clocs-resnet-12-0"),
    ("softmax-free-#", 3, f"{ALIGN} --loss softmax --multi @clocs-resnet-12-0"),
    ("softmax-start-#", 3, f"{ALIGN} {START}"),
    ("recorders-#", 1, f"extras.recorders {BUDGET} --epochs 16 {START}"),
    ("halves-#", 3, f"extras.halves {BUDGET} --epochs 16 --loss softmax --multi @teacher-0"),
)
# Probed beside a random encoder of the same architecture.
WITH_BASELINE = ("clocs-1-0", "st_mem-1-0", "heartlang-1-0")


def all_runs(plan: tuple, shared: list[str], out: Path) -> dict[str, list[str]]:
    runs = evidence.all_runs(plan, shared, out)
    for run in WITH_BASELINE:
        if f"{run}-probe" in runs:
            runs[f"{run}-probe"].append("--baseline")
    return runs


def run_chains(runs: dict[str, list[str]], out: Path, jobs: int) -> None:
    """Every run that is not finished and then its probe, `jobs` of them at once.

    After one that fails, or is interrupted, no other is started.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    chains = {}
    for run in runs:
        start = run.removesuffix("-probe").removesuffix("-frozen")
        chains.setdefault(start, []).append(run)
    has_failed = threading.Event()

    def run_chain(chain: list[str]) -> None:
        for run in chain:
            if has_failed.is_set():
                return
            try:
                evidence.run_missing({run: runs[run]}, out)
            except BaseException:  # SystemExit of a run that failed among them
                has_failed.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_chain, chain) for chain in chains.values()]
    for future in futures:
        future.result()


class Row(NamedTuple):
    """A line of the table for each head."""

    method: str
    sees: str  # while it trains; all are tested on lead I
    network: str
    labels: str  # that pre-training has seen
    runs: list[str]
    paper: str = ""  # its mean AUC of nine types, in the paper
    head: str = ""  # the end of its heads' names


def benchmark(name: str, method: str, network: str, paper: str) -> list[Row]:
    """A method of Table 1 on lead I and on twelve leads."""
    return [
        Row(method, "lead I", network, "none", [f"{name}-1-0-probe"]),
        Row(method, "12 leads", network, "none", [f"{name}-12-0-probe"], paper),
    ]


def on_resnet(name: str, method: str) -> list[Row]:
    """The same on this repository's network."""
    runs = {sees: with_seeds(f"{name}-resnet-{sees}-#-probe") for sees in ("1", "12")}
    return [
        Row(method, "lead I", "ResNet1D", "none", runs["1"]),
        Row(method, "12 leads", "ResNet1D", "none", runs["12"]),
    ]


CONV = "conv-transformer"
SELFMIS = with_seeds("softmax-#-probe")
RANDOM = train_probe.BASELINE_KEY
ROWS = (
    Row("random", "", "ResNet1D", "none", with_seeds("random-#")),
    Row("random", "", CONV, "none", ["clocs-1-0-probe"], head=RANDOM),
    Row("random", "", "ST-MEM's", "none", ["st_mem-1-0-probe"], head=RANDOM),
    Row("random", "", "HeartLang's", "none", ["heartlang-1-0-probe"], head=RANDOM),
    *benchmark("simclr", "SimCLR", CONV, "60.7"),
    *benchmark("wav2vec2", "Wav2Vec 2", CONV, "63.4"),
    *benchmark("three_kg", "3KG", CONV, "62.0"),
    *benchmark("clocs", "CLOCS", CONV, "65.9"),
    *benchmark("w2v_cmsc", "W2V-CMSC", CONV, "78.2"),
    *benchmark("st_mem", "ST-MEM", "its own", "73.3"),
    *benchmark("heartlang", "HeartLang", "its own", "76.1"),
    *on_resnet("simclr", "SimCLR"),
    *on_resnet("three_kg", "3KG"),
    *on_resnet("clocs", "CLOCS"),
    Row("CLOCS, 2 epochs", "lead I", "ResNet1D", "none", ["clocs-resnet-1-2epochs-0-probe"]),
    Row("CLOCS, 4 epochs", "lead I", "ResNet1D", "none", ["clocs-resnet-1-4epochs-0-probe"]),
    Row("CLOCS, self-cut", "both", "ResNet1D", "none", with_seeds("clocs-resnet-cut-#-probe")),
    Row("supervised", "lead I", "ResNet1D", "all", with_seeds("scratch-#-frozen")),
    Row("supervised, halves", "lead I", "ResNet1D", "all", with_seeds("crops-#-probe")),
    Row("SelfMIS, Eq. (3)", "both", "ResNet1D", "teacher's", with_seeds("paper-#-probe"), "82.6"),
    Row("SelfMIS, InfoNCE", "both", "ResNet1D", "teacher's", SELFMIS),
    Row("SelfMIS, InfoNCE, halves", "both", "ResNet1D", "teacher's", with_seeds("halves-#-probe")),
    Row(
        "SelfMIS, InfoNCE, student from CLOCS",
        "both",
        "ResNet1D",
        "teacher's",
        with_seeds("softmax-start-#-probe"),
    ),
    Row(
        "the same, halves through recorders", "both", "ResNet1D", "teacher's", ["recorders-0-probe"]
    ),
    Row(
        "SelfMIS, Eq. (3), teacher from CLOCS",
        "both",
        "ResNet1D",
        "none",
        with_seeds("paper-free-#-probe"),
    ),
    Row(
        "SelfMIS, InfoNCE, teacher from CLOCS",
        "both",
        "ResNet1D",
        "none",
        with_seeds("softmax-free-#-probe"),
    ),
)


def print_tables(out: Path) -> None:
    """A table for each head, of what is there."""
    for head in ("logistic", "adam"):
        lines = [["method", "sees", "network", "labels", "seeds", *evidence.MEANS.values()]]
        lines[0] += ["six minus SelfMIS", "44, validation", "44 minus SelfMIS, validation"]
        lines[0] += ["R@1", "its minutes", "nine, paper"]
        for row in ROWS:
            own = evidence.scores(out, tuple(row.runs), head + row.head)
            if own is None:
                continue
            line = [row.method, row.sees, row.network, row.labels, len(own.sixes)]
            line += [own.cell(group) for group in evidence.MEANS]
            # By the validation fold a recipe or a length would be chosen.
            chosen_by = evidence.scores(out, tuple(row.runs), head + row.head, "validation_")
            others = ()
            if row.runs != SELFMIS:
                others = tuple(SELFMIS[: len(own.sixes)])
            line.append(evidence.difference(own, evidence.scores(out, others, head), "six"))
            line.append(f"{train_probe.group_means(chosen_by.auc)['diagnostic']:.3f}")
            other = evidence.scores(out, others, head, "validation_")
            line.append(evidence.difference(chosen_by, other, "diagnostic"))
            line += ["", ""] if row.head else evidence.training_cost(out, row.runs)
            lines.append([*line, row.paper])
        evidence.print_table(f"Table 1, {head} head", lines)


def run_table(flags: argparse.Namespace) -> None:
    for plan in (FIRST, THEN):
        runs = all_runs(plan, shared_flags(flags), flags.out)
        if not flags.tables:
            run_chains(runs, flags.out, flags.jobs)
    print_tables(flags.out)


def add_flags(parser: argparse.ArgumentParser, out: Path) -> None:
    """The flags of a table whose runs may go side by side."""
    evidence.add_run_flags(parser, out)
    evidence.add_tables_flag(parser)
    some = range(1, 65)
    parser.add_argument(
        "--jobs", type=int, choices=some, metavar="N", default=2, help="runs at once (default: 2)"
    )


def main(argv=None) -> None:
    parser = command_parser("extras.baselines.table1", __doc__)
    add_flags(parser, Path("runs/table1"))
    run_action(run_table, parser.parse_args(argv))


if __name__ == "__main__":
    main()
