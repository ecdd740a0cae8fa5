"""Voxels that a cosmic ray has hit are found and replaced; nothing that cells do is."""

from __future__ import annotations

import numpy as np
import pytest

from restormer3d.artefacts.spikes import WithoutSpikes, without_spikes
from restormer3d.denoising import array_and_record
from restormer3d.noise import estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

PLACES = ([0, 30, 30, 47], [5, 0, 31, 20], [7, 31, 0, 20])


@pytest.fixture(scope="module")
def recording():
    return NoisyScene(simulate_scene((48, 32, 32), seed=71), *noise_parameters(1), seed=1)[:].astype(np.int16)


def mended(stack):
    return without_spikes(stack, estimate_noise(stack))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_recordings_have_none(level, seed):
    stack = NoisyScene(simulate_scene((64, 48, 48), seed=70 + seed), *noise_parameters(level), seed=seed)[:]
    assert mended(stack) is stack


def test_few_photons_are_none():
    counts = np.random.default_rng(0).poisson(0.03, (200, 48, 48)).astype(np.uint8)
    assert mended(counts) is counts
    assert mended(np.zeros((5, 8, 8))).shape == (5, 8, 8)
    two = np.random.default_rng(0).normal(0, 1, (2, 8, 8))
    assert mended(two) is two


def test_they_are_replaced_by_what_is_before_and_after(recording):
    stack = recording.copy()
    stack[PLACES] = 32000
    found = mended(stack)
    assert isinstance(found, WithoutSpikes)
    assert found.dtype == np.int16
    assert set(zip(*found.places.T.tolist(), strict=True)) == set(zip(*PLACES, strict=True))
    out = found[:]
    np.testing.assert_array_equal(np.argwhere(out != stack), np.array(sorted(zip(*PLACES, strict=True))))
    usual = (recording[29, 0, 31].astype(float) + recording[31, 0, 31]) / 2
    assert abs(out[30, 0, 31] - usual) <= 1
    for index in (3, 30, slice(28, 40), (slice(None), slice(3, 9), slice(2, 20)), (30, slice(0, 4)), slice(0, 48, 2)):
        np.testing.assert_array_equal(found[index], out[index])


def test_a_row_of_them_is_found_and_what_is_resolved_is_not(recording):
    stack = recording.copy()
    stack[20, 10, 10:13] = 32000  # the amplifier is slow along a row
    assert len(mended(stack).places) == 3
    cell = recording.astype(float)
    y, x = np.mgrid[:32, :32]
    cell[20] += 9000 * np.exp(-((y - 12) ** 2 + (x - 14) ** 2) / 2 / 0.8**2)  # an event of a single frame
    assert mended(cell) is cell


def test_other_voxels_are_denoised_as_without_them(recording):
    stack = recording.copy()
    stack[30, 10::12, 5::12] = 32000
    chosen = settings(iterations=0)
    out, record = array_and_record(stack, chosen)
    expected, alone = array_and_record(recording, chosen)
    assert (record["spikes"], alone["spikes"]) == (6, 0)
    assert np.abs(out.astype(float) - expected).max() < 100
    assert out.max() < 10_000
