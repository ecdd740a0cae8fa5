"""The temporal mean as an image: closer to the truth than its guide, unharmed where there is no noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from restormer3d import denoising
from restormer3d.arithmetic import torch_device
from restormer3d.denoising import silent, start_denoising
from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.static_image import _restored, _stabilized, denoise_mean

WHITE = ((1.0,), (1.0,), (1.0,))


def noise_of(gain, read_noise_variance, offset=0.0):
    return NoiseEstimate(gain, read_noise_variance, offset, None, {}, 0.0, 0.0)


@pytest.fixture(scope="module")
def scene():
    return simulate_scene((60, 64, 64), seed=11)


def error(image, truth):
    return np.square(image - truth).mean()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_it_is_closer_to_the_truth_than_its_guide_and_the_mean(scene, level):
    truth = scene[:].mean(0)
    noisy = NoisyScene(scene, *noise_parameters(level), seed=3)[:]
    mean, guide = noisy.mean(0), gaussian_filter(noisy.mean(0), 0.6)
    out = denoise_mean(mean, guide, estimate_noise(noisy), len(noisy), WHITE)
    assert out.dtype == np.float32
    assert error(out, truth) < 0.85 * min(error(mean, truth), error(guide, truth))


def test_noise_that_neighbors_share_is_known(scene):
    """Correlated noise looks like structure: told of it, less of it is kept."""
    truth = scene[:].mean(0)
    white = np.random.default_rng(0).normal(size=(64, 65))
    mean = truth + 60 * (white[:, 1:] + 0.5 * white[:, :-1]) / 1.25**0.5
    guide = gaussian_filter(mean, 1.0)
    told, not_told = (
        denoise_mean(mean, guide, noise_of(0.0, 3600.0), 1, each) for each in ((*WHITE[:2], (1, 0.4)), WHITE)
    )
    assert error(told, truth) < 0.97 * error(not_told, truth)


@pytest.mark.parametrize("shape", [(40, 30), (5, 9), (1, 20), (1, 1)])
def test_without_noise_the_mean_stays(shape):
    mean = np.random.default_rng(1).uniform(100, 900, shape)
    out = denoise_mean(mean, mean * 0.9, noise_of(0.0, 0.0), 100, WHITE)
    np.testing.assert_allclose(out, mean, rtol=1e-2)


def test_a_flat_image_stays_flat():
    flat = np.full((20, 20), 70.0)
    for noise in (noise_of(20.0, 100.0), noise_of(0.0, 0.0)):
        np.testing.assert_allclose(denoise_mean(flat, flat, noise, 50, WHITE), flat, rtol=1e-4)


@pytest.mark.parametrize(
    "noise", [noise_of(30.0, 400.0, 12.0), noise_of(30.0, 0.0), noise_of(0.0, 25.0, 5.0), noise_of(0.0, 0.0)]
)
def test_the_transform_makes_noise_alike_and_is_taken_back(noise):
    intensities = np.linspace(-80, 3000, 500)
    np.testing.assert_allclose(_restored(_stabilized(intensities, noise), noise), intensities, atol=1e-6)
    if noise.read_noise_variance:
        slope = np.gradient(_stabilized(intensities, noise), intensities)
        np.testing.assert_allclose(slope[40:] ** 2 * noise.variance(intensities[40:]), 1, rtol=0.02)


def test_only_the_static_part_of_a_stack_changes(scene, monkeypatch):
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

    monkeypatch.setattr("restormer3d.components._CHUNK_VOXELS", 40 * 64 * 64)  # too long to be held
    long = denoised()
    assert error(long.mean(0), truth) < 0.97 * error(denoised(static_image=False).mean(0), truth)
