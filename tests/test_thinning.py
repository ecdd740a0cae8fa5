"""Thinned recordings have the moments, the correlation and the normalization of recordings with less light."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.normalization import estimate_normalization, temporal_mean
from restormer3d.patches import random_patches, training_stack
from restormer3d.simulation import add_noise
from restormer3d.thinning import prepare_thinning, thin

from .conftest import blinking_cells, photons

GAIN, READ_VARIANCE = 30.0, 400.0


def known_noise(x: float = 0.0, y: float = 0.0, offset: float = 0.0) -> NoiseEstimate:
    white = (0.0, 0.0, 0.0)
    correlation = {"t": (0.0, 0.0), "y": (y, *white[1:]), "x": (x, *white[1:])}
    return NoiseEstimate(GAIN, READ_VARIANCE, offset, 10.0, correlation, 0.001, 0.0)


def thinnable(stack: np.ndarray, smallest: float = 0.02):
    source = training_stack(stack)
    mean = temporal_mean(stack)
    return replace(
        source, thinning=prepare_thinning(stack, mean, source.normalization, estimate_noise(stack), smallest)
    )


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_are_those_of_less_light(share, offset):
    rng = np.random.default_rng(0)
    mean = np.tile(np.linspace(50, 600, 12), (12, 1))
    recorded = add_noise(np.broadcast_to(mean, (6000, 12, 12)), GAIN, READ_VARIANCE, rng) + offset
    thinned = thin(recorded, mean + offset, known_noise(offset=offset), share, rng).astype(float)
    error = thinned - mean - offset
    shot = GAIN * mean / share
    columns = error.mean(axis=(0, 1)), error.var(axis=(0, 1)), (error**3).mean(axis=(0, 1))
    standard_error = np.sqrt((shot + READ_VARIANCE)[0] / (6000 * 12))
    assert (np.abs(columns[0]) < 5 * standard_error).all()
    np.testing.assert_allclose(columns[1], (shot + READ_VARIANCE)[0], rtol=0.12)
    assert columns[2].mean() == pytest.approx((GAIN / share * shot).mean(), rel=0.15)


def test_a_simulated_recording_measures_as_one_with_less_light():
    """End to end: noise estimated, thinned with the estimate, estimated again."""
    stack = photons(blinking_cells(240, 64, 64), gain=GAIN)
    mean, noise = temporal_mean(stack), estimate_noise(stack)
    again = estimate_noise(thin(stack, mean, noise, 0.1, np.random.default_rng(0)))
    assert again.gain == pytest.approx(noise.gain / 0.1, rel=0.1)


def test_added_noise_is_correlated_as_the_recorded():
    frames, mean = np.zeros((400, 32, 32), np.float32), np.full((32, 32), 300.0)

    def correlation(added, axis):
        a, b = (np.take(added, range(start, 31 + start), axis) for start in (0, 1))
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    added = thin(frames, mean, known_noise(x=0.3, y=-0.15), 0.1, np.random.default_rng(0))
    assert correlation(added, 2) == pytest.approx(0.3, abs=0.01)
    assert correlation(added, 1) == pytest.approx(-0.15, abs=0.01)
    assert added.var() == pytest.approx(GAIN * 300 * 9, rel=0.02)
    assert np.corrcoef(added[:, :, 0].ravel(), added[:, :, -1].ravel())[0, 1] == pytest.approx(0, abs=0.03)
    # What no blind spot covers is estimation error, and adding it would be a leak.
    faint = thin(frames, mean, known_noise(x=0.05), 0.1, np.random.default_rng(0))
    assert correlation(faint, 2) == pytest.approx(0, abs=0.01)


def test_nothing_to_thin():
    stack = photons(blinking_cells(24, 20, 20))
    source, noise = training_stack(stack), known_noise()
    assert prepare_thinning(stack, temporal_mean(stack), source.normalization, noise, 1.0) is None
    constant = replace(noise, gain=0.0, photons_per_pixel=None)
    assert prepare_thinning(stack, temporal_mean(stack), source.normalization, constant, 0.1) is None


def test_thinned_patches_repeat_under_a_seed_and_differ_between_draws():
    source = thinnable(photons(blinking_cells(40, 32, 40)))
    first, again, other = (
        random_patches([source], (16, 16, 16), 2, np.random.default_rng(seed)).noisy.numpy() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_mean_image_knows_the_thinned_frames():
    """Else the masked voxels' share of the mean could not be exchanged, and the added noise would leak."""
    stack = photons(blinking_cells(40, 16, 16))
    batch = random_patches([thinnable(stack)], stack.shape, 3, np.random.default_rng(0))
    np.testing.assert_allclose(batch.background[:, :1, 0].numpy(), batch.noisy.mean(2).numpy(), atol=2e-5)


def test_thinned_patches_are_normalized_as_a_dimmer_recording_is():
    clean = blinking_cells(200, 32, 32)
    stack = photons(clean, gain=GAIN)
    thinning = thinnable(stack).thinning
    for share in (1.0, 0.3, 0.05):
        dimmer = estimate_normalization(photons(clean, gain=GAIN / share, seed=1))
        measured = thinning.normalization(share)
        # Counts end at zero photons, and added noise does not: its lower tail reaches a little further, and the scale
        # is 16 % too large at the smallest share where the noise is known exactly.
        assert measured.scale == pytest.approx(dimmer.scale, rel=0.2)
        assert measured.low == pytest.approx(dimmer.low, abs=0.1 * dimmer.scale)
