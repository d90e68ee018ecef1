"""All that is beyond the method; most files are commands: python -m extras.NAME."""

import argparse
import sys

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


def run_action(action, flags: argparse.Namespace) -> None:
    """action(flags) of a command that has --debug, which shows the traceback of an error.

    What a user can cause is one sentence and exit code 2; else action's status, None or 0 if good.
    """
    try:
        status = action(flags)
    except UsageError as error:
        if flags.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)
