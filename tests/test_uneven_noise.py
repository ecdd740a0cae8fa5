"""Noise that differs from place to place is found, made even, and put back."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter, shift

from restormer3d import denoising
from restormer3d.artefacts.uneven_noise import EvenNoise, put_back, uneven_noise
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.local_noise import seen_noise
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (80, 64, 72)
Y, X = np.mgrid[: SHAPE[1], : SHAPE[2]] - np.array(SHAPE[1:])[:, None, None] / 2
LIGHT = np.exp(-(Y**2 + X**2) / 1200)  # of a microscope, at the center and in the corners


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=71)[:]


def recorded(clean, level=1, seed=1):
    return NoisyScene(clean, *noise_parameters(level), seed=seed)[:].astype(np.float32)


def flat_field(clean):
    """Truth and recording, both divided by the light that came from each pixel."""
    return clean, recorded(clean * LIGHT) / LIGHT.astype(np.float32)


def relative_changes(clean):
    rest = clean.mean(0)
    return (clean - rest) / rest, (recorded(clean * LIGHT) / LIGHT.astype(np.float32) - rest) / rest


@pytest.fixture(scope="module", params=[flat_field, relative_changes])
def uneven(request, clean):
    return request.param(clean)


def test_its_deviation_is_that_of_the_noise(uneven):
    truth, noisy = uneven
    found = uneven_noise(noisy)
    expected = np.sqrt(np.square(noisy - truth).mean(0))
    expected /= np.median(expected)
    ratio = found.deviation / expected
    assert np.quantile(ratio, 0.05) > 0.6  # in dF/F noise has the detail of cells, finer than it can be measured
    assert np.quantile(ratio, 0.95) < 1.4
    assert found.ratio == pytest.approx(np.divide(*np.quantile(expected, (0.95, 0.05))), rel=0.3)


def test_made_even_it_is_the_same_everywhere(uneven):
    noisy = uneven[1]
    even = EvenNoise(noisy, uneven_noise(noisy))
    assert even.shape == noisy.shape
    assert even.dtype == np.float32
    assert uneven_noise(even) is None
    after, before = (np.quantile(np.diff(x, axis=0).std(0), (0.05, 0.95)) for x in (even[:], noisy))
    assert after[1] / after[0] < 0.6 * before[1] / before[0]
    np.testing.assert_allclose(list(put_back(iter(even), even.noise)), noisy, rtol=1e-4, atol=1e-5 * noisy.std())


@pytest.mark.parametrize("photons", [20, 2000])
def test_activity_much_stronger_than_noise_is_none(clean, photons):
    """Differences of frames are mostly of activity where there are thousands of photons; neighbors share it."""
    bright = clean * photons / clean.mean()
    noisy = np.random.default_rng(5).poisson(bright).astype(np.float32)
    assert uneven_noise(noisy) is None
    variance, mean, changes = seen_noise(noisy)
    assert changes.all()
    np.testing.assert_allclose(mean, bright.mean(0), rtol=0.5)
    seen, expected = (gaussian_filter(x, 4) for x in (variance, bright.mean(0)))
    assert np.quantile(seen / expected, (0.05, 0.95)) == pytest.approx([1, 1], abs=0.25)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_it_is_sliced_as_the_stack(uneven, kind):
    noisy = uneven[1]
    even = EvenNoise(np.clip(100 * noisy / noisy.std() + 100, 0, 255).astype(kind), uneven_noise(noisy))
    assert even[:].dtype == even.dtype
    for index in (7, slice(20, 40), (slice(None), slice(3, 9), slice(50, 56)), (7, slice(0, 3)), slice(0, 60, 3)):
        np.testing.assert_array_equal(even[index], even[:][index])


@pytest.mark.parametrize("method", ["restormer3d", "svd"])
def test_denoising_gains_by_it(uneven, method, monkeypatch):
    truth, noisy = uneven
    said: list[str] = []
    denoised, record = array_and_record(noisy, settings(iterations=0), method=method, say=said.append)
    assert record["uneven_noise"] > 2
    assert sum("in some places" in text for text in said) == 1
    monkeypatch.setattr(denoising, "uneven_noise", lambda *_: None)
    without, record = array_and_record(noisy, settings(iterations=0), method=method)
    assert record["uneven_noise"] is None
    scores = [evaluate_stacks(truth.astype(np.float32), output) for output in (denoised, without)]
    assert scores[0]["stsnr"] > scores[1]["stsnr"] + 0.3
    assert scores[0]["activity_snr"] > scores[1]["activity_snr"] - 0.3


@pytest.mark.parametrize("level", [1, 2, 3])
def test_noise_of_photons_is_not_uneven(clean, level):
    for light in (1, LIGHT):
        assert uneven_noise(recorded(clean * light, level)) is None


def test_nor_is_that_beside_a_black_border(clean):
    black = recorded(clean)
    black[:, :, :20] = 0
    assert uneven_noise(black) is None


@pytest.mark.parametrize("light", [1, (LIGHT**1.6).astype(np.float32)])
def test_of_planes_in_turns_it_is_told_from_what_they_differ_by(light):
    truth = simulate_scene((160, *SHAPE[1:]), seed=72)[:].astype(np.float32)
    truth[1::2] *= 1 + 0.4 * np.sin(X / 3) * np.cos(Y / 4)
    noisy = recorded(truth * light) / light
    denoised, record = array_and_record(noisy, settings(iterations=0))
    assert record["planes"] == {"count": 2, "shared": True}
    assert (record["uneven_noise"] is None) == isinstance(light, int)
    filtered = array_and_record(noisy, settings(), method="gaussian")[0]
    scores = [evaluate_stacks(truth, output)["stsnr"] for output in (denoised, filtered)]
    assert scores[0] > scores[1] + 3


def test_a_field_that_moves_may_have_it():
    wider = simulate_scene((SHAPE[0], SHAPE[1] + 8, SHAPE[2] + 8), seed=73)[:]
    shifts = np.stack([1.5 * np.sin(np.arange(SHAPE[0]) / 3), np.cos(np.arange(SHAPE[0]) / 7)], axis=1)
    truth = np.stack([shift(x, by, order=1)[4:-4, 4:-4] for x, by in zip(wider, shifts, strict=True)])
    light = (LIGHT**1.6).astype(np.float32)
    noisy = recorded(truth * light) / light
    scores = []
    for followed in ("smooth", "none"):
        denoised, record = array_and_record(noisy, settings(iterations=0, movement=followed))
        assert record["uneven_noise"] > 2
        scores.append(evaluate_stacks(truth.astype(np.float32), denoised)["activity_snr"])
    assert scores[0] > scores[1] + 1


@pytest.mark.parametrize("shape", [(8, 64, 64), (40, 20, 64), (2, 40, 40)])
def test_small_stacks_do_not_tell(shape):
    noise = np.random.default_rng(0).normal(0, 1, shape) * np.linspace(1, 30, shape[2])
    assert uneven_noise(noise) is None


def test_a_stack_that_never_changes_has_none():
    assert uneven_noise(np.ones((40, 40, 40), np.uint8)) is None


def test_inspect_tells_of_it(uneven, clean, tmp_path):
    for noisy, told in ((uneven[1], True), (recorded(clean), False)):
        tifffile.imwrite(tmp_path / "stack.tif", noisy.astype(np.float32))
        facts = inspect(tmp_path / "stack.tif")
        assert (facts["uneven_noise"] is not None) == told
        assert ("uneven noise: " in describe(facts)) == told


def test_the_published_recipe_leaves_it(uneven):
    chosen = settings("published", iterations=0)
    assert array_and_record(uneven[1], chosen, method="svd")[1]["uneven_noise"] is None
