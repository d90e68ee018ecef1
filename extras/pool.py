"""One table out of probes that were tested on different folds: every record counts, tested once.

    python train_probe.py --data ptb-xl --encoder E --val-fold 2 --test-fold 3 --out runs/fold3
    python -m extras.pool runs/fold1 runs/fold2 runs/fold3 ... --out runs/pooled

A rare type has two or three positives in one test fold, and ten times as many in ten.  The runs
differ in their folds alone, and in --encoder where an encoder was trained for each fold.  A head
never saw the fold that it is tested on; an encoder that saw labels of it is refused.  All of
PTB-XL takes a minute or two for each head and seed: its patients are drawn 1,000 times.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import selfmis
from extras import command_parser, make_folder, run_action
from selfmis import UsageError
from train_probe import any_infarct, as_table, infarct_score, mean_auc, read_predictions, summarize

# What may differ between the runs.  Lead, rate and preprocessing are compared as they came out.
FREE = {*selfmis.FREE_ON_RESUME, "test_fold", "val_fold", "encoder"} - {"batch_size", "amp"}
FREE |= {"lead", "sample_rate", "normalize", "filter"}


class Run(NamedTuple):
    """What a finished run left in its folder."""

    folder: Path
    test_fold: int
    settings: dict  # in which all runs agree
    training_data: list[dict]  # of the encoder and its teacher
    head_training_data: list[dict]
    warnings: list[str]
    test: dict  # labels (N, 44), fold (N,) and patient (N,) of the test records
    logits: dict  # {head: (seeds, N, 44)}


def read_run(folder: Path) -> Run:
    """UsageError if train_probe.py has not finished there."""
    try:
        results = json.loads((folder / "results.json").read_text())  # the last file of a run
        config, test_fold = results["config"], results["config"]["test_fold"]
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(
            f"{folder}: no finished run of train_probe.py, by its results.json; finish it with "
            "--resume, or leave it out"
        ) from error
    probe = selfmis.read_checkpoint(folder / "probe.pt")
    predictions = read_predictions(folder)
    settings = {name: value for name, value in config.items() if name not in FREE}
    for name in ("lead", "sample_rate_hz", "preprocessing"):
        settings[name] = probe[name]
    # Encoders may be different files, but not of different kinds.
    encoder_data = {(entry["data"], entry["labels"]) for entry in probe["training_data"]}
    settings["training_data"] = sorted(encoder_data)
    provenance = probe["training_data"], probe["head_training_data"], results["warnings"]
    return Run(folder, test_fold, settings, *provenance, *predictions)


def refuse_differences(runs: list[Run]) -> None:
    """UsageError unless the runs differ in their folds alone, and no fold is tested twice."""
    first = runs[0]
    if len({data.startswith("synthetic:") for data in first.settings["data"]}) > 1:
        raise UsageError(f"{first.folder}: synthetic records beside real ones; pool either alone")
    folders = {}
    for run in runs:
        for name, value in run.settings.items():
            expected = first.settings.get(name)
            if value != expected:
                raise UsageError(
                    f"{run.folder}: {name} is {value}, but {expected} in {first.folder}; pool runs "
                    "that differ in their folds alone"
                )
        if run.test_fold in folders:
            both = f"{folders[run.test_fold]} and {run.folder}"
            raise UsageError(f"{both}: both are tested on fold {run.test_fold}; leave one out")
        folders[run.test_fold] = run.folder


def refuse_seen_labels(run: Run) -> None:
    """UsageError if labels of a run's test fold trained or chose its encoder or the teacher.

    The folds that it trains and chooses on are no matter: other runs test those.
    """
    tested = {entry["data"] for entry in run.head_training_data}
    for entry in run.training_data:
        folds = entry.get("folds") or range(1, 11)  # where none are known it may be any
        if entry["labels"] and entry["data"] in tested and run.test_fold in folds:
            how = "chosen by" if entry.get("use") == "validation" else "trained on"
            raise UsageError(
                f"{run.folder}: its encoder or the encoder's teacher was {how} fold "
                f"{run.test_fold} of {entry['data']} with labels, so it cannot be tested there"
            )


def within_folds(scores: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The percentile within its fold (0 to 1) of every score, (N,) or (N, K).

    Heads of two folds put their logits on scales of their own: ranked together, one fold's
    negatives may pass the other's positives.
    """
    rankdata = selfmis.import_optional("scipy.stats", "pooling").rankdata
    percentile = np.empty(scores.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        percentile[rows] = rankdata(scores[rows], axis=0) / (1 + rows.sum())  # ties: their mean
    return percentile


def evaluate(runs: list[Run]) -> dict:
    """What results.json holds.  Its first head is the one that the first run prefers."""
    test = {name: np.concatenate([run.test[name] for run in runs]) for name in runs[0].test}
    y, folds, patients = test["labels"], test["fold"], test["patient"]
    heads = {}
    for name in runs[0].logits:
        logits = np.concatenate([run.logits[name] for run in runs], axis=1)  # (seeds, N, 44)
        auc, draws = mean_auc([within_folds(one, folds) for one in logits], y, patients)
        scores = [within_folds(infarct_score(one), folds) for one in logits]
        heads[name] = summarize(auc, draws, y) | dict(any=any_infarct(scores, y, patients))
    results = next(iter(heads.values())) | dict(heads=heads, config=runs[0].settings)
    results |= dict(records=len(y), patients=len(np.unique(patients)))
    results["folds"] = [run.test_fold for run in runs]
    results["pooled"] = [str(run.folder) for run in runs]
    results["warnings"] = list(dict.fromkeys(text for run in runs for text in run.warnings))
    return results


def describe(results: dict) -> str:
    """results.md."""
    folds = ", ".join(str(fold) for fold in results["folds"])
    text = (
        f"AUC on folds {folds}, {results['records']:,} records of {results['patients']:,} "
        "patients, each scored by a head that never saw its fold, as the percentile within it; in "
        "brackets the 95 % bootstrap interval by patient, unless it would be falsely narrow"
    )
    text += f"\n\n{as_table(results['heads'], results['types'])}\n"
    for warning in results["warnings"]:
        text += f"\nwarning: {warning}\n"
    return text


def pool(flags: argparse.Namespace) -> None:
    """Checks and joins the runs, prints the table, and writes it into a new folder."""
    runs = [read_run(folder) for folder in flags.runs]
    refuse_differences(runs)
    for run in runs:
        refuse_seen_labels(run)
    if flags.out:
        make_folder(flags.out)
        if any(flags.out.iterdir()):
            raise UsageError(f"--out {flags.out}: is not empty; give a new folder")
    results = evaluate(runs)
    text = describe(results)
    print(text, end="")
    if flags.out:
        selfmis.write_atomically(flags.out / "results.md", text.encode())
        selfmis.write_json(flags.out / "results.json", results)


def main(argv=None) -> None:
    parser = command_parser("extras.pool", __doc__)
    kind = "folders of finished train_probe.py runs, each with another --test-fold"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=kind)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json, results.md")
    run_action(pool, parser.parse_args(argv))


if __name__ == "__main__":
    main()
