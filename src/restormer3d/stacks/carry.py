"""What of a recording's header goes along with its denoised frames.

All dialects are written in one way: plain uncompressed pages in the source's byte order, with the tags of the source's
pages copied byte for byte; only descriptions that would not be true of the new file are rewritten.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile

from restormer3d.stacks.chain import StackError
from restormer3d.stacks.dialects import names_other_files, single_file_ome
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
ASCII, RATIONALS = 2, {5: "I", 10: "i"}
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, COLOR_MAP = 282, 283, 296, 320
SCANIMAGE_MAGIC = 0x07030301

ExtraTag = tuple[int, int, int, bytes | tuple[int, ...], bool]


class WriteOptions(NamedTuple):
    """Arguments for `tifffile.TiffWriter` and for its `write`, and whether every page has its own tags."""

    file: dict[str, Any]
    page: dict[str, Any]
    tags_per_page: bool


def file_bytes(shape: tuple[int, int, int], dtype: np.dtype, tag_bytes: int = 0) -> int:
    """Return the size of an uncompressed file whose pages carry `tag_bytes` of tags each."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize + shape[0] * (PAGE_BYTES + tag_bytes)


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
        return WriteOptions({"bigtiff": file_bytes(shape, dtype) > classic_limit, "ome": False}, page, False)
    if (tuple(shape), dtype) != (like.shape, like.dtype):
        raise ValueError(f"expected the shape {like.shape} and dtype {like.dtype} of {like.path}, got {shape}, {dtype}")
    tags = carried_tags(like, 0)
    later = {frame for code, frame in like.layout.later_tags.items() if code in CARRIED_TAGS}
    per_page = len(like.layout.page_offsets) > 1 and (bool(later) or like.layout.joined)
    own_bytes = max((sum(len(tag[3]) for tag in carried_tags(like, frame)) for frame in later), default=0)
    too_large = file_bytes(shape, dtype, 2 * own_bytes) > classic_limit
    # Past 4 GB ImageJ writes a classic TIFF with one directory that describes all frames, and opens no BigTIFF
    # without a plugin: what came in that form goes out in it.
    one_page = like.layout.kind == "imagej" and len(like.layout.page_offsets) == 1 and not like.is_bigtiff
    page |= {"extratags": tags, "truncate": too_large and one_page} | _look(like)
    bigtiff = like.is_bigtiff or (too_large and not one_page)
    return WriteOptions({"bigtiff": bigtiff, "ome": False, "byteorder": like.byteorder}, page, per_page)


def carried_tags(like: TiffStack, frame: int) -> list[ExtraTag]:
    """Return the tags of a frame's page that describe the recording, as tifffile's extra tags."""
    try:
        found = [tag for tag in like.frame_tags(frame) if tag[0] in CARRIED_TAGS]
    except StackError:  # the voxels are worth more than the tags of a damaged directory
        return []
    tags: list[ExtraTag] = []
    for code, kind, count, value in found:  # of descriptions there may be two: the user's and tifffile's own
        if frame == 0 and code == DESCRIPTION:
            description = _description(like, value)
            if description.strip(b"\0"):
                tags.append((code, ASCII, 0, description, True))
        elif kind in RATIONALS:  # tifffile counts packed pairs twice
            pairs = struct.iter_unpack(f"{like.byteorder}2{RATIONALS[kind]}", value[: len(value) // 8 * 8])
            values = tuple(number for pair in pairs for number in pair)
            tags.append((code, kind, len(values) // 2, values, True))
        else:
            tags.append((code, kind, count, value, True))
    return tags


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
    if text.startswith("ImageJ="):
        counted = {"T": b"images|frames", "Z": b"images|slices"}.get(like.axes[0], b"images")
        return re.sub(rb"(?m)^(%b)=\d+" % counted, rb"\1=%d" % like.shape[0], raw)
    try:
        if like.layout.kind == "shaped":
            header = json.loads(text)
            if isinstance(header, dict) and "truncated" in header:
                return json.dumps({key: value for key, value in header.items() if key != "truncated"}).encode()
        if "<OME" in text[:2000]:
            return single_file_ome(text, like.path.name, like.shape[0], like.axes[0]).encode()
    except (ElementTree.ParseError, ValueError):  # a header that tifffile did not follow either
        return b"" if names_other_files(text) else raw
    return raw


def scanimage_header(like: TiffStack) -> bytes:
    """Return the block of settings that ScanImage puts between the header of a BigTIFF and its first page."""
    with like.path.open("rb") as file:
        start = file.read(32)
        if not like.is_bigtiff or like.byteorder != "<":
            return b""
        magic, _, settings, regions = struct.unpack("<IIII", start[16:])
        return start[16:] + file.read(settings + regions) if magic == SCANIMAGE_MAGIC else b""
