"""The temporal mean as an image: closer to the truth, unharmed where there is no noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from restormer3d import denoising, static_image
from restormer3d.arithmetic import torch_device
from restormer3d.checkpoint import small_network
from restormer3d.denoising import start_denoising
from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.static_image import denoise_change, denoise_mean, restored, stabilized
from restormer3d.unets import ImageNetwork

NETWORK = small_network(ImageNetwork)
WHITE = ((1.0,), (1.0,), (1.0,))


def noise_of(gain, read_noise_variance, offset=0.0):
    return NoiseEstimate(gain, read_noise_variance, offset, None, {}, 0.0, 0.0)


@pytest.fixture(scope="module")
def scene():
    return simulate_scene((60, 64, 64), seed=11)


def error(image, truth):
    return np.square(image - truth).mean()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_it_is_closer_to_the_truth_than_the_mean_and_any_gaussian(scene, level):
    truth = scene[:].mean(0)
    noisy = NoisyScene(scene, *noise_parameters(level), seed=3)[:]
    mean = noisy.mean(0)
    out = denoise_mean(mean, estimate_noise(noisy), len(noisy), WHITE, NETWORK)
    assert out.dtype == np.float32
    best = min(error(gaussian_filter(mean, sigma), truth) for sigma in (0.0, 0.4, 0.6, 0.8, 1.0, 1.3, 2.0))
    assert error(out, truth) < 0.7 * best


def test_a_network_that_takes_too_much_away_is_not_followed(scene, monkeypatch):
    truth = scene[:].mean(0)
    mean = truth + np.random.default_rng(0).normal(size=truth.shape)
    monkeypatch.setattr(static_image, "denoise_image", lambda _, image, __: image.mean().expand_as(image))
    assert error(denoise_mean(mean, noise_of(0.0, 1.0), 1, WHITE, NETWORK), truth) < 1.1 * error(mean, truth)


def test_noise_that_neighbors_share_is_known(scene):
    """Correlated noise looks like structure: told of it, less of it is kept."""
    truth = scene[:].mean(0)
    white = np.random.default_rng(0).normal(size=(64, 65))
    mean = truth + 60 * (white[:, 1:] + 0.5 * white[:, :-1]) / 1.25**0.5
    told, not_told = (
        denoise_mean(mean, noise_of(0.0, 3600.0), 1, each, NETWORK) for each in ((*WHITE[:2], (1, 0.4)), WHITE)
    )
    assert error(told, truth) < 0.97 * error(not_told, truth)


@pytest.mark.parametrize("shape", [(40, 30), (5, 9), (1, 20), (1, 1)])
def test_without_noise_the_mean_stays(shape):
    mean = np.random.default_rng(1).uniform(100, 900, shape)
    out = denoise_mean(mean, noise_of(0.0, 0.0), 100, WHITE, NETWORK)
    np.testing.assert_allclose(out, mean, rtol=1e-6)


def test_a_flat_image_stays_flat():
    flat = np.full((20, 20), 70.0)
    for noise in (noise_of(20.0, 100.0), noise_of(0.0, 0.0)):
        of_noise = (noise.variance(flat).mean() / 50) ** 0.5
        np.testing.assert_allclose(denoise_mean(flat, noise, 50, WHITE, NETWORK), flat, rtol=1e-6, atol=0.15 * of_noise)


@pytest.mark.parametrize(
    "noise", [noise_of(30.0, 400.0, 12.0), noise_of(30.0, 0.0), noise_of(0.0, 25.0, 5.0), noise_of(0.0, 0.0)]
)
def test_the_transform_makes_noise_alike_and_is_taken_back(noise):
    intensities = np.linspace(-80, 3000, 500)
    np.testing.assert_allclose(restored(stabilized(intensities, noise), noise), intensities, atol=1e-6)
    if noise.read_noise_variance:
        slope = np.gradient(stabilized(intensities, noise), intensities)
        np.testing.assert_allclose(slope[40:] ** 2 * noise.variance(intensities[40:]), 1, rtol=0.02)


def test_only_the_static_part_of_a_stack_changes(scene):
    noisy = NoisyScene(scene, *noise_parameters(2), seed=4)[:]
    chosen, device = settings(iterations=0), torch_device("cpu")

    def denoised(**changes):
        inference = chosen.inference.model_copy(update=changes)
        with_changes = denoising.replace(chosen, inference=inference)
        result = start_denoising(noisy, with_changes, "restormer3d", device, None, silent, silent)
        return np.stack(list(result.frames))

    out, without = denoised(), denoised(static_image=False)
    np.testing.assert_allclose(out - out.mean(0), without - without.mean(0), atol=0.05)
    truth = scene[:].mean(0)
    assert error(out.mean(0), truth) < 0.95 * error(without.mean(0), truth)

    chunk = {"chunk_voxels": 40 * 64 * 64}
    long = denoised(**chunk)
    assert error(long.mean(0), truth) < 1.05 * error(out.mean(0), truth)
    without_components = denoised(components=False, **chunk)
    assert error(without_components.mean(0), truth) < 1.05 * error(out.mean(0), truth)
    assert error(long, scene[:]) < 0.97 * error(denoised(static_image=False, **chunk), scene[:])


def test_what_a_part_of_a_stack_has_of_its_own():
    rng, (y, x) = np.random.default_rng(3), np.mgrid[:64, :64]
    truth = sum(
        a * np.exp(-((y - v) ** 2 + (x - u) ** 2) / 10) for a, v, u in ((40, 12, 30), (-25, 40, 50), (15, 50, 10))
    )
    deviation = np.linspace(5, 20, 64)
    left = deviation * np.sqrt(1 / 100 - 1 / 1000)
    noisy = truth + left * rng.standard_normal((64, 64))
    variance = np.broadcast_to(deviation**2, (64, 64))
    out = denoise_change(noisy, variance, (100, 1000), WHITE, NETWORK)
    assert error(out, truth) < 0.25 * error(noisy, truth)
    for frames, noise in (((100, 100), variance), ((100, 1000), np.zeros((64, 64)))):
        np.testing.assert_allclose(denoise_change(noisy, noise, frames, WHITE, NETWORK), noisy, rtol=1e-6)
    strong = 1000 * np.where((y // 3 + x // 3) % 2, 1.0, -1.0)  # more than noise is not taken away
    np.testing.assert_allclose(denoise_change(strong, variance, (100, 1000), WHITE, NETWORK), strong, atol=10)


@pytest.mark.parametrize("deviation", [1e-3, 0.1, 3.0])
def test_what_is_far_above_the_noise_stays(deviation):
    """Pixels that have nothing in common, recorded with next to no noise."""
    mean = np.random.default_rng(1).uniform(100, 900, (40, 30))
    out = denoise_mean(mean, noise_of(0.0, deviation**2), 1, WHITE, NETWORK)
    assert np.sqrt(error(out, mean)) < max(1.2 * deviation, 0.05)
