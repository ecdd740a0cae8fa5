"""The command line: each command is one workflow function with a typed signature.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys

from cyclopts import CycloptsError

from restormer3d.cli import denoising, measuring, training
from restormer3d.cli.terminal import app, close_error_stream, refuse, say

__all__ = ["app", "denoising", "main", "measuring", "training"]


def main() -> None:
    """Run the command line; exit 0 if all went well, 1 if a stack failed, 2 for bad arguments, 130 after Ctrl-C."""
    # A batch system's kill, and the end of the session, clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        status = app(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        status = refuse(error)
    except KeyboardInterrupt:
        say("interrupted: no half-written file is left")
        status = 130
    close_error_stream()
    sys.exit(status)
