"""Percentile normalization, temporal median and mean on small stacks."""

from __future__ import annotations

import numpy as np
import pytest

from restormer3d import normalization
from restormer3d.normalization import (
    Normalization,
    estimate_normalization,
    sample_frames,
    sampled_percentiles,
    temporal_mean,
    temporal_median,
)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (7, 7), (10, 3), (600, 300), (5, 1), (301, 300)])
def test_sampled_frames_are_increasing_and_span_the_stack(length: int, count: int):
    frames = sample_frames(length, count)
    assert frames.dtype == np.int64
    assert len(frames) == min(length, count)
    assert frames[0] == 0
    assert np.all(np.diff(frames) > 0)
    assert frames[-1] == (length - 1 if count > 1 else 0)


def test_sample_frames_refuses_an_empty_stack():
    with pytest.raises(ValueError, match="length >= 1"):
        sample_frames(0, 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "float32", "float64"])
def test_percentiles_agree_with_numpy(dtype: str):
    stack = np.random.default_rng(1).normal(40, 12, (20, 13, 17)).astype(dtype)
    found = estimate_normalization(stack)
    low, high = np.percentile(stack.astype(float), (0.5, 99.5))
    assert found.low == pytest.approx(low, abs=1e-5)
    assert found.high == pytest.approx(high, abs=1e-5)


def test_percentiles_use_only_the_sampled_frames():
    stack = np.random.default_rng(2).integers(-300, 900, (40, 8, 8)).astype(np.int16)
    found = estimate_normalization(stack, max_frames=5)
    low, high = np.percentile(stack[sample_frames(40, 5)], (0.5, 99.5))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_large_float_stacks_are_thinned_not_held(monkeypatch: pytest.MonkeyPatch):
    stack = np.random.default_rng(3).normal(0, 1, (30, 40, 40)).astype(np.float32)
    monkeypatch.setattr(normalization, "_COLLECT_VALUES", 10_000)
    found = estimate_normalization(stack)
    assert found.low == pytest.approx(-2.576, abs=0.15)
    assert found.high == pytest.approx(2.576, abs=0.15)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint32", "float32"])
def test_a_normalized_frame_comes_back(dtype: str):
    frame = np.random.default_rng(4).integers(0, 30_000, (9, 9)).astype(dtype)
    normalization_ = Normalization(120.5, 5210.25)
    normal = normalization_.apply(frame)
    assert normal.dtype == np.float32
    np.testing.assert_array_equal(np.rint(normalization_.invert(normal)).astype(dtype), frame)


def test_no_clipping_and_large_offsets_keep_their_detail():
    offset = 2_000_000_000
    frame = np.array([[offset - 10, offset, offset + 1, offset + 1000]], dtype=np.uint32)
    normalization_ = Normalization(offset, offset + 100)
    np.testing.assert_allclose(normalization_.apply(frame), [[-0.1, 0, 0.01, 10]], rtol=1e-6)
    np.testing.assert_allclose(normalization_.invert(normalization_.apply(frame)), frame, rtol=0, atol=1e-3)


def test_bright_pixels_on_a_flat_ground_use_the_extremes():
    stack = np.zeros((400, 8, 8), dtype=np.uint16)
    stack[1, 2, 3] = 700  # not among the sampled frames
    assert estimate_normalization(stack) == Normalization(0, 700)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_constant_stack_is_refused(dtype: str):
    with pytest.raises(ValueError, match="constant: every pixel of its 6 frames is 7"):
        estimate_normalization(np.full((6, 5, 5), 7, dtype=dtype))


def test_non_finite_values_are_refused():
    stack = np.ones((6, 5, 5), dtype=np.float32)
    stack[2, 1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimate_normalization(stack)


@pytest.mark.parametrize("frames", [7, 8])
def test_temporal_median_in_strips_is_the_median(monkeypatch: pytest.MonkeyPatch, frames: int):
    stack = np.random.default_rng(5).integers(-500, 500, (frames, 11, 6)).astype(np.int16)
    monkeypatch.setattr(normalization, "_STRIP_BYTES", frames * 6 * 2 * 3)
    median = temporal_median(stack)
    assert median.dtype == np.float32
    np.testing.assert_array_equal(median, np.median(stack, axis=0))


def test_temporal_mean_covers_every_frame_without_overflow():
    stack = np.full((70, 4, 5), 30_000, dtype=np.int16)
    stack[-1] = 0
    np.testing.assert_allclose(temporal_mean(stack), 30_000 * 69 / 70, rtol=1e-6)


def test_percentiles_of_a_saturated_recording():
    """Where the upper percentile is the largest value, it is that value."""
    stack = np.minimum(np.arange(3 * 20 * 20).reshape(3, 20, 20), 900).astype(np.int16)
    assert sampled_percentiles(stack, (0, 50, 99.5)) == (0, 599.5, 900)
