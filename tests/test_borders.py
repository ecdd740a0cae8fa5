"""What registration has filled stays filled, and pixels beside it are denoised as if it were not there."""

from __future__ import annotations

import numpy as np
import pytest

from restormer3d.artefacts.borders import WithoutBorders, put_edges_back, without_borders, without_constant_edges
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


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_edges_that_never_change_are_left_out(recording, kind):
    black = (recording % 251).astype(kind)
    black[:, :5], black[:, :, -9:] = 7, np.arange(9)
    found = without_constant_edges(black)
    assert found.shape == (64, 43, 47)
    out = found[:]
    np.testing.assert_array_equal(out, black[:, 5:, :-9])
    for index in (7, slice(20, 40), (slice(None), slice(2, 9), slice(40, 46)), (7, slice(0, 3)), slice(0, 64, 3)):
        np.testing.assert_array_equal(found[index], out[index])
    whole = np.stack(list(put_edges_back(iter(out), black[0], found.rows, found.columns)))
    np.testing.assert_array_equal(whole, black)


def test_edges_that_change_once_stay(recording):
    assert without_constant_edges(recording) is recording
    black = recording.copy()
    black[:, :5] = 0
    black[31, 2, 20] = 1  # between the frames that are looked at first
    assert without_constant_edges(black).shape == (64, 46, 56)
    long = np.concatenate([black] * 4)
    assert without_constant_edges(long).shape == (256, 46, 56)


def test_edges_stay_where_little_else_is_left(recording):
    assert without_constant_edges(np.zeros(SHAPE, np.uint8)).shape == SHAPE
    black = recording.copy()
    black[:, :20] = 0
    assert without_constant_edges(black) is black
    small = black[:, 18:30]
    assert without_constant_edges(small) is small


def test_edges_come_back_and_cost_nothing(recording):
    wide = np.pad(recording, ((0, 0), (3, 0), (12, 4)), constant_values=40)
    chosen, said = settings(iterations=0), []
    out, record = array_and_record(wide, chosen, say=said.append)
    assert record["constant_edges"] == [3, 0, 12, 4]
    assert any("nothing ever changes in 3, 0, 12, 4 rows and columns" in line for line in said)
    np.testing.assert_array_equal(out[:, 3:, 12:-4], array_and_record(recording, chosen)[0])
    out[:, 3:, 12:-4] = 40
    assert (out == 40).all()


def test_a_field_that_moves_behind_an_edge_is_followed():
    clean = simulate_scene((64, 64, 80), seed=82)[:]
    shifts = np.rint(2 * np.sin(np.arange(64) / 4)).astype(int)
    moved = np.stack([np.roll(frame, by, 1) for frame, by in zip(clean, shifts, strict=True)])
    noisy = NoisyScene(moved, *noise_parameters(1), seed=1)[:].astype(np.float32)
    noisy[..., :16] = 0
    _, record = array_and_record(noisy, settings(iterations=0), method="gaussian")
    assert record["movement"]["followed_up_to"][1] > 1


def test_the_published_recipe_leaves_them(recording):
    stack, _ = registered(recording[:20])
    assert set_aside(stack, settings("published").inference).stack is stack
    assert set_aside(stack, settings().inference).record["filled_borders"] > 0
