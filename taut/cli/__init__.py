"""The `taut` command: generate, run, chat, inspect and bench from a terminal."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `taut` console script."""
    from taut.cli.app import app

    try:
        app()
    except BrokenPipeError:  # `taut generate ... | head`: the reader has what it wanted
        sys.stderr.close()
        sys.exit(141)
