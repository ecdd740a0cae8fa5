"""The chain of pages of a TIFF file, followed link by link before any reader trusts it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_TAGS = 4096  # as in libtiff and tifffile: more means that the file is damaged

# ImageWidth, ImageLength, BitsPerSample, Compression, SamplesPerPixel, RowsPerStrip, Predictor, TileWidth, TileLength,
# SampleFormat: what two pages must share to be frames of one stack that is decoded in one way.
GEOMETRY = (256, 257, 258, 259, 277, 278, 317, 322, 323, 339)

Geometry = tuple[tuple[int, int], ...]  # (tag, value)

SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"PK": "a ZIP archive",
    b"\x93NUMPY": "a NumPy file",
    b"GIF8": "a GIF image",
    b"RIFF": "an AVI movie",
    b"\x1f\x8b": "a gzip archive",
}


class PageChain(NamedTuple):
    """The pages of a file, in order.

    Attributes
    ----------
    pages : dict
        From the position of each page's directory to its geometry: (tag, value) pairs.
    later_tags : dict
        From the code of every tag of the pages after the first to the position of the first of them that has it.
    """

    pages: dict[int, Geometry]
    later_tags: dict[int, int]


class StackError(ValueError):
    """A file that can't be used as one stack of frames; the message says why and what to do."""


def damaged(path: Path, found: str) -> StackError:
    """Return the error for a file that was cut off or overwritten."""
    return StackError(
        f"{path}: the file is truncated or damaged: {found}. Copy it again from where it was recorded (compare the "
        "sizes); if the original is damaged too, open it in Fiji and save the frames that can be read."
    )


def page_chain(path: Path) -> PageChain:
    """Follow the chain of pages from the header to its end.

    tifffile ends quietly at a broken link, and would return the frames before it as if they were all; and it takes
    all pages to be alike from a look at a few.

    Returns
    -------
    PageChain

    Raises
    ------
    StackError
        Not a TIFF file, no page, or a chain that leaves the file or bites its tail.
    """
    pages: dict[int, Geometry] = {}
    later: dict[bytes, int] = {}
    known: dict[bytes, Geometry] = {}  # most pages have the same geometry: parse it once
    with path.open("rb") as file:
        size = path.stat().st_size
        order, big, offset = _header(path, file)
        pointer, entry = (f"{order}Q", 20) if big else (f"{order}I", 12)
        codes = {struct.pack(f"{order}H", code) for code in GEOMETRY}
        while offset:
            if offset in pages:
                raise damaged(path, f"page {len(pages)} points back to an earlier page")
            if offset >= size:
                raise damaged(path, f"page {len(pages)} should start at byte {offset}, the file ends at {size}")
            file.seek(offset)
            try:
                tags = struct.unpack(f"{order}Q" if big else f"{order}H", file.read(8 if big else 2))[0]
                if not 0 < tags <= MAX_TAGS:
                    raise damaged(path, f"page {len(pages)} claims to have {tags} tags")
                directory = file.read(tags * entry)
                following = struct.unpack(pointer, file.read(struct.calcsize(pointer)))[0]
            except struct.error as error:
                raise damaged(path, f"the file ends inside the directory of page {len(pages)}") from error
            if not pages and _text_end(directory, order, entry) > size:
                raise damaged(path, f"its description goes on beyond the end of the file at {size}")
            entries = [directory[i : i + entry] for i in range(0, len(directory), entry)]
            for code in {e[:2] for e in entries} - later.keys() if pages else ():
                later[code] = offset
            geometry = b"".join(e for e in entries if e[:2] in codes)
            if geometry not in known:
                known[geometry] = _geometry(geometry, order, entry)
            pages[offset] = known[geometry]
            offset = following
    if not pages:
        raise StackError(f"{path}: the file is empty: a TIFF header without a single image.")
    return PageChain(pages, {struct.unpack(f"{order}H", code)[0]: place for code, place in later.items()})


def _header(path: Path, file: BinaryIO) -> tuple[str, bool, int]:
    """Return byte order, whether it is a BigTIFF, and the position of the first page."""
    header = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(header[:2], "")
    version = struct.unpack(f"{order}H", header[2:4])[0] if order and len(header) >= 8 else 0
    if version == 42:
        return order, False, struct.unpack(f"{order}I", header[4:8])[0]
    if version == 43 and len(header) == 16:
        return order, True, struct.unpack(f"{order}Q", header[8:])[0]
    if not header:
        raise StackError(f"{path}: the file is empty: zero bytes. Copy it again from where it was recorded.")
    found = next((name for start, name in SIGNATURES.items() if header.startswith(start)), f"bytes {header[:8]!r}")
    raise StackError(
        f"{path}: expected a TIFF file, found {found}. Open it in Fiji and save it with File > Save As > Tiff."
    )


def _geometry(entries: bytes, order: str, size: int) -> Geometry:
    """Parse directory entries, whatever integer type they are written in; of several values count only how many."""
    pairs = []
    for start in range(0, len(entries), size):
        code, dtype, count = struct.unpack_from(f"{order}HHQ" if size == 20 else f"{order}HHI", entries, start)
        number = {1: "B", 3: "H", 16: "Q"}.get(dtype, "I")
        value = struct.unpack_from(f"{order}{number}", entries, start + (12 if size == 20 else 8))[0]
        pairs.append((code, value if count == 1 else -count))
    return tuple(pairs)


def _text_end(directory: bytes, order: str, size: int) -> int:
    """Return where the last text value of a page ends in the file."""
    form = f"{order}HHQQ" if size == 20 else f"{order}HHII"
    entries = struct.iter_unpack(form, directory[: len(directory) // size * size])
    return max((count + offset for _, dtype, count, offset in entries if dtype == 2 and count > 8), default=0)
