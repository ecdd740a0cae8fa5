"""Voxels whose data were lost stay as they are, and others are denoised as if the recording went on there."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts import lost_voxels
from restormer3d.artefacts.lost_voxels import WithoutLostVoxels, put_back, without_lost_voxels
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.noise import estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (64, 48, 56)
BLANK = {5: slice(10, 17), 6: slice(10, 17), 30: slice(47, 48), 63: slice(20, 48)}  # rows by frame
LOST = sum(rows.stop - rows.start for rows in BLANK.values()) * SHAPE[2]


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=83)[:]


@pytest.fixture(scope="module")
def recording(clean):
    return (2000 + NoisyScene(clean, *noise_parameters(2), seed=1)[:]).astype(np.uint16)


def with_blank_rows(stack, fill=0):
    stack = stack.copy()
    for t, rows in BLANK.items():
        stack[t, rows] = fill
    return stack


def without(stack):
    return without_lost_voxels(stack, estimate_noise(stack), {})


@pytest.mark.parametrize("fill", [0, 65535])
def test_they_hold_what_frames_around_show(recording, fill):
    stack = with_blank_rows(recording, fill)
    found = without(stack)
    assert isinstance(found, WithoutLostVoxels)
    assert list(found.lost) == list(BLANK)
    out = found[:]
    filled = np.zeros(SHAPE, bool)
    for t, rows in BLANK.items():
        filled[t, rows] = True
    np.testing.assert_array_equal(out[~filled], stack[~filled])
    around = [1, 2, 3, 4, 7, 8, 9, 10]
    np.testing.assert_allclose(out[5, 10:17], recording[around, 10:17].mean(0), rtol=1e-6)
    for index in (6, slice(4, 40), (slice(None), slice(12, 25), slice(50, 56)), (63, slice(18, 30)), slice(0, 64, 3)):
        np.testing.assert_array_equal(found[index], out[index])
    np.testing.assert_array_equal(np.stack(list(put_back(iter(out), found))), stack)


def test_blocks_far_below_all_others_are_found(recording):
    stack = recording.copy()
    stack[9, 3:12, 20:40] = 0
    stack[40, :, 30:] = np.random.default_rng(4).integers(0, 50, (48, 26))
    stack[:, 44, 50] = 0  # a pixel that never works
    found = without(stack)
    assert {t: int(lost.sum()) for t, lost in found.lost.items()} == {9: 9 * 20, 40: 48 * 26 - 1}
    np.testing.assert_array_equal(np.stack(list(put_back(iter(found[:]), found))), stack)


def test_what_fades_or_is_dark_is_not_lost():
    rng = np.random.default_rng(5)
    faded = 2000 * np.exp(-np.linspace(0, 3, SHAPE[0]))[:, None, None] + 10 * rng.standard_normal(SHAPE)
    assert without(faded) is faded
    darker = 2000 + 20 * rng.standard_normal(SHAPE)
    darker[30:34] -= 800
    assert without(darker) is darker


def test_recordings_without_them_stay(recording):
    assert without(recording) is recording
    constant = np.full(SHAPE, 7, np.uint8)
    assert without(constant) is constant


def test_rows_that_are_always_blank_stay(recording):
    black = recording.copy()
    black[:, 20:23] = 0
    assert without(black) is black


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
def test_rows_without_a_photon_stay(rate):
    counts = np.random.default_rng(0).poisson(rate, SHAPE).astype(np.uint8)
    assert without(counts) is counts


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_denoising_gains_by_it(method, clean, recording, monkeypatch):
    chosen, said = settings(iterations=0), []
    stack = with_blank_rows(recording)
    out, record = array_and_record(stack, chosen, method=method, say=said.append)
    assert record["lost_voxels"] == LOST
    assert any("voxels of 4 frames are as if their data were lost" in text for text in said)
    for t, rows in BLANK.items():
        assert (out[t, rows] == 0).all()
    whole = np.setdiff1d(np.arange(len(stack)), list(BLANK))
    plain, _ = array_and_record(recording, chosen, method=method)
    monkeypatch.setattr(lost_voxels, "without_lost_voxels", lambda stack, *_: stack)
    left_in, _ = array_and_record(stack, chosen, method=method)
    scores = [evaluate_stacks(clean[whole] + 2000, x[whole])["activity_snr"] for x in (left_in, out, plain)]
    assert scores[0] + 3 < scores[1]
    assert scores[1] > scores[2] - 1


def test_they_are_told_beforehand(tmp_path, recording):
    path = tmp_path / "broken.tif"
    tifffile.imwrite(path, with_blank_rows(recording))
    facts = inspect(path)
    assert facts["lost_voxels"] == LOST
    assert "as if their data were lost" in describe(facts)
    tifffile.imwrite(path, recording)
    assert "as if their data were lost" not in describe(inspect(path))


def test_only_where_it_is_asked_for(recording):
    stack = with_blank_rows(recording)
    assert set_aside(stack, settings("published").inference).stack is stack
