"""Where in a TIFF file the frames lie and which of its axes is time.

What a cut, mixed or multi-channel file gets wrong is found here, before a voxel is read: the extent of every page is
compared with the size of the file, and exactly one axis besides Y and X may have more than one entry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from restormer3d.stacks.chain import PageChain, StackError, damaged
from restormer3d.stacks.dialects import header_sizes, names_other_files, planes_in_turns

Page = tifffile.TiffPage | tifffile.TiffFrame

# A damaged header makes tifffile and its codecs fail in any of these ways.
TIFF_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)
TIFF_SUFFIXES = {".tif", ".tiff", ".btf", ".tf2", ".tf8"}  # the last three are used for BigTIFF
DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "float64")


@dataclass(frozen=True)
class Layout:
    """Where the frames of a stack lie in its file.

    Attributes
    ----------
    shape : (T, H, W)
    dtype : native byte order.
    axes : the axes as the file names them, without those of size one, such as "TYX" or "ZYX".
    kind : the dialect by tifffile's name: "imagej", "ome", "shaped", "uniform", ...
    note : what a user should know about how the file was understood; empty if nothing.
    joined : the file holds many separate images, one after the other, not one series.
    page_offsets : position of the directory of every page; one entry where one page describes all frames.
    data_offsets : position of the first byte of every frame; None where frames must be decoded.
    pages : the pages to decode; empty where data_offsets is given.
    later_tags : from the code of every tag of the pages after the first to the first of those frames that has it.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    axes: str
    kind: str
    note: str
    joined: bool
    page_offsets: NDArray[np.int64]
    data_offsets: NDArray[np.int64] | None
    pages: list[Page]
    later_tags: dict[int, int]


@dataclass(frozen=True)
class _Frames:
    """The pages that hold frames, and the axes that the file gives them."""

    pages: list[Page]
    axes: str
    sizes: tuple[int, ...]
    kind: str
    note: str = ""
    joined: bool = False
    data_offset: int | None = None  # of the first frame where all lie in one block
    by_header: bool = False  # the pages' axes stand in a header that tifffile does not follow
    interleaved: bool = True  # planes and channels follow one another page by page

    @property
    def keyframe(self) -> tifffile.TiffPage:
        """The page whose shape and dtype all share."""
        keyframe = self.pages[0].keyframe
        assert keyframe is not None
        return keyframe


def read_layout(tif: tifffile.TiffFile, path: Path, chain: PageChain) -> Layout:
    """Find the frames of an open TIFF file.

    Parameters
    ----------
    tif : TiffFile
        Opened by `open_tiff`.
    path : Path
        Of the same file.
    chain : PageChain
        Of its pages.

    Raises
    ------
    StackError
        Less or more than one stack of frames, an unsupported dtype, or parts beyond the end of the file.
    """
    frames = _find_frames(tif, path, mixed=len(set(chain.pages.values())) > 1)
    page = frames.keyframe
    if len({chain.pages.get(p.offset) for p in frames.pages}) > 1 and not frames.joined:
        raise StackError(f"{path}: expected frames of one size and type, found several. Save the stack alone.")
    length, time_axis = _time_axis(path, frames)
    dtype = _dtype(path, page)
    frames = _match_pages(tif, path, chain, frames, length)
    offsets = _data_offsets(frames, length, dtype)
    if offsets is None and len(page.shape) != 2:
        raise StackError(f"{path}: expected one frame per page, found pages of {_sizes(page.axes, page.shape)}.")
    shape = (len(frames.pages) if offsets is None else len(offsets), page.shape[-2], page.shape[-1])
    _check_extent(path, frames, offsets, shape, dtype)
    note = "" if time_axis in "TQI" else f"its axis {time_axis} of {shape[0]} entries is taken as time"
    places = {p.offset: t for t, p in enumerate(frames.pages)}
    return Layout(
        shape=shape,
        dtype=dtype,
        axes=time_axis + "YX",
        kind=frames.kind,
        note="; ".join(filter(None, (frames.note, note))),
        joined=frames.joined,
        page_offsets=np.array([p.offset for p in frames.pages], np.int64),
        data_offsets=offsets,
        pages=frames.pages if offsets is None else [],
        later_tags={code: places.get(offset, 1) for code, offset in chain.later_tags.items()},
    )


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF file so that tifffile looks at this file only."""
    # The indices of Micro-Manager and NDTiff reach for the other files of a set, and the guess at ScanImage's frames
    # can miss the last one; the chain of pages is all we need.
    flags: dict[str, Any] = {"is_mmstack": False, "is_ndtiff": False, "is_scanimage": False}
    tif = tifffile.TiffFile(path, **flags)
    if tif.pages and names_other_files(tif.pages.first.description):
        tif.close()
        flags |= {"is_ome": False, "is_imagej": False}
        tif = tifffile.TiffFile(path, **flags)
    return tif


def _find_frames(tif: tifffile.TiffFile, path: Path, mixed: bool) -> _Frames:
    """Choose the pages that make the stack: those of one series, or of many single images of one kind."""
    if mixed:  # tifffile would take the pages to be alike from the first and last ones
        tif.is_uniform = False
    found = _all_series(tif)
    series = [s for s in found if not s.keyframe.is_reduced] or found  # without thumbnails
    if not series or any(0 in _axes_and_sizes(s)[1] for s in series):
        raise StackError(f"{path}: the file is empty: it holds no voxels.")
    frames = _one_series(path, series[0]) if len(series) == 1 else _joined_series(path, series)
    return _with_header(tif, path, frames)


def _all_series(tif: Any) -> list[tifffile.TiffPageSeries]:
    """Return the series of a file; from tifffile 2026.5.2 on, the axes of size one have to be asked for."""
    series: Any = tif.series(squeeze=False) if callable(tif.series) else tif.series
    return list(series)


def forget_series(tif: tifffile.TiffFile) -> None:
    """Let go of the series of a file: they hold an object per page, which a long recording has no use for."""
    held = vars(tif)
    held.pop("series", None)
    held.get("_series", {}).clear()  # from tifffile 2026.5.2 on


def _axes_and_sizes(series: Any) -> tuple[str, tuple[int, ...]]:
    """Return the axes of a series as the file names them, those of size one among them."""
    if hasattr(series, "get_axes"):  # before tifffile 2026.5.2
        return series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    return series.axes, series.shape


def _one_series(path: Path, series: tifffile.TiffPageSeries) -> _Frames:
    """Return the frames of a file that is one series."""
    data_offset = series.dataoffset
    try:
        listed = [series.keyframe] if series.is_truncated else list(series)
    except LookupError:  # one block of data that more frames than pages describe
        listed = [series.keyframe]
    while listed[-1] is None:  # the header promises more frames than were recorded
        listed.pop()
    pages = [page for page in listed if page is not None]
    if len(pages) < len(listed):
        raise damaged(path, f"{len(listed) - len(pages)} of {len(listed)} pages are missing")
    axes, sizes = _axes_and_sizes(series)
    frames = _Frames(pages, axes, sizes, series.kind, data_offset=data_offset)
    planar = axes == "SYX" and series.kind == "shaped" and series.dtype.itemsize > 1 and data_offset is not None
    if not planar:
        return frames
    # what tifffile.imwrite makes of an array of 3 or 4 frames, unless it is told that they are not colors
    return replace(frames, axes="QYX", note=f"its {sizes[0]} samples are taken as frames, not as colors")


def _joined_series(path: Path, series: list[tifffile.TiffPageSeries]) -> _Frames:
    """Return the frames of a file that was written image by image or block by block, in file order."""
    first, found = series[0].keyframe, ""
    for other in series:
        many = "".join(axis for axis, size in zip(*_axes_and_sizes(other), strict=True) if size > 1 or axis in "YX")
        plain = other.kind in ("shaped", "generic", "uniform") and many[:-2] in ("", "I", "Q", "T")
        found += many[:-2]
        if not plain or (other.keyframe.shape, other.dtype) != (first.shape, first.dtype):
            listed = "; ".join(f"{_sizes(s.axes, s.shape)} {s.dtype}" for s in series[:4])
            raise StackError(
                f"{path}: expected one stack of frames, found {len(series)} images of different kinds ({listed}"
                f"{', ...' if len(series) > 4 else ''}). Save the stack alone, for example in Fiji, or with "
                f"tifffile.imwrite('stack.tif', tifffile.imread({path.name!r}, series=0), photometric='minisblack')."
            )
    pages = sorted((page for s in series for page in s if page is not None), key=lambda page: page.index)
    axis = "T" if set(found) == {"T"} else "I"
    return _Frames(pages, axis + first.axes, (len(pages), *first.shape), "joined", joined=True)


def _with_header(tif: tifffile.TiffFile, path: Path, frames: _Frames) -> _Frames:
    """Name the axes of nameless pages by the microscope's own header, so that no channels are mixed as time."""
    header = header_sizes(tif, path.name) if frames.kind in ("generic", "uniform", "joined") else {}
    if not header:
        return frames
    count = len(frames.pages)
    promised = int(np.prod(list(header.values())))
    if count == 1 < promised and tif.is_imagej:
        expected = promised * frames.pages[0].nbytes
        raise damaged(path, f"its ImageJ header promises {promised} frames, {expected} bytes, in one block")
    others = promised // header.get("T", 1)  # planes and channels of a time point
    note = _broken_promise(promised, count) if "T" in header and promised != count else ""
    header["T"] = max(count // others, 1)
    axes = "".join(axis for axis in "RTZC" if axis in header)
    page = frames.pages[0]
    return replace(
        frames,
        axes=axes + page.axes,
        sizes=(*(header[axis] for axis in axes), *page.shape),
        note="; ".join(filter(None, (frames.note, note))),
        data_offset=None,
        interleaved=planes_in_turns(tif),
        by_header=True,
    )


def _time_axis(path: Path, frames: _Frames) -> tuple[int, str]:
    """Return the length and name of the one axis that may be time."""
    axes, sizes = frames.axes, frames.sizes
    found = _sizes(axes, sizes)
    many = [(axis, size) for axis, size in zip(axes, sizes, strict=True) if size > 1 and axis not in "YX"]
    names = "".join(axis for axis, _ in many)
    if "S" in names:
        raise StackError(
            f"{path}: expected one gray value per voxel, found colors: {found}, S = samples (RGB or RGBA). Convert it "
            "in Fiji with Image > Type > 16-bit, or keep one color with tifffile.imread(...)[..., 0]. If the samples "
            "are frames, write the file again with tifffile.imwrite(..., photometric='minisblack')."
        )
    if "C" in names:
        keep = _first_of(many, names.index("C"), path, frames)
        raise StackError(
            f"{path}: expected one channel, found {dict(many)['C']}: {found}. Split them in Fiji with Image > Color > "
            f"Split Channels and denoise each file, or keep one with {keep}. If the "
            "channels are time points, say so in Fiji under Image > Properties."
        )
    if len(many) > 1:
        keep = _first_of(many, 0 if names[-1] == "T" else -1, path, frames)
        raise StackError(
            f"{path}: expected one axis besides Y and X, time, found {len(many)}: {found}. Keep one plane, in Fiji "
            f"with Image > Duplicate, or with {keep}."
        )
    if not many:
        raise StackError(
            f"{path}: expected a stack of frames over time, found a single image: {found}. If every frame is a file, "
            f"join them: tifffile.imwrite('stack.tif', {_all_files(path, frames)}, photometric='minisblack')."
        )
    if set(axes[-2:]) != {"Y", "X"} and axes.rstrip("S")[-2:] != "YX":
        raise StackError(f"{path}: expected time as the first axis, found {found}. Move it there with np.moveaxis.")
    return many[0][1], many[0][0]


def _dtype(path: Path, page: tifffile.TiffPage) -> np.dtype:
    """Return the dtype of the voxels in native byte order, if it is one that can be written back."""
    dtype = page.dtype
    if dtype is None or dtype.name not in DTYPES:
        raise StackError(
            f"{path}: expected voxels of {', '.join(DTYPES)}, found {dtype or 'an unknown type'}. Convert it, for "
            f"example: tifffile.imwrite('converted.tif', tifffile.imread({path.name!r}).astype('float32'), "
            "photometric='minisblack')"
        )
    return np.dtype(dtype)


def _match_pages(tif: tifffile.TiffFile, path: Path, chain: PageChain, frames: _Frames, length: int) -> _Frames:
    """Believe the intact chain of pages where a header promises another number of frames."""
    count = len(frames.pages)
    alike = {offset for offset, geometry in chain.pages.items() if geometry == chain.pages.get(frames.pages[0].offset)}
    if frames.kind in ("imagej", "ome") and len(alike) > max(count, length):  # tifffile has left the others out
        pages = [page for page in tif.pages if page.offset in alike]
        for page in pages:
            if page.keyframe is None:
                page.keyframe = frames.keyframe
        return replace(frames, pages=pages, data_offset=None, note=_broken_promise(length, len(pages)))
    if frames.data_offset is not None or count == length:
        return frames
    if count == 1 and len(frames.keyframe.shape) > 2 and frames.keyframe.imagedepth > 1:
        raise StackError(
            f"{path}: expected a page for each frame, found all {length} compressed in one as a volume. Write the file "
            f"again: tifffile.imwrite('stack.tif', tifffile.imread({path.name!r}), photometric='minisblack')."
        )
    if count == 1:
        raise damaged(path, f"its header promises {length} frames, it holds one")
    return replace(frames, note=_broken_promise(length, count))


def _broken_promise(promised: int, count: int) -> str:
    return f"its header promises {promised} frames, it holds {count}: all of those are used"


def _data_offsets(frames: _Frames, length: int, dtype: np.dtype) -> NDArray[np.int64] | None:
    """Return where each frame's voxels start, if they lie in the file as they are."""
    if frames.data_offset is not None:
        frame_bytes = int(np.prod(frames.keyframe.shape[-2:])) * dtype.itemsize
        return frames.data_offset + np.arange(length, dtype=np.int64) * frame_bytes
    if all(page.is_final and _in_one_block(page) for page in frames.pages):
        return np.array([page.dataoffsets[0] for page in frames.pages], np.int64)
    return None


def _in_one_block(page: Page) -> bool:
    """Say whether the strips of a page follow one another; tifffile looks at the first page only."""
    offsets, counts = page.dataoffsets, page.databytecounts
    return len(offsets) == 1 or all(
        offset + count == following for offset, count, following in zip(offsets, counts, offsets[1:], strict=False)
    )


def _check_extent(
    path: Path, frames: _Frames, offsets: NDArray[np.int64] | None, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    """Compare where the voxels of every frame should end with where the file ends."""
    size = path.stat().st_size
    if offsets is not None:
        ends = offsets + int(np.prod(shape[1:])) * dtype.itemsize
        missing = offsets < 8
    else:
        ends = np.array(
            [max(map(sum, zip(p.dataoffsets, p.databytecounts, strict=False)), default=0) for p in frames.pages]
        )
        segments = int(np.prod(frames.keyframe.chunked))
        missing = np.array([len(p.dataoffsets) != segments or 0 in p.databytecounts for p in frames.pages], bool)
    if missing.any():
        raise damaged(path, f"frame {int(missing.argmax())} of {shape[0]} has no pixel data")
    if ends.max() > size:
        complete = int((ends <= size).sum())
        raise damaged(path, f"it holds {complete} of {shape[0]} frames: expected {ends.max()} bytes, found {size}")


def _sizes(axes: str, sizes: tuple[int, ...]) -> str:
    """Return axes with sizes for a message: "axes TCYX = 100 x 2 x 64 x 64", without those of size one."""
    kept = [(axis, size) for axis, size in zip(axes, sizes, strict=True) if size > 1 or axis in "YX"]
    return f"axes {''.join(axis for axis, _ in kept)} = {_times([size for _, size in kept])}"


def _times(sizes: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, sizes))


def _all_files(path: Path, frames: _Frames) -> str:
    """Return the Python that reads all frames of a folder of files with one each."""
    text = frames.keyframe.description
    if "<OME" in text and "FileName=" in text:  # tifffile finds the others by the names, from any of them
        return f"tifffile.imread({path.name!r})"
    # which sorts the names in every version of tifffile, as imread does not
    return f"tifffile.TiffSequence('*.tif').asarray({'is_ome=False' * ('<OME' in text)})"


def _first_of(many: list[tuple[str, int]], position: int, path: Path, frames: _Frames) -> str:
    """Return the line of Python that keeps the first entry of one of the axes before Y and X."""
    index = [":"] * len(many)
    index[position] = "0"
    picked = f"tifffile.imread({path.name!r})[{', '.join(index)}]"
    if frames.by_header:
        if not frames.interleaved:
            return "the software that wrote it: the header does not tell which pages belong together"
        stride = int(np.prod([size for axis, size in many if axis != "T"]))
        picked = f"tifffile.imread({path.name!r}, key=range(0, {len(frames.pages)}, {stride}))"
    return f"tifffile.imwrite('first.tif', {picked}, photometric='minisblack')"
