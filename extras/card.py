"""What is stored in any checkpoint of an encoder, as a model card.

    python -m extras.card FILE

FILE: best.pt, last.pt or probe.pt of a run, or an ECGFounder file.
"""

import argparse

from extras import command_parser, run_action
from extras.detect import DISCLAIMER, describe_data, describe_probe, operating_point, point_lines
from selfmis import is_empty, load_encoder, read_checkpoint
from train_probe import format_cell


def describe_checkpoint(path) -> str:
    """The card, a line for each thing that is stored."""
    content = read_checkpoint(path)
    if "architecture" not in content:  # ECGFounder's files, and those of others
        keys = ", ".join(map(str, content))
        return f"{path}\nnot written by selfmis; top level: {keys}"
    encoder = load_encoder(path)
    parameters = sum(p.numel() for p in encoder.parameters())
    steps = ", ".join(f"{name} {value}" for name, value in (encoder.preprocessing or {}).items())
    date, git = content.get("date", "at an unknown time"), content.get("git") or "?"
    made = f"written {date} with torch {content.get('torch', '?')}, git {git}"
    size = (
        f"{parameters:,} parameters, {encoder.leads} lead(s) -> {encoder.embedding_dim} dimensions"
    )
    lines = [
        f"{path}: {content.get('kind', 'encoder')}, {made}",
        f"encoder: {size}",
        f"input: lead {encoder.lead} at {encoder.sample_rate_hz:g} Hz, {steps}",
        f"trained on, its teacher included: {describe_data(encoder.training_data)}",
    ]
    if "validation" in content:
        lines += describe_head(content)
    for name in ("reliability", "metrics"):
        if content.get(name):
            values = ", ".join(f"{key} {value:.4g}" for key, value in content[name].items())
            lines.append(f"{name}: {values}")
    config = content.get("config", {})
    settings = [f"{k} {v}" for k, v in config.items() if not is_empty(v) and v != ""]
    lines.append(f"settings: {', '.join(settings)}")
    lines.append(f"limits: {DISCLAIMER}; one lead does not show every infarct")
    return "\n".join(lines)


def describe_head(content: dict) -> list[str]:
    """The head of a probe.pt: its labels, its AUC on the test fold, its verdict.

    The verdict is that of extras.detect with its default specificity.
    """
    results, fold = content["results"], content.get("config", {}).get("test_fold", "?")
    labels = describe_data(content["head_training_data"])
    head = content.get("head_name", "?")
    lines = [f"head: {head}, {len(content['classes'])} statements; its labels: {labels}"]
    lines += [f"warning: {warning}" for warning in describe_probe(content)["warnings"]]
    lines.append(f"verdict: {'; '.join(point_lines(operating_point(content)))}")
    means = [
        f"{group} {format_cell(results[group], 'mean', '{:.3f}')}"
        for group in ("nine", "six", "diagnostic")
    ]
    lines.append(f"AUC on fold {fold}, 95 % interval: {', '.join(means)}")
    against = [
        f"{name} {format_cell(entry, 'auc', '{:.3f}')}" for name, entry in results["any"].items()
    ]
    lines.append(f"any infarct against: {', '.join(against)}")
    for name, entry in results["types"].items():
        auc = format_cell(entry, "auc", "{:.3f}")
        lines.append(f"  {name:<6}{entry['positives']:>5} positives  {auc}")
    return lines


def main(argv=None) -> None:
    parser = command_parser("extras.card", __doc__)
    parser.add_argument("file", help="best.pt, last.pt or probe.pt, or an ECGFounder file")
    run_action(run_card, parser.parse_args(argv))


def run_card(arguments: argparse.Namespace) -> None:
    print(describe_checkpoint(arguments.file))


if __name__ == "__main__":
    main()
