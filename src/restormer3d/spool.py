"""Frames that are computed now and needed later: they wait in memory, or in a temporary file if they are many."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from tempfile import SpooledTemporaryFile, TemporaryFile, gettempdir
from typing import Any

import numpy as np
import psutil

from restormer3d.progress import silent
from restormer3d.views import each_frame

_IN_MEMORY = 2**28  # bytes that wait there at most,
_HELD = 2**30  # and of a stack that is read again and again


def spooled(sequences: Iterable[Iterator[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Compute sequences of frames one after the other, now, and give them back frame by frame of all.

    Parameters
    ----------
    sequences : iterable of iterator of numpy.ndarray
        Frames of one shape and dtype, as many in each.

    Returns
    -------
    iterator of list of numpy.ndarray
        The first frames of all sequences, then the second ones, and so on. They come from a temporary file, that nobody
        else sees and that is gone once the last one was read, if they are many.

    Raises
    ------
    OSError
        If the temporary folder has no room.
    """
    with ExitStack() as until_written:
        with _room():
            kept = until_written.enter_context(SpooledTemporaryFile(_IN_MEMORY))
        counts: list[int] = []
        example = np.empty(0)
        for sequence in sequences:
            counts.append(0)
            for example in sequence:
                with _room():
                    kept.write(np.ascontiguousarray(example).data)
                counts[-1] += 1
        assert len(set(counts)) == 1
        until_read = until_written.pop_all()

    def read() -> Iterator[list[np.ndarray]]:
        with until_read:
            for t in range(counts[0]):
                yield [frame(number * counts[0] + t) for number in range(len(counts))]

    def frame(position: int) -> np.ndarray:
        kept.seek(position * example.nbytes)
        return np.frombuffer(kept.read(example.nbytes), example.dtype).reshape(example.shape).copy()

    return read()


def held(stack: Any, advance: Callable[[int], None] = silent) -> np.ndarray | None:
    """Read all frames of a stack (T, H, W) into memory, or into a temporary file if they are many; None without room.

    Of more than 1 GB, or than a quarter of the memory that is free, that file holds them. `advance` is called with how
    many were read.
    """
    size = int(np.prod(stack.shape)) * np.dtype(stack.dtype).itemsize
    if size > min(_HELD, psutil.virtual_memory().available // 4):
        return decoded(stack, advance) if has_room(size) else None
    values = np.empty(stack.shape, stack.dtype)
    for t, frame in each_frame(stack):
        values[t] = frame
        advance(t + 1)
    return values


def decoded(stack: Any, advance: Callable[[int], None] = silent) -> np.ndarray:
    """Read all frames of a stack (T, H, W) into a temporary file, of which memory holds what is in use.

    Raises
    ------
    OSError
        If the temporary folder has no room; see :func:`has_room`.
    """
    with ExitStack() as until_mapped:
        with _room():
            kept = until_mapped.enter_context(TemporaryFile())
        for t, frame in each_frame(stack):
            with _room():
                kept.write(np.ascontiguousarray(frame).data)
            advance(t + 1)
        with _room():
            kept.flush()
        return np.memmap(kept, stack.dtype, "c", shape=stack.shape)  # may be written to, the file stays as it is


def has_room(size: int) -> bool:
    """Whether a file of so many bytes may wait: half of what the temporary folder, which may be memory, has left."""
    try:
        return size <= shutil.disk_usage(gettempdir()).free // 2
    except OSError:  # there is none
        return False


@contextmanager
def _room() -> Iterator[None]:
    """Say what to do where a temporary file can't be made or written."""
    try:
        yield
    except OSError as error:
        folder = "the folder for them"
        with suppress(OSError):  # there may be none
            folder = gettempdir()
        raise OSError(
            f"frames have to wait in a temporary file, but: {error.strerror or error}. Make room in {folder}, or set "
            "TMPDIR to another one."
        ) from error
