"""Noise that rows share is found, and taken away; what tissue shares is not."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts import set_aside
from restormer3d.artefacts.row_noise import WithoutRowNoise, row_noise
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (120, 64, 72)
NOISE = 100.0
SHARED = np.random.default_rng(2).standard_normal((*SHAPE[:2], 1))  # of each row of each frame


@pytest.fixture(scope="module")
def noise():
    return (NOISE * np.random.default_rng(1).standard_normal(SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=71)[:]


def recorded(clean, level=1, seed=1):
    return NoisyScene(clean, *noise_parameters(level), seed=seed)[:].astype(np.float32)


@pytest.mark.parametrize("share", [0.15, 0.5, 2.0])
def test_it_is_taken_away_as_far_as_pixels_tell(share, noise):
    added = share * NOISE * SHARED
    found = row_noise((noise + added).astype(np.float32))
    of_a_row = NOISE**2 / SHAPE[2]  # variance of the mean of its pixels' own noise
    told = 1 / (1 / np.square(added).mean() + 1 / of_a_row)
    assert np.square(found - (added - added.mean(0))[..., 0]).mean() < 1.35 * told  # what always is, is of the image


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_it_is_sliced_as_the_stack(kind, noise):
    stack = np.clip(100 + 30 * (noise / NOISE + 0.5 * SHARED), 0, 255).astype(kind)
    without = WithoutRowNoise(stack, row_noise(stack))
    assert without.shape == stack.shape
    assert without[:].dtype == without.dtype
    for index in (7, slice(20, 40), (slice(None), slice(3, 9), slice(50, 56)), (7, slice(0, 3)), slice(0, 60, 3)):
        np.testing.assert_array_equal(without[index], without[:][index])


def test_there_is_none_in_noise(noise):
    assert row_noise(noise) is None
    assert row_noise(np.zeros(SHAPE, np.int16)) is None


@pytest.mark.parametrize("level", [1, 2, 3])
def test_there_is_none_in_a_recording(level, clean):
    assert row_noise(recorded(clean, level)) is None


def test_noise_correlated_along_rows_is_of_pixels(noise):
    assert row_noise((noise[..., 1:] + noise[..., :-1])[:, :, :64]) is None


def test_there_is_none_where_single_frames_differ(noise):
    outlier = noise.copy()
    outlier[40:42] += 20 * NOISE * SHARED[40:42]
    assert row_noise(outlier) is None


def test_the_image_and_slow_changes_stay(noise):
    bands = 3 * NOISE * SHARED[:1] * (1 + np.arange(SHAPE[0]) / SHAPE[0])[:, None, None]  # of the tissue, ever brighter
    found = row_noise((noise + bands + 0.3 * NOISE * SHARED).astype(np.float32))
    slow = np.abs(np.array([part.mean(0) for part in np.split(found, 6)]))
    assert slow.max() < 0.2 * NOISE


@pytest.mark.parametrize("shape", [(31, 64, 72), (120, 24, 72), (120, 64, 24)])
def test_small_stacks_are_left_alone(shape, noise):
    frames, height, width = shape
    assert row_noise((noise + NOISE * SHARED)[:frames, :height, :width]) is None


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_denoising_gains_by_it(method, clean, monkeypatch):
    noisy = recorded(clean)
    deviation = float(np.diff(noisy, axis=0).std() / 2**0.5)
    shared = (noisy + 0.3 * deviation * SHARED).astype(np.float32)
    chosen, said = settings(iterations=0), []
    without, record = array_and_record(shared, chosen, method=method, say=said.append)
    assert 0.2 * deviation < record["row_noise"] < 0.35 * deviation
    assert any("pixels of a row share" in text for text in said)
    assert array_and_record(noisy, chosen, method="gaussian")[1]["row_noise"] == 0
    monkeypatch.setattr(set_aside, "row_noise", lambda _: None)
    left_in, _ = array_and_record(shared, chosen, method=method)
    scores = [evaluate_stacks(clean, x)["activity_snr"] for x in (left_in, without)]
    assert scores[1] > scores[0] + (1.0 if method == "restormer3d" else 0.1)


def test_it_is_told_beforehand(tmp_path, clean):
    path = tmp_path / "rows.tif"
    noisy = recorded(clean)
    tifffile.imwrite(path, (noisy + 0.5 * noisy.std() * SHARED).astype(np.float32))
    facts = inspect(path)
    assert facts["row_noise"] > 0
    assert "pixels of a row share" in describe(facts)
    tifffile.imwrite(path, noisy)
    assert inspect(path)["row_noise"] == 0
    assert "pixels of a row share" not in describe(inspect(path))


def test_only_where_it_is_asked_for(clean):
    noisy = recorded(clean)
    shared = noisy + 0.5 * noisy.std() * SHARED
    _, record = array_and_record(shared, settings("published", iterations=0), method="gaussian")
    assert record["row_noise"] == 0
