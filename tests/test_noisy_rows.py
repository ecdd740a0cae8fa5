"""Rows of a few frames that are far noisier than others are found, and drawn towards the frames around."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts import noisy_rows as module
from restormer3d.artefacts.frames_around import Steadied, mean_around
from restormer3d.artefacts.noisy_rows import noisy_rows, without_noise_of_rows
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.noise import estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (96, 48, 56)
NOISY = {9: slice(0, 48), 40: slice(10, 30), 41: slice(10, 30), 95: slice(30, 48)}  # rows by frame
GARBLED = slice(16, 32)  # rows of one more frame


@pytest.fixture(scope="module")
def clean():
    return 2000 + simulate_scene(SHAPE, seed=84)[:]


def recorded(clean, level=2, seed=1):
    return 2000 + NoisyScene(clean - 2000, *noise_parameters(level), seed=seed)[:].astype(np.float32)


@pytest.fixture(scope="module")
def recording(clean):
    return recorded(clean)


@pytest.fixture(scope="module")
def noisy(clean, recording):
    stack = recording.copy()
    for t, rows in NOISY.items():
        stack[t, rows] = clean[t, rows] + 6 * (recording[t, rows] - clean[t, rows])
    return stack


def rows_of(stack):
    return noisy_rows(stack, estimate_noise(stack))


def test_they_are_found_and_only_they(noisy):
    kept = rows_of(noisy)
    assert list(kept) == list(NOISY)
    for t, rows in NOISY.items():
        drawn = kept[t] < 1
        assert drawn[rows].all()
        drawn[max(0, rows.start - 1) : rows.stop + 1] = False
        assert not drawn.any()
        assert np.median(kept[t][rows]) == pytest.approx(1 / 6, rel=0.35)


def test_their_noise_becomes_as_usual(clean, recording, noisy):
    steady = without_noise_of_rows(noisy, rows_of(noisy))
    assert isinstance(steady, Steadied)
    usual = (recording - clean).std()
    for t, rows in NOISY.items():
        inside = slice(rows.start + 2, rows.stop - 2)
        assert (noisy - clean)[t, inside].std() > 4 * usual
        assert (steady[t, inside] - clean[t, inside]).std() < 1.6 * usual
    others = np.setdiff1d(np.arange(SHAPE[0]), list(NOISY))
    np.testing.assert_array_equal(steady[:][others], noisy[others])
    np.testing.assert_array_equal(steady[40, 36:], noisy[40, 36:])
    for index in (9, slice(30, 60), (slice(None), slice(5, 25), slice(50, 56)), (95, slice(20, 40)), slice(0, 96, 3)):
        np.testing.assert_array_equal(steady[index], steady[:][index])


def test_frames_around_are_none_of_them(noisy):
    steady = without_noise_of_rows(noisy, rows_of(noisy))
    assert not set(NOISY) & set(steady.usual)
    np.testing.assert_allclose(mean_around(noisy, steady.usual, 40), noisy[[36, 37, 38, 39, 42, 43, 44, 45]].mean(0))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float64])
def test_they_are_found_in_any_type(noisy, kind):
    scaled = np.clip(np.rint((noisy - 2000) / 8 + 60), 0, 255).astype(kind)
    assert set(NOISY) == set(rows_of(scaled))


def test_long_recordings_are_looked_at_in_parts(noisy, monkeypatch):
    repeated = np.concatenate([noisy, noisy[:, ::-1], noisy])
    expected = rows_of(repeated)
    assert len(expected) == 12
    for block in (250, 100):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert set(rows_of(repeated)) == set(expected)


def test_garbled_rows_count_as_lost(recording):
    stack = np.rint(recording).astype(np.uint16)
    stack[50, GARBLED] = np.random.default_rng(3).integers(0, 2**16, stack[50, GARBLED].shape)
    aside = set_aside(stack, settings().inference)
    assert aside.record["lost_voxels"] == (GARBLED.stop - GARBLED.start) * SHAPE[2]
    assert aside.record["noisy_frames"] == 0
    assert aside.light is None
    around = [46, 47, 48, 49, 51, 52, 53, 54]
    np.testing.assert_allclose(aside.stack[50][GARBLED], stack[around, GARBLED].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(list(aside.put_back(iter(aside.stack[:]))), stack)


def test_single_voxels_of_noisy_rows_are_not_lost(clean, recording):
    stack = recording.copy()
    stack[20:23] = clean[20:23] + 8 * (recording[20:23] - clean[20:23])
    aside = set_aside(stack, settings().inference)
    assert aside.drawn == (20, 21, 22)
    assert aside.record["lost_voxels"] == 0


@pytest.mark.parametrize("level", [1, 2, 3])
def test_usual_recordings_stay(clean, level):
    assert rows_of(recorded(clean, level)) == {}


def test_what_explains_noise_is_no_accident(clean, recording, noisy):
    bright = clean.copy()
    bright[30:33] = 2000 + 40 * (bright[30:33] - 2000)  # all tissue is active: more photons, more noise
    assert rows_of(recorded(bright)) == {}
    lit = clean.copy()
    lit[30:33] += 20000
    assert rows_of(recorded(lit)) == {}
    growing = clean + np.linspace(1, 6, SHAPE[0])[:, None, None] * (recording - clean)
    assert rows_of(growing) == {}
    from_then_on = clean + np.where(np.arange(SHAPE[0]) < 60, 1, 5)[:, None, None] * (recording - clean)
    assert rows_of(from_then_on) == {}
    every_sixth = clean + np.where(np.arange(SHAPE[0]) % 6 == 0, 5, 1)[:, None, None] * (recording - clean)
    assert rows_of(every_sixth) == {}
    moved = recording.copy()
    moved[30:33] = np.roll(moved[30:33], (5, 3), (1, 2))
    assert rows_of(moved) == {}
    assert rows_of(np.full(SHAPE, 7, np.uint8)) == {}
    assert rows_of(noisy[:15]) == rows_of(noisy[:, :31]) == {}


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3, 3.0])
def test_few_photons_stay(rate):
    rates = np.full(SHAPE, rate)
    rates[40:43] *= 5
    counts = np.random.default_rng(0).poisson(rates).astype(np.uint8)
    assert rows_of(counts) == {}


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_denoising_gains_by_it(method, clean, noisy, recording, monkeypatch):
    said: list[str] = []
    denoised, record = array_and_record(noisy, settings(iterations=0), method=method, say=said.append)
    assert record["noisy_frames"] == 4
    assert sum("rows of 4 frames are far noisier than others" in text for text in said) == 1
    plain, _ = array_and_record(recording, settings(iterations=0), method=method)
    monkeypatch.setattr(module, "noisy_rows", lambda *_: {})
    left_in, record = array_and_record(noisy, settings(iterations=0), method=method)
    assert record["noisy_frames"] == 0
    scores = [evaluate_stacks(clean, output)["activity_snr"] for output in (denoised, left_in, plain)]
    assert scores[0] > scores[1] + 0.3
    assert scores[0] > scores[2] - 1


def test_they_are_told_beforehand(tmp_path, noisy, recording):
    path = tmp_path / "noisy.tif"
    tifffile.imwrite(path, noisy)
    facts = inspect(path)
    assert facts["noisy_frames"] == 4
    assert "rows of 4 are far noisier" in describe(facts)
    tifffile.imwrite(path, recording)
    assert "noisier" not in describe(inspect(path))


def test_planes_in_turns_are_not_drawn_towards_one_another(noisy):
    stack = noisy.copy()
    stack[1::2] = stack[1::2, ::-1]
    assert rows_of(stack)
    aside = set_aside(stack, settings().inference)
    assert aside.drawn == ()
    assert aside.record["noisy_frames"] == 0


def test_only_where_it_is_asked_for(noisy):
    assert set_aside(noisy, settings("published").inference).stack is noisy
