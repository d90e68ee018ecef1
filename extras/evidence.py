"""The commands behind the first seven tables of extras/RESULTS.md, and the README's table.

    python -m extras.evidence PTBXL --val-fold 8 --test-fold 9 --out runs/evidence
    python -m extras.evidence PTBXL --val-fold 8 --test-fold 9 --out runs/evidence --tables
    python -m extras.evidence picture

The first starts what is missing of RUNS, each command as somebody would type it, then prints the
tables; --tables only prints them (and fits two regressions on beats, for which it reads records).
Some eighty runs, ten to fifteen hours on two cores; one that was cut off goes on, a finished one is
not touched.  `picture` draws extras/results.png from the main table in extras/RESULTS.md and prints
the README's table from it, so that the three cannot differ.
"""

import argparse
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import selfmis
import train_probe
from extras import command_parser, run_action
from extras.synthetic import save_picture
from selfmis import LEADS, UsageError, import_optional

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# The runs
# --------------------------------------------------------------------------------------------------

SMALL = "--size small --sample-rate 100"
FULL = "--size ecgfounder --sample-rate 100"
# --amp off where bf16 is not named: the same precision whatever the processor has.
FINETUNE = "train_probe.py --finetune --epochs 8 --amp off"
PROBE = "train_probe.py --encoder"
LONG_PROBE = "train_probe.py --epochs 100 --patience 100 --encoder"
# Another tenth of the labels for each seed.
TENTH = "train_probe.py --finetune --fractions 0.1 --amp off"
TENTH_PROBE = "train_probe.py --fractions 0.1 --head logistic --encoder"
SHARES = "--fractions 0.02 0.05 0.1 0.25 0.5 1 --seeds 5 --head logistic --baseline"
ALIGN = "train_pretrain.py --lr 1e-3 --warmup 50 --epochs 8 --amp off"
SOFTMAX = f"{ALIGN} --loss softmax --multi"
SYNTHETIC = f"{FINETUNE} {SMALL} --data synthetic:15000 --synthetic-only --epochs 5"

# (name, number of seeds, command), in the order in which they need each other.  # stands for the
# seed and @NAME for best.pt of that run; --data, the folds, --seed and --out are added, and every
# alignment is probed, as NAME-probe.  Of a flag that stands twice the last counts, but all --data.
RUNS = (
    ("teacher-#", 3, f"{FINETUNE} --lead all {SMALL}"),
    ("teacher-#-frozen", 1, f"{PROBE} @teacher-#"),
    ("teacher-#-zeros", 1, f"{PROBE} @teacher-# --lead I"),
    ("scratch-#", 3, f"{FINETUNE} --lead I {SMALL}"),
    ("scratch-#-frozen", 3, f"{PROBE} @scratch-#"),
    ("random-#", 3, f"{PROBE} random --lead I {SMALL}"),
    ("paper-#", 3, f"{ALIGN} --loss paper --multi @teacher-0"),
    ("softmax-#", 3, f"{SOFTMAX} @teacher-0"),
    ("learnable-#", 1, f"{ALIGN} --loss learnable --multi @teacher-0"),
    ("raw-#", 1, f"{ALIGN} --loss raw --multi @teacher-0"),
    ("random-teacher-#", 1, f"{ALIGN} --loss paper --multi random {SMALL}"),
    # Not frozen; 16 epochs are as many steps as alignment and fine-tuning together.
    ("softmax-#-finetuned", 3, f"{FINETUNE} --encoder @softmax-#"),
    ("scratch-#-longer", 1, f"{FINETUNE} --lead I {SMALL} --epochs 16"),
    ("scratch-#-longer-frozen", 1, f"{PROBE} @scratch-#-longer"),
    # The full network.
    ("full-teacher", 1, f"{FINETUNE} --lead all {FULL} --amp bf16"),
    ("full-teacher-frozen", 1, f"{PROBE} @full-teacher"),
    ("full-scratch", 1, f"{FINETUNE} --lead I {FULL} --amp bf16"),
    ("full-scratch-frozen", 1, f"{PROBE} @full-scratch"),
    ("full-random", 1, f"{PROBE} random --lead I {FULL}"),
    ("full-paper", 1, f"{ALIGN} --loss paper --multi @full-teacher --amp bf16"),
    ("full-softmax", 1, f"{SOFTMAX} @full-teacher --amp bf16"),
    # A tenth of the labels; the teacher of tenth-# has seen no more.
    ("scratch-#-tenth", 2, f"{TENTH} --lead I {SMALL} --epochs 40 --patience 12"),
    ("scratch-#-tenth-frozen", 2, f"{TENTH_PROBE} @scratch-#-tenth"),
    ("softmax-#-tenth", 2, f"{TENTH} --encoder @softmax-# --epochs 24"),
    ("softmax-#-tenth-frozen", 2, f"{TENTH_PROBE} @softmax-#"),
    ("teacher-#-tenth", 2, f"{TENTH} --lead all {SMALL} --epochs 40 --patience 12"),
    ("tenth-#", 2, f"{SOFTMAX} @teacher-#-tenth"),
    ("tenth-#-finetuned", 2, f"{TENTH} --encoder @tenth-# --epochs 24"),
    ("tenth-#-frozen", 2, f"{TENTH_PROBE} @tenth-#"),
    ("softmax-#-shares", 1, f"{PROBE} @softmax-# {SHARES}"),
    # Ideas on top of softmax-0, one at a time.
    ("softmax-0-long-probe", 1, f"{LONG_PROBE} @softmax-0 --head adam"),
    ("epochs20", 1, f"{SOFTMAX} @teacher-0 --epochs 20"),
    ("epochs20-long-probe", 1, f"{LONG_PROBE} @epochs20"),
    ("from-scratch", 1, f"{SOFTMAX} @teacher-0 --single @scratch-0"),
    ("synthetic", 1, f"{SOFTMAX} @teacher-0 --data synthetic:8000"),
    ("lr3e-3", 1, f"{SOFTMAX} @teacher-0 --lr 3e-3"),
    ("batch512", 1, f"{SOFTMAX} @teacher-0 --batch-size 512"),
    ("decay0", 1, f"{SOFTMAX} @teacher-0 --weight-decay 0"),
    ("millivolts-teacher", 1, f"{FINETUNE} --lead all {SMALL} --normalize none"),
    ("millivolts", 1, f"{SOFTMAX} @millivolts-teacher"),
    ("filter-teacher", 1, f"{FINETUNE} --lead all {SMALL} --filter ecgfounder"),
    ("filter", 1, f"{SOFTMAX} @filter-teacher"),
    # Synthetic records train, real ones choose and test.
    ("synthetic-only-I", 1, f"{SYNTHETIC} --lead I"),
    ("synthetic-only-all", 1, f"{SYNTHETIC} --lead all"),
)


def with_seeds(name: str, seeds: int = 3) -> list[str]:
    """'paper-#-probe' -> paper-0-probe, paper-1-probe, paper-2-probe."""
    return [name.replace("#", str(seed)) for seed in range(seeds)]


def all_runs(plan: tuple, shared: list[str], out: Path) -> dict[str, list[str]]:
    """{run: script and flags} of RUNS or the like; `shared` are the flags that all have."""
    commands = {}
    for name, seeds, command in plan:
        for seed in range(seeds):
            run = name.replace("#", str(seed))
            commands[run] = f"{command} --seed {seed}".replace("#", str(seed))
            if not command.startswith("train_probe.py"):
                commands[f"{run}-probe"] = f"{PROBE} @{run} --lead I --seed {seed}"
    runs = {}
    for run, command in commands.items():
        script, *flags = command.split()
        flags = [str(out / flag[1:] / "best.pt") if flag[0] == "@" else flag for flag in flags]
        runs[run] = [script, *shared, *flags, "--out", str(out / run)]
    return runs


def add_run_flags(parser: argparse.ArgumentParser, out: Path, data: str = "PTBXL") -> None:
    """The flags that say on which records and where a table's runs are."""
    add = parser.add_argument
    add("data", metavar=data, help="a folder")
    add("--out", type=Path, default=out, help=f"of the runs (default: {out})")
    add("--val-fold", type=int, default=9, help="default: 9")
    add("--test-fold", type=int, default=10, help="default: 10")


def add_tables_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is there")


def shared_flags(flags: argparse.Namespace) -> list[str]:
    """What all runs of a table have in common, as somebody would type it."""
    folds = f"--val-fold {flags.val_fold} --test-fold {flags.test_fold}"
    return ["--data", flags.data, *folds.split()]


def run_missing(runs: dict[str, list[str]], out: Path) -> None:
    """Start every run that is not finished, one after the other; end at the first that fails."""
    for run, (script, *flags) in runs.items():
        if (out / run / "results.json").exists():  # train_pretrain.py knows when it is finished
            continue
        start = [str(HERE.parent / script)] if script.endswith(".py") else ["-m", script]
        command = [*start, *flags]
        print(f"python {shlex.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command, "--resume"]).returncode:
            sys.exit(f"{run}: the run failed; mend it and start again")


# --------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------

BEATS = 4000  # synthetic records from whose beats a logistic regression learns
MEANS = {"six": "six", "nine": "nine", "diagnostic": "44"}  # what a group is called in the tables
SCRATCH = [*with_seeds("scratch-#-frozen"), *with_seeds("scratch-#")]
FULL_SCRATCH = ["full-scratch-frozen", "full-scratch"]
FEW_SCRATCH = [*with_seeds("scratch-#-tenth-frozen", 2), *with_seeds("scratch-#-tenth", 2)]

# The runs behind each row; a row is repeated for every head that they have.
MAIN = {
    "random encoder": with_seeds("random-#"),
    "supervised on lead I from scratch": with_seeds("scratch-#-frozen"),
    "supervised on lead I from scratch, 16 epochs": ["scratch-0-longer-frozen"],
    "aligned to a random teacher, Eq. (3)": ["random-teacher-0-probe"],
    "aligned, Eq. (3)": with_seeds("paper-#-probe"),
    "aligned, `--loss learnable`": ["learnable-0-probe"],
    "aligned, `--loss raw`": ["raw-0-probe"],
    "aligned, `--loss softmax`": with_seeds("softmax-#-probe"),
    "aligned, `--loss softmax`, 100 epochs of the Adam head": ["softmax-0-long-probe"],
    "12-lead teacher given lead I and zeros": ["teacher-0-zeros"],
    "12-lead teacher, all leads": ["teacher-0-frozen"],
    "*not frozen:* lead I from scratch": with_seeds("scratch-#"),
    "*not frozen:* lead I from scratch, 16 epochs": ["scratch-0-longer"],
    "*not frozen:* aligned by softmax, then fine-tuned": with_seeds("softmax-#-finetuned"),
    "*not frozen:* 12-lead teacher": with_seeds("teacher-#"),
}
FULL_SIZE = {
    "random encoder": ["full-random"],
    "supervised on lead I from scratch": ["full-scratch-frozen"],
    "aligned, Eq. (3)": ["full-paper-probe"],
    "aligned, `--loss softmax`": ["full-softmax-probe"],
    "12-lead teacher, all leads": ["full-teacher-frozen"],
    "*not frozen:* lead I from scratch": ["full-scratch"],
    "*not frozen:* 12-lead teacher": ["full-teacher"],
}
SAME_STEPS = {
    "lead I from scratch, 16 epochs": ["scratch-0-longer"],
    "aligned by softmax for 8 epochs, fine-tuned for 8": ["softmax-0-finetuned"],
}
FEW_LABELS = {
    "lead I from scratch": with_seeds("scratch-#-tenth-frozen", 2),
    "aligned to the teacher of all labels": with_seeds("softmax-#-tenth-frozen", 2),
    "aligned to a teacher of that tenth": with_seeds("tenth-#-frozen", 2),
    "*not frozen:* lead I from scratch": with_seeds("scratch-#-tenth", 2),
    "*not frozen:* aligned to the teacher of all labels": with_seeds("softmax-#-tenth", 2),
    "*not frozen:* aligned to a teacher of that tenth": with_seeds("tenth-#-finetuned", 2),
    "*not frozen:* 12-lead teacher of that tenth": with_seeds("teacher-#-tenth", 2),
}
IDEAS = {
    "none": "softmax-0-probe",
    "probe `--epochs 100 --patience 100`": "softmax-0-long-probe",
    "`--epochs 20` of the alignment, and of the probe as above": "epochs20-long-probe",
    "`--single` = the encoder trained from scratch with labels": "from-scratch-probe",
    "`--data synthetic:8000` beside the real records": "synthetic-probe",
    "`--lr 3e-3`": "lr3e-3-probe",
    "`--batch-size 512`": "batch512-probe",
    "`--weight-decay 0`": "decay0-probe",
    "`--normalize none`: millivolts, with a teacher trained so": "millivolts-probe",
    "`--filter ecgfounder`, with a teacher trained so": "filter-probe",
    "the full network, with a teacher of that size": "full-softmax-probe",
    "the same aligned by Eq. (3)": "full-paper-probe",
    "*trained on lead I with labels*": "scratch-0-frozen",
    "*trained on lead I with labels, full network*": "full-scratch-frozen",
}


class Scores(NamedTuple):
    """AUC of the 44 statements, mean over the seeds that are there; of a difference too."""

    auc: np.ndarray  # (K,)
    draws: np.ndarray  # (R, K) bootstrap by patient
    labels: np.ndarray  # (N, K)
    patients: np.ndarray  # (N,)
    sixes: list[float]  # the six-mean of each seed

    def minus(self, other: "Scores") -> "Scores":
        """The paired difference.  UsageError: the two were tested on other records."""
        check_same((self.labels, self.patients), (other.labels, other.patients))
        auc, draws = self.auc - other.auc, self.draws - other.draws
        return self._replace(auc=auc, draws=draws, sixes=[])

    def cell(self, group: str, form: str = "{:.3f}") -> str:
        """The mean of a group with its interval, paired by patient if this is a difference."""
        summary = train_probe.summarize(self.auc, self.draws, self.labels)
        return train_probe.format_cell(summary[group], "mean", form)


def check_same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    """UsageError unless both (labels, patients) are the same."""
    if not all(map(np.array_equal, one, other)):
        raise UsageError("--out: its runs were tested on different records; run them again")


@functools.cache
def scores(out: Path, runs: tuple[str, ...], head: str, fold: str = "") -> Scores | None:
    """Scores of those of these runs that have this head; None where there is none.

    fold: "" for the test fold, "validation_" for the other.
    """
    tested, aucs, draws = [], [], []
    for run in runs:
        path = out / run / "predictions.npz"
        if not path.exists():
            continue
        with np.load(path) as saved:
            if f"{fold}logits_{head}" not in saved:
                continue
            labels, patients = saved[f"{fold}labels"], saved[f"{fold}patient"]
            auc, drawn = train_probe.mean_auc(saved[f"{fold}logits_{head}"], labels, patients)
        tested.append((labels, patients))
        check_same(tested[-1], tested[0])
        aucs.append(auc)
        draws.append(drawn)
    if not aucs:
        return None
    sixes = [train_probe.group_means(auc)["six"] for auc in aucs]
    return Scores(np.mean(aucs, 0), np.mean(draws, 0), labels, patients, sixes)


def print_table(title: str, lines: list[list]) -> None:
    print(f"\n## {title}\n\n{train_probe.as_markdown(lines)}", flush=True)


def print_rows(out: Path, title: str, rows: dict, differences: list[tuple], costs=False) -> None:
    """A line for each row and head: the three means, differences, and with `costs` the training.

    differences: (group, name of the other row, its runs); heads are compared with their like.
    """
    minus = [f"{MEANS[group]} minus {name}" for group, name, _ in differences]
    lines = [["encoder", "seeds", "head", *MEANS.values(), *minus]]
    if costs:
        lines[0] += ["R@1", "minutes"]
    for row, runs in rows.items():
        for head in ("adam", "logistic", "finetune"):
            own = scores(out, tuple(runs), head)
            if own is None:
                continue
            cells = {group: own.cell(group) for group in MEANS}
            if len(own.sixes) > 1:
                cells["six"] += f" ± {np.std(own.sixes, ddof=1):.3f}"
            line = [row, len(own.sixes), head, *cells.values()]
            for group, _, others in differences:
                other = None
                if not set(runs) <= set(others):  # a row is not compared with itself
                    other = scores(out, tuple(others), head)
                line.append(difference(own, other, group))
            if costs:
                line += training_cost(out, runs)
            lines.append(line)
    print_table(title, lines)


def difference(own: Scores, other: Scores | None, group: str) -> str:
    """own - other as a cell; empty if there is no other."""
    if other is None:
        return ""
    return own.minus(other).cell(group, "{:+.3f}")


def training_cost(out: Path, runs: list[str]) -> list[str]:
    """[R@1, minutes], means over what trained the encoders of these runs; empty if nothing did."""
    recalls, minutes = [], []
    for run in runs:
        folder = out / run
        if not (folder / "results.json").exists():
            continue
        config = json.loads((folder / "results.json").read_text())["config"]
        if not config["finetune"]:  # the encoder was trained in another folder, if at all
            folder = Path(config["encoder"]).parent
        if not (folder / "log.jsonl").exists():
            continue
        minutes.append(0)
        for log in (*folder.glob("words/log.jsonl"), folder / "log.jsonl"):  # HeartLang has two
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            rates = [e["records_per_second"] for e in entries if "records_per_second" in e]
            last = entries[-1]
            described = json.loads(log.with_name("config.json").read_text())
            records = described.get("training_records") or described["records"]["train"]
            minutes[-1] += last["epoch"] * records / np.median(rates) / 60
        if "r1" in last:
            recalls.append(last["r1"])
    cells = ["", ""]
    if recalls:
        cells[0] = f"{np.mean(recalls):.1f} %"
    if minutes:
        cells[1] = f"{np.mean(minutes):.0f}"
    return cells


def print_ideas(out: Path) -> None:
    """Every idea on the validation fold, and its difference to softmax-0 under the same head."""
    lines = [["idea", "six, adam", "six minus `softmax`, adam", "six, logistic"]]
    lines[0] += ["six minus `softmax`, logistic", "44 minus `softmax`, logistic"]
    for idea, run in IDEAS.items():
        line = [idea]
        for head, groups in (("adam", ["six"]), ("logistic", ["six", "diagnostic"])):
            own = scores(out, (run,), head, "validation_")
            base = None
            if idea != "none":
                base = scores(out, (IDEAS["none"],), head, "validation_")
            if own is None:
                line += [""] * (1 + len(groups))
            else:
                line.append(f"{own.sixes[0]:.3f}")
                line += [difference(own, base, group) for group in groups]
        if any(line[1:]):
            lines.append(line)
    print_table("Ideas", lines)


# ---- trained on synthetic records only -----------------------------------------------------------


def print_synthetic_only(out: Path, data: str, val_fold: int, test_fold: int) -> None:
    """How well two models that saw synthetic records only tell real infarcts from others."""
    lines = [
        ["trained on synthetic records only", "infarcts", "against NORM", "against all others"]
    ]
    found = {}
    for lead in ("I", "all"):
        path = out / f"synthetic-only-{lead}" / "results.json"
        if path.exists():
            results = json.loads(path.read_text())
            found[f"small network, lead {lead}"] = results["heads"]["finetune"]["any"]
    for name, entries in (found | beat_models(data, val_fold, test_fold)).items():
        line = [name, entries["NORM"]["positives"]]
        for other in ("NORM", "others"):
            line.append(train_probe.format_cell(entries[other], "auc", "{:.3f}"))
        lines.append(line)
    print_table("Synthetic records only", lines)


def beat_models(data: str, val_fold: int, test_fold: int) -> dict[str, dict]:
    """Logistic regression on the median beat, trained on synthetic records, tested on real ones.

    Returns {model: what results.json holds as "any"}.
    """
    real = selfmis.find_records(data, sample_rate_hz=100)
    real = real[real.labels.any(1)]
    parts = [selfmis.find_records(f"synthetic:{BEATS}", seed=5)]
    for fold in (val_fold, test_fold):
        if not (real.folds == fold).any():
            raise UsageError(f"{data}: no labelled record in fold {fold}")
        parts.append(real[real.folds == fold])
    beats, infarcts = [], []
    for part in parts:
        each = [find_median_beat(part.read(i, LEADS, 100)) for i in range(len(part))]
        beats.append(torch.from_numpy(np.stack(each)).float())  # (N, 12, 70)
        infarcts.append(torch.from_numpy(part.labels[:, train_probe.NINE].any(1)[:, None]).float())
    y, y_val, _ = infarcts
    models = {}
    for lead, leads in (("I", slice(0, 1)), ("all", slice(0, 12))):
        x, x_val, x_test = [part[:, leads].flatten(1) for part in beats]
        config = train_probe.ProbeConfig()
        weight, bias, _ = train_probe.logistic_head(x, y, x_val, y_val, config, 0)
        scores = [train_probe.score(x_test, weight, bias)[:, 0]]
        any_infarct = train_probe.any_infarct(scores, parts[2].labels, parts[2].patients)
        models[f"logistic regression on the median beat, lead {lead}"] = any_infarct
    return models


def find_median_beat(ecg: np.ndarray) -> np.ndarray:
    """(12, 1000) at 100 Hz -> (12, 70): from 250 ms before R to 450 ms after it."""
    signal = import_optional("scipy.signal", "finding beats")
    size = np.abs(ecg - np.median(ecg, axis=1, keepdims=True)).sum(0)[25:-45]
    starts, _ = signal.find_peaks(size, height=size.max() / 2, distance=30)
    beat = np.median([ecg[:, i : i + 70] for i in starts], axis=0)
    return beat - beat[:, 16:19].mean(1, keepdims=True)  # the PQ segment is the baseline


# --------------------------------------------------------------------------------------------------
# The picture and the README's table
# --------------------------------------------------------------------------------------------------

MAIN_TITLE = "The small network"
SHOWN = {  # row of the main table: what the README calls it
    "random encoder": "random weights",
    "supervised on lead I from scratch": "supervised, on lead I",
    "aligned, Eq. (3)": "aligned by Eq. (3)",
    "aligned, `--loss softmax`": "aligned by InfoNCE",
    "12-lead teacher, all leads": "the teacher, on twelve leads",
}


def main_table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """{(row, head): {column: cell}} of the main table in the text of RESULTS.md."""
    section = text.partition(f"\n## {MAIN_TITLE}\n")[2].partition("\n## ")[0]
    lines = [line[1:-1].split("|") for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    cells = [dict(zip(names, row, strict=True)) for row in rows]
    return {(row["encoder"], row["head"]): row for row in cells}


def readme_table(text: str) -> str:
    """Five rows of the main table, as the README shows them."""
    table = main_table(text)
    lines = [["frozen encoder", "R@1", "six, Adam head", "six, logistic head", "minus supervised"]]
    for row, name in SHOWN.items():
        adam, logistic = table[row, "adam"], table[row, "logistic"]
        six = [cells["six"].partition(" ±")[0] for cells in (adam, logistic)]
        lines.append([name, logistic["R@1"], *six, logistic["six minus scratch"]])
    return train_probe.as_markdown(lines)


def draw_picture(text: str, path: Path) -> None:
    """Six-mean under the logistic head with its interval, a point for each row of SHOWN."""
    figure = import_optional("matplotlib.figure", "drawing").Figure((7, 2.7), layout="constrained")
    axes = figure.add_subplot(xlim=(0.68, 0.97), ylim=(len(SHOWN) - 0.5, -0.5))
    axes.set_xlabel("mean AUC of six infarct types, logistic head, 95 % interval")
    axes.set_yticks(range(len(SHOWN)), SHOWN.values())
    table = main_table(text)
    for y, row in enumerate(SHOWN):
        mean, low, high = re.findall(r"\d\.\d+", table[row, "logistic"]["six"])[:3]
        colour = "tab:blue" if row.startswith("aligned") else "0.35"
        axes.plot([float(low), float(high)], [y, y], color=colour, linewidth=2)
        axes.plot(float(mean), y, "o", color=colour)
        axes.annotate(mean, (float(high), y), (6, 0), textcoords="offset points", va="center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save_picture(figure, path, pixels_per_mm=6)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def run_evidence(flags: argparse.Namespace) -> None:
    if flags.data == "picture":
        text = (HERE / "RESULTS.md").read_text()
        draw_picture(text, HERE / "results.png")
        print(readme_table(text))
        return
    if not flags.tables:
        run_missing(all_runs(RUNS, shared_flags(flags), flags.out), flags.out)
    out = flags.out
    minus = [("six", "scratch", SCRATCH), ("six", "random", with_seeds("random-#"))]
    print_rows(out, MAIN_TITLE, MAIN, minus, costs=True)
    minus = [("six", "scratch", FULL_SCRATCH), ("six", "random", ["full-random"])]
    print_rows(out, "The full network", FULL_SIZE, minus, costs=True)
    minus = [(group, "scratch", ["scratch-0-longer"]) for group in MEANS]
    print_rows(out, "As many steps, not frozen", SAME_STEPS, minus)
    minus = [(group, "scratch", FEW_SCRATCH) for group in MEANS]
    print_rows(out, "A tenth of the labels", FEW_LABELS, minus)
    shares = out / "softmax-0-shares" / "results.md"
    if shares.exists():
        print(f"\n## Shares of the labels\n\n{shares.read_text()}")
    print_ideas(out)
    print_synthetic_only(out, flags.data, flags.val_fold, flags.test_fold)


def main(argv=None) -> None:
    parser = command_parser("extras.evidence", __doc__)
    add_run_flags(parser, Path("runs/evidence"), "PTBXL|picture")
    add_tables_flag(parser)
    run_action(run_evidence, parser.parse_args(argv))


if __name__ == "__main__":
    main()
