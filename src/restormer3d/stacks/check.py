"""One pass over every voxel of a stack before work starts on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restormer3d.stacks.chain import StackError

CHECK_BYTES = 2**25  # read at once
_RANGE = (1e-12, 1e15)  # of floats: squares and their sums have room in single precision


@dataclass(frozen=True)
class StackCheck:
    """What one pass over every voxel found.

    Attributes
    ----------
    minimum, maximum : float or int
        Of the voxels that hold a value.
    sha256 : str
        Hash of the voxels in C order, little-endian, without any header.
    missing : int
        Voxels that hold none: NaN.
    """

    minimum: float
    maximum: float
    sha256: str
    missing: int = 0


def check_stack(stack: Any, progress: Callable[[int], None] | None = None, *, missing: bool = False) -> StackCheck:
    """Read every frame once, in fixed memory, and prove that all can be decoded and denoised.

    Parameters
    ----------
    stack : TiffStack or ndarray of shape (T, H, W)
    progress : callable, optional
        Called with the number of frames read so far.
    missing : bool
        Whether voxels may be NaN, if they are fewer than half.

    Raises
    ------
    StackError
        Not three axes, neither integers nor floats, a single frame, a frame that can't be decoded, a voxel that is not
        finite, the same value everywhere, or floats that reach over less than 1e-12 or more than 1e15.
    """
    name = getattr(stack, "path", "the array")
    if len(stack.shape) != 3:
        raise StackError(
            f"{name}: expected three axes (T, H, W), got the shape {tuple(stack.shape)}. Denoise channels and planes "
            "one by one, such as stack[:, 0]."
        )
    if np.dtype(stack.dtype).kind not in "iuf" or np.dtype(stack.dtype).itemsize > 8:
        raise StackError(
            f"{name}: expected integers or floats of at most 64 bits, got {np.dtype(stack.dtype)}. Convert it first, "
            "such as stack.astype(np.float32)."
        )
    little = np.dtype(stack.dtype).newbyteorder("<")
    if 0 in stack.shape:
        raise StackError(f"{name}: the stack is empty: its shape is {tuple(stack.shape)}.")
    if stack.shape[0] == 1:
        raise StackError(f"{name}: a single frame: noise shows in differences of frames, of which two are needed.")
    digest = hashlib.sha256()
    lows, highs, bad, first_bad, none = [], [], 0, -1, 0
    with ThreadPoolExecutor(1) as beside:  # the hash takes longer than all else
        for start, frames in _blocks(stack):
            hashing = beside.submit(digest.update, np.ascontiguousarray(frames, little).data)
            lows.append(np.fmin.reduce(frames, axis=None))
            highs.append(np.fmax.reduce(frames, axis=None))
            wrong = ~np.isfinite(frames) if frames.dtype.kind == "f" else np.zeros(0)
            if wrong.any():
                none += int(np.isnan(frames).sum())
                bad += int(wrong.sum())
                first_bad = start + int(wrong.any(axis=(1, 2)).argmax()) if first_bad < 0 else first_bad
            hashing.result()
            if progress is not None:
                progress(start + len(frames))
    if missing and 2 * none >= np.prod(stack.shape):
        raise StackError(f"{name}: {none} voxels are NaN, half of all or more. Check how the stack was saved.")
    if bad > (none if missing else 0):
        raise StackError(
            f"{name}: expected finite values, found {bad} voxels of NaN or infinity, the first in frame {first_bad}. "
            "Leave those frames out, or replace the values, for example with np.nan_to_num, and save the stack again."
        )
    minimum, maximum = np.fmin.reduce(lows).item(), np.fmax.reduce(highs).item()
    if minimum == maximum:
        raise StackError(
            f"{name}: every voxel is {minimum}: nothing to denoise. Check that the right channel was saved."
        )
    if little.kind == "f" and not _RANGE[0] <= maximum - minimum <= _RANGE[1]:
        raise StackError(
            f"{name}: expected floats that reach over {_RANGE[0]:g} to {_RANGE[1]:g}, got {minimum:g} to {maximum:g}. "
            "Replace fill values, or multiply by a power of ten, and save the stack again."
        )
    return StackCheck(minimum, maximum, digest.hexdigest(), none)


def _blocks(stack: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first frame, frames) over a whole stack, some megabytes at a time."""
    length, height, width = stack.shape
    step = max(1, CHECK_BYTES // max(1, height * width * np.dtype(stack.dtype).itemsize))
    for start in range(0, length, step):
        yield start, stack[start : start + step]
