"""The tables of the README, from real records:  python tests/evidence.py ptb-xl [--out runs/evidence] [--test-fold 10 --val-fold 9]

Runs every command that is not finished yet (some eighty, ten to fifteen hours on two cores), each as a user would type it, then
prints the table, smaller ones of equal training time and of a tenth of the labels, and what further ideas do to the validation
fold.  A run that was cut off is started again; one that is there is not touched.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np
import torch
from test_synthetic import detected_beats

import selfmis
import train_probe

HERE = Path(__file__).parents[1]
SMALL = ["--size", "small", "--sample-rate", "100"]
ALIGN = [*SMALL, "--lr", 1e-3, "--warmup", 50, "--epochs", 8]


# Ideas on top of softmax-0, one at a time, judged on the validation fold: further flags of the alignment ("SCRATCH" is a run), and of the probe.
# Size and preprocessing are the teacher's too, so such an idea gets a teacher of its own.
IDEAS = {
    "synth8": (["--data", "synthetic:8000"], []),
    "sinit": (["--single", "SCRATCH"], []),
    "adam100": ([], ["--epochs", 100, "--patience", 100]),
    "epochs20": (["--epochs", 20], ["--epochs", 100, "--patience", 100]),
    "lr3e-3": (["--lr", 3e-3], []),
    "batch512": (["--batch-size", 512], []),
    "wd0": (["--weight-decay", 0], []),
    "millivolts": (["--normalize", "none"], []),
    "filter": (["--filter", "ecgfounder"], []),
    "size": (["--size", "ecgfounder", "--amp", "bf16"], []),
    "size-paper": (["--size", "ecgfounder", "--amp", "bf16", "--loss", "paper"], []),
}
OF_THE_TEACHER = ("--normalize", "--filter", "--size", "--amp")


def commands(out: Path) -> dict[str, list]:
    """{folder of the run: script and flags}, in the order in which they need each other."""
    found = {}
    finetune = ["train_probe.py", "--finetune", "--epochs", 8]
    for seed in (0, 1, 2):
        found[f"teacher-{seed}"] = [*finetune, "--lead", "all", *SMALL, "--seed", seed]
        found[f"scratch-{seed}"] = [*finetune, "--lead", "I", *SMALL, "--seed", seed]
        found[f"scratch-{seed}-frozen"] = ["train_probe.py", "--encoder", out / f"scratch-{seed}/best.pt", "--seed", seed]
        found[f"random-{seed}"] = ["train_probe.py", "--lead", "I", *SMALL, "--seed", seed]
    found["teacher-0-frozen"] = ["train_probe.py", "--encoder", out / "teacher-0/best.pt"]
    found["teacher-0-zeros"] = ["train_probe.py", "--encoder", out / "teacher-0/best.pt", "--lead", "I"]
    aligned = [("paper", s) for s in (0, 1, 2)] + [("softmax", s) for s in (0, 1, 2)] + [("learnable", 0), ("raw", 0), ("randomteacher", 0)]
    for loss, seed in aligned:
        teacher = "random" if loss == "randomteacher" else out / "teacher-0/best.pt"
        found[f"{loss}-{seed}"] = ["train_pretrain.py", "--multi", teacher, "--loss", "paper" if loss == "randomteacher" else loss, *ALIGN, "--seed", seed]
        found[f"{loss}-{seed}-probe"] = ["train_probe.py", "--encoder", out / f"{loss}-{seed}/best.pt", "--lead", "I", "--seed", seed]
    encoder_of, teacher_of = {(): "softmax-0"}, {(): "teacher-0"}
    for name, (align, probe) in IDEAS.items():
        if tuple(align) not in encoder_of:
            align_flags = [out / "scratch-0/best.pt" if flag == "SCRATCH" else flag for flag in align]
            own = [part for flag, value in zip(align[::2], align[1::2]) if flag in OF_THE_TEACHER for part in (flag, value)]
            if tuple(own) not in teacher_of:
                teacher_of[tuple(own)] = f"{name}-teacher"
                found[f"{name}-teacher"] = [*finetune, "--lead", "all", *SMALL, *own]
            teacher = out / teacher_of[tuple(own)] / "best.pt"
            found[name] = ["train_pretrain.py", "--multi", teacher, "--loss", "softmax", *ALIGN, *align_flags]
            encoder_of[tuple(align)] = name
        found[f"{name}-probe"] = ["train_probe.py", "--encoder", out / encoder_of[tuple(align)] / "best.pt", "--lead", "I", *probe]
    found["size-scratch"] = [*finetune, "--lead", "I", *SMALL, *IDEAS["size"][0]]
    for name in ("size-scratch", "size-teacher"):
        found[f"{name}-frozen"] = ["train_probe.py", "--encoder", out / name / "best.pt"]
    found["size-random"] = ["train_probe.py", "--lead", "I", *SMALL, "--size", "ecgfounder"]
    for lead in ("I", "all"):  # synthetic records train, real ones choose and test
        found[f"zeroshot-{lead}"] = ["train_probe.py", "--data", "synthetic:15000", "--synthetic-only", "--finetune", "--lead", lead, *SMALL, "--epochs", 5]
    for seed in (0, 1, 2):
        found[f"softmax-{seed}-finetuned"] = [*finetune, "--encoder", out / f"softmax-{seed}/best.pt", "--seed", seed]
    found["scratch-0-longer"] = [*finetune, "--lead", "I", *SMALL, "--epochs", 16]  # as many steps as alignment and fine-tuning together
    found["scratch-0-longer-frozen"] = ["train_probe.py", "--encoder", out / "scratch-0-longer/best.pt"]
    for seed in (0, 1):  # a tenth of the labels, a share for each seed; with `tenth`, the teacher too has seen no more
        share = [*finetune, "--fractions", 0.1, "--seed", seed]
        found[f"scratch-{seed}-tenth"] = [*share, "--lead", "I", *SMALL, "--epochs", 40, "--patience", 12]
        found[f"softmax-{seed}-tenth"] = [*share, "--encoder", out / f"softmax-{seed}/best.pt", "--epochs", 24]
        found[f"teacher-{seed}-tenth"] = [*share, "--lead", "all", *SMALL, "--epochs", 40, "--patience", 12]
        found[f"tenth-{seed}"] = ["train_pretrain.py", "--multi", out / f"teacher-{seed}-tenth/best.pt", "--loss", "softmax", *ALIGN, "--seed", seed]
        found[f"tenth-{seed}-finetuned"] = [*share, "--encoder", out / f"tenth-{seed}/best.pt", "--epochs", 24]
        for name in (f"scratch-{seed}-tenth", f"softmax-{seed}", f"tenth-{seed}"):
            frozen = ["train_probe.py", "--encoder", out / name / "best.pt", "--fractions", 0.1, "--seed", seed, "--head", "logistic"]
            found[f"{name.removesuffix('-tenth')}-tenth-frozen"] = frozen
    return found


ROWS = {  # of the first table: the runs whose mean it is
    "random encoder": ["random-0", "random-1", "random-2"],
    "supervised on lead I from scratch": ["scratch-0-frozen", "scratch-1-frozen", "scratch-2-frozen"],
    "supervised on lead I from scratch, 16 epochs": ["scratch-0-longer-frozen"],
    "aligned to a random teacher, Eq. (3)": ["randomteacher-0-probe"],
    "aligned, Eq. (3)": ["paper-0-probe", "paper-1-probe", "paper-2-probe"],
    "aligned, `--loss learnable`": ["learnable-0-probe"],
    "aligned, `--loss raw`": ["raw-0-probe"],
    "aligned, `--loss softmax`": ["softmax-0-probe", "softmax-1-probe", "softmax-2-probe"],
    "12-lead teacher given lead I and zeros": ["teacher-0-zeros"],
    "12-lead teacher, all leads": ["teacher-0-frozen"],
    "aligned, `--loss softmax`, 100 epochs of the Adam head": ["adam100-probe"],
    "*not frozen:* lead I from scratch": ["scratch-0", "scratch-1", "scratch-2"],
    "*not frozen:* lead I from scratch, 16 epochs": ["scratch-0-longer"],
    "*not frozen:* aligned by softmax, then fine-tuned": ["softmax-0-finetuned", "softmax-1-finetuned", "softmax-2-finetuned"],
    "*not frozen:* 12-lead teacher": ["teacher-0", "teacher-1", "teacher-2"],
}

FULL_SIZE = {  # the same with the full network
    "random encoder": ["size-random"],
    "supervised on lead I from scratch": ["size-scratch-frozen"],
    "aligned, Eq. (3)": ["size-paper-probe"],
    "aligned, `--loss softmax`": ["size-probe"],
    "12-lead teacher, all leads": ["size-teacher-frozen"],
    "*not frozen:* lead I from scratch": ["size-scratch"],
    "*not frozen:* 12-lead teacher": ["size-teacher"],
}

SAME_STEPS = {
    ("lead I from scratch, 16 epochs", "finetune"): ["scratch-0-longer"],
    ("aligned by softmax for 8 epochs, fine-tuned for 8", "finetune"): ["softmax-0-finetuned"],
}

FEW = {  # a tenth of the labels trains encoder and head: (row, head): runs, the first row of each head is what the others are compared with
    ("lead I from scratch", "logistic"): ["scratch-0-tenth-frozen", "scratch-1-tenth-frozen"],
    ("aligned to the teacher of all labels", "logistic"): ["softmax-0-tenth-frozen", "softmax-1-tenth-frozen"],
    ("aligned to a teacher of that tenth", "logistic"): ["tenth-0-tenth-frozen", "tenth-1-tenth-frozen"],
    ("*not frozen:* lead I from scratch", "finetune"): ["scratch-0-tenth", "scratch-1-tenth"],
    ("*not frozen:* aligned to the teacher of all labels", "finetune"): ["softmax-0-tenth", "softmax-1-tenth"],
    ("*not frozen:* aligned to a teacher of that tenth", "finetune"): ["tenth-0-finetuned", "tenth-1-finetuned"],
    ("*not frozen:* 12-lead teacher of that tenth", "finetune"): ["teacher-0-tenth", "teacher-1-tenth"],
}


def scores(out: Path, runs: list[str], head: str):
    """(AUC of each run (runs, K), its mean's bootstrap draws (R, K), labels) of those that are there."""
    aucs, draws, labels = [], [], None
    for run in runs:
        if (out / run / "results.json").exists():
            with np.load(out / run / "predictions.npz") as saved:
                if f"logits_{head}" in saved:
                    labels = saved["labels"]
                    auc, drawn = train_probe.mean_auc(saved[f"logits_{head}"], labels, saved["fold"], saved["patient"])
                    aucs.append(auc)
                    draws.append(drawn)
    return np.array(aucs), np.mean(draws, 0) if draws else None, labels


def show(c: dict, form: str) -> str:
    return f"{form.format(c['mean'])} ({form.format(c['low'])} to {form.format(c['high'])})"


def encoder_run(out: Path, run: str) -> Path | None:
    """The folder in which a run's encoder was trained: its own if it was fine-tuned, None if it is a random one."""
    config = json.loads((out / run / "results.json").read_text())["config"]
    return out / run if config["finetune"] else None if config["encoder"] == "random" else out / Path(config["encoder"]).parent.name


def minutes(folder: Path) -> float | None:
    """What the training of an encoder took; None if it is not there."""
    if (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())["minutes"]
    if (folder / "log.jsonl").exists():
        said, last = json.loads((folder / "config.json").read_text()), json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        return said["config"]["epochs"] * said["steps"] * said["config"]["batch_size"] * said["world"] / last["records_per_second"] / 60


def paired(out: Path, title: str, rows: dict[tuple[str, str], list[str]]) -> None:
    """Each row, and its difference to the first one of its head, paired by patient; only seeds that both have."""
    groups, first = ("six", "nine", "diagnostic"), {}
    print(f"\n| {title} | head | seeds | six | nine | 44 | six minus first | nine minus first | 44 minus first |\n|---|---|--:|---|---|---|---|---|---|")
    for (row, head), runs in rows.items():
        base = first.setdefault(head, runs)
        both = [names for names in zip(runs, base) if all((out / name / "results.json").exists() for name in names)]
        if both:
            (aucs, draws, labels), (base_aucs, base_draws, _) = (scores(out, list(names), head) for names in zip(*both))
            own, difference = train_probe.summarize(aucs.mean(0), draws, labels), train_probe.summarize(aucs.mean(0) - base_aucs.mean(0), draws - base_draws, labels)
            cells = [show(own[group], "{:.3f}") for group in groups] + ["" if runs is base else show(difference[group], "{:+.3f}") for group in groups]
            print(f"| {row} | {head} | {len(both)} | {' | '.join(cells)} |")


def table(out: Path, title: str, rows: dict[str, list[str]]) -> None:
    """Each row under each head, and its difference to the rows 'scratch' and 'random' under that head."""
    reference, kept = {}, []
    for row, runs in rows.items():
        for head in ("adam", "logistic", "finetune"):
            aucs, draws, labels = scores(out, runs, head)
            if draws is not None:
                kept.append((row, runs, head, aucs, draws))
                reference[row, head] = aucs.mean(0), draws
    print(f"\n| {title} | head | seeds | six | nine | 44 | six minus scratch | six minus random | R@1 | minutes |\n|---|---|--:|---|---|---|---|---|--:|--:|")
    for row, runs, head, aucs, draws in kept:
        summary = train_probe.summarize(aucs.mean(0), draws, labels)
        six = aucs[:, train_probe.columns("six")].mean(1)
        cells = [show(summary["six"], "{:.3f}") + (f" ± {six.std(ddof=1):.3f}" if len(six) > 1 else "")] + [show(summary[g], "{:.3f}") for g in ("nine", "diagnostic")]
        for other in ("supervised on lead I from scratch", "random encoder"):
            own = (other if head != "finetune" else "*not frozen:* lead I from scratch" if "scratch" in other else None, head)
            if own not in reference or own[0] == row:
                cells.append("")
            else:
                auc, drawn = reference[own]
                cells.append(show(train_probe.summarize(aucs.mean(0) - auc, draws - drawn, labels)["six"], "{:+.3f}"))
        trained = [folder for folder in (encoder_run(out, run) for run in runs if (out / run / "results.json").exists()) if folder]
        spent = [m for m in map(minutes, trained) if m]
        last = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in trained if (folder / "log.jsonl").exists()]
        r1 = [entry["r1"] for entry in last if "r1" in entry]
        print(f"| {row} | {head} | {len(aucs)} | {' | '.join(cells)} | {f'{np.mean(r1):.1f} %' if r1 else ''} | {f'{np.mean(spent):.0f}' if spent else ''} |")


def choice(out: Path) -> None:
    """Six-mean and 44-mean on the validation fold, each idea minus softmax-0, paired by patient; beside them training with labels."""
    runs = {"softmax-0": "softmax-0-probe", "scratch-0": "scratch-0-frozen", **{idea: f"{idea}-probe" for idea in IDEAS}, "size-scratch": "size-scratch-frozen"}
    of = {}
    for name, run in runs.items():
        path = out / run / "predictions.npz"
        if path.exists():
            with np.load(path) as saved:
                y, patient = saved["validation_labels"], saved["validation_patient"]
                of[name] = {head: train_probe.mean_auc(saved[f"validation_logits_{head}"], y, np.zeros(len(y)), patient) for head in ("adam", "logistic")}
    print("\n| on the validation fold | head | six | 44 | six minus softmax-0 | 44 minus softmax-0 |\n|---|---|--:|--:|---|---|")
    for name, heads in of.items():
        for head, (auc, draws) in heads.items():
            means = [f"{c:.3f}" for group, c in train_probe.group_means(auc).items() if group != "nine"]
            if name == "softmax-0" or "softmax-0" not in of:
                means += ["", ""]
            else:
                base = of["softmax-0"][head]
                difference = train_probe.summarize(auc - base[0], draws - base[1], y)
                means += ["{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference[group]) for group in ("six", "diagnostic")]
            print(f"| {name} | {head} | {' | '.join(means)} |")


def synthetic_only(out: Path, data: str, val_fold: int, test_fold: int) -> None:
    """Trained on synthetic records, chosen on the validation fold, tested on real ones: the small network, and logistic regression on mean beats."""
    print("\n| trained on synthetic records only | MI against NORM | MI against all others |\n|---|---|---|")
    cell = lambda c: "{auc:.3f} ({low:.3f} to {high:.3f}), {positives} to {negatives}".format(**c)
    for lead, name in (("I", "lead I"), ("all", "twelve leads")):
        path = out / f"zeroshot-{lead}" / "results.json"
        if path.exists():
            found = json.loads(path.read_text())["heads"]["finetune"]["any"]
            print(f"| small network, {name} | {cell(found['NORM'])} | {cell(found['others'])} |")
    records = selfmis.find_records(data, sample_rate_hz=100)
    nine = train_probe.columns("nine")

    def mean_beats(records) -> tuple[np.ndarray, np.ndarray]:
        """(beats (N, 12, 71), from 250 ms before R to 450 ms after it in steps of 10 ms, rows (N,) with such a beat)."""
        beats = [detected_beats(records.read(i, selfmis.LEADS, 100)) for i in range(len(records))]
        rows = np.array([i for i, beat in enumerate(beats) if beat is not None])
        return np.stack([beats[i][:, 25:380:5] for i in rows]).astype(np.float32), rows

    parts = {"train": selfmis.find_records("synthetic:4000", seed=5)}
    parts |= {name: records[(records.folds == fold) & records.labels.any(1)] for name, fold in (("val", val_fold), ("test", test_fold))}
    parts = {name: (part, *mean_beats(part)) for name, part in parts.items()}
    for lead, name in ((slice(0, 1), "lead I"), (slice(0, 12), "twelve leads")):
        x = {part: torch.from_numpy(beats[:, lead].reshape(len(beats), -1)) for part, (_, beats, _) in parts.items()}
        y = {part: torch.from_numpy(records.labels[rows][:, nine].any(1).astype(np.float32)[:, None]) for part, (records, _, rows) in parts.items()}
        weight, bias, _ = train_probe.logistic_head(x["train"], y["train"], x["val"], y["val"], train_probe.ProbeConfig(), 0)
        test, _, rows = parts["test"]
        logits = train_probe.score(x["test"].numpy(), weight, bias)
        infarct, normal = y["test"].numpy()[:, 0] > 0, test.labels[rows][:, selfmis.STATEMENTS.index("NORM")] > 0
        cells = []
        for chosen in (infarct | normal, infarct | True):
            auc, draws = train_probe.mean_auc([logits[chosen]], infarct[chosen, None], test.folds[rows][chosen], test.patients[rows][chosen])
            low, high = selfmis.interval(draws[:, 0])
            cells.append(cell(dict(auc=auc[0], low=low, high=high, positives=infarct[chosen].sum(), negatives=(~infarct[chosen]).sum())))
        print(f"| mean beat, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="PTB-XL")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--val-fold", default=9)
    parser.add_argument("--test-fold", default=10)
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    for name, (script, *flags) in commands(arguments.out).items() if not arguments.table else ():
        folds = ["--val-fold", arguments.val_fold, "--test-fold", arguments.test_fold]
        finished = arguments.out / name / ("results.json" if script == "train_probe.py" else "best.pt")
        if not finished.exists() or script == "train_pretrain.py":  # that one knows whether it is finished
            subprocess.run([sys.executable, str(HERE / script), "--data", arguments.data, *map(str, [*folds, *flags]), "--out", str(arguments.out / name), "--resume"], check=True)
    print(f"{len(selfmis.STATEMENTS)} statements; 95 % bootstrap intervals by patient, differences paired; ± the standard deviation over seeds")
    table(arguments.out, "small network", ROWS)
    table(arguments.out, "full network", FULL_SIZE)
    paired(arguments.out, "as many steps, not frozen", SAME_STEPS)
    paired(arguments.out, "with a tenth of the labels", FEW)
    choice(arguments.out)
    synthetic_only(arguments.out, arguments.data, int(arguments.val_fold), int(arguments.test_fold))
