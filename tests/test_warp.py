"""Displacement that varies over the field: its patterns, and frames that are moved along it and back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from restormer3d.artefacts import warp
from restormer3d.artefacts.moved_frames import MovedBack, put_back, static_images

_FIELD = (60, 76)


def image(shape=_FIELD, seed=0):
    return gaussian_filter(np.random.default_rng(seed).normal(0, 10, shape), 2.5).astype(np.float32)


def bends(frames=1, size=0.4):
    return np.random.default_rng(1).normal(0, size, (frames, 2, warp.PATTERNS))


def displacement(weights, shape=_FIELD):
    """By the definition: the weighted sum of all patterns."""
    v, u = (np.linspace(-1, 1, side) for side in shape)
    return np.tensordot(weights, warp.patterns(v[:, None], u, weights.shape[1]), axes=(1, 0))


def test_patterns_have_mean_square_1_and_nothing_in_common():
    v = np.linspace(-1, 1, 401)
    each = warp.patterns(v[:, None], v).reshape(warp.PATTERNS, -1)
    np.testing.assert_allclose(each @ each.T / each.shape[1], np.eye(warp.PATTERNS), atol=0.03)


@pytest.mark.parametrize("count", [1, warp.PATTERNS])
def test_where_pixels_come_from(count):
    weights = bends()[0][:, :count]
    padded = np.zeros((2, warp.PATTERNS))
    padded[:, :count] = weights
    expected = np.mgrid[: _FIELD[0], : _FIELD[1]] - displacement(weights)
    for each in (weights, padded):
        np.testing.assert_allclose(warp.displaced_from(each, _FIELD, _FIELD, back=False), expected, atol=1e-9)


def test_what_is_moved_back_comes_from_where_it_is_displaced_to():
    weights = bends()[0]
    there = warp.displaced_from(weights, _FIELD, _FIELD, back=True)
    v, u = (2 * place / (side - 1) - 1 for place, side in zip(there, _FIELD, strict=True))
    by = np.einsum("ak,kyx->ayx", weights, warp.patterns(np.clip(v, -1, 1), np.clip(u, -1, 1)))
    np.testing.assert_allclose(there - by, np.mgrid[: _FIELD[0], : _FIELD[1]], rtol=0, atol=2e-3)


def test_rigid_movement_is_a_shift():
    frame, by = image(), np.array([1.3, -0.6])
    np.testing.assert_array_equal(warp.moved(frame, by[:, None], _FIELD), shift(frame, by, order=3, mode="mirror"))
    bent = np.zeros((2, warp.PATTERNS))
    bent[:, 0] = by
    np.testing.assert_allclose(warp.moved(frame, bent, _FIELD), shift(frame, by, order=3, mode="mirror"), atol=1e-4)
    back = warp.moved(frame, by[:, None], _FIELD, back=True)
    np.testing.assert_array_equal(back, shift(frame, -by, order=3, mode="mirror"))


def test_moved_and_moved_back_it_is_as_it_was():
    frame, weights = image(), bends()[0]
    back = warp.moved(warp.moved(frame, weights, _FIELD), weights, _FIELD, back=True)
    inside = slice(6, -6), slice(6, -6)
    assert np.abs(warp.moved(frame, weights, _FIELD) - frame)[inside].max() > 0.3 * frame.std()
    np.testing.assert_allclose(back[inside], frame[inside], atol=0.01 * frame.std())


def test_what_is_next_to_still_stays():
    frame = image()
    assert warp.moved(frame, np.full((2, warp.PATTERNS), 1e-4), _FIELD) is frame


def test_the_farthest_that_any_place_is_displaced_by():
    weights = bends(5)
    expected = [np.abs(displacement(each)).max((1, 2)) for each in weights]
    np.testing.assert_allclose(warp.farthest(weights), expected, rtol=0.05)
    most = np.median(expected, axis=0)
    shrunk = warp.within(weights, most)
    np.testing.assert_allclose(warp.farthest(shrunk), np.minimum(warp.farthest(weights), most), rtol=1e-6)
    assert (shrunk == weights).all((1, 2)).any()


def test_margins_around_the_field_are_displaced_as_its_border():
    weights, margins = bends()[0], (5, 3)
    shape = tuple(side + 2 * margin for side, margin in zip(_FIELD, margins, strict=True))
    inside = tuple(slice(margin, -margin) for margin in margins)
    wide = warp.displaced_from(weights, shape, _FIELD, back=False)
    shifted = np.array(margins)[:, None, None]
    narrow = warp.displaced_from(weights, _FIELD, _FIELD, back=False)
    np.testing.assert_allclose(wide[:, *inside] - shifted, narrow, atol=1e-9)
    by = np.mgrid[: shape[0], : shape[1]] - wide
    np.testing.assert_allclose(by[:, 0, 3:-3], by[:, 5, 3:-3], atol=1e-9)


def test_frames_that_bend_come_back_to_where_they_were():
    frames, weights = np.stack([image(seed=seed) for seed in range(4)]), bends(4, 0.3)
    there = MovedBack(frames, weights, static_images(frames, weights))
    margins = np.ceil(warp.farthest(weights).max(0)).astype(int)
    assert there.shape == (4, *(np.array(_FIELD) + 2 * margins))
    back = np.stack(list(put_back(iter(there[:]), weights, _FIELD)))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[:, 3:-3, 3:-3], frames[:, 3:-3, 3:-3], atol=0.05 * frames.std())
