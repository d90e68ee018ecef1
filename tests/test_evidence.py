"""The commands, tables and picture of extras/evidence.py, and the GPU part of extras/speed.py."""

import functools
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE
from methods import GENERATIVE, METHODS

import selfmis
import train_pretrain
import train_probe
from extras import evidence, halves, recorders, speed, speed_gpu, timing
from extras.baselines import table1, table2
from selfmis import UsageError

CONFIGS = {
    "train_pretrain.py": train_pretrain.PretrainConfig,
    "train_probe.py": train_probe.ProbeConfig,
    "extras.recorders": recorders.RecorderConfig,
    "extras.halves": halves.HalvesConfig,
    **{f"extras.baselines.{name}": config for name, (_, config) in (METHODS | GENERATIVE).items()},
}
RUNS = evidence.all_runs(evidence.RUNS, ["--data", "ptb-xl"], Path("runs"))
TABLE2 = table2.all_runs(["--data", "ptb-xl"], Path("runs"))
TABLE1 = table1.all_runs((*table1.FIRST, *table1.THEN), ["--data", "ptb-xl"], Path("runs"))
RESULTS = (HERE / "extras/RESULTS.md").read_text()


@pytest.mark.parametrize("runs", [RUNS, TABLE1, TABLE2], ids=["all runs", "table 1", "table 2"])
def test_every_command_has_flags_that_exist_and_needs_earlier_runs_only(runs):
    made = set()
    for run, (script, *flags) in runs.items():
        config = selfmis.parse_flags(CONFIGS[script], "", flags)
        needed = [Path(flag).parent.name for flag in flags if flag.endswith("best.pt")]
        assert set(needed) <= made, run
        assert config.out == f"runs/{run}" and config.data[0] == "ptb-xl"
        if script != "train_probe.py" or config.finetune:
            made.add(run)  # these leave a best.pt


def test_every_row_is_made_by_a_run():
    rows = [list(evidence.IDEAS.values()), evidence.SCRATCH, evidence.FULL_SCRATCH]
    for table in ("MAIN", "FULL_SIZE", "SAME_STEPS", "FEW_LABELS"):
        rows += getattr(evidence, table).values()
    assert {run for row in rows for run in row} <= set(RUNS)
    assert {run for row in table1.ROWS for run in row.runs} <= set(TABLE1)


@pytest.fixture
def finished(tmp_path, ptbxl, tiny, monkeypatch):
    """A folder in which some of the runs are finished, with tiny encoders and few draws."""
    few = functools.partial(selfmis.bootstrap_auc, draws=20)
    monkeypatch.setattr(selfmis, "bootstrap_auc", few)
    shared = dict(data=[str(ptbxl)], batch_size=16, epochs=1, workers=0, val_fold=8, test_fold=9)
    shared |= dict(cache=str(tmp_path / "cache"))

    def probe(run, **settings):
        train_probe.main(train_probe.ProbeConfig(**shared, out=str(tmp_path / run), **settings))

    align = dict(single=tiny[1], multi=tiny[12], loss="softmax", out=str(tmp_path / "softmax-0"))
    train_pretrain.main(train_pretrain.PretrainConfig(**shared, **align))
    probe("softmax-0-probe", encoder=str(tmp_path / "softmax-0/best.pt"))
    probe("scratch-0", encoder=tiny[1], finetune=True)
    probe("scratch-0-frozen", encoder=str(tmp_path / "scratch-0/best.pt"))
    shutil.copytree(tmp_path / "softmax-0-probe", tmp_path / "softmax-1-probe")
    return tmp_path


def test_the_tables_show_what_is_there(finished, ptbxl, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "BEATS", 40)
    folds = ["--val-fold", "8", "--test-fold", "9"]
    capsys.readouterr()
    evidence.main([str(ptbxl), *folds, "--out", str(finished), "--tables"])
    text = capsys.readouterr().out
    table = evidence.main_table(text)
    frozen, aligned = "supervised on lead I from scratch", "aligned, `--loss softmax`"
    not_frozen = "*not frozen:* lead I from scratch", "finetune"
    both = [(row, head) for row in (frozen, aligned) for head in ("adam", "logistic")]
    assert list(table) == [*both, not_frozen]
    results = json.loads((finished / "softmax-0-probe/results.json").read_text())
    for head in ("adam", "logistic"):
        line, summary = table[aligned, head], results["heads"][head]
        assert line["seeds"] == "2" and line["six"].endswith(" ± 0.000")
        assert line["six"].startswith(train_probe.format_cell(summary["six"], "mean", "{:.3f}"))
        assert line["nine"] == f"{summary['nine']['mean']:.3f}"  # too few positives
        base = float(table[frozen, head]["six"][:5])
        assert float(line["six minus scratch"][:6]) == pytest.approx(
            summary["six"]["mean"] - base, abs=2e-3
        )
        assert table[frozen, head]["six minus scratch"] == ""
        assert line["R@1"].endswith(" %") and line["minutes"] == "0"
    for title in RESULTS.split("\n## ")[2:7]:
        title = title.splitlines()[0]
        assert f"\n## {title}\n" in text or title == "Shares of the labels"
    assert text.count("logistic regression on the median beat") == 2


def test_runs_that_tested_different_records_are_not_averaged(finished):
    path = finished / "softmax-1-probe/predictions.npz"
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **arrays | dict(patient=arrays["patient"] + 1))
    with pytest.raises(UsageError, match="its runs were tested on different records"):
        evidence.scores(finished, ("softmax-0-probe", "softmax-1-probe"), "logistic")


def test_a_table_of_nothing_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        table2.main(["ptb-xl", "--out", str(tmp_path), "--tables"])
    assert "no generated leads in it; start without --tables" in capsys.readouterr().err


def test_what_is_finished_is_not_started_again(tmp_path, monkeypatch):
    started = []

    def start(command):
        started.append(Path(command[command.index("--out") + 1]).name)
        return subprocess.CompletedProcess(command, 1)

    (tmp_path / "scratch-0").mkdir()
    (tmp_path / "scratch-0/results.json").touch()
    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(SystemExit, match="scratch-1: the run failed"):
        evidence.run_missing(dict.fromkeys(["scratch-0", "scratch-1"], RUNS["scratch-1"]), tmp_path)
    assert started == ["scratch-1"]


def test_table_1_shows_what_is_there(finished, capsys):
    table1.main(["ptb-xl", "--out", str(finished), "--tables"])
    logistic, adam = capsys.readouterr().out.split("\n## Table 1, ")[1:]
    (line,) = [line for line in logistic.splitlines() if line.startswith("| SelfMIS")]
    results = json.loads((finished / "softmax-0-probe/results.json").read_text())
    six = train_probe.format_cell(results["heads"]["logistic"]["six"], "mean", "{:.3f}")
    assert line.startswith("| SelfMIS, InfoNCE ") and f"| 2     | {six} " in line
    assert adam.startswith("adam head") and "supervised" in logistic
    assert "ST-MEM's" not in logistic
    probed = finished / "st_mem-1-0-probe"
    shutil.copytree(finished / "softmax-0-probe", probed)
    with np.load(probed / "predictions.npz") as saved:
        arrays = dict(saved)
    for key in ("logits_logistic", "validation_logits_logistic"):
        arrays[f"{key}_random_encoder"] = arrays[key]
    np.savez(probed / "predictions.npz", **arrays)
    evidence.scores.cache_clear()
    table1.main(["ptb-xl", "--out", str(finished), "--tables"])
    assert "| ST-MEM's " in capsys.readouterr().out


def test_runs_and_their_probes_follow_each_other(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(evidence, "run_missing", lambda run, out: started.extend(run))
    runs = dict.fromkeys(
        ["clocs-1-0", "random-0", "scratch-0", "clocs-1-0-probe", "scratch-0-frozen"]
    )
    table1.run_chains(runs, tmp_path, jobs=1)
    assert started == ["clocs-1-0", "clocs-1-0-probe", "random-0", "scratch-0", "scratch-0-frozen"]


def test_after_a_run_that_fails_no_other_is_started(tmp_path, monkeypatch):
    started = []

    def run_missing(chain, out):
        started.append(next(iter(chain)))
        if "bad" in chain:
            raise SystemExit("bad: the run failed")
        time.sleep(0.2)

    monkeypatch.setattr(evidence, "run_missing", run_missing)
    runs = dict.fromkeys(["slow", "bad", "bad-probe", "a", "b"])
    with pytest.raises(SystemExit, match="bad: the run failed"):
        table1.run_chains(runs, tmp_path, jobs=2)
    assert sorted(started) == ["bad", "slow"]


def test_picture_and_readme_table_are_drawn_from_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    (tmp_path / "RESULTS.md").write_text(RESULTS)
    evidence.main(["picture"])
    drawn = (tmp_path / "results.png").read_bytes()
    assert len(drawn) > 10_000
    assert capsys.readouterr().out.strip() in (HERE / "README.md").read_text()
    (tmp_path / "RESULTS.md").write_text(RESULTS.replace("0.792 (0.763", "0.812 (0.763"))
    evidence.main(["picture"])
    assert (tmp_path / "results.png").read_bytes() != drawn


def test_all_that_a_gpu_must_show_runs_in_miniature(capfd):
    """Every part but the compiled step, which needs a GPU."""
    speed.main(["gpu", "--device", "cpu", "--mini"])
    text = capfd.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    eager = [f"step, {amp}, eager" for amp in ("bf16", "fp16", "off")]
    assert set(eager) < set(rows) and rows[-1] == "torchrun: probe"
    assert text.count("losses finite") == 3 and "NOT FINITE" not in text
    assert "| loss of 30 steps, float32 | 0.0e+00 apart |" in text
    assert text.count("differ by") == 2 and "cut off" not in text


def test_a_part_that_hangs_or_fails_costs_no_other(monkeypatch, capfd):
    parts = dict(rates=(None, 0.01), teacher=(None, 60))
    monkeypatch.setattr(speed_gpu, "PARTS", parts)
    with pytest.raises(SystemExit, match="not finished: rates$"):
        speed_gpu.run_all("cpu", mini=True)
    text = capfd.readouterr().out
    assert "| rates | cut off |" in text and "| teacher, float32 |" in text


def test_the_detector_is_timed_and_an_unknown_part_refused(capsys):
    speed.main(["detect", "--device", "cpu"])
    assert "full network" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        speed.main(["nonsense"])
    assert "no part nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main(["gpu", "--device", "cpu"])
    assert "gpu: needs a GPU; --mini" in capsys.readouterr().err


def test_the_original_layer_by_layer_embeds_as_ours():
    torch.manual_seed(0)
    ours = selfmis.ResNet1D(1, stem=16, widths=[32, 64], depths=[2, 1])
    theirs = timing.LayeredResNet1D(ours)
    x = torch.randn(3, 1, 515)  # odd lengths on the way
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-6)
    speed.forward_and_backward(theirs, x, "bf16")
    assert all(p.grad is None for p in theirs.parameters())


def test_cost_counts_what_the_paper_counts():
    macs = [timing.count_macs(selfmis.ResNet1D(leads), 500) for leads in (1, 12)]
    assert sum(macs) / 1e9 == pytest.approx(2.309, abs=5e-4)
