"""Planes recorded in turns: found, told apart by their activity, denoised without being blended."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import tifffile
import torch

from restormer3d import denoising, fitting, spool
from restormer3d.artefacts.planes import (
    Planes,
    WithoutPlanes,
    differences_of,
    find_planes,
    in_turns,
    one_plane,
    plane_images,
    put_back,
)
from restormer3d.artefacts.stimulus_light import stimulus_light
from restormer3d.demo import RECORDING
from restormer3d.denoising import start_denoising
from restormer3d.inspection import describe, inspect
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import noise_parameters, simulate_scene
from restormer3d.stacks import open_stack

SHAPE = (192, 64, 64)
DEMO_STACK = resources.files("restormer3d") / "data" / RECORDING


@pytest.fixture(scope="module")
def scenes():
    return [simulate_scene(SHAPE, seed=seed)[:].astype(np.float32) for seed in range(90, 94)]


def recorded(clean, level=2, seed=0):
    gain, read = noise_parameters(level)
    rng = np.random.default_rng(seed)
    counted = gain * rng.poisson(np.maximum(clean, 0) / gain) + read**0.5 * rng.standard_normal(clean.shape)
    return np.clip(np.round(counted), -32768, 32767).astype(np.int16)


def interleaved(scenes):
    out = scenes[0].copy()
    for number, scene in enumerate(scenes):
        out[number :: len(scenes)] = scene[number :: len(scenes)]
    return out


def neighboring(scene):
    """The same activity in a plane a little deeper, whose cells are brighter or darker."""
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    other = scene * (1 + 0.4 * np.sin(x / 3) * np.cos(y / 4)).astype(np.float32)
    return interleaved([scene, other])


def denoised(stack, said=None, **changes):
    chosen = settings(iterations=0)
    chosen = replace(chosen, inference=chosen.inference.model_copy(update=changes))
    say = silent if said is None else said.append
    result = start_denoising(stack, chosen, "restormer3d", torch.device("cpu"), None, silent, say)
    return np.stack(list(result.frames)), result.record


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_planes_of_other_activity_are_counted(scenes, count, level):
    assert find_planes(recorded(interleaved(scenes[:count]), level)) == Planes(count, shared=False)


def test_a_plane_that_is_visited_twice_counts_twice(scenes):
    a, b, c = scenes[:3]
    assert find_planes(recorded(interleaved([a, b, a, c]))) == Planes(4, shared=False)


def test_planes_close_to_one_another_share_their_activity(scenes):
    assert find_planes(recorded(neighboring(scenes[0]), level=1)) == Planes(2, shared=True)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_one_plane_is_one(scenes, level):
    for scene in scenes:
        assert find_planes(recorded(scene, level)) is None


def test_what_changes_in_one_plane_is_no_second_one(scenes):
    t = np.arange(SHAPE[0], dtype=np.float32)[:, None, None]
    bleaching = scenes[0] * np.exp(-t / 60)
    flicker = scenes[0] * (1 + 0.1 * np.sin(2 * np.pi * t / 2.31))
    flash = scenes[0].copy()
    flash[50] += 3000
    for clean in (bleaching, flicker, flash):
        assert find_planes(recorded(clean, level=1)) is None
    assert find_planes(np.full((40, 20, 20), 7, np.uint8)) is None


def test_the_recording_of_the_demo_shows_two_planes():
    with open_stack(DEMO_STACK) as stack:
        assert find_planes(stack) == Planes(2, shared=True)
        assert find_planes(one_plane(stack, 0, 2)) is None
    assert "2 in turns, frame by frame, close to one another" in describe(inspect(DEMO_STACK))


def test_the_number_of_planes_can_be_given(scenes):
    stack = recorded(interleaved(scenes[:2]))
    assert find_planes(stack, 1) is None
    assert find_planes(stack, 2) == find_planes(stack)
    assert find_planes(stack[:20], 2) == Planes(2, shared=False)  # too few frames to see it
    assert find_planes(stack[:20]) is None
    with pytest.raises(ValueError, match=r"planes: expected at least two frames of each of 11 planes, got 20 frames"):
        find_planes(stack[:20], 11)


def test_a_large_offset_costs_no_precision(scenes):
    stack = recorded(interleaved(scenes[:2]))
    far = stack.astype(np.int32) + 2_000_000_000
    assert find_planes(far) == find_planes(stack)
    away = WithoutPlanes(far, differences_of(plane_images(far, 2)))
    assert away.dtype == np.float64
    np.testing.assert_allclose(
        away[:] - 2e9, WithoutPlanes(stack, differences_of(plane_images(stack, 2)))[:], atol=1e-2
    )


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("length", [6, 7])
def test_one_plane_is_a_stack(length: int, first: int, count: int):
    stack = np.arange(length * 6).reshape(length, 2, 3)
    plane, expected = one_plane(stack, first, count), stack[first::count]
    assert plane.shape == expected.shape
    assert len(plane) == len(expected)
    for index in (
        slice(None),
        1,
        -1,
        slice(1, 3),
        slice(1, 1),
        slice(None, None, -1),
        (slice(0, 2), slice(1), slice(1, 3)),
    ):
        np.testing.assert_array_equal(plane[index], expected[index])


def test_slices_are_those_of_the_array():
    stack = np.arange(7 * 4 * 5, dtype=np.uint16).reshape(7, 4, 5)
    images = np.random.default_rng(0).uniform(-900, 900, (3, 4, 5))
    away, dense = WithoutPlanes(stack, images), stack - images[np.arange(7) % 3]
    assert (away.shape, away.dtype) == (stack.shape, np.float32)
    for index in (5, slice(2, 7), (slice(0, 6, 2), slice(3, 0, -1), slice(1, 4)), (4, slice(1, 3)), np.array([6, 2])):
        np.testing.assert_allclose(away[index], dense[index], rtol=1e-5)


def test_planes_come_back_in_their_turns():
    frames = np.arange(7.0 * 6).reshape(7, 2, 3)
    again = list(in_turns([iter(frames[number::3]) for number in range(3)]))
    np.testing.assert_array_equal(again, frames)
    images = plane_images(frames, 3)
    np.testing.assert_allclose(images, [frames[number::3].mean(0) for number in range(3)])
    apart = differences_of(images)
    np.testing.assert_allclose(list(put_back(iter(WithoutPlanes(frames, apart)[:]), apart)), frames, rtol=1e-6)


def test_planes_of_other_activity_are_denoised_as_if_they_were_files(scenes):
    stack, said, steps = recorded(interleaved(scenes[:2]))[:112], [], []
    chosen = settings(iterations=0)
    result = start_denoising(
        stack, chosen, "restormer3d", torch.device("cpu"), None, lambda *step: steps.append(step), said.append
    )
    out = np.stack(list(result.frames))
    for number in range(2):
        np.testing.assert_array_equal(out[number::2], denoised(stack[number::2])[0])
    assert result.record["planes"] == {"count": 2, "shared": False}
    assert [each["method"] for each in result.record["each_plane"]] == ["restormer3d"] * 2
    assert result.record["method"] == "restormer3d"
    assert result.record["settings"]["inference"]["planes"] == "auto"
    assert any("2 planes in turns" in line for line in said)
    assert any(line.startswith("plane 2 of 2: ") for line in said)
    stages = [stage for stage, _ in itertools.groupby(step[0] for step in steps)]
    # Never both at once, with the memory of two.
    assert stages == [f"{stage}, plane {number} of 2" for number in (1, 2) for stage in ("movement", "denoise")]
    for number in (1, 2):
        of_frames = [step[1:] for step in steps if step[0] == f"denoise, plane {number} of 2"]
        assert of_frames == sorted(of_frames)
        assert of_frames[-1][0] == of_frames[-1][1]


def test_frames_of_a_plane_may_wait_in_a_file(scenes, monkeypatch, tmp_path):
    stack = recorded(interleaved(scenes[:2]))[:112]
    expected, _ = denoised(stack)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spool, "_IN_MEMORY", 1000)
    np.testing.assert_array_equal(denoised(stack)[0], expected)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"none.*TMPDIR"):
        denoised(stack)


def test_planes_close_to_one_another_keep_what_they_differ_by(scenes):
    clean, said = neighboring(scenes[0]), []
    stack = recorded(clean, level=1)
    (out, record), (as_one, of_one) = denoised(stack, said), denoised(stack, planes=1)
    assert record["planes"] == {"count": 2, "shared": True}
    assert of_one["planes"] is None
    assert any("2 images in turns" in line for line in said)

    def error(frames):
        return np.square(frames - clean).mean()

    assert error(out) < 0.5 * error(as_one)
    assert error(out) < error(denoised(stack, static_image=False)[0])
    truth = differences_of(plane_images(clean, 2))
    assert np.square(differences_of(plane_images(out, 2)) - truth).mean() < 0.1 * np.square(truth).mean()


def test_light_is_taken_away_from_each_plane_alike(scenes):
    clean = interleaved(scenes[:2])
    bright = clean.copy()
    bright[40:43] += 2000
    out, record = denoised(recorded(bright))
    assert stimulus_light(recorded(bright)) is not None
    assert record["stimulus_light"]["frames"] == 3
    assert record["planes"] == {"count": 2, "shared": False}
    assert abs((out - bright)[40:43].mean()) < 40


@pytest.mark.parametrize("shared", [False, True])
def test_the_filter_that_stands_in_keeps_planes_apart(scenes, shared):
    clean = neighboring(scenes[0]) if shared else interleaved(scenes[:2])
    cpu = torch.device("cpu")
    stack = recorded(clean, level=1)
    result = start_denoising(stack, settings(iterations=0), "restormer3d", cpu, 1e-3, silent, silent)
    out = np.stack(list(result.frames))
    assert result.record["planes"] == {"count": 2, "shared": shared}
    assert result.record["method"] == "gaussian"
    assert "instead_of_the_network" in result.record
    truth = differences_of(plane_images(clean, 2))
    assert np.square(differences_of(plane_images(out, 2)) - truth).mean() < 0.1 * np.square(truth).mean()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["gaussian", "temporal-mean", "svd"])
def test_filters_keep_planes_apart(scenes, method, shared):
    clean = neighboring(scenes[0]) if shared else interleaved(scenes[:2])
    stack, steps = recorded(clean, level=1), []
    result = start_denoising(
        stack, settings(), method, torch.device("cpu"), None, lambda *step: steps.append(step), silent
    )
    out = np.stack(list(result.frames))
    assert result.record["method"] == method
    truth = differences_of(plane_images(clean, 2))
    assert np.square(differences_of(plane_images(out, 2)) - truth).mean() < 0.1 * np.square(truth).mean()
    if method == "svd":
        assert steps[-1][1] == steps[-1][2]


def test_a_plane_without_light_is_left_as_it_is(scenes):
    stack, said, steps = recorded(scenes[0]), [], []
    stack[1::2] = 0
    chosen, cpu = settings(iterations=0), torch.device("cpu")
    result = start_denoising(stack, chosen, "restormer3d", cpu, None, lambda *step: steps.append(step), said.append)
    out, record = np.stack(list(result.frames)), result.record
    assert steps[-1][1] == steps[-1][2]
    assert (out[1::2] == 0).all()
    np.testing.assert_array_equal(out[::2], denoised(stack[::2])[0])
    assert record["method"] == "restormer3d"
    assert record["each_plane"][1] == {"constant": True}
    assert any(line.startswith("plane 2 of 2: ") and "left as it is" in line for line in said)


def test_planes_that_never_change_are_left_as_they_are():
    stack = np.zeros((48, 16, 16), np.uint16)
    stack[1::2] = 7
    out, record = denoised(stack)
    np.testing.assert_array_equal(out, stack)
    assert record["each_plane"] == [{"constant": True}] * 2


def test_planes_are_trained_one_after_the_other_in_the_time_that_is_left(scenes, monkeypatch):
    shares, steps = [], []

    def by_network(stack, measured, images, chosen, device, seconds, progress, *_):
        shares.append(seconds)
        progress("train", 1, 1)
        return fitting.Denoised(iter(stack), {})

    monkeypatch.setattr(denoising, "by_network", by_network)
    result = start_denoising(
        recorded(interleaved(scenes[:3])),
        settings(),
        "restormer3d",
        torch.device("cpu"),
        90.0,
        lambda *step: steps.append(step),
        silent,
    )
    assert len(list(result.frames)) == SHAPE[0]
    trained = [stage for stage, *_ in steps if stage.startswith("train")]
    assert trained == [f"train, plane {number} of 3" for number in (1, 2, 3)]
    assert shares[0] == pytest.approx(30, rel=0.1)
    assert shares[2] == pytest.approx(90, rel=0.1)  # what the others did not take


def test_hum_of_nearly_a_third_of_the_frame_rate_is_no_plane():
    rows = (np.arange(900)[:, None] + np.arange(64) / 64) / 30.03
    hum = 3 * np.sin(2 * np.pi * 50 * rows)
    noise = 10 * np.random.default_rng(0).standard_normal((900, 64, 64), np.float32)
    assert find_planes(100 + noise + hum[:, :, None].astype(np.float32)) is None


@pytest.mark.parametrize("shared", [False, True])
def test_the_noise_of_planes_is_that_of_one(scenes, shared, tmp_path):
    clean = neighboring(scenes[0]) if shared else interleaved(scenes[:2])
    tifffile.imwrite(tmp_path / "planes.tif", recorded(clean, level=1))
    tifffile.imwrite(tmp_path / "one.tif", recorded(scenes[0], level=1))
    planes, one = (inspect(tmp_path / name) for name in ("planes.tif", "one.tif"))
    assert planes["planes"] == {"count": 2, "shared": shared}
    assert planes["noise"]["gain"] == pytest.approx(one["noise"]["gain"], rel=0.15)
    assert planes["blind_spot"] == one["blind_spot"]


def test_frames_between_those_of_a_plane_are_not_read():
    class Recorder:
        shape, dtype = (12, 3, 3), np.dtype(np.uint16)

        def __getitem__(self, index):
            read.append(range(12)[index[0]])
            return np.zeros(self.shape, self.dtype)[index]

    read: list[range] = []
    assert one_plane(Recorder(), 1, 4)[0:3].shape == (3, 3, 3)
    assert read == [range(1, 10, 4)]


@pytest.mark.parametrize("side", [1, 2, 3])
def test_narrow_fields_show_planes_too(side):
    stack = np.random.default_rng(0).normal(100, 3, (96, side, 64))
    stack[1::2] += 40 * np.sin(np.arange(64))
    assert find_planes(stack) is not None


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_long_recording_of_a_small_field_shows_one_plane(side, seed):
    """Of many frames few are looked at: their noise is what tells, not that of the mean of all."""
    image = 100 + 60 * np.exp(-((np.mgrid[:side, :side] - side / 2) ** 2).sum(0) / 20)
    rng, frames = np.random.default_rng(seed), 20_000
    some = 10 * rng.poisson(image / 10, (500, side, side)).astype(np.uint16)
    order = rng.integers(500, size=frames)
    assert find_planes(some[order]) is None
