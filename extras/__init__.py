"""All that is beyond the method; most files are commands: python -m extras.NAME."""

import argparse
import sys
from pathlib import Path

from selfmis import UsageError


def command_parser(module: str, about: str) -> argparse.ArgumentParser:
    """A parser whose help shows `about`, the module's docstring, as it is written."""
    parser = argparse.ArgumentParser(
        f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def make_folder(out: Path) -> None:
    """The --out of a command, unless it is there; UsageError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; give a new folder") from error


def run_action(action, flags: argparse.Namespace) -> None:
    """action(flags) of a command that has --debug, which shows the traceback of an error.

    A UsageError becomes one sentence and exit code 2; else the exit code is what action returns
    (None or 0: success).
    """
    try:
        status = action(flags)
    except UsageError as error:
        if flags.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if status:
        sys.exit(status)
