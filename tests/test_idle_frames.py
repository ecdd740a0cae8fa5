"""Frames that show nothing of their own are set aside, and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts.idle_frames import frames_shown, put_back, without_idle
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.noise import estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import noise_parameters, simulate_scene

GAIN, READ = noise_parameters(2)
NONE = np.array([], int)


@pytest.fixture(scope="module")
def recording():
    clean = simulate_scene((96, 48, 48), seed=61)[:]
    rng = np.random.default_rng(0)
    return np.rint(2000 + GAIN * rng.poisson(clean / GAIN) + READ**0.5 * rng.standard_normal(clean.shape)).astype("u2")


def denoised(stack, method="restormer3d"):
    said = []
    out, record = array_and_record(stack, settings(iterations=0), method=method, say=said.append)
    return out, record, "\n".join(said)


def test_every_frame_of_a_recording_shows_something(recording):
    shown = frames_shown(recording)
    np.testing.assert_array_equal(shown, np.arange(96))
    assert without_idle(recording, shown) is recording


@pytest.mark.parametrize("read_bytes", [1, 2**25])
def test_blank_and_repeated_frames_are_found(recording, monkeypatch, read_bytes):
    monkeypatch.setattr("restormer3d.views._READ_BYTES", read_bytes)
    stack = recording.copy()
    stack[[0, 40, 95]] = 0
    stack[41] = 0
    stack[11:13] = stack[10]
    expected = np.arange(96)
    expected[[0, 40, 41, 95]] = -1
    expected[11:13] = 10
    np.testing.assert_array_equal(frames_shown(stack), expected)
    others = without_idle(stack, frames_shown(stack))
    assert others.shape == (90, 48, 48)
    back = np.stack(list(put_back(iter(others[:]), stack, expected)))
    np.testing.assert_array_equal(back, stack)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("places", [[0], [50], [0, 1], [30, 60, 61]])
def test_frames_that_are_dark_are_found(recording, share, places):
    stack = recording.copy()
    dark = np.random.default_rng(1).poisson(share * (recording[places] - 2000.0).clip(0) / GAIN) * GAIN + 2000
    stack[places] = dark + 10 * np.random.default_rng(2).standard_normal(dark.shape)
    np.testing.assert_array_equal(np.flatnonzero(frames_shown(stack) < 0), places)


def test_frames_that_hold_no_photon_by_chance_are_kept():
    counts = np.random.default_rng(0).poisson(0.003, (100, 24, 24)).astype(np.uint8)
    assert (counts.max((1, 2)) == 0).sum() > 5
    np.testing.assert_array_equal(frames_shown(counts), np.arange(100))


def test_what_is_not_dark(recording):
    moved, bleached, half = recording.copy(), recording.astype(float), recording.copy()
    moved[50] = np.roll(moved[50], (9, -7), (0, 1))
    bleached = 2000 + (bleached - 2000) * np.exp(-np.arange(96) / 40)[:, None, None]
    half[48:] = 2000 + (half[48:] - 2000) // 3  # for longer than it was bright: the laser's power was changed
    for stack in (moved, bleached, half):
        assert (frames_shown(stack) >= 0).all()


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_other_frames_are_denoised_as_if_idle_ones_were_not_there(recording, method):
    stack = np.insert(recording, [0, 20, 50], 0, axis=0)
    stack = np.insert(stack, 71, stack[70], axis=0)
    out, record, said = denoised(stack, method)
    expected, alone, _ = denoised(recording, method)
    blank = [0, 21, 52]
    np.testing.assert_array_equal(out[blank], 0)
    np.testing.assert_array_equal(out[71], out[70])
    np.testing.assert_array_equal(np.delete(out, [*blank, 71], axis=0), expected)
    assert (record["idle_frames"], alone["idle_frames"]) == (4, 0)
    assert "3 frames are blank or dark, 1 repeat the one before" in said


def test_the_published_recipe_takes_all_frames(recording):
    stack = recording[:20].copy()
    stack[5] = 0
    assert set_aside(stack, settings("published").inference).stack is stack
    assert set_aside(stack, settings().inference).record["idle_frames"] == 1


def test_inspect_counts_them_and_measures_the_others(recording, tmp_path):
    tifffile.imwrite(tmp_path / "all.tif", recording)
    tifffile.imwrite(tmp_path / "idle.tif", np.concatenate([recording, np.zeros_like(recording)]))
    every, idle = inspect(tmp_path / "all.tif"), inspect(tmp_path / "idle.tif")
    assert (every["idle_frames"], idle["idle_frames"]) == (0, 96)
    assert idle["noise"] == every["noise"]
    assert "96 frames are blank" in describe(idle)
    assert "blank" not in describe(every)


def test_noise_is_measured_where_frames_change(recording):
    alone = estimate_noise(recording)
    beside = estimate_noise(np.concatenate([recording, np.zeros((300, 48, 48), "u2")]))
    assert beside.gain == pytest.approx(alone.gain, rel=0.3)
