"""How a field moves: measured, followed and put back; and not confused with activity or noise."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from benchmarks.artefacts import other_scene
from scipy.ndimage import gaussian_filter1d, map_coordinates, shift

from restormer3d import spool
from restormer3d.artefacts import movement, warp
from restormer3d.artefacts.moved_frames import MovedBack, put_back, static_images
from restormer3d.artefacts.movement import field_movement, follow_movement
from restormer3d.config import InferenceConfig
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

from .conftest import photons

_AROUND = 8  # pixels around the field that it may move to


@pytest.fixture(scope="module")
def wider():
    """Clean frames of a field and of what is around it."""
    return simulate_scene((90, 64 + 2 * _AROUND, 72 + 2 * _AROUND), seed=11)[:]


def moved(wider, shifts):
    inside = slice(_AROUND, -_AROUND)
    return np.stack([shift(x, by, order=1)[inside, inside] for x, by in zip(wider, shifts, strict=True)])


def breathing(frames=90):
    t = np.arange(frames)
    return np.stack([1.2 * np.sin(t / 3), 0.6 * np.cos(t / 7)], axis=1)


def jumps(frames=90):
    shifts = np.zeros((frames, 2))
    shifts[20:26], shifts[50:58] = (3.5, -2), (-2, 4)
    return shifts


def jitter(frames=90):
    return np.random.default_rng(3).normal(0, (0.9, 0.5), (frames, 2))


def error(found, shifts):
    apart = found - (shifts - shifts.mean(0))
    return np.sqrt(np.square(apart - apart.mean(0)).mean(0))


@pytest.mark.parametrize("follow_jitter", [True, False])
@pytest.mark.parametrize("course", [breathing, jumps])
def test_movement_that_goes_on_is_measured(wider, course, follow_jitter):
    shifts = course()
    found = field_movement(photons(moved(wider, shifts)), jitter=follow_jitter)
    assert (error(found.weights[..., 0], shifts) < 0.35).all()
    np.testing.assert_allclose(found.deviation, shifts.std(0), rtol=0.25)


def test_jitter_is_measured_and_followed_if_asked_for(wider):
    shifts = jitter()
    noisy = photons(moved(wider, shifts))
    followed, left = (field_movement(noisy, jitter=asked) for asked in (True, False))
    assert (error(followed.weights[..., 0], shifts) < 0.3).all()
    assert not left.weights[..., 0].any()
    np.testing.assert_allclose(left.deviation, followed.deviation, rtol=0.05)


def test_of_jitter_on_a_drift_the_drift_is_followed(wider):
    drift = np.stack([np.linspace(-0.8, 0.8, 90), np.zeros(90)], axis=1)
    shifts = drift + np.random.default_rng(3).normal(0, (0.7, 0), (90, 2))
    found = field_movement(photons(moved(wider, shifts)), jitter=False)
    assert error(found.weights[..., 0], drift)[0] < 0.25
    assert error(found.weights[..., 0], shifts)[0] > 0.5
    assert not found.weights[..., 0][:, 1].any()


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", [5, 6])
def test_activity_and_noise_are_no_movement(level, seed):
    scene = simulate_scene((120, 64, 64), seed=seed)
    assert field_movement(NoisyScene(scene, *noise_parameters(level), seed=1)[:], jitter=True) is None


def test_what_changes_all_of_the_field_is_no_movement(wider):
    still = moved(wider, np.zeros((90, 2)))
    for course in (
        1 + 0.1 * np.random.default_rng(0).standard_normal(90),
        np.exp(-np.arange(90) / 40),
        1 + 2.0 * (np.arange(90) // 10 % 4 == 1),
    ):
        assert field_movement(photons(still * course[:, None, None]), jitter=True) is None


def test_pixels_of_the_detector_do_not_hold_the_field(wider):
    rng = np.random.default_rng(2)
    shifts = breathing()
    noisy = photons(moved(wider, shifts)) + 3000 * (rng.random(wider[0, 8:-8, 8:-8].shape) < 0.001)
    assert (error(field_movement(noisy, jitter=False).weights[..., 0], shifts) < 0.4).all()


@pytest.mark.parametrize("size", [(15, 64, 64), (90, 64, 20)])
def test_too_little_to_tell(wider, size):
    frames, height, width = size
    assert field_movement(photons(moved(wider, breathing()))[:frames, :height, :width], jitter=True) is None


def test_without_noise_and_with_a_black_margin(wider):
    shifts = breathing()
    clean = moved(wider, shifts)
    clean[:, :, :9] = 0
    assert (error(field_movement(clean.astype(np.float32), jitter=False).weights[..., 0], shifts) < 0.25).all()


def test_long_and_large_stacks(wider, monkeypatch):
    shifts = breathing()
    noisy = photons(moved(wider, shifts))
    dense = field_movement(noisy, jitter=False).weights[..., 0]
    monkeypatch.setattr(movement, "_SAMPLE", 40)
    some = field_movement(noisy, jitter=False).weights[..., 0]
    assert (error(some, shifts) < 0.35).all()
    assert np.abs(some - dense).max() < 0.5
    monkeypatch.setattr(movement, "_SIDE", 40)
    assert (error(field_movement(noisy, jitter=False).weights[..., 0], shifts) < 0.5).all()


@pytest.mark.parametrize("side", [64, 128])
def test_movement_by_several_pixels(side):
    wide = simulate_scene((60, side + 4 * _AROUND, side + 4 * _AROUND), seed=3)[:]
    t = np.arange(60)
    shifts = np.rint(np.stack([6 * np.sin(t / 5), 4 * np.cos(t / 9)], axis=1))
    shifts[30:] += (0, 3)
    corners = 16 - shifts.astype(int)
    clean = np.stack([x[y : y + side, z : z + side] for x, (y, z) in zip(wide, corners, strict=True)])
    assert (error(field_movement(photons(clean), jitter=False).weights[..., 0], shifts) < 0.3).all()


def test_a_frame_that_shows_something_else(wider):
    shifts = breathing()
    noisy = photons(moved(wider, shifts)).astype(np.float32)
    noisy[40] = np.random.default_rng(1).normal(0, 5000, noisy[40].shape)
    assert field_movement(noisy, jitter=True) is None  # rather nothing than what that frame seems to tell


@pytest.mark.parametrize("scale", [1e-6, 1e10])
def test_any_unit(wider, scale):
    noisy = photons(moved(wider, breathing())).astype(np.float32)
    scaled = field_movement(noisy * np.float32(scale), jitter=False).weights[..., 0]
    np.testing.assert_allclose(scaled, field_movement(noisy, jitter=False).weights[..., 0], atol=0.02)


def test_few_photons_may_lie_anywhere(wider):
    dim = np.random.default_rng(0).poisson(0.0002 * moved(wider, np.zeros((90, 2))))
    assert field_movement(dim.astype(np.uint16), jitter=True) is None


def test_a_short_time_limit_leaves_movement_alone(moving):
    said: list[str] = []
    record = array_and_record(moving[1], settings(), method="svd", time_limit=1e-4, say=said.append)[1]
    assert record["movement"] is None
    assert any("for want of time" in text for text in said)


def test_a_strip_of_the_field():
    shifts = breathing()
    strip = simulate_scene((90, 33 + 2 * _AROUND, 600 + 2 * _AROUND), seed=11)[:]
    assert (error(field_movement(photons(moved(strip, shifts)), jitter=False).weights[..., 0], shifts) < 0.2).all()


def test_frames_come_back_to_where_they_were():
    y, x = np.mgrid[:40, :50]
    frames = np.stack([np.sin(y / 4 + t) * np.cos(x / 5) for t in range(6)]).astype(np.float32)
    shifts = np.array([(0, 0), (1.5, -0.5), (0.3, 0.2), (-3, 2), (0.01, 0), (0, -1)])
    image = static_images(frames, shifts[..., None])
    back = np.stack(list(put_back(iter(MovedBack(frames, shifts[..., None], image)[:]), shifts[..., None], (40, 50))))
    assert back.dtype == frames.dtype
    np.testing.assert_allclose(back[:, 3:-3, 3:-3], frames[:, 3:-3, 3:-3], atol=1e-2)
    np.testing.assert_allclose(back[[0, 4]], frames[[0, 4]], atol=1e-5)


def test_moved_back_frames_show_the_field_where_it_is_on_average(wider):
    shifts = breathing()
    still = moved(wider, np.zeros((90, 2)))
    recorded = moved(wider, shifts)
    there = MovedBack(recorded, shifts[..., None], static_images(recorded, shifts[..., None]))
    assert there.shape == there[:].shape == (90, 64 + 4, 72 + 2)
    apart, before = (np.square(x - still).mean() for x in (there[0:90][:, 2:-2, 1:-1], recorded))
    assert apart < 0.15 * before
    np.testing.assert_array_equal(there[10:12], there[:][10:12])


@pytest.fixture(scope="module")
def large():
    """Clean frames of a larger field and of what is around it."""
    return simulate_scene((90, 112 + 2 * _AROUND, 112 + 2 * _AROUND), seed=11)[:]


def warped(wide, by):
    """Clean frames whose pixels are displaced by rows and columns, each by its own (T, 2, H, W)."""
    places = np.mgrid[: by.shape[2], : by.shape[3]] + _AROUND
    return np.stack([map_coordinates(x, places - each, order=1) for x, each in zip(wide, by, strict=True)])


def one_side(frames=90, side=112):
    """Tissue that gives way at the bottom and at the left."""
    y, x = np.mgrid[:side, :side] / side
    t = np.arange(frames)[:, None, None]
    return np.stack([2.5 * np.sin(t / 4) * y, 2.5 * np.cos(t / 5) * (1 - x)], axis=1)


def while_scanned(frames=90, side=112, share=1.0):
    """Rigid movement while rows are scanned one after the other, for a share of the time between frames."""
    t = np.arange(frames)[:, None] + share * np.arange(side) / side
    by = np.stack([1.5 * np.sin(1.1 * t), 1.2 * np.cos(0.9 * t + 1)], axis=1)
    return np.broadcast_to(by[..., None], (frames, 2, side, side))


def left(found, by):
    """Deviation of what is left of displacements (T, 2, H, W), along y and x."""
    at_rest = np.mgrid[: by.shape[2], : by.shape[3]]
    measured = [at_rest - warp.displaced_from(each, by.shape[2:], by.shape[2:], back=False) for each in found.weights]
    apart = by - by.mean(0) - np.stack(measured)
    return np.sqrt(np.square(apart - apart.mean(0)).mean((0, 2, 3)))


@pytest.mark.parametrize("follow_jitter", [True, False])
def test_parts_that_move_by_themselves_are_followed(large, follow_jitter):
    by = one_side()
    found = field_movement(photons(warped(large, by)), jitter=follow_jitter)
    assert found.weights[..., 2:].any()
    assert min(found.record()["non_rigid"]) > 0.3
    assert (left(found, by) < 0.35 * np.sqrt(np.square(by - by.mean(0)).mean((0, 2, 3)))).all()


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_rows_that_are_scanned_meanwhile_are_followed(large, share):
    by = while_scanned(share=share)
    found = field_movement(photons(warped(large, by)), jitter=False)
    assert found.weights[..., 0].any(0).all()
    assert not found.weights[..., 2:].any()
    slope = found.weights[..., 1].std() if found.weights.shape[-1] > 1 else 0.0
    assert (slope > 0.15) == (share > 0)
    assert (left(found, by) < 0.35).all()


def test_long_stacks_are_scanned_too(large, monkeypatch):
    by = while_scanned()
    monkeypatch.setattr(movement, "_SAMPLE", 40)
    assert (left(field_movement(photons(warped(large, by)), jitter=False), by) < 0.35).all()


@pytest.mark.parametrize("seed", [5, 6])
def test_activity_does_not_bend_the_field(seed):
    clean = other_scene((120, 112, 112), seed)
    found = field_movement(photons(clean), jitter=True)
    assert found is None or not found.weights[..., 1:].any()


def test_denoising_gains_by_bending_back(large):
    clean = warped(large, one_side())
    said: list[str] = []
    scores, records = [], []
    for followed in ("none", "smooth"):
        chosen = settings(iterations=0, movement=followed)
        denoised, record = array_and_record(photons(clean), chosen, say=said.append)
        scores.append(evaluate_stacks(clean.astype(np.float32), denoised)["activity_snr"])
        records.append(record)
    assert scores[1] > scores[0] + 1
    assert min(records[1]["movement"]["non_rigid"]) > 0.3
    assert sum("against one another" in text for text in said) == 1


@pytest.fixture
def moving(wider):
    """Clean frames and the recording of them."""
    clean = moved(wider, gaussian_filter1d(3 * jitter(), 1.5, axis=0))
    return clean, photons(clean)


@pytest.mark.parametrize("method", ["gaussian", "svd", "restormer3d"])
def test_denoising_gains_by_following(moving, method):
    clean, noisy = moving
    said: list[str] = []
    scores, records = [], []
    for followed in ("none", "smooth"):
        chosen = settings(iterations=0, movement=followed)
        denoised, record = array_and_record(noisy, chosen, method=method, say=said.append)
        assert denoised.dtype == noisy.dtype
        scores.append(evaluate_stacks(clean.astype(np.float32), denoised)["activity_snr"])
        records.append(record)
    assert scores[1] > scores[0] + (1 if method == "restormer3d" else 0.2)
    assert records[0]["movement"] is None
    assert min(records[1]["movement"]["followed_up_to"]) > 0.5
    assert sum("the field moves by" in text for text in said) == 1


def test_movement_is_followed_under_strong_light_too(moving):
    clean = moving[0].copy()
    clean[30:33] += 40 * clean.mean()
    noisy = photons(clean)
    said: list[str] = []
    scores, records = [], []
    for followed in ("none", "smooth"):
        denoised, record = array_and_record(noisy, settings(iterations=0, movement=followed), say=said.append)
        unlit = np.r_[:30, 33 : len(clean)]
        scores.append(evaluate_stacks(clean[unlit].astype(np.float32), denoised[unlit])["activity_snr"])
        records.append(record)
        assert denoised[31].mean() == pytest.approx(clean[31].mean(), rel=0.02)
    assert sum("drawn towards those around" in text for text in said) == 2
    assert min(records[1]["movement"]["followed_up_to"]) > 0.5
    assert scores[1] > scores[0] + 1


def test_of_jitter_it_is_said_that_it_stays(wider):
    noisy = photons(moved(wider, jitter()))
    said: list[str] = []
    denoised, record = array_and_record(noisy, settings(movement="smooth"), method="svd", say=said.append)
    assert any("--movement all" in text for text in said)
    assert record["movement"]["followed_up_to"] == [0, 0]
    np.testing.assert_array_equal(denoised, array_and_record(noisy, settings(movement="none"), method="svd")[0])


def test_moved_frames_wait_in_a_file_or_stay_as_they_are(moving, monkeypatch):
    noisy, chosen = moving[1], settings(movement="smooth")
    expected = array_and_record(noisy, chosen, method="svd")[0]
    monkeypatch.setattr(spool, "_HELD", 1000)
    np.testing.assert_array_equal(array_and_record(noisy, chosen, method="svd")[0], expected)
    monkeypatch.setattr(spool, "has_room", lambda size: False)
    said: list[str] = []
    left, record = array_and_record(noisy, chosen, method="svd", say=said.append)
    assert any("no room" in text for text in said)
    assert record["movement"]["followed_up_to"] == [0, 0]
    np.testing.assert_array_equal(left, array_and_record(noisy, settings(movement="none"), method="svd")[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_progress_of_looking_and_of_moving_is_told(moving, monkeypatch, in_memory):
    told: dict[str, list[tuple[int, int]]] = {"movement": [], "move": []}
    if not in_memory:
        monkeypatch.setattr(spool, "_HELD", 1000)
    monkeypatch.setattr(movement, "_SAMPLE", 40)  # fewer than there are
    follow_movement(moving[1], jitter=True, progress=lambda stage, *done: told[stage].append(done))
    assert told["move"] == [(done, 90) for done in range(1, 91)]
    done, totals = np.array(told["movement"]).T
    assert (np.diff(done) > 0).all()
    assert done[-1] == 3 * 40 + 3 * 90 + 2 * 4 * 90
    assert set(totals) == {done[-1]}


def test_planes_of_their_own_activity_move_each_by_itself(wider):
    frames = np.empty((90, 64, 72))
    shifts = breathing()
    frames[::2] = moved(wider, shifts)[::2]
    frames[1::2] = 0.5 * moved(wider[:, ::-1, ::-1], -shifts)[1::2]
    record = array_and_record(photons(frames), settings(planes=2), method="svd")[1]
    assert [min(plane["movement"]["followed_up_to"]) > 0.5 for plane in record["each_plane"]] == [True, True]


def test_planes_of_the_same_activity_move_together(wider, tmp_path):
    wide = wider.copy()
    wide[1::2] += 0.5 * (wider[0, ::-1, ::-1] - wider[0].mean())
    clean = moved(wide, breathing())
    noisy = photons(clean)
    scores = []
    for followed in ("none", "smooth"):
        denoised, record = array_and_record(noisy, settings(iterations=0, movement=followed))
        assert record["planes"] == {"count": 2, "shared": True}
        scores.append(evaluate_stacks(clean.astype(np.float32), denoised)["stsnr"])
    assert min(record["movement"]["followed_up_to"]) > 0.5
    assert scores[1] > scores[0] + 1
    tifffile.imwrite(tmp_path / "stack.tif", noisy)
    assert inspect(tmp_path / "stack.tif")["movement"] is not None


def test_moved_back_planes_keep_their_images(wider):
    wide, shifts = wider.copy(), breathing()[..., None]
    wide[1::2] += 200
    recorded = moved(wide, shifts[..., 0])
    images = static_images(recorded, shifts, 2)
    assert 190 < (images[1] - images[0]).mean() < 210
    there = MovedBack(recorded, shifts, images)
    odd = there[1:90:2] - there[0:90:2]
    assert (odd[:, 0].mean(1) > 150).all()  # in the margins, too
    np.testing.assert_array_equal(there[11:14], there[:][11:14])


def test_inspect_tells_of_movement(moving, wider, tmp_path):
    stacks = moving[1], photons(moved(wider, jitter())), photons(moved(wider, 0 * jitter()))
    for noisy, told in zip(stacks, ("frames follow it", "jitter", ""), strict=True):
        tifffile.imwrite(tmp_path / "stack.tif", noisy)
        facts = inspect(tmp_path / "stack.tif")
        assert (facts["movement"] is None) == (not told)
        assert told in describe(facts)
        assert ("movement: " in describe(facts)) == bool(told)


def test_the_published_recipe_follows_nothing():
    assert InferenceConfig().movement == "none"
    assert settings("published").inference.movement == "none"
    assert settings().inference.movement == "smooth"
    with pytest.raises(ValueError, match="movement"):
        settings(movement="some")
