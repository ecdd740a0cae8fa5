"""Write a denoised recording as a drop-in replacement: same shape, dtype, byte order, axes and tags as its source.

Frames go to disk one by one, uncompressed, into a hidden file beside the output that takes its name at the very end.
All dialects are written in one way: plain pages, with the tags of the source's pages copied byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray

from restormer3d.stacks.chain import StackError, page_chain
from restormer3d.stacks.dialects import names_other_files, single_file_ome
from restormer3d.stacks.layout import DTYPES
from restormer3d.stacks.read import TiffStack

CLASSIC_LIMIT = 4_000_000_000  # classic TIFF counts bytes in 32 bits; the rest is for the pages' directories
PAGE_BYTES = 512  # a directory of ours with its values, at most, without the tags carried over

# Tags that describe the recording, not how its voxels are stored.
CARRIED_TAGS = {
    269: "DocumentName",
    270: "ImageDescription",
    271: "Make",
    272: "Model",
    274: "Orientation",
    285: "PageName",
    286: "XPosition",
    287: "YPosition",
    297: "PageNumber",
    305: "Software",
    306: "DateTime",
    315: "Artist",
    316: "HostComputer",
    33432: "Copyright",
    50838: "IJMetadataByteCounts",
    50839: "IJMetadata",
    51123: "MicroManagerMetadata",
}
DESCRIPTION, SOFTWARE = 270, 305
ASCII = 2
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, COLOR_MAP = 282, 283, 296, 320
SCANIMAGE_MAGIC = 0x07030301

ExtraTag = tuple[int, int, int, bytes, bool]


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
    """

    path: Path
    frames: int
    clipped_voxels: int
    clipped_low: int
    clipped_high: int


class WriteOptions(NamedTuple):
    """Arguments for `tifffile.TiffWriter` and for its `write`, and whether every page has its own tags."""

    file: dict[str, Any]
    page: dict[str, Any]
    tags_per_page: bool


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
        The recording that the output stands in for, of the same shape and dtype: gives byte order, axes and tags.
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
    clipped = np.zeros(2, np.int64)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with _named_os_errors(path.parent, _needed_bytes(shape, dtype)):
            _write_pages(part, _finished(frames, shape, dtype, clipped), options, shape, dtype, like)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            page_chain(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    low, high = clipped.tolist()
    return WriteSummary(path, shape[0], low + high, low, high)


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
    needed = _needed_bytes(shape, dtype)
    with _named_os_errors(path.parent, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_options(
    like: TiffStack | None, shape: tuple[int, int, int], dtype: np.dtype, classic_limit: int = CLASSIC_LIMIT
) -> WriteOptions:
    """Return the arguments that make tifffile write a stand-in for `like`.

    Parameters
    ----------
    like : TiffStack or None
        Without it: little-endian, axes TYX, no resolution.
    shape, dtype
        Of the stack to write; those of `like`.
    classic_limit : int
        Number of bytes from which on BigTIFF is written.
    """
    page: dict[str, Any] = {"metadata": None, "software": False, "resolution": (1, 1), "resolutionunit": 1}
    if like is None:
        description = json.dumps({"shape": list(shape), "axes": "TYX"}).encode()
        tags = [(DESCRIPTION, ASCII, 0, description, True), (SOFTWARE, ASCII, 0, b"restormer3d", True)]
        page |= {"photometric": "minisblack", "extratags": tags}
        return WriteOptions({"bigtiff": _needed_bytes(shape, dtype) > classic_limit, "ome": False}, page, False)
    if (tuple(shape), dtype) != (like.shape, like.dtype):
        raise ValueError(f"expected the shape {like.shape} and dtype {like.dtype} of {like.path}, got {shape}, {dtype}")
    tags = carried_tags(like, 0)
    own_tags = carried_tags(like, 1)
    per_page = len(like.layout.page_offsets) > 1 and (bool(own_tags) or like.layout.joined)
    too_large = _needed_bytes(shape, dtype, 2 * sum(len(tag[3]) for tag in own_tags)) > classic_limit
    # Past 4 GB ImageJ writes a classic TIFF with one directory that describes all frames, and opens no BigTIFF
    # without a plugin: what came in that form goes out in it.
    one_page = like.layout.kind == "imagej" and len(like.layout.page_offsets) == 1 and not like.is_bigtiff
    page |= {"extratags": tags, "truncate": too_large and one_page} | _look(like)
    bigtiff = like.is_bigtiff or (too_large and not one_page)
    return WriteOptions({"bigtiff": bigtiff, "ome": False, "byteorder": like.byteorder}, page, per_page)


def carried_tags(like: TiffStack, frame: int) -> list[ExtraTag]:
    """Return the tags of a frame's page that describe the recording, as tifffile's extra tags."""
    try:
        found = like.frame_tags(frame)
    except StackError:  # the voxels are worth more than the tags of a damaged directory
        return []
    tags = {code: (code, *found[code], True) for code in CARRIED_TAGS if code in found}
    if frame == 0 and DESCRIPTION in tags:
        description = _description(like, tags[DESCRIPTION][3])
        tags[DESCRIPTION] = (DESCRIPTION, ASCII, 0, description, True)
        if not description.strip(b"\0"):
            del tags[DESCRIPTION]
    return list(tags.values())


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
            writer.filehandle.write(_scanimage_header(like))
        if like is None or not options.tags_per_page:
            writer.write(frames, shape=shape, dtype=dtype, **options.page)
            return
        for t, frame in enumerate(frames):
            options.page["extratags"] = carried_tags(like, t)
            writer.write(frame, **options.page)


def _finished(
    frames: Iterable[NDArray[Any]], shape: tuple[int, int, int], dtype: np.dtype, clipped: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    """Yield exactly T frames (H, W) in the dtype of the file, and add to the numbers of clipped voxels."""
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
            finished, *outside = to_dtype(frame, dtype)
            clipped += outside
            count += 1
            yield finished
    if count != shape[0]:
        raise ValueError(f"expected {shape[0]} frames, got {count}")


def _look(like: TiffStack) -> dict[str, Any]:
    """Return how the source's first page is to be shown: size of a pixel, gray scale or palette."""
    page = like.page(0)
    x, y, unit, colors = (page.tags.valueof(code) for code in (X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, COLOR_MAP))
    look: dict[str, Any] = {"photometric": "minisblack"}
    if all(isinstance(ratio, tuple) and min(ratio) > 0 for ratio in (x, y)):
        look |= {"resolution": (x, y), "resolutionunit": unit if unit in (1, 2, 3) else 2}  # inch by the standard
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        look["photometric"] = "miniswhite"
    elif page.photometric == tifffile.PHOTOMETRIC.PALETTE and np.shape(colors) == (3, 2 ** (8 * like.dtype.itemsize)):
        look |= {"photometric": "palette", "colormap": colors}
    return look


def _description(like: TiffStack, raw: bytes) -> bytes:
    """Return the first page's description, true for a file that holds all frames, one per page."""
    text = raw.rstrip(b"\0").decode("utf-8", "replace")
    try:
        if like.layout.kind == "shaped":
            return json.dumps({key: value for key, value in json.loads(text).items() if key != "truncated"}).encode()
        if "<OME" in text[:2000]:
            return single_file_ome(text, like.path.name, like.shape[0]).encode()
    except (ElementTree.ParseError, ValueError):  # a header that tifffile did not follow either
        return b"" if names_other_files(text) else raw
    return raw


def _scanimage_header(like: TiffStack) -> bytes:
    """Return the block of settings that ScanImage puts between the header of a BigTIFF and its first page."""
    with like.path.open("rb") as file:
        start = file.read(32)
        if not like.is_bigtiff or like.byteorder != "<":
            return b""
        magic, _, settings, regions = struct.unpack("<IIII", start[16:])
        return start[16:] + file.read(settings + regions) if magic == SCANIMAGE_MAGIC else b""


def _needed_bytes(shape: tuple[int, int, int], dtype: np.dtype, tag_bytes: int = 0) -> int:
    """Return the size of an uncompressed file whose pages carry `tag_bytes` of tags each."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize + shape[0] * (PAGE_BYTES + tag_bytes)


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
