"""What a lab sees when its TIFF files go in and come out: every dialect read, nothing lost, bad files named."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from restormer3d.stacks import (
    StackError,
    TiffStack,
    check_output,
    check_stack,
    open_stack,
    to_dtype,
    too_coarse,
    write_stack,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
DTYPES = ["int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "float64"]
SHAPE = (7, 24, 32)

# name: (arguments for TiffWriter, arguments for write)
DIALECTS = {
    "plain": ({}, {"metadata": None}),
    "shaped": ({}, {"metadata": {"axes": "TYX"}}),
    "bigtiff": ({"bigtiff": True}, {"metadata": {"axes": "ZYX"}}),
    "imagej": ({"imagej": True}, {"metadata": {"axes": "TYX", "finterval": 0.1}, "resolution": (2.5, 2.5)}),
    "ome": ({"ome": True}, {"metadata": {"axes": "TYX", "TimeIncrement": 0.03}}),
    "strips": ({}, {"rowsperstrip": 5}),
    "zlib": ({}, {"compression": "zlib"}),
    "lzw": ({}, {"compression": "lzw", "rowsperstrip": 7}),
    "zstd": ({}, {"compression": "zstd", "predictor": True}),
    "tiled": ({}, {"tile": (16, 16)}),
}


def frames_of(dtype: str = "int16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(7)
    low, high = (-100, 100) if np.dtype(dtype).kind in "if" else (0, 200)
    return rng.integers(low, high, shape).astype(dtype)


def save(path: Path, data: np.ndarray, dialect: str = "shaped", **more: object) -> Path:
    """Write with tifffile, as a microscope or a script would."""
    file, page = DIALECTS[dialect]
    file = file | {key: more.pop(key) for key in ("byteorder", "bigtiff", "imagej", "ome") if key in more}
    with tifffile.TiffWriter(path, **file) as writer:
        writer.write(data, **({"photometric": "minisblack"} | page | more))
    return path


def rewrite(source: Path, target: Path, **more: object) -> np.ndarray:
    """Send a file through the package unchanged, as float32 or float64 frames."""
    with open_stack(source) as stack:
        data = stack[:]
        wide = np.float64 if stack.dtype.itemsize >= 4 else np.float32
        write_stack(target, (f.astype(wide) for f in data), shape=stack.shape, dtype=stack.dtype, like=stack, **more)
    return data


def tag(path: Path, code: int | str, page: int = 0) -> object:
    with tifffile.TiffFile(path) as tif:
        return tif.pages[page].tags.valueof(code)


def series(path: Path) -> tuple[str, tuple[int, ...], np.dtype, str]:
    with tifffile.TiffFile(path) as tif:
        found = tif.series
        if callable(found):  # from tifffile 2026.5.2 on
            first = found(squeeze=False)[0]
            return first.axes, first.shape, first.dtype, tif.byteorder
        return found[0].get_axes(squeeze=False), found[0].get_shape(squeeze=False), found[0].dtype, tif.byteorder


# --- reading and writing back ---


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dialect_comes_back_as_it_went_in(tmp_path, dtype, byteorder, dialect):
    if dialect == "imagej" and dtype not in ("int16", "uint8", "uint16", "float32"):
        pytest.skip("ImageJ has no such dtype")
    if dtype == "float16" and dialect in ("ome", "zstd"):
        pytest.skip("not in the OME model, no predictor")
    data = frames_of(dtype)
    source = save(tmp_path / "in.tif", data, dialect, byteorder=byteorder)
    with open_stack(source) as stack:
        assert (stack.shape, stack.dtype, stack.nbytes) == (data.shape, np.dtype(dtype), data.nbytes)
        np.testing.assert_array_equal(stack[:], data)
    rewrite(source, tmp_path / "out.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data)
    assert series(tmp_path / "out.tif") == series(source)
    assert {tag(tmp_path / "out.tif", name) is None for name in ("XResolution", "YResolution", "ResolutionUnit")} == {
        False
    }
    if dialect != "ome":
        assert tag(tmp_path / "out.tif", "ImageDescription") == tag(source, "ImageDescription")


@pytest.fixture(scope="module", params=["shaped", "zlib", "tiled", "strips"])
def indexable(request, tmp_path_factory):
    data = frames_of()
    with open_stack(save(tmp_path_factory.mktemp("index") / "in.tif", data, request.param, byteorder=">")) as stack:
        yield stack, data


INDEX = st.one_of(st.integers(-7, 6), st.slices(7))


@settings(max_examples=60, deadline=None)
@given(key=st.one_of(INDEX, st.tuples(INDEX), st.tuples(INDEX, st.slices(24)), st.tuples(INDEX, INDEX, st.slices(32))))
def test_a_stack_is_indexed_like_an_array(indexable, key):
    stack, data = indexable
    patch = stack[key]
    np.testing.assert_array_equal(patch, data[key])
    assert patch.dtype == data.dtype
    assert np.shape(patch) == np.shape(data[key])


def test_wrong_indices_are_refused(tmp_path):
    with open_stack(save(tmp_path / "in.tif", frames_of())) as stack:
        for key in (7, -8, (0, 0, 0, 0)):
            with pytest.raises(IndexError):
                stack[key]
        with pytest.raises(TypeError):
            stack["a"]
    with pytest.raises(ValueError, match="closed"):
        stack[0]


def test_patches_are_copies(tmp_path):
    with open_stack(save(tmp_path / "in.tif", frames_of(), "zlib")) as stack:
        stack[0][:] = 0
        assert stack[0].any()


def test_a_large_file_does_not_grow_the_process(tmp_path):
    """A pass over 400 MB, patch by patch, stays far below it."""
    path = tmp_path / "sparse.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(None, shape=(1600, 512, 256), dtype="uint16", photometric="minisblack")
    script = f"""
import resource
from restormer3d.stacks import open_stack
with open_stack({str(path)!r}) as stack:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stack[:, 100:101, 100:101]
    for t in range(0, 1600, 64):
        stack[t : t + 64].max()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 120_000  # kilobytes


def test_threads_forks_and_pickles_share_a_stack(tmp_path):
    data = frames_of(shape=(60, 24, 32))
    for dialect in ("shaped", "zlib"):
        with open_stack(save(tmp_path / f"{dialect}.tif", data, dialect)) as stack:
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(partial(_wrong_frames, stack, data), range(8))) == [[]] * 8
            with pickle.loads(pickle.dumps(stack)) as again:
                np.testing.assert_array_equal(again[:], data)
    with open_stack(tmp_path / "zlib.tif") as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        with multiprocessing.get_context("fork").Pool(2, _share, (stack, data)) as pool:
            assert pool.map(_wrong_in_child, range(4)) == [[], [], [], []]


def _wrong_frames(stack, data, _=0):
    return [t for t in range(len(data)) if not np.array_equal(stack[t], data[t])]


def _share(*shared):
    globals()["shared"] = shared


def _wrong_in_child(_):
    return _wrong_frames(*globals()["shared"])


# --- the dialects of microscopes ---


@pytest.mark.parametrize(("axes", "imagej"), [("TZCYX", True), ("TZCYX", False), ("TCYX", False), ("ZYX", True)])
def test_axes_of_size_one_are_kept(tmp_path, axes, imagej):
    data = frames_of().reshape(7, *[1] * (len(axes) - 3), 24, 32)
    source = save(tmp_path / "in.tif", data, imagej=imagej, metadata={"axes": axes})
    with open_stack(source) as stack:
        assert stack.axes == axes[0] + "YX"
        assert ("axis Z of 7 entries is taken as time" in stack.note) == (axes == "ZYX")
    rewrite(source, tmp_path / "out.tif")
    assert series(tmp_path / "out.tif") == series(source)


@pytest.mark.parametrize("imagej", [True, False])
def test_one_directory_for_all_frames(tmp_path, imagej):
    """ImageJ's form of stacks above 4 GB."""
    data = frames_of()
    source = save(tmp_path / "in.tif", data, imagej=imagej, truncate=True, metadata={"axes": "TYX"})
    rewrite(source, tmp_path / "small.tif")
    rewrite(source, tmp_path / "large.tif", classic_limit=1000)
    for name, pages in (("small.tif", 7), ("large.tif", 1 if imagej else 7)):
        np.testing.assert_array_equal(tifffile.imread(tmp_path / name), data)
        with tifffile.TiffFile(tmp_path / name) as tif:
            assert len(tif.pages) == pages
            assert tif.is_bigtiff == (name == "large.tif" and not imagej)


@pytest.mark.parametrize("dialect", ["plain", "shaped", "ome", "imagej", "zlib"])
def test_bigtiff_above_the_limit_of_classic_tiff(tmp_path, dialect):
    source = save(tmp_path / "in.tif", frames_of(), dialect)
    data = rewrite(source, tmp_path / "out.tif", classic_limit=5000)
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.is_bigtiff
        assert tif.is_imagej == (dialect == "imagej")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data)
    write_stack(tmp_path / "new.tif", data, shape=data.shape, dtype=data.dtype, classic_limit=5000)
    with tifffile.TiffFile(tmp_path / "new.tif") as tif:
        assert tif.is_bigtiff


@pytest.mark.parametrize("block", [1, 3])
def test_images_written_one_by_one_are_frames(tmp_path, block):
    data = frames_of(shape=(6, 24, 32))
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        for t in range(0, 6, block):
            writer.write(data[t : t + block].squeeze(), photometric="minisblack")
    rewrite(tmp_path / "in.tif", tmp_path / "out.tif")
    with open_stack(tmp_path / "out.tif") as stack:
        np.testing.assert_array_equal(stack[:], data)


def test_blocks_of_frames_appended_one_after_the_other_are_one_stack(tmp_path):
    data, path = frames_of(shape=(9, 24, 32)), tmp_path / "in.tif"
    for part in (data[:4], data[4:8], data[8]):
        axes = {"axes": "TYX"[3 - part.ndim :]}
        tifffile.imwrite(path, part, append=path.exists(), photometric="minisblack", metadata=axes)
    rewrite(path, tmp_path / "out.tif")
    for name in ("in.tif", "out.tif"):
        with open_stack(tmp_path / name) as stack:
            assert stack.axes == "TYX"
            np.testing.assert_array_equal(stack[:], data)
    tifffile.imwrite(path, data[:, ::2], append=True, photometric="minisblack", metadata={"axes": "TYX"})
    with pytest.raises(StackError, match="expected one stack of frames, found 4 images"):
        open_stack(path)


def test_four_frames_that_tifffile_took_for_colors(tmp_path):
    data = frames_of(shape=(4, 24, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tifffile.imwrite(tmp_path / "in.tif", data)
    with open_stack(tmp_path / "in.tif") as stack:
        assert "taken as frames" in stack.note
    rewrite(tmp_path / "in.tif", tmp_path / "out.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data)


def scanimage(
    path: Path, channels: str = "1", planes: int = 1, frames: int = 12, bigtiff: bool = True, more: str = ""
) -> Path:
    """Write pages as ScanImage does: settings in every page, a time stamp of its own in each."""
    settings = (
        f"SI.VERSION_MAJOR = 2020\nSI.hChannels.channelSave = {channels}\nSI.hStackManager.numSlices = {planes}\n"
        f"SI.hStackManager.enable = {str(planes > 1).lower()}\nSI.hStackManager.framesPerSlice = 1000\n" + more
    )
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder="<") as writer:
        if bigtiff:
            block, regions = settings.encode() + b"\0", b'{"RoiGroups": {}}\0'
            writer.filehandle.write(struct.pack("<IIII", 0x07030301, 4, len(block), len(regions)) + block + regions)
        for t, frame in enumerate(frames_of(shape=(frames, 24, 32))):
            writer.write(
                frame,
                photometric="minisblack",
                metadata=None,
                software=settings,
                description=f"frameTimestamps_sec = {t / 30:.6f}",
                extratags=[(315, 2, 0, b'{"RoiGroups": {}}', False)],
            )
    return path


@pytest.mark.parametrize("bigtiff", [True, False])
def test_scanimage_keeps_every_page_description(tmp_path, bigtiff):
    """All frames of an aborted acquisition are read, whatever number was planned."""
    source = scanimage(tmp_path / "in.tif", bigtiff=bigtiff)
    data = rewrite(source, tmp_path / "out.tif")
    assert data.shape == (12, 24, 32)
    with tifffile.TiffFile(source) as before, tifffile.TiffFile(tmp_path / "out.tif") as after:
        assert after.is_bigtiff == bigtiff
        assert after.scanimage_metadata == before.scanimage_metadata
    plain = {"is_scanimage": False}  # tifffile's guess at the places of the pages can miss the last one
    with tifffile.TiffFile(source, **plain) as before, tifffile.TiffFile(tmp_path / "out.tif", **plain) as after:
        assert len(after.pages) == 12
        for code in ("ImageDescription", "Software", "Artist"):
            assert [p.tags.valueof(code) for p in after.pages] == [p.tags.valueof(code) for p in before.pages]


def test_scanimage_channels_and_planes_are_not_mixed_as_time(tmp_path):
    with pytest.raises(
        StackError, match=r"expected one channel, found 2: axes TCYX = 6 x 2 x 24 x 32.*range\(0, 12, 2"
    ):
        open_stack(scanimage(tmp_path / "channels.tif", channels="[1;2]"))
    with pytest.raises(StackError, match="axes TZYX = 4 x 3 x 24 x 32"):
        open_stack(scanimage(tmp_path / "planes.tif", planes=3))
    flyback = "SI.hFastZ.numDiscardFlybackFrames = 1\n"
    with_flyback = "SI.hStackManager.numFramesPerVolume = 3\nSI.hStackManager.numFramesPerVolumeWithFlyback = 4\n"
    for more in (flyback, with_flyback, flyback + "SI.hFastZ.numFramesPerVolume = 4\n"):
        with pytest.raises(StackError, match=r"axes TZYX = 3 x 4 x 24 x 32.*range\(0, 12, 4\)"):
            open_stack(scanimage(tmp_path / "volumes.tif", planes=3, more=more))
    with pytest.raises(StackError, match="header does not tell which pages") as error:
        open_stack(scanimage(tmp_path / "slow.tif", planes=3, more="SI.hStackManager.stackMode = 'slow'\n"))
    assert "range(" not in str(error.value)
    old = "state.acq.numberOfChannelsSave=2\nstate.acq.numberOfZSlices=1\n"
    with tifffile.TiffWriter(tmp_path / "old.tif") as writer:
        for frame in frames_of():
            writer.write(frame, photometric="minisblack", metadata=None, description=old)
    with pytest.raises(StackError, match="expected one channel, found 2"):
        open_stack(tmp_path / "old.tif")


def ome_set(path: Path, names: list[str], channels: int) -> Path:
    """Write one file of an OME set: its header names the file of every plane, as Bruker's and Bio-Formats' do."""
    planes = [(c, t) for c in range(channels) for t in range(7)]
    data = "".join(
        f'<TiffData FirstC="{c}" FirstT="{t}" FirstZ="0" IFD="{t}" PlaneCount="1"><UUID FileName="{names[c]}">'
        f"urn:uuid:{c}</UUID></TiffData>"
        for c, t in planes
    )
    data += "".join(f'<Plane TheC="{c}" TheT="{t}" TheZ="0" DeltaT="{c + t / 10}"/>' for c, t in planes)
    named = "".join(f'<Channel ID="Channel:0:{c}" Name="PMT{c}"/>' for c in range(channels))
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0" Name="run"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="int16" SizeX="32" '
        f'SizeY="24" SizeC="{channels}" SizeZ="1" SizeT="7" PhysicalSizeX="0.5" PhysicalSizeXUnit="µm">'
        f"{named}{data}</Pixels></Image></OME>"
    )
    return save(path, frames_of(), "plain", description=xml.encode())


def ome_xml(inside: str, channels: int = 1, times: int = 14, planes: int = 1) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZTC" Type="int16" SizeX="32" SizeY="24" '
        f'SizeC="{channels}" SizeZ="{planes}" SizeT="{times}">{inside}</Pixels></Image></OME>'
    ).encode()


IN_THIS_FILE = '<UUID FileName="in.ome.tif">urn:uuid:1</UUID></TiffData>'


@pytest.mark.parametrize("start", ["<TiffData>", '<TiffData IFD="0">', '<TiffData IFD="0" PlaneCount="1">'])
def test_an_ome_header_need_not_count_the_planes_of_its_own_file(tmp_path, start):
    data = frames_of(shape=(14, 24, 32))
    xml = ome_xml(start + IN_THIS_FILE, channels=2, times=7)
    with pytest.raises(StackError, match="expected one channel, found 2: axes TCYX = 7 x 2"):
        open_stack(save(tmp_path / "in.ome.tif", data, "plain", description=xml))
    xml = ome_xml(start + IN_THIS_FILE, planes=2, times=7)
    with pytest.raises(StackError, match="axes TZYX = 7 x 2"):
        open_stack(save(tmp_path / "in.ome.tif", data, "plain", description=xml))
    with open_stack(save(tmp_path / "in.ome.tif", data, "plain", description=ome_xml(start + IN_THIS_FILE))) as stack:
        assert (stack.axes, stack.shape, stack.note) == ("TYX", data.shape, "")
    elsewhere = '<TiffData FirstC="1"><UUID FileName="other.ome.tif">urn:uuid:2</UUID></TiffData>'
    xml = ome_xml("<TiffData>" + IN_THIS_FILE + elsewhere, channels=2)
    with open_stack(save(tmp_path / "in.ome.tif", data, "plain", description=xml)) as stack:
        assert stack.shape == data.shape


def test_channels_of_an_ome_header_that_tifffile_does_not_follow_are_not_mixed_as_time(tmp_path):
    xml = ome_xml('<TiffData IFD="99" PlaneCount="14"/>', channels=2, times=7)
    source = save(tmp_path / "in.tif", frames_of(shape=(14, 24, 32)), "plain", description=xml)
    with pytest.raises(StackError, match="expected one channel, found 2"):
        open_stack(source)


@pytest.mark.parametrize("name", ["run_Ch2.ome.tif", "renamed.tif"])
def test_one_file_of_a_set_of_channels(tmp_path, name):
    source = ome_set(tmp_path / name, ["run_Ch1.ome.tif", "run_Ch2.ome.tif"], channels=2)
    data = rewrite(source, tmp_path / "out.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data)
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.series[0].axes == "TYX"
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    assert (pixels["SizeC"], pixels["SizeT"], pixels["PhysicalSizeXUnit"]) == (1, 7, "µm")
    assert len(pixels["Plane"]) == 7
    if name == "run_Ch2.ome.tif":
        assert pixels["Channel"]["Name"] == "PMT1"
        assert pixels["Plane"][3]["DeltaT"] == 1.3


def test_one_file_of_a_set_over_time_keeps_its_own_times(tmp_path):
    places = [(0 if t < 7 else 1, t) for t in range(14)]
    data = "".join(
        f'<TiffData FirstT="{t}" IFD="{t % 7}" PlaneCount="1"><UUID FileName="run_{part}.ome.tif">urn:uuid:{part}'
        "</UUID></TiffData>"
        for part, t in places
    )
    data += "".join(f'<Plane TheC="0" TheT="{t}" TheZ="0" DeltaT="{t / 10}"/>' for _, t in places)
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="int16" SizeX="32" SizeY="24" '
        f'SizeC="1" SizeZ="1" SizeT="14"><Channel ID="Channel:0:0"/>{data}</Pixels></Image></OME>'
    )
    rewrite(save(tmp_path / "run_1.ome.tif", frames_of(), "plain", description=xml.encode()), tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        planes = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]["Plane"]
    assert [plane["TheT"] for plane in planes] == list(range(7))
    assert [plane["DeltaT"] for plane in planes] == [t / 10 for t in range(7, 14)]


def test_both_channels_in_one_file_of_a_set(tmp_path):
    with pytest.raises(StackError, match="expected one channel, found 2"):
        open_stack(ome_set(tmp_path / "in.tif", ["in.tif", "in.tif"], channels=2))


def test_imagej_metadata_is_kept(tmp_path):
    meta = {
        "axes": "TYX",
        "unit": "um",
        "finterval": 0.033,
        "fps": 30.0,
        "Info": "laser 920 nm",
        "min": 3.0,
        "max": 9.0,
    }
    meta["Labels"] = [f"frame {t}" for t in range(7)]
    source = save(tmp_path / "in.tif", frames_of("uint16"), "imagej", metadata=meta, resolution=(1.25, 1.25))
    rewrite(source, tmp_path / "out.tif")
    with tifffile.TiffFile(source) as before, tifffile.TiffFile(tmp_path / "out.tif") as after:
        assert after.imagej_metadata == before.imagej_metadata
        assert after.pages[0].resolution == before.pages[0].resolution


def test_ome_metadata_is_kept(tmp_path):
    meta = {
        "axes": "TYX",
        "Name": "mouse 3",
        "PhysicalSizeX": 0.83,
        "PhysicalSizeXUnit": "µm",
        "TimeIncrement": 0.033,
        "TimeIncrementUnit": "s",
        "Channel": {"Name": "GCaMP"},
        "Plane": {"DeltaT": [t / 30 for t in range(7)]},
    }
    rewrite(save(tmp_path / "in.ome.tif", frames_of("uint16"), "ome", metadata=meta), tmp_path / "out.ome.tif")
    with tifffile.TiffFile(tmp_path / "out.ome.tif") as tif:
        image = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]
    pixels = image["Pixels"]
    assert image["Name"] == "mouse 3"
    assert {key: pixels[key] for key in meta if key in pixels and key not in ("Plane", "Channel")} == {
        key: meta[key] for key in ("PhysicalSizeX", "PhysicalSizeXUnit", "TimeIncrement", "TimeIncrementUnit")
    }
    assert pixels["Channel"]["Name"] == "GCaMP"
    assert [plane["DeltaT"] for plane in pixels["Plane"]] == [t / 30 for t in range(7)]


IMAGEJ = "ImageJ=1.53t\nimages=5\n{}=5\nhyperstack=true\n"


@pytest.mark.parametrize("dialect", ["plain", "zlib"])
@pytest.mark.parametrize(
    ("header", "axes"),
    [
        (IMAGEJ.format("frames"), "TYX"),
        (IMAGEJ.format("slices"), "ZYX"),
        ("ImageJ=1.53t\nimages=5\n", "IYX"),
        (ome_xml("<TiffData/>", times=5), "TYX"),
        (ome_xml("<TiffData/>", times=1, planes=5), "ZYX"),
        (ome_xml('<TiffData IFD="0" PlaneCount="5"/>', times=5), "TYX"),
    ],
)
def test_no_page_is_lost_to_a_header_that_promises_fewer(tmp_path, header, axes, dialect):
    data = frames_of(shape=(14, 24, 32))
    source = save(tmp_path / "in.tif", data, dialect, metadata=None, description=header, software=False)
    with open_stack(source) as stack:
        assert stack.axes == axes
        assert ("promises 5 frames, it holds 14" in stack.note) == (axes != "IYX")
    np.testing.assert_array_equal(rewrite(source, tmp_path / "out.tif"), data)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data)
    with open_stack(tmp_path / "out.tif") as stack:
        assert (stack.axes, stack.shape) == (axes, data.shape)
        assert "promises" not in stack.note
    assert b"images=5" not in (tmp_path / "out.tif").read_bytes()


def test_a_description_beside_the_axes_is_kept_with_them(tmp_path):
    source = save(tmp_path / "in.tif", frames_of(), description="laser 920 nm", metadata={"axes": "TYX", "fps": 30.0})
    rewrite(source, tmp_path / "out.tif")
    assert series(tmp_path / "out.tif") == series(source)
    with tifffile.TiffFile(source) as before, tifffile.TiffFile(tmp_path / "out.tif") as after:
        assert after.pages[0].description == "laser 920 nm"
        assert after.shaped_metadata == before.shaped_metadata


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [True, False])
def test_the_place_of_an_image_is_kept(tmp_path, bigtiff, byteorder):
    places = [(286, 5, 1, (3, 2), True), (287, 10, 1, (-7, 2), True), (297, 3, 2, (0, 7), True)]
    file = {"bigtiff": bigtiff, "byteorder": byteorder}
    rewrite(save(tmp_path / "in.tif", frames_of(), "plain", extratags=places, **file), tmp_path / "out.tif")
    assert [tag(tmp_path / "out.tif", code) for code in (286, 287, 297)] == [(3, 2), (-7, 2), (0, 7)]
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert [tif.pages[0].tags[code].count for code in (286, 287, 297)] == [1, 1, 2]


@pytest.mark.parametrize("first", [1, 2, 6])
def test_tags_of_single_pages_are_kept(tmp_path, first):
    times = [f"2024:01:01 00:00:0{t}" if t >= first else None for t in range(7)]
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        for frame, time in zip(frames_of(), times, strict=True):
            writer.write(frame, photometric="minisblack", metadata=None, software=False, datetime=time)
    rewrite(tmp_path / "in.tif", tmp_path / "out.tif")
    assert [tag(tmp_path / "out.tif", "DateTime", t) for t in range(7)] == times


def test_plain_tags_are_kept(tmp_path):
    tags = [(315, 2, 0, b"someone", True), (272, 2, 0, b"scope", True)]
    kept = {"software": "rig 2.1", "datetime": "2024:02:03 04:05:06", "description": "mouse 3, µm".encode()}
    resolution = {"resolution": ((33, 10), (7, 2)), "resolutionunit": "CENTIMETER"}
    source = save(tmp_path / "in.tif", frames_of(), "plain", extratags=tags, **kept, **resolution)
    rewrite(source, tmp_path / "out.tif")
    for code in (270, 272, 282, 283, 296, 305, 306, 315):
        assert tag(tmp_path / "out.tif", code) == tag(source, code) is not None


def test_palette_and_inverted_gray_keep_values_and_look(tmp_path):
    colors = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype("uint16")
    for name, look in (("p.tif", {"photometric": "palette", "colormap": colors}), ("w.tif", {"photometric": 0})):
        source = save(tmp_path / name, frames_of("uint8"), "plain", **look)
        data = rewrite(source, tmp_path / f"out_{name}")
        np.testing.assert_array_equal(data, frames_of("uint8"))
        assert tag(tmp_path / f"out_{name}", 262) == tag(source, 262)
        np.testing.assert_array_equal(tag(tmp_path / f"out_{name}", 320), tag(source, 320))


def test_thumbnails_and_pyramid_levels_are_left_aside(tmp_path):
    data = frames_of()
    with tifffile.TiffWriter(tmp_path / "in.ome.tif", ome=True) as writer:
        options = {"photometric": "minisblack", "tile": (16, 16)}
        writer.write(data, subifds=1, metadata={"axes": "TYX"}, **options)
        writer.write(data[:, ::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(rewrite(tmp_path / "in.ome.tif", tmp_path / "out.tif"), data)


@pytest.mark.parametrize("name", ["fmi_mouse_gcamp_600x256x256.tif", "optinist_mouse_1000x128x128.tif"])
def test_real_recordings(tmp_path, name):
    if not (DATA / name).exists():
        pytest.skip("recordings are not here")
    with open_stack(DATA / name) as stack:
        assert stack.axes == "TYX"
        expected = tifffile.imread(DATA / name, key=range(100, 104))
        np.testing.assert_array_equal(stack[100:104], expected)


# --- bad files ---


def color(path):
    data = np.stack([frames_of("uint8")] * 3, -1)
    return save(path, data, "plain", photometric="rgb")


def two_kinds(path):
    with tifffile.TiffWriter(path) as writer:
        writer.write(frames_of(), photometric="minisblack")
        writer.write(frames_of()[:, :12], photometric="minisblack")
    return path


def one_odd_frame(path):
    with tifffile.TiffWriter(path) as writer:
        for t, frame in enumerate(frames_of()):
            writer.write(frame[: 12 if t == 3 else 24], photometric="minisblack", metadata=None)
    return path


def circular(path):
    save(path, frames_of(), "plain")
    with tifffile.TiffFile(path) as tif:
        last, first = tif.pages.next_page_offset, tif.pages[0].offset
    content = bytearray(path.read_bytes())
    content[last : last + 4] = struct.pack("<I", first)
    path.write_bytes(content)
    return path


def empty(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save(path, np.zeros((0, 24, 32), "uint16"))


def undecodable(path):
    save(path, frames_of(), "zlib")
    with tifffile.TiffFile(path) as tif:
        start, size = tif.pages[5].dataoffsets[0], tif.pages[5].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[start + 10 : start + size - 10] = bytes(size - 20)
    path.write_bytes(content)
    return path


def with_values(dtype, **values):
    def write(path):
        data = frames_of(dtype)
        for frame, value in values.items():
            data[int(frame[1:])] = value
        return save(path, data)

    return write


BAD = {
    "missing": (lambda p: p, "no such file"),
    "folder": (lambda p: p.mkdir() or p, "found a folder"),
    "text": (lambda p: p.write_text("frame,value\n") and p, "expected a TIFF file, found bytes"),
    "png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)) and p, "found a PNG image"),
    "zero bytes": (lambda p: p.touch() or p, "the file is empty: zero bytes"),
    "header only": (lambda p: p.write_bytes(b"II*\0\0\0\0\0") and p, "without a single image"),
    "first page cut": (lambda p: p.write_bytes(b"II*\0\x08\0\0\0") and p, "truncated or damaged"),
    "garbage": (lambda p: p.write_bytes(b"II*\0\x08\0\0\0" + bytes(range(256))) and p, "truncated or damaged"),
    "circular": (circular, "points back to an earlier page"),
    "no voxels": (empty, "empty"),
    "one image": (lambda p: save(p, frames_of()[0]), r"found a single image: axes YX = 24 x 32"),
    "one frame": (lambda p: save(p, frames_of()[:1]), "found a single image"),
    "color": (color, r"found colors: axes IYXS = 7 x 24 x 32 x 3"),
    "channels": (
        lambda p: save(p, np.stack([frames_of()] * 2, 1), "imagej", metadata={"axes": "TCYX"}),
        r"expected one channel, found 2: axes TCYX = 7 x 2 x 24 x 32.*Split Channels.*\[:, 0\]",
    ),
    "planes": (
        lambda p: save(p, np.stack([frames_of()] * 2, 1), "ome", metadata={"axes": "TZYX"}),
        r"found 2: axes TZYX = 7 x 2 x 24 x 32.*\[:, 0\]",
    ),
    "nameless axes": (lambda p: save(p, np.stack([frames_of()] * 2, 1)), "axes QQYX = 7 x 2 x 24 x 32"),
    "time last": (lambda p: save(p, frames_of(), metadata={"axes": "YXT"}), "time as the first axis"),
    "several images": (two_kinds, r"found 2 images.*24 x 32 int16.*12 x 32 int16"),
    "odd frame": (one_odd_frame, "found 2 images"),
    "int64": (lambda p: save(p, frames_of("int64")), "found int64"),
    "bool": (lambda p: save(p, frames_of() > 0, photometric=0), "found bool"),
    "complex": (lambda p: save(p, frames_of().astype("complex64")), "found complex64"),
    "undecodable": (undecodable, "frame 5 can't be read"),
    "volume": (
        lambda p: save(p, frames_of(), "zlib", volumetric=True),
        "expected a page for each frame, found all 7 compressed in one as a volume",
    ),
    "too large": (with_values("float32", f2=1e30), r"reach over 1e-12 to 1e\+15, got -?\d.* to 1e\+30"),
    "too small": (lambda p: save(p, frames_of("float32") * np.float32(1e-25)), "multiply by a power of ten"),
    "nan": (with_values("float32", f2=np.nan, f5=np.inf), "found 1536 voxels of NaN or infinity, the first in frame 2"),
    "constant": (lambda p: save(p, np.full(SHAPE, 7, "int16")), "every voxel is 7: nothing to denoise"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_what_to_do(tmp_path, name, caplog, capfd):
    make, message = BAD[name]
    path = make(tmp_path / "recording.tif")
    with pytest.raises(StackError, match=message) as error, open_stack(path) as stack:
        check_stack(stack)
    assert str(path) in str(error.value)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def single_page_ome(folder: Path, described: str) -> list[Path]:
    """Write a file for each frame, as Bruker does; the header of each tells of all files or only of its own."""
    paths = [folder / f"run_{t:06}.ome.tif" for t in range(7)]
    planes = "".join(
        f'<TiffData IFD="0" FirstT="{t}" PlaneCount="1"><UUID FileName="{path.name}">urn:uuid:{t}</UUID></TiffData>'
        for t, path in enumerate(paths)
    )
    header = {
        "all": ome_xml(planes, times=7),
        "own": ome_xml('<TiffData IFD="0" PlaneCount="1"/>', times=1),
        "companion": b'<?xml version="1.0"?><OME><BinaryOnly MetadataFile="run.companion.ome"/></OME>',
        "nothing": b"",
    }[described]
    for path, frame in zip(paths, frames_of(), strict=True):
        save(path, frame, "plain", description=header)
    return paths


@pytest.mark.parametrize("described", ["all", "own", "companion", "nothing"])
def test_how_to_join_files_of_one_frame_each_is_said_so_that_it_works(tmp_path, monkeypatch, described):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StackError, match="If every frame is a file, join them") as error:
        open_stack(single_page_ome(tmp_path, described)[3])
    exec(str(error.value).split("join them: ")[1].removesuffix("."), {"tifffile": tifffile})
    with open_stack("stack.tif") as stack:
        np.testing.assert_array_equal(stack[:], frames_of())


def test_a_path_that_is_none_is_refused_and_leaves_nothing_to_close():
    with pytest.raises(TypeError):
        TiffStack(None)  # pyright: ignore[reportArgumentType]
    gc.collect()


@pytest.mark.parametrize("form", ["one directory", "page by page", *DIALECTS])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path, form, part):
    path = tmp_path / "in.tif"
    if form == "one directory":
        save(path, frames_of(), imagej=True, truncate=True)
    elif form == "page by page":
        scanimage(path)
    else:
        save(path, frames_of(), form)
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(StackError, match="truncated or damaged"), open_stack(path) as stack:
        check_stack(stack)


def test_a_version_of_tifffile_that_lacks_something_is_no_fault_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "recording.tif"
    tifffile.imwrite(path, np.ones((3, 8, 8), np.int16), photometric="minisblack")
    monkeypatch.delattr(tifffile.TiffPage, "is_reduced")
    with pytest.raises(RuntimeError, match=r"recording.tif.*tifffile .* has no attribute 'is_reduced'.*constraints"):
        open_stack(path)


@settings(max_examples=80, deadline=None)
@given(place=st.integers(0, 4999), junk=st.binary(min_size=1, max_size=12), zipped=st.booleans())
def test_no_damage_raises_anything_but_a_stack_error(tmp_path_factory, place, junk, zipped):
    path = tmp_path_factory.mktemp("fuzz") / "in.tif"
    save(path, frames_of(shape=(4, 16, 16)), "zlib" if zipped else "imagej")
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(junk)] = junk
    path.write_bytes(content)
    try:
        with open_stack(path) as stack:
            check_stack(stack)
    except StackError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = save(tmp_path / "in.tif", frames_of())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StackError, match="no permission to read"):
        open_stack(path)


# --- check ---


@pytest.mark.parametrize("dialect", ["shaped", "zlib"])
def test_check_reads_every_voxel(tmp_path, dialect):
    data = frames_of()
    expected = hashlib.sha256(data.astype("<i2").tobytes()).hexdigest()
    done = []
    with open_stack(save(tmp_path / "in.tif", data, dialect, byteorder=">")) as stack:
        check = check_stack(stack, done.append)
    assert (check.minimum, check.maximum, check.sha256) == (data.min(), data.max(), expected)
    assert sum(done) == 7
    assert check_stack(data) == check == check_stack(data.astype(">i2"))


def test_check_of_arrays():
    with pytest.raises(StackError, match=r"the array: .* found 1 voxels"):
        check_stack(np.array([[[1.0, np.nan]], [[1.0, 2.0]]]))
    with pytest.raises(StackError, match="every voxel is 0"):
        check_stack(np.zeros((2, 3, 4), "uint8"))
    with pytest.raises(StackError, match="empty"):
        check_stack(np.zeros((0, 3, 4), "uint8"))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.eye(5), r"\(T, H, W\)"),
        (np.zeros((3, 2, 5, 5)), r"stack\[:, 0\]"),
        (np.eye(5)[None] > 0, "astype"),
        (np.full((2, 2, 2), 1j), "got complex128"),
        (np.eye(5)[None], "a single frame"),
    ],
)
def test_an_array_that_is_no_stack_is_refused_before_anything_is_computed(array, reason):
    with pytest.raises(StackError, match=reason):
        check_stack(array)


# --- writing ---


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("int16", -(2**15), 2**15 - 1), ("uint8", 0, 255), ("int32", -(2**31), 2**31 - 1), ("uint32", 0, 2**32 - 1)],
)
def test_rounding_and_clipping_are_exact(dtype, low, high):
    values = np.array([low, high, low + 1, high - 1, 3.4, 3.6, low - 0.4, high + 0.4, low - 1, high + 2, high + 1e9])
    rounded, below, above = to_dtype(values, np.dtype(dtype))
    assert rounded.tolist() == [low, high, low + 1, high - 1, 3, 4, low, high, low, high, high]
    assert (below, above) == (1, 2)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.sampled_from(DTYPES))
def test_rounding_keeps_every_voxel_in_range_within_half_a_step(values, dtype):
    given_values = np.array(values, "float32")
    result, below, above = to_dtype(given_values, np.dtype(dtype))
    inside = given_values.astype("float64")
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    clipped = np.clip(inside, float(limits.min), float(limits.max))
    step = 0.5 if np.dtype(dtype).kind in "iu" else np.abs(clipped) * 2.0**-10 + 1e-4
    assert (np.abs(result.astype("float64") - clipped) <= step).all()
    assert below + above <= np.count_nonzero(clipped != inside)


def test_clipped_voxels_are_counted_over_blocks(tmp_path):
    frames = np.zeros((6, 4, 5), "float32")
    frames[1, 0, :3], frames[4, 1, 1], frames[5, 2, 2] = -7, 300, 255.4
    blocks = [frames[:4], frames[4], frames[5:]]
    summary = write_stack(tmp_path / "out.tif", blocks, shape=frames.shape, dtype="uint8")
    assert (summary.frames, summary.clipped_low, summary.clipped_high, summary.clipped_voxels) == (6, 3, 1, 4)
    assert tifffile.imread(tmp_path / "out.tif").max() == 255


def result_of(level: float, activity: float, contrast: float, shape: tuple[int, int, int] = (60, 24, 32)) -> np.ndarray:
    """Make a denoised movie: an image of some contrast, and a few cells whose activity rises and falls."""
    rng = np.random.default_rng(3)
    image = level + contrast * rng.standard_normal(shape[1:])
    courses = np.sin(np.arange(shape[0]) / 5)[:, None, None] * (rng.random(shape[1:]) < 0.1)
    return (image + activity * courses + 0.003 * rng.standard_normal(shape)).astype("float32")


@pytest.mark.parametrize(
    ("level", "activity", "contrast", "coarse"),
    [
        (0.2, 0.1, 0.03, True),  # photons, of which a pixel counts one in five frames
        (6, 2, 1, True),
        (60, 20, 10, False),
        (200, 0, 30, False),  # an image that stands still
        (0.2, 0, 0.05, True),
        (300, 0.2, 1, True),
    ],
)
def test_steps_coarser_than_what_is_left_to_tell_apart_are_found(tmp_path, level, activity, contrast, coarse):
    movie = result_of(level, activity, contrast)
    summary = write_stack(tmp_path / "out.tif", movie, shape=movie.shape, dtype="uint16")
    assert bool(too_coarse(summary.rounding_share, np.dtype(np.uint16))) == coarse
    error = (np.rint(movie) - movie).astype(float).var() + np.mean(np.rint(movie) - movie) ** 2
    if activity:
        assert summary.rounding_share == pytest.approx(error / movie.astype(float).var(0).mean(), rel=0.01)
    far = write_stack(tmp_path / "far.tif", movie.astype(float) + 2e9, shape=movie.shape, dtype="uint32")
    assert far.rounding_share == pytest.approx(summary.rounding_share, rel=1e-3)


def test_nothing_is_lost_where_nothing_is_rounded(tmp_path):
    movie = result_of(0.2, 0.1, 0.03)
    for dtype, frames in (("float32", movie), ("uint16", np.rint(movie)), ("uint16", np.rint(movie).astype("uint16"))):
        summary = write_stack(tmp_path / "out.tif", frames, shape=movie.shape, dtype=dtype, overwrite=True)
        assert summary.rounding_share == 0
    flat = write_stack(tmp_path / "out.tif", np.full((3, 4, 5), 0.25), shape=(3, 4, 5), dtype="uint16", overwrite=True)
    assert flat.rounding_share == np.inf


def test_a_new_file_has_axes_and_resolution_tags(tmp_path):
    data = frames_of("uint16", (5, 8, 1))
    path = tmp_path / "deep" / "er" / "out.ome.tif"
    write_stack(path, data, shape=data.shape, dtype=data.dtype)
    assert series(path)[:2] == ("TYX", (5, 8, 1))
    np.testing.assert_array_equal(tifffile.memmap(path, mode="r"), data)
    assert [tag(path, name) for name in ("XResolution", "YResolution", "ResolutionUnit")] == [(1, 1), (1, 1), 1]
    assert json.loads(str(tag(path, 270))) == {"shape": [5, 8, 1], "axes": "TYX"}


def interrupted(data):
    yield data[0]
    raise KeyboardInterrupt


def with_nan(data):
    wrong = data.astype("float32")
    wrong[3, 2, 1] = np.nan
    return wrong


@pytest.mark.parametrize("per_page", [True, False])
@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (interrupted, KeyboardInterrupt),
        (with_nan, RuntimeError),
        (lambda data: data[:-1], ValueError),
        (lambda data: [*data, data[0]], ValueError),
        (lambda data: data[:, 1:], ValueError),
        (lambda _: [], ValueError),
    ],
)
def test_an_interrupted_output_leaves_nothing(tmp_path, frames, error, per_page):
    source = scanimage(tmp_path / "in.tif") if per_page else save(tmp_path / "in.tif", frames_of())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.tif").write_text("precious")
    with open_stack(source) as stack:
        for name in ("new.tif", "old.tif"):
            with pytest.raises(error):
                write_stack(
                    tmp_path / "out" / name,
                    frames(stack[:]),
                    shape=stack.shape,
                    dtype=stack.dtype,
                    like=stack,
                    overwrite=True,
                )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.tif"]
    assert (tmp_path / "out" / "old.tif").read_text() == "precious"


def test_the_input_is_never_overwritten(tmp_path):
    source = save(tmp_path / "in.tif", frames_of())
    (tmp_path / "soft.tif").symlink_to(source)
    (tmp_path / "hard.tif").hardlink_to(source)
    for name in ("in.tif", "soft.tif", "hard.tif", "../" + tmp_path.name + "/in.tif"):
        with pytest.raises(StackError, match="the output is the input itself"):
            check_output(tmp_path / name, SHAPE, "int16", source=source, overwrite=True)
        with pytest.raises(StackError, match="the output is the input itself"):
            rewrite(source, tmp_path / name, overwrite=True)


def test_an_existing_output_needs_overwrite(tmp_path):
    source = save(tmp_path / "in.tif", frames_of())
    save(tmp_path / "out.tif", frames_of("uint8"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        rewrite(source, tmp_path / "out.tif")
    rewrite(source, tmp_path / "out.tif", overwrite=True)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), frames_of())


def test_a_name_may_be_as_long_as_the_folder_allows(tmp_path):
    source = save(tmp_path / "in.tif", frames_of())
    name = 251 * "x" + ".tif"
    rewrite(source, tmp_path / name)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / name), frames_of())


def test_outputs_that_can_not_be_written(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        check_output(tmp_path, SHAPE, "int16")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="found a file in its place"):
        check_output(tmp_path / "file" / "out.tif", SHAPE, "int16")
    with pytest.raises(ValueError, match=r"got .* int64"):
        check_output(tmp_path / "out.tif", SHAPE, "int64")
    with pytest.raises(OSError, match=r"not enough space: the output needs \d+ bytes, \d+ are free") as error:
        check_output(tmp_path / "out.tif", (10**9, 512, 512), "float64")
    assert error.value.errno == errno.ENOSPC

    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("restormer3d.stacks.write.tempfile.TemporaryFile", read_only)
    with pytest.raises(PermissionError, match=r"can't write there \(Read-only file system\)"):
        check_output(tmp_path / "out.tif", SHAPE, "int16")


@pytest.mark.parametrize("short", [OSError(errno.ENOSPC, "No space left"), OSError("768 requested and 512 written")])
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch, short):
    def fail(*_args):
        raise short

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("restormer3d.stacks.write.shutil.disk_usage", lambda _: usage(0, 0, 10**9))
    monkeypatch.setattr(tifffile.FileHandle, "write_array", fail)
    with pytest.raises(OSError, match="not enough space") as error:
        write_stack(tmp_path / "out.tif", frames_of(), shape=SHAPE, dtype="int16")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_like_must_have_the_same_shape_and_dtype(tmp_path):
    with (
        open_stack(save(tmp_path / "in.tif", frames_of())) as stack,
        pytest.raises(ValueError, match="expected the shape"),
    ):
        write_stack(tmp_path / "out.tif", stack[:5], shape=(5, 24, 32), dtype="int16", like=stack)
