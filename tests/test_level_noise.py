"""Noise that all pixels of a frame share is found, and taken away; what tissue shares is not."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts import set_aside
from restormer3d.artefacts.level_noise import level_noise
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (160, 64, 72)
LEVEL = np.random.default_rng(2).standard_normal((SHAPE[0], 1, 1))


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=73)[:]


def recorded(clean, level=1, seed=1):
    return NoisyScene(clean, *noise_parameters(level), seed=seed)[:].astype(np.float32)


def deviation(noisy):
    return float(np.diff(noisy, axis=0).std() / 2**0.5)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_it_is_found_as_it_is(share):
    rng = np.random.default_rng(3)
    noise = 100 * rng.standard_normal(SHAPE)
    image = 200 + 50 * np.sin(np.arange(SHAPE[2]) / 5)
    found = level_noise((image + noise + 100 * share * LEVEL).astype(np.float32))
    added = 100 * share * (LEVEL - LEVEL.mean())[:, 0, 0]
    assert np.square(found - added).mean() < 0.1 * np.square(added).mean()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_there_is_none_in_a_recording(level, clean):
    assert level_noise(recorded(clean, level)) is None


def test_light_that_flickers_is_multiplied(clean):
    assert level_noise(recorded(clean * (1 + 0.1 * LEVEL))) is None


def test_activity_of_all_tissue_is_slower(clean):
    rng = np.random.default_rng(4)
    events = np.convolve(rng.poisson(0.1, SHAPE[0]), np.exp(-np.arange(30) / 4))[: SHAPE[0], None, None]
    assert level_noise(recorded(clean) + (60 * events).astype(np.float32)) is None


def test_slow_changes_of_the_level_stay(clean):
    noisy = recorded(clean)
    slow = 300 * np.sin(np.arange(SHAPE[0]) / 12)[:, None, None]
    found = level_noise((noisy + slow + 0.1 * deviation(noisy) * LEVEL).astype(np.float32))
    assert abs(np.dot(found, slow[:, 0, 0]) / np.square(slow).sum()) < 0.1


@pytest.mark.parametrize("shape", [(31, 64, 72), (160, 24, 72), (160, 64, 24)])
def test_small_stacks_are_left_alone(shape, clean):
    frames, height, width = shape
    assert level_noise((recorded(clean) + 1000 * LEVEL)[:frames, :height, :width]) is None
    assert level_noise(np.zeros(SHAPE, np.int16)) is None


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_denoising_gains_by_it(method, clean, monkeypatch):
    noisy = recorded(clean)
    share = 0.15 * deviation(noisy)
    shared = (noisy + share * LEVEL).astype(np.float32)
    chosen, said = settings(iterations=0), []
    without, record = array_and_record(shared, chosen, method=method, say=said.append)
    assert 0.8 * share < record["level_noise"] < 1.2 * share
    assert any("pixels of a frame share noise" in text for text in said)
    assert array_and_record(noisy, chosen, method="gaussian")[1]["level_noise"] == 0
    monkeypatch.setattr(set_aside, "level_noise", lambda _: None)
    left_in, _ = array_and_record(shared, chosen, method=method)
    scores = [evaluate_stacks(clean, x)["activity_snr"] for x in (left_in, without)]
    assert scores[1] > scores[0] + (3.0 if method == "restormer3d" else -0.3)  # the filter averages it anyway


def test_it_is_told_beforehand(tmp_path, clean):
    path = tmp_path / "level.tif"
    noisy = recorded(clean)
    tifffile.imwrite(path, (noisy + 0.3 * deviation(noisy) * LEVEL).astype(np.float32))
    facts = inspect(path)
    assert facts["level_noise"] > 0
    assert "pixels of a frame share" in describe(facts)
    tifffile.imwrite(path, noisy)
    assert "pixels of a frame share" not in describe(inspect(path))


def test_only_where_it_is_asked_for(clean):
    noisy = recorded(clean)
    shared = (noisy + 0.3 * deviation(noisy) * LEVEL).astype(np.float32)
    _, record = array_and_record(shared, settings("published", iterations=0), method="gaussian")
    assert record["level_noise"] == 0


def test_what_is_left_of_light_is_not_taken_for_it(clean):
    """The same frames, with and without light that was taken from them."""
    noisy, parts = recorded(clean) + (20 * LEVEL).astype(np.float32), settings().inference
    light = np.zeros(SHAPE[:2], np.float32)
    for taken, finds in ((None, True), (light, False)):
        seen, found = set_aside.without_electrical_noise(noisy, None, taken, parts)
        assert (found["level_noise"] > 10) == finds
        assert (seen is noisy) != finds
