"""What acquisition software writes into a TIFF's headers about channels, planes and time points.

tifffile reads most of it; here are the cases where its answer would mix channels or reach for other files:
OME sets spread over several files (Bruker, Micro-Manager), ScanImage, and ImageJ headers that do not fit the pages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from xml.etree import ElementTree

import numpy as np
import tifffile

SCANIMAGE_CHANNELS = re.compile(r"\bchannels?Save\s*=\s*([^\r\n]*)")
SCANIMAGE_CHANNEL_COUNT = re.compile(r"\bnumberOfChannelsSave\s*=\s*(\d+)")
SCANIMAGE_PLANES = re.compile(r"(?:hStackManager\.numSlices|stackNumSlices|numberOfZSlices)\s*=\s*(\d+)")
# Pages of a volume: frames while the lens or piezo flies back are saved, too.
SCANIMAGE_VOLUME = (
    re.compile(r"numFramesPerVolumeWithFlyback\s*=\s*(\d+)"),
    re.compile(r"hFastZ\.numFramesPerVolume\s*=\s*(\d+)"),
)
SCANIMAGE_FLYBACK = re.compile(r"numDiscardFlybackFrames\s*=\s*(\d+)")
SCANIMAGE_SLOW = re.compile(r"stackMode\s*=\s*'slow'")
SCANIMAGE_STACK_OFF = re.compile(r"(?:hStackManager\.enable|hFastZ\.enable|fastZEnable)\s*=\s*(?:false|0)")
SCANIMAGE_STACK_ON = re.compile(r"(?:hStackManager\.enable|hFastZ\.enable|fastZEnable)\s*=\s*(?:true|1)")


def names_other_files(xml: str) -> bool:
    """Say whether an OME header places planes in files by name, or lies in a companion file."""
    return "FileName=" in xml or "BinaryOnly" in xml


def header_sizes(tif: tifffile.TiffFile, file_name: str) -> dict[str, int]:
    """Return how many positions R, time points T, planes Z and channels C the header gives to this file.

    Empty where no header says anything; R only where there are several.
    """
    page = tif.pages.first
    if "<OME" in page.description[:2000]:
        return _ome_sizes(page.description, file_name, len(tif.pages))
    if page.is_imagej:
        header = tif.imagej_metadata or {}
        names = {"T": "frames", "Z": "slices", "C": "channels"}
        return {axis: max(int(header.get(name, 1)), 1) for axis, name in names.items()}
    if page.is_scanimage:
        return _scanimage_sizes(f"{page.software}\n{page.description}")
    return {}


def _scanimage_sizes(text: str) -> dict[str, int]:
    """Read the numbers of channels and planes from ScanImage's settings, versions 3 to 2023."""
    channels = planes = 1
    if found := SCANIMAGE_CHANNELS.search(text):
        channels = max(len(re.findall(r"\d+", found[1])), 1)
    elif found := SCANIMAGE_CHANNEL_COUNT.search(text):
        channels = max(int(found[1]), 1)
    stacking = SCANIMAGE_STACK_ON.search(text) or not SCANIMAGE_STACK_OFF.search(text)
    if stacking and (found := SCANIMAGE_PLANES.search(text)):
        planes = _pages_of_a_volume(text, max(int(found[1]), 1))
    return {"Z": planes, "C": channels}


def _pages_of_a_volume(text: str, planes: int) -> int:
    """Count the pages of a channel after which ScanImage comes back to the first of several planes."""
    if planes == 1:
        return 1
    for pattern in SCANIMAGE_VOLUME:
        if (found := pattern.search(text)) and int(found[1]) >= planes:
            return int(found[1])
    found = SCANIMAGE_FLYBACK.search(text)
    return planes + (int(found[1]) if found else 0)


def planes_in_turns(tif: tifffile.TiffFile) -> bool:
    """Say whether planes follow one another page by page: a slow stack has all frames of one, then of the next."""
    page = tif.pages.first
    return not page.is_scanimage or not SCANIMAGE_SLOW.search(f"{page.software}\n{page.description}")


def _ome_sizes(xml: str, file_name: str, pages: int) -> dict[str, int]:
    """Count the positions, time points, planes and channels that one file of an OME set of so many pages holds."""
    own = _ome_planes(xml, file_name, pages)
    sizes = {axis: len({plane[i] for plane in own}) for i, axis in enumerate("RTZC")} if own else {}
    return {axis: size for axis, size in sizes.items() if axis != "R" or size > 1}


def _ome_planes(xml: str, file_name: str, pages: int) -> set[tuple[int, int, int, int]]:
    """Return the (image, time, plane, channel) of every page in this file of an OME set; empty if it can't be told.

    A file that was renamed is not in the list; if all files of the set hold one channel and one plane each,
    any of them can stand for it, otherwise the planes of the whole set are returned.

    Parameters
    ----------
    xml, file_name : str
        The header, and the name of the file that it came from.
    pages : int
        Of that file; the others are taken to be as long.
    """
    by_file: dict[str, set[tuple[int, int, int, int]]] = defaultdict(set)
    try:
        root = ElementTree.fromstring(xml)
        for image, pixels in enumerate(root.iter(_qualified(root, "Pixels"))):
            listed = pixels.findall(_qualified(root, "TiffData"))
            least = pages if len(listed) == 1 else 0  # what alone describes a file is of all its pages
            for data in listed:
                uuid = data.find(_qualified(root, "UUID"))
                name = file_name if uuid is None else uuid.get("FileName", file_name)
                usual = 1 if "IFD" in data.attrib else pages  # so the OME model says
                count = max(int(data.get("PlaneCount", data.get("NumPlanes", usual))), least)
                by_file[name] |= {(image, *place) for place in _tiff_data_places(pixels, data, count)}
    except (ElementTree.ParseError, ValueError, KeyError):  # some software crops a file and keeps its header
        return set()
    if file_name in by_file:
        return by_file[file_name]
    alike = all(len({p[2:] for p in planes}) == 1 for planes in by_file.values())
    return next(iter(by_file.values()), set()) if alike else set().union(*by_file.values())


def _tiff_data_places(pixels: ElementTree.Element, data: ElementTree.Element, count: int) -> list[tuple[int, int, int]]:
    """Return the (time, plane, channel) of the `count` consecutive pages that one TiffData element describes."""
    order = pixels.get("DimensionOrder", "XYCZT")[2:]
    sizes = [int(pixels.get(f"Size{axis}", 1)) for axis in order]
    first = np.ravel_multi_index([int(data.get(f"First{axis}", 0)) for axis in order], sizes, order="F")
    planes = np.arange(first, min(first + count, np.prod(sizes)))
    places = dict(zip(order, np.unravel_index(planes, sizes, order="F"), strict=True))
    return list(zip(*(places[axis].tolist() for axis in "TZC"), strict=True))


def single_file_ome(xml: str, file_name: str, frames: int, axis: str) -> str:
    """Return an OME header for a file that holds all its `frames` pages itself, in order, in one channel.

    Names of other files, other positions and other channels are taken out; everything else (physical sizes,
    time increment, instrument, annotations) is kept.

    Parameters
    ----------
    xml : str
        The header of the file the frames came from.
    file_name : str
        Its name, to find its own channel in a set of files.
    frames : int
        Number of pages.
    axis : str
        What is taken as time: "Z", or any other for T.

    Returns
    -------
    str
        OME-XML; empty where the header only points to a companion file.
    """
    root = ElementTree.fromstring(xml)
    namespace = root.tag.removesuffix("OME").strip("{}")
    if namespace:
        ElementTree.register_namespace("", namespace)
    root.attrib.pop("UUID", None)
    here = _ome_planes(xml, file_name, frames)
    image_number, _, plane, channel = min(here, default=(0, 0, 0, 0))
    images = root.findall(_qualified(root, "Image"))
    for image in images[:image_number] + images[image_number + 1 :]:
        root.remove(image)
    pixels = root.find(f".//{_qualified(root, 'Pixels')}")
    if pixels is None:  # all is in a companion file that knows nothing of this one
        return ""
    time_axis = "Z" if axis == "Z" else "T"
    for name in "TZC":
        pixels.set(f"Size{name}", str(frames) if name == time_axis else "1")
    channels = pixels.findall(_qualified(root, "Channel"))
    for other in channels[:channel] + channels[channel + 1 :]:
        pixels.remove(other)
    own = {"TheC": channel} if time_axis == "Z" else {"TheC": channel, "TheZ": plane}
    _keep_planes(root, pixels, own)
    times = sorted({time for _, time, _, _ in here})
    if time_axis == "T" and len(times) == frames:
        _keep_times(root, pixels, times)
    place = _replace_tiff_data(root, pixels)
    place.attrib.update({"IFD": "0", "PlaneCount": str(frames)})
    return '<?xml version="1.0" encoding="UTF-8"?>' + ElementTree.tostring(root, encoding="unicode")


def _keep_planes(root: ElementTree.Element, pixels: ElementTree.Element, own: dict[str, int]) -> None:
    """Remove the plane records of other channels and planes, and number the kept ones from zero."""
    for plane in pixels.findall(_qualified(root, "Plane")):
        if any(plane.get(key, "0") != str(value) for key, value in own.items()):
            pixels.remove(plane)
        plane.attrib.update(dict.fromkeys(own, "0"))


def _keep_times(root: ElementTree.Element, pixels: ElementTree.Element, times: list[int]) -> None:
    """Remove the plane records of frames in other files of the set, and number the kept ones from zero."""
    for plane in pixels.findall(_qualified(root, "Plane")):
        time = int(plane.get("TheT", "0"))
        if time in times:
            plane.set("TheT", str(times.index(time)))
        else:
            pixels.remove(plane)


def _replace_tiff_data(root: ElementTree.Element, pixels: ElementTree.Element) -> ElementTree.Element:
    """Remove all TiffData elements and return a new one at the place the schema wants it: before Plane."""
    for data in pixels.findall(_qualified(root, "TiffData")):
        pixels.remove(data)
    before = [_qualified(root, name) for name in ("Channel", "BinData", "MetadataOnly")]
    new = ElementTree.Element(_qualified(root, "TiffData"))
    pixels.insert(sum(child.tag in before for child in pixels), new)
    return new


def _qualified(root: ElementTree.Element, name: str) -> str:
    """Return an element name in the namespace of the document."""
    return root.tag.removesuffix("OME") + name
