"""What registration has filled stays filled, and pixels beside it are denoised as if it were not there."""

from __future__ import annotations

import numpy as np
import pytest

from restormer3d.artefacts.borders import WithoutBorders, without_borders
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.denoising import array_and_record
from restormer3d.noise import estimate_noise
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (64, 48, 56)


@pytest.fixture(scope="module")
def recording():
    clean = simulate_scene(SHAPE, seed=81)[:]
    return (2000 + NoisyScene(clean, *noise_parameters(2), seed=1)[:]).astype(np.uint16)


def registered(stack, fill=0, still=0):
    """Move frames by up to four pixels, as a registration does, which leaves the fill."""
    out, filled = stack.copy(), np.zeros(stack.shape, bool)
    for t, (y, x) in enumerate(np.random.default_rng(2).integers(-4, 5, (len(stack), 2))):
        inside = slice(max(y, 0) + still, stack.shape[1] + min(y, 0)), slice(max(x, 0), stack.shape[2] + min(x, 0))
        filled[t] = True
        filled[t][inside] = False
    out[filled] = fill
    return out, filled


def unfilled(stack):
    return without_borders(stack, estimate_noise(stack))


@pytest.mark.parametrize(("fill", "still"), [(0, 0), (2000, 0), (0, 3)])
def test_filled_borders_hold_what_other_frames_show(recording, fill, still):
    stack, filled = registered(recording, fill, still)
    found = unfilled(stack)
    assert isinstance(found, WithoutBorders)
    np.testing.assert_array_equal([found.borders.mask(t, SHAPE[1:]) for t in range(len(stack))], filled)
    out = found[:]
    np.testing.assert_array_equal(out[~filled], stack[~filled])
    shown = ~filled.all(0)
    expected = np.where(filled, 0, stack).sum(0) / np.maximum((~filled).sum(0), 1)
    assert np.abs(out - expected)[filled & shown].max() < 0.01
    assert (out[:, ~shown] == fill).all()
    for index in (7, slice(20, 40), (slice(None), slice(2, 9), slice(50, 56)), (7, slice(0, 3)), slice(0, 64, 3)):
        np.testing.assert_array_equal(found[index], out[index])


def test_borders_of_one_width_and_none_change_nothing(recording):
    assert unfilled(recording) is recording
    black = recording.copy()
    black[:, :5], black[:, :, -3:] = 0, 0
    assert unfilled(black) is black


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
def test_rows_without_a_photon_are_no_border(rate):
    counts = np.random.default_rng(0).poisson(rate, SHAPE).astype(np.uint8)
    assert unfilled(counts) is counts


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_the_fill_comes_back(recording, method):
    stack, filled = registered(recording)
    chosen = settings(iterations=0)
    said = []
    out, record = array_and_record(stack, chosen, method=method, say=said.append)
    whole, _ = array_and_record(recording, chosen, method=method)
    assert (out[filled] == 0).all()
    assert record["filled_borders"] == filled.any((1, 2)).sum()
    assert any("registration has left borders of 0, up to 4, 4, 4, 4 pixels wide" in line for line in said)
    inside = ~filled
    assert (
        np.abs(out[inside].astype(float) - whole[inside]).mean() < 0.3 * np.abs(recording - whole.astype(float)).mean()
    )


def test_the_published_recipe_leaves_them(recording):
    stack, _ = registered(recording[:20])
    assert set_aside(stack, settings("published").inference).stack is stack
    assert set_aside(stack, settings().inference).record["filled_borders"] > 0
