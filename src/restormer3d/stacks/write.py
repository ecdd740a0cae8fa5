"""Write a denoised recording as a drop-in replacement: same shape, dtype, byte order, axes and tags as its source.

Frames go to disk one by one, uncompressed, into a hidden file beside the output that takes its name at the very end.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray

from restormer3d.stacks.carry import (
    CLASSIC_LIMIT,
    WriteOptions,
    carried_tags,
    file_bytes,
    scanimage_header,
    write_options,
)
from restormer3d.stacks.chain import StackError, page_chain
from restormer3d.stacks.layout import DTYPES
from restormer3d.stacks.missing import missing_again
from restormer3d.stacks.read import TiffStack
from restormer3d.stacks.rounding import Rounding


@dataclass(frozen=True)
class WriteSummary:
    """What was written.

    Attributes
    ----------
    path : Path
    frames : int
    clipped_voxels : int
        Voxels more than half a step outside the range of the dtype, set to its end.
    clipped_low, clipped_high : int
        How many of them were below and above.
    rounding_share : float
        Mean square of the rounding error over the variance that it disturbs; see :meth:`.Rounding.share`.
    """

    path: Path
    frames: int
    clipped_voxels: int
    clipped_low: int
    clipped_high: int
    rounding_share: float


def write_stack(
    path: str | Path,
    frames: Iterable[NDArray[Any]],
    *,
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    like: TiffStack | None = None,
    overwrite: bool = False,
    classic_limit: int = CLASSIC_LIMIT,
) -> WriteSummary:
    """Write frames, rounded to nearest and clipped to the dtype, to an uncompressed TIFF file.

    The file appears under its name only when it is complete; whatever interrupts the writing leaves nothing behind.

    Parameters
    ----------
    path : str or Path
        Output. Missing folders above it are made.
    frames : iterable of ndarray
        In order, each (H, W) or a block (n, H, W), of any real dtype.
    shape : (T, H, W)
    dtype : dtype
        Of the file: int8/16/32, uint8/16/32 or float16/32/64.
    like : TiffStack, optional
        The recording that the output stands in for, of the same shape and dtype: gives byte order, axes and tags. Where
        it is NaN, the output is.
    overwrite : bool
        Replace an existing file.
    classic_limit : int
        Number of bytes from which on BigTIFF is written.

    Returns
    -------
    WriteSummary

    Raises
    ------
    StackError
        The output is the file that `like` reads.
    FileExistsError
        The output exists and `overwrite` is false.
    OSError
        A folder that can't be written, or too little space.
    ValueError
        Too few or too many frames, or of another size.
    RuntimeError
        A frame with values that are not finite.
    """
    path, dtype = Path(path), np.dtype(dtype)
    check_output(path, shape, dtype, source=like.path if like else None, overwrite=overwrite)
    options = write_options(like, shape, dtype, classic_limit)
    lost = Rounding()
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part-{os.getpid()}")
    try:
        with _named_os_errors(path.parent, file_bytes(shape, dtype)):
            finished = finished_frames(frames, shape, dtype, lost)
            if like is not None:
                finished = missing_again(finished, like)
            _write_pages(part, finished, options, shape, dtype, like)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            page_chain(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return WriteSummary(path, shape[0], lost.low + lost.high, lost.low, lost.high, lost.share())


def check_output(
    path: str | Path,
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    *,
    source: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Find out before an hour of work whether a stack can be written; makes the folders above the output.

    Parameters
    ----------
    path : str or Path
        The output.
    shape, dtype
        Of the stack to write.
    source : Path, optional
        The recording itself, which must not be overwritten.
    overwrite : bool
        Whether another existing file may be replaced.

    Raises
    ------
    StackError, FileExistsError, OSError, ValueError
        As `write_stack`.
    """
    path, dtype = Path(path), np.dtype(dtype)
    if len(shape) != 3 or 0 in shape or dtype.name not in DTYPES:
        raise ValueError(f"expected a shape (T, H, W) and one of {', '.join(DTYPES)}, got {shape} and {dtype}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path}: the output is a folder; name a file in it")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise StackError(f"{path}: the output is the input itself, which is never overwritten. Choose another name.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: the output exists. Choose another name, or replace it with --overwrite.")
    check_folder(path.parent, file_bytes(shape, dtype))


def check_folder(folder: Path, needed: int = 0) -> None:
    """Find out whether `needed` bytes can be written to a folder, and make it; an OSError says why not."""
    with _named_os_errors(folder, needed):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def to_dtype(frame: NDArray[Any], dtype: np.dtype) -> tuple[NDArray[Any], int, int]:
    """Round to nearest and clip to the range of a dtype.

    Parameters
    ----------
    frame : ndarray
        Finite values.
    dtype : dtype
        An integer or floating dtype.

    Returns
    -------
    frame, low, high
        The frame in `dtype`, and the numbers of voxels clipped below and above.
    """
    if frame.dtype == dtype:
        return frame, 0, 0
    integer = dtype.kind in "iu"
    limits = np.iinfo(dtype) if integer else np.finfo(dtype)
    # float32 has 24 bits: 2**32 - 1 and the halves beside it need float64, the 16-bit dtypes do not
    exact = np.float32 if frame.dtype == np.float32 and dtype.itemsize < 4 else np.float64
    values = frame.astype(exact, copy=False)
    half = 0.5 if integer else 0.0
    low, high = float(limits.min), float(limits.max)
    below, above = np.count_nonzero(values < low - half), np.count_nonzero(values > high + half)
    if integer:
        values = np.rint(values)
    return np.clip(values, low, high).astype(dtype), int(below), int(above)


def _write_pages(
    part: Path,
    frames: Iterator[NDArray[Any]],
    options: WriteOptions,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    like: TiffStack | None,
) -> None:
    """Write all frames as one block with its directories, or page by page where each has tags of its own."""
    with tifffile.TiffWriter(part, **options.file) as writer:
        if like is not None and options.file["bigtiff"]:
            writer.filehandle.write(scanimage_header(like))
        if like is None or not options.tags_per_page:
            writer.write(frames, shape=shape, dtype=dtype, **options.page)
            return
        for t, frame in enumerate(frames):
            options.page["extratags"] = carried_tags(like, t)
            writer.write(frame, **options.page)


def finished_frames(
    frames: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype, lost: Rounding | None = None
) -> Iterator[NDArray[Any]]:
    """Yield exactly T frames (H, W) in the dtype of the result, and add up what it can't hold.

    Raises
    ------
    RuntimeError
        If a frame has values that are not finite.
    ValueError
        If frames are more or fewer than `shape` says, or of another size.
    """
    count = 0
    for block in frames:
        for frame in np.reshape(block, (-1, *np.shape(block)[-2:])):
            if count == shape[0] or frame.shape != tuple(shape[1:]):
                raise ValueError(f"expected {shape[0]} frames of {shape[1:]}, got frame {count} of {frame.shape}")
            if frame.dtype.kind == "f" and not np.isfinite(frame).all():
                raise RuntimeError(
                    f"frame {count} of the output has values that are not finite; nothing was written. Try a lower "
                    "learning rate, or float32 on the CPU, and report it if it happens again."
                )
            finished, low, high = to_dtype(frame, dtype)
            if lost is not None:
                lost.low, lost.high = lost.low + low, lost.high + high
                if dtype.kind in "iu":
                    lost.add(frame)
            count += 1
            yield finished
    if count != shape[0]:
        raise ValueError(f"expected {shape[0]} frames, got {count}")


@contextmanager
def _named_os_errors(folder: Path, needed: int) -> Iterator[None]:
    """Name the folder and the needed space in errors of the file system."""
    try:
        yield
    except OSError as error:
        # numpy reports a short write as a bare sentence without a number
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or " requested and " in str(error)
        if full:
            free = shutil.disk_usage(folder).free
            message = f"{folder}: not enough space: the output needs {needed} bytes, {free} are free. Free some space"
            raise OSError(errno.ENOSPC, f"{message}, or choose another folder.") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            message = f"{folder}: expected a folder, found a file in its place"
            raise NotADirectoryError(errno.ENOTDIR, message) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{folder}: can't write there ({error.strerror}). Choose another folder with -o."
            raise PermissionError(error.errno, message) from error
        raise
