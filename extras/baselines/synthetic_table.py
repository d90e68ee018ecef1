"""Does pre-training on synthetic ECG help where labels are few?  Table and curves on lead I.

    python -m extras.baselines.synthetic_table PTBXL --val-fold 8 --test-fold 9 --out runs/synthetic
    python -m extras.baselines.synthetic_table PTBXL --val-fold 8 --test-fold 9 --tables

Networks of synthetic_pretraining.py start from random weights or from one pre-training each (seed
0), and are fine-tuned on shares of PTB-XL's labels by train_probe.py --finetune.  A seed draws
share, order and head; shares of one seed lie in each other, and all starts see the same.  The
labels of the whole validation fold choose the epoch, however few train.  Intervals are by patient:
neither the draw of a share nor that of the one pre-training is in them, +- is over seeds.  Small
shares come first; what was cut off goes on, what is finished stays.  All of it takes more than a
day of one core; --networks, --shares and --seeds leave some out.  Draws OUT/synthetic.png.

Departures from the protocol that the project set itself: no LSTM, but ResNet1D with labels; smaller
batches of small shares instead of more epochs; "as many steps in all" adds those of pre-training to
those of tuning, and ends after 20 epochs that were no better.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

import train_probe
from extras import command_parser, evidence, run_action
from extras.baselines.table1 import add_flags, run_chains
from extras.evidence import shared_flags
from extras.synthetic import save_picture
from selfmis import UsageError, import_optional

NETWORKS = ("transformer", "gru", "resnet")
SHARES = (0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
FEW = 0.1  # shares below this have --seeds runs each, the others one
EPOCHS = 20
BATCHES = {0.01: 8, 0.025: 16, 0.05: 32}  # the others: 64; 18 steps an epoch or more
# Of ten synthetic folds two do not train: 15,200 do, as many as real ones.
SYNTHETIC = ["--data", "synthetic:19000"]
RECORDS = 15_000  # about, of folds 1 to 7, whose labels are shared out
PRETRAINING_STEPS = 8 * (15_200 // 128)

# What the table calls each start, and the flags that make its weights.
SCRATCH, LONGER = "from scratch", "from scratch, up to as many steps in all"
STARTS = {
    "scratch": (SCRATCH, "--untrained --alpha 0"),
    "longer": (LONGER, ""),  # begins where scratch does
    "holes": ("synthetic, holes (a = 1)", "--alpha 1"),
    "joint": ("synthetic, both (a = 0.5)", "--alpha 0.5"),
    "labels": ("synthetic, labels (a = 0)", "--alpha 0"),
    "real": ("real without labels, holes (a = 1)", "--alpha 1"),
}

# --------------------------------------------------------------------------------------------------
# The runs
# --------------------------------------------------------------------------------------------------


def starts_of(network: str) -> tuple[str, ...]:
    """The starts of a network; the ResNet has no tokens to mask."""
    return ("scratch", "longer", "labels") if network == "resnet" else tuple(STARTS)


def pretraining_runs(networks: list[str], shared: list[str], out: Path) -> dict[str, list[str]]:
    """{run: script and flags}."""
    runs = {}
    for network in networks:
        for start in starts_of(network):
            if start == "longer":
                continue
            data = shared if start == "real" else SYNTHETIC
            flags = f"--network {network} {STARTS[start][1]} --amp bf16".split()
            run = f"{network}-{start}"
            script = "extras.baselines.synthetic_pretraining"
            runs[run] = [script, *data, *flags, "--out", str(out / run)]
    return runs


def finetuning_runs(
    networks: list[str], shares: list[float], seeds: int, shared: list[str], out: Path
) -> dict[str, list[str]]:
    """{run: script and flags}, the smallest share first."""
    runs = {}
    for share in shares:
        for network in networks:
            for start in starts_of(network):
                weights = "scratch" if start == "longer" else start
                encoder = out / f"{network}-{weights}" / "best.pt"
                flags = ["--finetune", "--encoder", str(encoder), "--fractions", f"{share:g}"]
                flags += schedule(share, start)
                for seed, run in enumerate(names(network, start, share, seeds)):
                    own = ["--seed", str(seed), "--out", str(out / run)]
                    runs[run] = ["train_probe.py", *shared, *flags, *own]
    return runs


def names(network: str, start: str, share: float, seeds: int) -> list[str]:
    """The runs of a row of the table."""
    return evidence.with_seeds(f"{network}-{start}-{share:g}-#", seeds if share < FEW else 1)


def schedule(share: float, start: str) -> list[str]:
    """EPOCHS; for `longer` as many steps as pre-training has on top, if they bring anything.

    Less patience would end the slow start of a random network.
    """
    batch = BATCHES.get(share, 64)
    epochs = EPOCHS
    if start == "longer":
        steps = int(share * RECORDS) // batch  # of an epoch
        epochs += math.ceil(PRETRAINING_STEPS / steps)
    return f"--batch-size {batch} --epochs {epochs} --patience {EPOCHS} --amp bf16".split()


# --------------------------------------------------------------------------------------------------
# The table and the picture
# --------------------------------------------------------------------------------------------------


def against_normal(out: Path, runs: list[str]) -> str:
    """AUC of any infarct against the normal records, mean over those runs that are there."""
    scores = []
    for run in finished(out, runs):
        test, heads = train_probe.read_predictions(out / run)
        scores += [train_probe.infarct_score(one) for one in heads["finetune"]]
    entry = train_probe.any_infarct(scores, test["labels"], test["patient"])["NORM"]
    return train_probe.format_cell(entry, "auc", "{:.3f}")


def print_network(out: Path, network: str, shares: list[float], seeds: int) -> dict[str, list]:
    """The table of what is there; {start: [(number of labelled records, 44-mean)]}."""
    lines = [["labelled records", "start", "seeds", "six", "MI against NORM", "44"]]
    lines[0] += ["six minus scratch", "44 minus scratch"]
    lines[0] += ["six minus as many steps", "44 minus as many steps"]
    curves = {}
    for share in shares:
        for start in starts_of(network):
            runs = names(network, start, share, seeds)
            own = evidence.scores(out, tuple(runs), "finetune")
            if own is None:
                continue
            title, _ = STARTS[start]
            count = labelled_records(out, runs)
            six = own.cell("six")
            if len(own.sixes) > 1:
                six += f" ± {np.std(own.sixes, ddof=1):.3f}"
            line = [f"{count:,}", title, len(own.sixes), six]
            line += [against_normal(out, runs), own.cell("diagnostic")]
            for other in ("scratch", "longer"):
                line += differences(out, runs, names(network, other, share, seeds))
            lines.append(line)
            mean = train_probe.group_means(own.auc)["diagnostic"]
            curves.setdefault(title, []).append((count, mean))
    if curves:
        evidence.print_table(f"Synthetic pre-training, {network}", lines)
    return curves


def differences(out: Path, runs: list[str], others: list[str]) -> list[str]:
    """Of six-means and 44-means, paired; empty unless the same seeds (and shares) are there."""
    own = evidence.scores(out, tuple(runs), "finetune")
    other = evidence.scores(out, tuple(others), "finetune")
    seeds = [[run.rpartition("-")[2] for run in finished(out, row)] for row in (runs, others)]
    if runs == others or seeds[0] != seeds[1]:
        other = None
    return [evidence.difference(own, other, group) for group in ("six", "diagnostic")]


def finished(out: Path, runs: list[str]) -> list[str]:
    """Those of these runs that are there."""
    return [run for run in runs if (out / run / "predictions.npz").exists()]


def labelled_records(out: Path, runs: list[str]) -> int:
    """How many records trained the first of these runs that is there."""
    config = out / finished(out, runs)[0] / "config.json"
    return json.loads(config.read_text())["records"]["train"]


def draw_curves(curves: dict[str, dict[str, list]], path: Path) -> None:
    """44-mean against the number of labelled records: a panel a network, a line a start."""
    matplotlib = import_optional("matplotlib.figure", "drawing")
    figure = matplotlib.Figure((4 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    colours = {title: f"C{i}" for i, (title, _) in enumerate(STARTS.values())}
    colours |= {SCRATCH: "0.35", LONGER: "0.65"}
    for axes, (network, lines) in zip(panels, curves.items(), strict=True):
        axes.set(title=network, xscale="log", xlabel="labelled records")
        for title, points in lines.items():
            counts = [count for count, _ in points]
            means = [mean for _, mean in points]
            axes.plot(counts, means, "o-", color=colours[title], label=title)
        shown = sorted({count for points in lines.values() for count, _ in points})
        axes.set_xticks(shown, [f"{count:,}" for count in shown])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean AUC of 44 statements")
    handles = {
        title: line
        for axes in panels
        for line, title in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(curves), frameon=False
    )
    save_picture(figure, path, pixels_per_mm=6)


def run_table(flags: argparse.Namespace) -> None:
    shared, out = shared_flags(flags), flags.out
    shares = sorted(set(flags.shares))
    if not flags.tables:
        run_chains(pretraining_runs(flags.networks, shared, out), out, flags.jobs)
        runs = finetuning_runs(flags.networks, shares, flags.seeds, shared, out)
        run_chains(runs, out, flags.jobs)
    curves = {}
    for network in flags.networks:
        lines = print_network(out, network, shares, flags.seeds)
        if lines:
            curves[network] = lines
    if not curves:
        raise UsageError(f"{out}: no finished run of {', '.join(flags.networks)}")
    draw_curves(curves, out / "synthetic.png")


def main(argv=None) -> None:
    parser = command_parser("extras.baselines.synthetic_table", __doc__)
    add_flags(parser, Path("runs/synthetic"))
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: all three")
    add("--shares", nargs="+", type=float, choices=SHARES, default=SHARES, help="default: all six")
    few = range(1, 11)
    add(
        "--seeds",
        type=int,
        choices=few,
        metavar="N",
        default=3,
        help=f"runs of each share below {FEW} (default: 3)",
    )
    run_action(run_table, parser.parse_args(argv))


if __name__ == "__main__":
    main()
