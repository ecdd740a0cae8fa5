"""Windows cover everything, evenly."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from restormer3d.tiling import (
    even_window,
    gaussian_weights,
    hann_weights,
    mirror_indices,
    temporal_starts,
    window_starts,
)


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.9))
def test_spatial_windows_cover_the_axis_and_stay_inside(length, window, overlap):
    window = min(length, window)
    starts = window_starts(length, window, overlap)
    covered = np.zeros(length, int)
    for start in starts:
        assert 0 <= start <= length - window
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts))


@given(st.integers(1, 900), st.integers(1, 256), st.floats(1, 1.5), st.floats(0, 0.75))
def test_longer_windows_are_fewer_and_compute_no_more(length, window, most, overlap):
    window = min(window, length)
    longest = min(int(most * window), length)
    size = even_window(length, window, longest, overlap)
    assert window <= size <= longest
    count = len(window_starts(length, size, overlap))
    assert count == len(window_starts(length, longest, overlap)) <= len(window_starts(length, window, overlap))
    assert size in (window, longest) or len(window_starts(length, size - 8, overlap)) > count


def test_windows_of_usual_fields():
    assert even_window(256, 96, 120, 0.25) == 104  # three instead of four
    assert even_window(490, 96, 120, 0.25) == 104
    assert even_window(512, 96, 120, 0.25) == 112
    assert even_window(512, 64, 64, 0.5) == 64


@given(st.integers(64, 300), st.integers(1, 16), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_temporal_windows_treat_every_frame_alike(frames, quarter, overlap):
    window = 4 * quarter
    starts = temporal_starts(frames, window, overlap)
    covered = np.zeros(frames, int)
    for start in starts:
        covered[max(0, start) : max(0, start + window)] += 1
    assert starts[0] <= -(window // 2)
    assert covered.min() >= int(1 / (1 - overlap))
    assert covered.max() - covered.min() <= 1


def test_two_hann_windows_add_up_to_one_and_none_is_zero():
    weights = hann_weights(32)
    np.testing.assert_allclose(weights[:16] + weights[16:], 1, atol=1e-6)
    assert weights.min() > 0
    assert gaussian_weights(64).min() > 0


def test_mirroring_does_not_repeat_the_ends():
    np.testing.assert_array_equal(mirror_indices(-2, 5, 3), [2, 1, 0, 1, 2, 1, 0])
    np.testing.assert_array_equal(mirror_indices(-2, 2, 1), [0, 0, 0, 0])
