"""Frames that are computed now and needed later: they wait in memory, or in a temporary file if they are many."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import SpooledTemporaryFile, gettempdir

import numpy as np

_IN_MEMORY = 2**28  # bytes


def spooled(frames: Iterator[np.ndarray], in_memory: int = _IN_MEMORY) -> Iterator[np.ndarray]:
    """Compute all frames now, and give them back one by one.

    Parameters
    ----------
    frames : iterator of numpy.ndarray
        Of any shape.
    in_memory : int
        Bytes that may wait in memory; of more, all go to a temporary file, which nobody else sees and which is gone
        once the last frame was read.

    Returns
    -------
    iterator of numpy.ndarray
        The same frames.

    Raises
    ------
    OSError
        If the temporary folder has no room.
    """
    with ExitStack() as until_written:
        kept = until_written.enter_context(SpooledTemporaryFile(in_memory))
        count = 0
        for frame in frames:
            try:
                np.save(kept, frame)
            except OSError as error:
                reason = f"{gettempdir()}: denoised frames have to wait there ({error.strerror or error})"
                raise OSError(f"{reason}. Make room, or set TMPDIR to another folder.") from error
            count += 1
        kept.seek(0)
        until_read = until_written.pop_all()

    def read() -> Iterator[np.ndarray]:
        with until_read:
            for _ in range(count):
                yield np.load(kept)

    return read()


def has_room(size: int) -> bool:
    """Whether so many bytes may wait: no more than half of what the temporary folder, which may be memory, has left."""
    if size <= _IN_MEMORY:
        return True
    try:
        return size <= shutil.disk_usage(gettempdir()).free // 2
    except OSError:  # there is none
        return False
