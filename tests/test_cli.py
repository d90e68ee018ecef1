"""Flags, and the commands of README and docstrings."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import HERE
from methods import GENERATIVE, METHODS

import selfmis
import train_pretrain
from extras.halves import HalvesConfig
from extras.recorders import RecorderConfig
from train_pretrain import PretrainConfig
from train_probe import ProbeConfig

README = (HERE / "README.md").read_text()
CONFIGS = {"train_pretrain": PretrainConfig, "train_probe": ProbeConfig}
CONFIGS["recorders"] = RecorderConfig
CONFIGS["halves"] = HalvesConfig
BASELINES = {f"baselines.{name}": config for name, (_, config) in (METHODS | GENERATIVE).items()}
SCRIPT = re.compile(r"(train_pretrain|train_probe)\.py([^`#|)&]*)")
EXTRA = re.compile(r"-m extras\.([\w.]+)([^`#|)&>]*)")


def commands(text):
    """Of every command line in a text: (script or extra, its arguments); joins continued lines."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        if not re.match(r"\s*(\$ )?(torchrun|python|CUDA)", line):
            continue
        line = re.sub(r"(?<=\S)   +\S.*", "", line)  # what a docstring says of the command
        for match in (SCRIPT.search(line), EXTRA.search(line)):
            if match:
                yield match[1], shlex.split(match[2])


class Parsed(Exception):
    """The command line of an extra is right; the rest of it is not run."""


@pytest.fixture
def parse(monkeypatch):
    """Parses the arguments of a script or an extra as itself does."""
    real = argparse.ArgumentParser.parse_args

    def parse_only(*arguments):
        real(*arguments)
        raise Parsed

    def parse(name, arguments):
        configs = CONFIGS | BASELINES
        if name in configs:
            config = selfmis.parse_flags(configs[name], "", arguments)
            assert dataclasses.is_dataclass(config)
            return
        assert (HERE / "extras" / f"{name.replace('.', '/')}.py").is_file()
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            with pytest.raises(Parsed):
                importlib.import_module(f"extras.{name}").main(arguments)

    return parse


SOURCES = [
    *("README.md", "train_pretrain.py", "train_probe.py"),
    *(str(path.relative_to(HERE)) for path in sorted((HERE / "extras").glob("**/*.*"))),
]


@pytest.mark.parametrize("source", [name for name in SOURCES if name.endswith((".py", ".md"))])
def test_every_command_of_readme_and_docstrings_has_flags_that_exist(source, parse):
    text = (HERE / source).read_text()
    if source.endswith(".py"):
        text = ast.get_docstring(ast.parse(text)) or ""
    found = list(commands(text))
    mentions = len(re.findall(r"^\s*(?:\$ )?(?:python|torchrun)\b", text, re.MULTILINE))
    assert bool(found) == bool(mentions)
    for name, arguments in found:
        parse(name, arguments)


def test_a_wrong_flag_of_an_extra_would_be_noticed(parse, capsys):
    for name, arguments in commands("python -m extras.card FILE --nonesuch   a comment"):
        with pytest.raises(SystemExit):
            parse(name, arguments)
    assert "unrecognized arguments: --nonesuch" in capsys.readouterr().err


def test_the_readme_names_only_files_that_exist():
    names = set(re.findall(r"`((?:extras|tests|\.ci)/[\w/.]+)`", README))
    assert [name for name in names if not (HERE / name).exists()] == []


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_flags_are_the_fields_and_the_command_line_gives_the_same_settings():
    line = "--data a --data synthetic:9 --lr 0.5 --local-negatives --lead avf --sample-rate 100"
    config = selfmis.parse_flags(PretrainConfig, "", line.split())
    wanted = dict(data=["a", "synthetic:9"], lr=0.5, local_negatives=True, lead="aVF")
    assert config == PretrainConfig(sample_rate=100.0, **wanted)
    assert selfmis.parse_flags(ProbeConfig, "", ["--data", "a"]) == ProbeConfig(data=["a"])
    assert PretrainConfig().data is not PretrainConfig().data


def test_without_data_the_demonstration_says_what_it_is(capsys):
    config = selfmis.parse_flags(PretrainConfig, "", ["--epochs", "3"])
    line = capsys.readouterr().out
    assert line.startswith("no --data, so this is a demonstration on synthetic ECG, with a random")
    assert "InfoNCE: --data synthetic:3000 --multi random --loss softmax" in line
    assert len(line.splitlines()) == 1
    assert (config.epochs, config.loss, config.data) == (3, "softmax", ["synthetic:3000"])
    config = selfmis.parse_flags(ProbeConfig, "", ["--encoder", "runs/pretrain/best.pt"])
    assert capsys.readouterr().out.endswith(": --data synthetic:3000 --baseline\n")
    assert (config.size, config.sample_rate, config.baseline) == (None, None, True)


def test_settings_are_said_as_somebody_would_type_them():
    said = selfmis.as_flags(dict(seed=0, weight_decay=0.0, strict=True, resume=False, limit=None))
    assert said == "--seed 0 --weight-decay 0.0 --strict no --resume no --limit"


def test_a_gpu_without_memory_is_one_sentence(monkeypatch, capsys):
    def main(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr("sys.argv", ["train_probe.py", "--data", "a"])
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit, match="2"):
        selfmis.run_script(main, ProbeConfig, "")
    sentence = "error: the GPU's memory does not suffice; lower --batch-size"
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_help_shows_defaults_in_groups(config_class, capsys):
    with pytest.raises(SystemExit) as exit:
        selfmis.parse_flags(config_class, "what it does", ["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "what it does" in text
    assert "(default: 20)" in text and "of weights and order (default: 0)" in text
    shared, own = text.split("\nshared by both scripts:\n")[1].split("\nof this script:\n")
    names = {re.sub("_", "-", field.name) for field in dataclasses.fields(selfmis.Config)}
    assert set(re.findall(r"^  --([\w-]+)", shared, re.M)) == names
    assert set(re.findall(r"^  --([\w-]+)", own, re.M)).isdisjoint(names)


def test_table_7_and_table_8_are_the_defaults():
    p, q = PretrainConfig(), ProbeConfig()
    assert (p.batch_size, p.epochs, p.lr) == (128, 20, 1e-4)
    assert (p.weight_decay, p.loss) == (0.1, "paper")
    assert (q.batch_size, q.epochs, q.lr) == (64, 20, 5e-4)
    assert (q.patience, q.val_fold, q.test_fold) == (5, 9, 10)


def test_learning_rate_is_half_a_cosine_from_the_peak_to_zero():
    lr = [selfmis.cosine_lr(2.0, step, 100) for step in (0, 25, 50, 100)]
    assert lr == pytest.approx([2, 1 + 0.5**0.5, 1, 0])
    lr = [selfmis.cosine_lr(2.0, step, 100, warmup=4) for step in range(5)]
    assert lr == pytest.approx([0.5, 1, 1.5, 2, 2])


def test_the_plateau_is_the_minimum_over_a_common_logit():
    values = []
    for bias in torch.linspace(-8, 0, 801):
        one = torch.ones(128, 1)
        values.append(float(selfmis.siglip_loss(one, one, scale=0.0, bias=bias)))
    plateau = train_pretrain.prior_plateau(128)
    assert plateau == pytest.approx(min(values), rel=1e-4)
    assert plateau == pytest.approx(5.85, abs=0.01)


def test_step_lines_show_scale_and_bias_while_they_are_learned(
    tmp_path, ptbxl, tiny, monkeypatch, capsys
):
    monkeypatch.setattr(train_pretrain, "SECONDS_BETWEEN_LINES", -1)
    settings = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], loss="learnable", workers=0)
    train_pretrain.main(
        PretrainConfig(batch_size=16, epochs=1, out=str(tmp_path / "out"), **settings)
    )
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if " step " in line and "ECG/s" in line)
    assert re.search(r"epoch 1/1 step 4/4 \| loss [\d.]+ \| scale \d+\.\d\d bias -\d+\.\d\d", line)
    assert re.search(r" \| lr .* ms a step \| .* ECG/s \| eta", line)
    assert Path(tmp_path / "out/log.jsonl").read_text().count('"step": 4') == 1
