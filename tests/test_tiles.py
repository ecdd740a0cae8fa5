"""Tiles of a large field: all frames of each are looked at together, and their seams are not seen."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import tifffile
import torch

from restormer3d import spool
from restormer3d.activity import tiles
from restormer3d.activity.tiles import in_tiles, part_shape, tile_places, tile_shape, waiting_bytes
from restormer3d.artefacts.borders import FilledBorders, WithoutBorders
from restormer3d.artefacts.frames_around import Steadied
from restormer3d.artefacts.planes import WithoutPlanes, one_plane
from restormer3d.artefacts.scan_lines import AlignedLines
from restormer3d.artefacts.spikes import WithoutSpikes
from restormer3d.artefacts.stimulus_light import WithoutLight
from restormer3d.denoising import array_and_record, start_denoising
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.spool import decoded, has_room, spooled
from restormer3d.stacks import TiffStack, open_stack
from restormer3d.views import Lowered, SomeFrames, SomePixels

SHAPE = (104, 128, 112)
INFERENCE = settings(iterations=0).inference


@pytest.fixture(scope="module")
def scene():
    return simulate_scene(SHAPE, seed=31)


@pytest.fixture(scope="module")
def noisy(scene):
    return NoisyScene(scene, *noise_parameters(2), seed=5)[:]


@pytest.fixture(scope="module")
def whole(noisy):
    return denoised(noisy)[0]


def denoised(stack, said=None, progress=silent, **changes):
    chosen = settings(iterations=0)
    chosen = replace(chosen, inference=chosen.inference.model_copy(update=changes))
    say = silent if said is None else said.append
    result = start_denoising(stack, chosen, "restormer3d", torch.device("cpu"), None, progress, say)
    return np.stack(list(result.frames)), result.record


@pytest.mark.parametrize(
    "shape",
    [(300, 128, 128), (1500, 490, 490), (100, 2048, 2048), (5000, 512, 512), (200_000, 512, 512), (9000, 16, 2048)],
)
def test_tiles_hold_as_many_voxels_as_they_may(shape):
    part = part_shape(shape, INFERENCE)
    assert np.prod(part) <= INFERENCE.chunk_voxels
    assert tile_shape(shape, INFERENCE) == (shape[0], *part[1:])
    places = tile_places(shape, part)
    covered = np.zeros(shape[1:], int)
    for place in places:
        covered[place] += 1
        assert covered[place].shape == part[1:]
    assert covered.min() == 1
    assert part[0] >= min(shape[0], 2**13)
    if len(places) == 1:
        assert part[1:] == shape[1:]
        assert waiting_bytes(shape, INFERENCE) == 0
    else:  # of twice the voxels at most that they would have without overlap
        assert np.prod(part) > 0.7 * INFERENCE.chunk_voxels
        assert all(side == full or side >= 64 for side, full in zip(part[1:], shape[1:], strict=True))
        assert 1 <= waiting_bytes(shape, INFERENCE) / (4 * np.prod(shape, dtype=np.int64)) < 2


@pytest.mark.parametrize("shape", [(64, 1024, 1024), (20_000, 90, 90), (12_288, 81, 81)])
def test_a_stack_that_is_no_larger_is_one_tile(shape):
    assert tile_shape(shape, INFERENCE) == shape


def test_without_tiles_there_is_one():
    shape = (65, 1024, 1024)
    assert tile_shape(shape, INFERENCE) != shape
    for off in ("tiles", "components"):
        assert part_shape(shape, INFERENCE.model_copy(update={off: False})) == (64, 1024, 1024)


@pytest.mark.parametrize("size", [(64, 64), (70, 100), (128, 30), (128, 112), (1, 112), (5, 7)])
def test_what_does_not_change_the_tiles_does_not_change_the_stack(size):
    stack = np.random.default_rng(0).normal(1000, 10, (5, *SHAPE[1:])).astype(np.float32)
    asked = []

    def crop(place, number, count):
        asked.append((number, count))
        return (frame[place] for frame in stack)

    np.testing.assert_allclose(np.stack(list(in_tiles(stack.shape, (5, *size), crop))), stack, rtol=1e-6)
    assert asked == [(number, len(asked)) for number in range(len(asked))]


def test_tiles_fade_into_one_another():
    shape = (1, 64, 160)
    frame = next(in_tiles(shape, (1, 64, 90), lambda _, number, __: iter([np.full((64, 90), number, np.float32)])))
    assert set(frame[:, :70].flat) == {0.0}
    assert set(frame[:, 90:].flat) == {1.0}
    assert (np.diff(frame[0, 70:90]) > 0).all()
    assert np.abs(np.diff(frame[0])).max() < 0.15


def test_a_stack_in_tiles_is_as_close_to_the_truth_as_a_whole_one(scene, noisy, whole):
    clean, steps, said = scene[:], [], []
    voxels = 80 * 80 * SHAPE[0]
    out, record = denoised(noisy, said, lambda *step: steps.append(step), chunk_voxels=voxels)
    assert any("4 tiles of 72 x 64 pixels" in line for line in said)
    assert record["components"]
    assert all(record[step] is not None for step in ("footprints", "courses", "static_image"))
    in_time, _ = denoised(noisy, chunk_voxels=voxels, tiles=False)

    def error(frames):
        return np.square(frames - frames.mean(0) - (clean - clean.mean(0))).mean()

    assert error(out) < 1.06 * error(whole)
    assert error(out) < 0.97 * error(in_time)
    np.testing.assert_allclose(out.mean(0), whole.mean(0), atol=0.02 * whole.mean(0).std())
    # No seams: where tiles meet, columns differ by no more than elsewhere.
    residual = out - whole
    for axis, seam in ((1, range(56, 72)), (2, range(48, 64))):
        across = np.square(np.diff(residual, axis=axis)).mean((0, 3 - axis))
        elsewhere = np.setdiff1d(np.arange(len(across)), np.arange(seam[0] - 4, seam[-1] + 4))
        assert across[seam].max() < 4 * across[elsewhere].max()
    done = [step[1:] for step in steps if step[0] == "denoise"]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]
    assert len({total for _, total in done}) == 1


def test_frames_and_tiles_may_both_be_parts(scene, noisy, whole, monkeypatch):
    """Longer than memory holds even of the smallest tile: chunks of frames of each, and the stack is read lazily."""
    monkeypatch.setattr(tiles, "_ENOUGH_FRAMES", 64)
    monkeypatch.delattr(SomePixels, "read")
    said = []
    out, _ = denoised(noisy, said, chunk_voxels=64 * 80 * 80)
    assert any("tiles" in line for line in said)
    assert any("frames at a time" in line for line in said)
    clean = scene[:]
    assert np.square(out - clean).mean() < 1.15 * np.square(whole - clean).mean()


def test_tiles_wait_in_a_file_that_is_gone_afterwards(monkeypatch, tmp_path):
    stack = np.random.default_rng(0).normal(size=(50, 90, 90)).astype(np.float32)

    def blended():
        return in_tiles(stack.shape, (50, 64, 64), lambda place, *_: (frame[place] for frame in stack))

    expected = np.stack(list(blended()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spool, "_IN_MEMORY", 1000)
    np.testing.assert_array_equal(np.stack(list(blended())), expected)
    assert not list(tmp_path.iterdir())
    open_files = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    broken = iter([iter(stack), iter(lambda: 1 / 0, 0)])
    with pytest.raises(ZeroDivisionError):
        spooled(broken)
    assert open_files == (psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"none.*TMPDIR"):
        list(blended())


def test_many_tiles_need_one_file(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(spool, "_IN_MEMORY", 1000)
    stack = np.random.default_rng(0).normal(size=(2, 1500, 1500)).astype(np.float32)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        frames = list(in_tiles(stack.shape, (2, 64, 64), lambda place, *_: (frame[place] for frame in stack)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_allclose(np.stack(frames), stack, rtol=1e-5, atol=1e-6)


def test_without_room_for_them_frames_are_taken_together(noisy, monkeypatch):
    assert has_room(10_000)
    monkeypatch.setattr(spool, "_IN_MEMORY", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**6))
    assert has_room(500_000)
    assert not has_room(500_001)
    said = []
    few = noisy[:50, :104, :96]
    out, record = denoised(few, said, chunk_voxels=80 * 80 * 50)
    assert any("no room" in line and "TMPDIR" in line for line in said)
    assert any("frames at a time" in line for line in said)
    assert record["settings"]["inference"]["tiles"] is False
    in_time, _ = denoised(few, chunk_voxels=80 * 80 * 50, tiles=False)
    np.testing.assert_array_equal(out, in_time)


def test_there_is_no_room_in_a_folder_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert not has_room(1)
    with pytest.raises(OSError, match="TMPDIR"):
        decoded(np.zeros((2, 3, 4)))


@pytest.mark.parametrize("fill", [0.0, 33.3])
def test_a_tile_of_a_masked_field_may_have_no_noise(fill):
    stack = np.full((60, 64, 128), fill, np.float32)
    stack[:, :, 72:] = np.random.default_rng(0).poisson(10.0, (60, 64, 56)) * 10 + 100
    out, record = denoised(stack, chunk_voxels=60 * 64 * 70)
    assert record["footprints"] is not None
    assert np.isfinite(out).all()
    noise = stack[:, :, 80:].std()
    np.testing.assert_allclose(out[:, :, :48], fill, atol=0.005 * noise)  # as without tiles
    assert out[:, :, 80:].std() < 0.3 * noise


def test_frames_wait():
    stack = np.arange(24.0).reshape(4, 2, 3)
    for in_memory in (10, 10**6):
        with patch.object(spool, "_IN_MEMORY", in_memory):
            both = list(spooled([iter(stack), iter(-stack)]))
        np.testing.assert_array_equal(np.array(both), np.stack([stack, -stack], 1))


def test_a_compressed_stack_is_decoded_once(tmp_path, monkeypatch):
    stack = np.random.default_rng(0).integers(0, 1000, (30, 40, 50)).astype(np.uint16)
    path = tmp_path / "compressed.tif"
    tifffile.imwrite(path, stack, compression="zlib")
    expected = array_and_record(stack, settings(iterations=0))[0]
    with open_stack(path) as opened:
        np.testing.assert_array_equal(decoded(opened), stack)
        monkeypatch.setattr(spool, "_HELD", 1000)
        read, decode = [], TiffStack._decode

        def counted(self, frame):
            read.append(frame)
            return decode(self, frame)

        monkeypatch.setattr(TiffStack, "_decode", counted)
        out = array_and_record(opened, settings(iterations=0))[0]
    np.testing.assert_array_equal(out, expected)
    assert max(np.bincount(read)) <= 2  # checked, decoded


def test_some_pixels_of_a_stack():
    stack = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
    some = SomePixels(stack, slice(1, 4), slice(2, 7))
    assert (some.shape, some.dtype) == ((5, 3, 5), np.int16)
    np.testing.assert_array_equal(some[1:3], stack[1:3, 1:4, 2:7])
    np.testing.assert_array_equal(some.read(), stack[:, 1:4, 2:7])


def wrapped(stack):
    """Everything that denoising may put around a recording, by name."""
    rng, (frames, height, width) = np.random.default_rng(1), stack.shape
    filled = FilledBorders(rng.integers(0, 3, (frames, 4)), 7.0)
    places = np.argwhere(rng.random(stack.shape) < 0.02)
    kept = {3: np.stack([np.full(height, 5.0), np.linspace(0, 1, height)])}
    return {
        "some frames": SomeFrames(stack, np.array([0, 2, 3, 8, 9])),
        "one plane": one_plane(stack, 1, 3),
        "lowered": Lowered(stack, 100.0),
        "planes": WithoutPlanes(stack, rng.normal(size=(2, height, width)).astype(np.float32)),
        "borders": WithoutBorders(stack, filled, rng.normal(size=(height, width))),
        "spikes": WithoutSpikes(stack, places, rng.integers(0, 9, len(places)).astype(stack.dtype)),
        "light": WithoutLight(stack, rng.random((frames, height)).astype(np.float32)),
        "lines": AlignedLines(stack, -2),
        "steadied": Steadied(stack, kept, np.array([0, 1, 2, 4, 5, 6])),
    }


@pytest.mark.parametrize("name", wrapped(np.zeros((12, 9, 10), np.int16)))
def test_a_tile_of_what_is_around_a_recording_is_cut_out_of_it(name):
    recorded = np.random.default_rng(0).integers(0, 1000, (12, 9, 10)).astype(np.int16)
    stack = wrapped(recorded)[name]
    some = SomePixels(stack, slice(2, 7), slice(1, 10))
    assert (np.asarray(stack[:]) != recorded[: stack.shape[0]]).any()
    for frames in (slice(0, stack.shape[0]), slice(2, 4)):
        np.testing.assert_array_equal(some[frames], stack[frames][:, 2:7, 1:10])
    assert some.read().dtype == stack.dtype
    np.testing.assert_array_equal(some.read(), stack[:][:, 2:7, 1:10])
