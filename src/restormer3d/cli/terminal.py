"""What all commands share: the application, messages, progress bars."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

from cyclopts import App
from rich.console import Console

app = App(
    name="restormer3d",
    help="Denoise two-photon calcium imaging stacks from the noisy stack alone.",
    suppress_keyboard_interrupt=False,  # main() says what became of the output
)

_Arguments = ParamSpec("_Arguments")


class _ErrorStream:
    """The error stream, but that a terminal or pipe that goes away, or a full disk, stops no work."""

    @property
    def rich_proxied_file(self) -> _ErrorStream:
        """Itself, so that rich writes here and not to the stream behind."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(_standard_error(), name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            _standard_error().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            _standard_error().flush()


def _standard_error() -> Any:
    """Return the stream behind what rich puts in its place while it shows bars; there may be none at all."""
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return io.StringIO() if stream is None else stream


_console = Console(file=cast(Any, _ErrorStream()), highlight=False, soft_wrap=True)
_STAGES = {"check": "reading", "move": "aligning", "train": "training", "denoise": "denoising", "svd": "denoising"}


def say(text: str) -> None:
    """Print a line for the user, on the error stream: the output stream is for results."""
    _console.print(text, markup=False)


def close_error_stream() -> None:
    """Forget what nobody could be told any more: Python would fail over it at the very end."""
    try:
        _standard_error().flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def refuse(error: Exception) -> int:
    """Say what is wrong with the arguments; 2 is the exit status for that."""
    say(f"bad arguments: {error}")
    return 2


def answering(command: Callable[_Arguments, None]) -> Callable[_Arguments, int]:
    """Let a command end with an exit status, and say what was wrong: 2 for bad arguments, 1 for other failures."""

    @wraps(command)
    def answer(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            return refuse(error)
        except (OSError, RuntimeError) as error:
            say(f"failed: {error}")
            return 1
        return 0

    return answer


def files_named(paths: list[Path]) -> list[Path]:
    """Replace patterns such as day1/*.tif by the files that they name: shells of Windows pass them on as they are."""
    return [found for path in paths for found in _matches(path) or [path]]


def _matches(path: Path) -> list[Path]:
    return [] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path))))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars with rate and time left, one per stage of the stack at hand."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=_console, transient=True) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            for other in set(tasks) - {stage}:  # a stage may end early, as training does
                bars.remove_task(tasks.pop(other))
            if stage not in tasks:
                name, comma, plane = stage.partition(",")
                tasks[stage] = bars.add_task(_STAGES.get(name, name) + comma + plane, total=total, rate="")
            speed = bars.tasks[bars.task_ids.index(tasks[stage])].speed
            bars.update(tasks[stage], completed=done, rate=f"{speed:.2g}/s" if speed else "")
            if done >= total:
                bars.remove_task(tasks.pop(stage))

        yield report
