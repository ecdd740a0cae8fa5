"""What long computations tell whoever waits for them: how far they are, and what they decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it and how much there is."""
Say = Callable[[str], None]
"""Called with a sentence for the user."""


def silent(*_: Any) -> None:
    """Report nothing."""


def part_of(progress: Progress, number: int, count: int) -> Progress:
    """Tell of the work on part `number` of `count` as of a share of the whole."""
    return lambda stage, done, total: progress(stage, number * total + done, count * total)
