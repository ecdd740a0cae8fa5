"""Read a recording lazily: a `TiffStack` is opened in a moment and hands out any patch of it in fixed memory.

Frames that lie in the file as they are get mapped for the length of one access; all others are decoded, only those
that are asked for, and the latest are kept.
"""

from __future__ import annotations

import logging
import mmap
import operator
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from restormer3d.stacks.chain import StackError, damaged, page_chain
from restormer3d.stacks.layout import TIFF_FAILURES, Layout, forget_series, open_tiff, read_layout
from restormer3d.threads import thread_count

MAPPED_BYTES = 2**26  # mapped at once: pages of a mapped file count as memory of the process
DECODED_BYTES = 2**28  # decoded frames kept, so that random patches of a compressed file don't decode it each time
_MOST_THREADS = 8  # that decode

Index = int | slice


class TiffStack:
    """A TIFF recording of shape (T, H, W), read where it is indexed.

    Threads may share it. A forked process opens the file for itself; pickled, it is opened again by its path.

    Parameters
    ----------
    path : str or Path
        A TIFF or BigTIFF file: plain, ImageJ, OME, ScanImage, of any byte order and compression.

    Attributes
    ----------
    path : Path
    shape : tuple of int
        (T, H, W).
    dtype : dtype
        In native byte order.
    axes : str
        As the file names them, without axes of size one: "TYX", "ZYX", "IYX".
    note : str
        What a user should know about how the file was understood; empty if nothing.
    nbytes : int
        Size of all voxels in memory.
    byteorder : str
        Of the file: "<" or ">".
    layout : Layout
        Where the frames lie in the file.

    Raises
    ------
    StackError
        If the file is not one stack of frames; the message says what was found and what to do.
    """

    def __init__(self, path: str | Path) -> None:
        self._tif: tifffile.TiffFile | None = None  # before anything may fail: it is closed then
        self.path = Path(path)
        self._tif, self.layout = _open(self.path)
        self.shape = self.layout.shape
        self.dtype = self.layout.dtype
        self.axes = self.layout.axes
        self.note = self.layout.note
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.byteorder: Literal["<", ">"] = self._tif.byteorder
        self.is_bigtiff = self._tif.is_bigtiff
        self._decoded: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._lock = threading.RLock()
        self._owner = os.getpid()

    def __enter__(self) -> TiffStack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[TiffStack], tuple[Path]]:
        return TiffStack, (self.path,)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"<TiffStack {self.path.name}: {self.axes} = {size}, {self.dtype}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Index | tuple[Index, ...]) -> NDArray[Any]:
        """Return frames, or a patch of them, as a new array.

        Parameters
        ----------
        key : int, slice, or a tuple of up to three
            Along T, H, W, as for an array: ``stack[5]``, ``stack[::2]``, ``stack[0:64, 32:96, 32:96]``.
        """
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 3:
            raise IndexError(f"{self!r} has 3 axes, not {len(keys)}")
        spans = [_span(k, size) for k, size in zip((*keys, *[slice(None)] * (3 - len(keys))), self.shape, strict=True)]
        frames, rows, columns = spans
        out = np.empty([len(span) for span in spans], self.dtype)
        if out.size:
            self._read(np.arange(frames.start, frames.stop, frames.step), _slice(rows), _slice(columns), out)
        return out[tuple(slice(None) if isinstance(k, slice) else 0 for k in keys)]

    def close(self) -> None:
        """Close the file; the stack can't be read any more."""
        if self._tif is not None:
            self._tif.close()
            self._tif = None

    def page(self, frame: int) -> tifffile.TiffPage:
        """Return the page of a frame as tifffile parses it, with all its tags."""
        tif = self._file()
        with self._lock, _as_stack_errors(self.path, f"the tags of frame {frame}"):
            tif.filehandle.seek(int(self.layout.page_offsets[frame]))
            return tifffile.TiffPage(tif, frame)

    def frame_tags(self, frame: int) -> list[tuple[int, int, int, bytes]]:
        """Return the tags of a frame's page as they stand in the file.

        Returns
        -------
        list
            Code, data type, count, and value in the file's byte order of each, of which some have the same code; empty
            for a frame without a page of its own.
        """
        if frame >= len(self.layout.page_offsets) or not self.layout.page_offsets[frame]:
            return []
        tags, file = [], self._file().filehandle
        with self._lock:
            for tag in self.page(frame).tags:
                file.seek(tag.valueoffset)
                tags.append((tag.code, int(tag.dtype), tag.count, file.read(tag.valuebytecount)))
        return tags

    def _read(self, frames: NDArray[np.int64], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fill `out` with the patch [frames, rows, columns]."""
        if self.layout.data_offsets is None:
            self._read_decoded(frames, rows, columns, out)
            return
        step = max(1, MAPPED_BYTES // (self.nbytes // self.shape[0]))
        for start in range(0, len(frames), step):
            self._read_mapped(frames[start : start + step], rows, columns, out[start : start + step])

    def _read_mapped(self, frames: NDArray[np.int64], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Copy a patch out of the file, which is mapped only meanwhile."""
        assert self.layout.data_offsets is not None
        offsets = self.layout.data_offsets[frames]
        begin = int(offsets.min()) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = int(offsets.max()) - begin + self.nbytes // self.shape[0]
        file = self._file().filehandle.fileno()
        with (
            _as_stack_errors(self.path, f"frames {frames[0]} to {frames[-1]}"),
            mmap.mmap(file, length, access=mmap.ACCESS_READ, offset=begin) as mapped,
        ):
            stored = self.dtype.newbyteorder(self.byteorder)
            for target, offset in zip(out, offsets - begin, strict=True):
                target[:] = np.ndarray(self.shape[1:], stored, mapped, offset)[rows, columns]

    def _read_decoded(self, frames: NDArray[np.int64], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Decode the frames that are not kept from before, several at once, and copy a patch of each."""

        def fill(position: int) -> None:
            out[position] = self._decode(int(frames[position]))[rows, columns]

        if len(frames) == 1 or self._decoded.keys() >= set(frames.tolist()):
            for position in range(len(frames)):
                fill(position)
            return
        with ThreadPoolExecutor(min(_MOST_THREADS, thread_count())) as pool:
            for _ in pool.map(fill, range(len(frames))):
                pass

    def _decode(self, frame: int) -> NDArray[Any]:
        """Return one whole frame of a compressed or tiled file."""
        self._file()
        with self._lock:
            if frame in self._decoded:
                self._decoded.move_to_end(frame)
                return self._decoded[frame]
        with _as_stack_errors(self.path, f"frame {frame}"):
            image = self.layout.pages[frame].asarray(lock=self._lock, maxworkers=1)
        with self._lock:
            self._decoded[frame] = image
            while len(self._decoded) * image.nbytes > DECODED_BYTES:
                self._decoded.popitem(last=False)
        return image

    def _file(self) -> tifffile.TiffFile:
        """Return the open file; a forked process must not share its position with its parent."""
        if self._tif is None:
            raise ValueError(f"{self.path}: the stack is closed")
        if os.getpid() != self._owner:
            self._lock, self._owner = threading.RLock(), os.getpid()
            self._tif.filehandle.close()
            self._tif.filehandle.open()
        return self._tif


def open_stack(path: str | Path) -> TiffStack:
    """Open a TIFF recording to read it lazily; close it after use, or use it in a ``with`` statement.

    Parameters
    ----------
    path : str or Path
        A TIFF or BigTIFF file.

    Raises
    ------
    StackError
        If the file is not one stack of frames of a known dtype; the message says what was found and what to do.

    Examples
    --------
    >>> with open_stack("recording.tif") as stack:  # doctest: +SKIP
    ...     patch = stack[0:64, 100:164, 100:164]
    """
    return TiffStack(path)


def _open(path: Path) -> tuple[tifffile.TiffFile, Layout]:
    """Open a file and find its frames, or say what is wrong with it."""
    tif = None
    try:
        with _as_stack_errors(path, "its header"):
            _check_is_file(path)
            chain = page_chain(path)
            tif = open_tiff(path)
            layout = read_layout(tif, path, chain)
            forget_series(tif)
            return tif, layout
    except BaseException:
        if tif is not None:
            tif.close()
        raise


def _check_is_file(path: Path) -> None:
    """Refuse what can't be opened as a file."""
    if not path.exists():
        raise StackError(f"{path}: there is no such file. Check the path, and that its drive is connected.")
    if path.is_dir():
        raise StackError(f"{path}: expected a TIFF file, found a folder. Name the files in it, as in {path}/*.tif")
    if not path.is_file():
        raise StackError(f"{path}: expected a TIFF file, found a device or pipe.")


@contextmanager
def _as_stack_errors(path: Path, part: str) -> Iterator[None]:
    """Turn whatever tifffile and its codecs raise into a StackError, and keep their log from the user."""
    log = logging.getLogger("tifffile")

    def mute(record: logging.LogRecord) -> bool:  # a filter, not a level: threads may come and go in any order
        return False

    log.addFilter(mute)
    try:
        yield
    except StackError:
        raise
    except PermissionError as error:
        raise StackError(f"{path}: no permission to read the file. Ask its owner, or copy it first.") from error
    except TIFF_FAILURES as error:
        if _is_unknown_to_tifffile(error):
            raise RuntimeError(
                f"{path}: can't be read with tifffile {version('tifffile')} ({error}). Install another version: "
                "constraints.txt names one that was tested."
            ) from error
        raise damaged(path, f"{part} can't be read ({type(error).__name__}: {error})") from error
    finally:
        log.removeFilter(mute)


def _is_unknown_to_tifffile(error: Exception) -> bool:
    """Say whether our own code asked tifffile for something that this version does not have: no fault of the file."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").startswith("restormer3d.")
    return ours and isinstance(error, AttributeError) and type(error.obj).__module__.startswith("tifffile")


def _span(key: Index, size: int) -> range:
    """Return the positions that an index selects along an axis."""
    if isinstance(key, slice):
        return range(size)[key]
    position = range(size)[operator.index(key)]
    return range(position, position + 1)


def _slice(span: range) -> slice:
    """Return the slice that selects a range, going backwards to the very start too."""
    return slice(span.start, span.stop if span.stop >= 0 else None, span.step)
