"""Flags, the README's commands, and the chart."""

import ast
import dataclasses
import re
import shlex

import pytest
from conftest import HERE, write_record

import selfmis
from train_pretrain import PretrainConfig
from train_probe import ProbeConfig

README = (HERE / "README.md").read_text()


def commands(text):
    """Every command line of the two scripts in a text, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        match = re.search(r"(train_pretrain|train_probe)\.py([^`#|)&]*)", line)
        if match and re.match(r"\s*(\$ )?(torchrun|python|CUDA)", line):
            yield match[1], shlex.split(match[2])


@pytest.mark.parametrize("source", ["README.md", "train_pretrain.py", "train_probe.py"])
def test_every_command_of_readme_and_docstrings_has_flags_that_exist(source):
    text = (HERE / source).read_text()
    found = list(commands(text if source == "README.md" else ast.get_docstring(ast.parse(text))))
    assert found
    for script, arguments in found:
        config = selfmis.parse_flags(PretrainConfig if script == "train_pretrain" else ProbeConfig, "", arguments)
        assert dataclasses.is_dataclass(config)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_flags_are_the_fields_and_the_command_line_gives_the_same_settings():
    config = selfmis.parse_flags(PretrainConfig, "", ["--data", "a", "--data", "synthetic:9", "--lr", "0.5", "--local-negatives", "--lead", "avf", "--sample-rate", "100"])
    assert config == PretrainConfig(data=["a", "synthetic:9"], lr=0.5, local_negatives=True, lead="aVF", sample_rate=100.0)
    assert selfmis.parse_flags(ProbeConfig, "", []) == ProbeConfig()
    assert PretrainConfig().data is not PretrainConfig().data


def test_table_7_and_table_8_are_the_defaults():
    p, q = PretrainConfig(), ProbeConfig()
    assert (p.batch_size, p.epochs, p.lr, p.weight_decay, p.loss) == (128, 20, 1e-4, 0.1, "paper")
    assert (q.batch_size, q.epochs, q.lr, q.patience, q.val_fold, q.test_fold) == (64, 20, 5e-4, 5, 9, 10)


def test_learning_rate_is_half_a_cosine_from_the_peak_to_zero():
    lr = [selfmis.cosine_lr(2.0, step, 100) for step in (0, 25, 50, 100)]
    assert lr == pytest.approx([2, 1 + 0.5**0.5, 1, 0])
    assert [selfmis.cosine_lr(2.0, step, 100, warmup=4) for step in range(5)] == pytest.approx([0.5, 1, 1.5, 2, 2])


def test_the_plateau_is_the_minimum_over_a_common_logit():
    import torch

    values = [float(selfmis.siglip_loss(torch.ones(128, 1), torch.ones(128, 1), scale=0.0, bias=b)) for b in torch.linspace(-8, 0, 801)]
    assert selfmis.prior_plateau(128) == pytest.approx(min(values), rel=1e-4) and selfmis.prior_plateau(128) == pytest.approx(5.85, abs=0.01)


def test_step_lines_show_scale_and_bias_while_they_are_learned(tmp_path, ptbxl, tiny, monkeypatch, capsys):
    import train_pretrain

    monkeypatch.setattr(train_pretrain.Clock, "speak", lambda self: True)
    train_pretrain.main(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], loss="learnable", batch_size=16, epochs=1, out=str(tmp_path / "out"), workers=0))
    line = next(line for line in capsys.readouterr().out.splitlines() if " step " in line and "ECG/s" in line)
    assert re.search(r"epoch 1/1 step 4/4 \| loss [\d.]+ \| scale \d+\.\d\d bias -\d+\.\d\d \| lr .* ms a step \| .* ECG/s \| eta", line)


def test_chart_of_a_record_and_of_synthetic_ecg(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_record(tmp_path / "r", selfmis.synthesize(1)[0][0], rate=500)
    for arguments in (["r.hea", "a.png"], ["--synthetic", "IMI", "--stage", "acute", "b.png"]):
        selfmis.main(["plot", *arguments])
        assert (tmp_path / arguments[-1]).stat().st_size > 20_000
    for arguments, said in ((["nothing.hea", "c.png"], "nothing.hea: there is no such header file"), (["c.png"], "either a record or --synthetic")):
        with pytest.raises(SystemExit) as exit:
            selfmis.main(["plot", *arguments])
        assert exit.value.code == 2 and said in capsys.readouterr().err
