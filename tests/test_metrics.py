"""The metrics against cases computed by hand, plain whole-array formulas and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restormer3d.metrics import (
    MAX_DB,
    evaluate_events,
    evaluate_stacks,
    find_events,
    percentile_range,
    roi_traces,
    ssim,
)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A clean stack with changing signal and a worse one, (20, 24, 28) float32."""
    rng = np.random.default_rng(0)
    clean = rng.gamma(2.0, 50.0, (1, 24, 28)) * (
        1 + 0.5 * np.sin(np.arange(20) / 3)[:, None, None] * rng.random((24, 28))
    )
    other = 0.8 * clean + 15 + rng.normal(0, 12, clean.shape)
    return clean.astype(np.float32), other.astype(np.float32)


def db(signal: np.ndarray, error: np.ndarray) -> float:
    return float(np.mean(10 * np.log10(signal / error)))


def test_snr_of_a_case_computed_by_hand() -> None:
    clean = np.array([[[3.0, 4.0]], [[0.0, 10.0]]])
    denoised = np.array([[[3.0, 3.0]], [[2.0, 10.0]]])
    scores = evaluate_stacks(clean, denoised)
    # frames: 25 / 1 and 100 / 4; pixels: 9 / 4 and 116 / 1
    assert scores["ssnr"] == pytest.approx(10 * math.log10(25))
    assert scores["tsnr"] == pytest.approx(5 * (math.log10(9 / 4) + math.log10(116)))
    assert scores["stsnr"] == pytest.approx((scores["ssnr"] + scores["tsnr"]) / 2)
    # changes of the clean pixels: 1.5, -1.5 and -3, 3; of the error: -(-1), ... = 1, -1 and 0.5, -0.5
    assert scores["activity_snr"] == pytest.approx(10 * math.log10((2 * 1.5**2 + 2 * 3**2) / (2 * 1 + 2 * 0.5**2)))
    assert scores["activity_tsnr"] == pytest.approx(5 * (math.log10(1.5**2) + math.log10(6**2)))


def test_scores_equal_the_plain_formulas(pair) -> None:
    y, x = (stack.astype(np.float64) for stack in pair)
    scores = evaluate_stacks(*pair)
    error = (y - x) ** 2
    data_range = np.subtract(*np.percentile(y, [97, 3]))
    assert scores["ssnr"] == pytest.approx(db((y**2).sum((1, 2)), error.sum((1, 2))))
    assert scores["tsnr"] == pytest.approx(db((y**2).sum(0), error.sum(0)))
    assert scores["tpsnr"] == pytest.approx(db(data_range**2, error.mean(0)))
    frames = [peak_signal_noise_ratio(a, b, data_range=data_range) for a, b in zip(y, x, strict=True)]
    assert scores["spsnr"] == pytest.approx(np.mean(frames))
    assert scores["stpsnr"] == pytest.approx((scores["spsnr"] + scores["tpsnr"]) / 2)
    change, change_error = y - y.mean(0), (y - y.mean(0)) - (x - x.mean(0))
    assert scores["activity_snr"] == pytest.approx(db((change**2).sum(), (change_error**2).sum()))
    assert scores["activity_tsnr"] == pytest.approx(db((change**2).sum(0), (change_error**2).sum(0)))
    similar = [
        structural_similarity(a, b, data_range=data_range, gaussian_weights=True, use_sample_covariance=False)
        for a, b in zip(y, x, strict=True)
    ]
    assert scores["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)


def test_scale_invariant_psnr_is_the_psnr_after_a_least_squares_fit(pair) -> None:
    y, x = (stack.astype(np.float64) for stack in pair)
    data_range = np.subtract(*np.percentile(y, [97, 3]))

    def fitted_psnr(target: np.ndarray, image: np.ndarray) -> float:
        slope, offset = np.polyfit(image.ravel(), target.ravel(), 1)
        return db(data_range**2, np.mean((target - slope * image - offset) ** 2))

    scores = evaluate_stacks(*pair)
    assert scores["si_spsnr"] == pytest.approx(np.mean([fitted_psnr(a, b) for a, b in zip(y, x, strict=True)]))
    columns = zip(y.reshape(20, -1).T, x.reshape(20, -1).T, strict=True)
    assert scores["si_tpsnr"] == pytest.approx(np.mean([fitted_psnr(a, b) for a, b in columns]))
    assert scores["si_spsnr"] > scores["spsnr"]
    changed = evaluate_stacks(pair[0], 3 * pair[1] - 70)
    for key in ("si_spsnr", "si_tpsnr", "si_stpsnr"):
        assert changed[key] == pytest.approx(scores[key], abs=1e-4)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_block_size_does_not_matter(pair, block: int) -> None:
    masks = np.zeros((24, 28), dtype=int)
    masks[3:8, 3:8], masks[12:20, 10:25] = 1, 2
    expected = evaluate_stacks(*pair, noisy=pair[1], masks=masks)
    scores = evaluate_stacks(*pair, noisy=pair[1], masks=masks, block=block)
    assert scores == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_noisy_stack_is_scored_too(pair) -> None:
    clean, other = pair
    scores = evaluate_stacks(clean, clean + 1, noisy=other)
    for key, value in evaluate_stacks(clean, other).items():
        assert scores[f"noisy_{key}"] == pytest.approx(value)


def test_perfect_stack_scores_the_cap() -> None:
    clean = np.random.default_rng(0).integers(1, 1000, (6, 16, 16), dtype=np.int16)
    scores = evaluate_stacks(clean, clean.copy())
    assert scores.pop("ssim") == pytest.approx(1)
    assert set(scores.values()) == {MAX_DB}


def test_pixels_and_frames_without_signal_are_left_out(pair) -> None:
    clean, denoised = (stack.copy() for stack in pair)
    clean[:, 4, 5], denoised[:, 4, 5] = 0, 3
    clean[2] = 0
    y, x = clean.astype(np.float64), denoised.astype(np.float64)
    scores = evaluate_stacks(clean, denoised)
    keep = np.arange(20) != 2
    assert scores["ssnr"] == pytest.approx(db((y**2).sum((1, 2))[keep], ((y - x) ** 2).sum((1, 2))[keep]))
    bright = (y**2).sum(0) > 0
    assert scores["tsnr"] == pytest.approx(db((y**2).sum(0)[bright], ((y - x) ** 2).sum(0)[bright]))
    assert all(math.isfinite(value) for value in scores.values())


def test_an_empty_clean_stack_has_no_score() -> None:
    scores = evaluate_stacks(np.zeros((4, 12, 12)), np.ones((4, 12, 12)))
    assert all(math.isnan(value) for value in scores.values())


def test_a_static_image_has_no_activity_to_score() -> None:
    image = np.random.default_rng(0).uniform(100, 30000, (1, 12, 12))
    clean = np.repeat(image, 50, axis=0)
    scores = evaluate_stacks(clean, clean + np.random.default_rng(1).normal(0, 1, clean.shape))
    assert math.isnan(scores["activity_snr"])
    assert scores["ssnr"] > 60


def test_integers_do_not_overflow() -> None:
    clean = np.full((3, 12, 12), 30000, dtype=np.int16)
    scores = evaluate_stacks(clean, np.full((3, 12, 12), -30000, dtype=np.int16))
    assert scores["ssnr"] == pytest.approx(10 * math.log10(0.25))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"denoised has shape \(4, 8, 8\), clean \(4, 8, 9\)"):
        evaluate_stacks(np.zeros((4, 8, 9)), np.zeros((4, 8, 8)))


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8", "int8", "float32", "int32", ">i2"])
def test_percentile_range_is_that_of_numpy(dtype: str) -> None:
    stack = np.random.default_rng(0).normal(40, 25, (7, 11, 13)).clip(0, 120).astype(dtype)
    expected = np.subtract(*np.percentile(stack, [97, 3]))
    assert percentile_range(stack, 3, 97, block=2) == pytest.approx(expected)


def test_ssim_equals_scikit_image(pair) -> None:
    y, x = pair[0][3], pair[1][3]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for data_range in (50.0, 400.0):
        expected = structural_similarity(y.astype(float), x.astype(float), data_range=data_range, **options)
        assert ssim(y, x, data_range) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(ssim(y[:8], x[:8], 100.0))


def test_roi_traces_are_means_over_labels() -> None:
    stack = np.random.default_rng(0).integers(-50, 3000, (9, 12, 10), dtype=np.int16)
    masks = np.zeros((12, 10), dtype=np.uint16)
    masks[1:4, 2:5], masks[6:9, 6:9] = 2, 5
    traces = roi_traces(stack, masks, block=4)
    expected = [stack[:, masks == label].mean(axis=1) for label in (2, 5)]
    np.testing.assert_allclose(traces, expected)
    assert roi_traces(stack, np.zeros((12, 10), int)).shape == (0, 9)
    with pytest.raises(ValueError, match="expected that of a frame"):
        roi_traces(stack, masks[:5])


def transients(amplitude: float = 100.0, rise: int = 4, decay: float = 10.0) -> np.ndarray:
    """Three events on a ground of 50: linear rises from frames 20, 80 and 140, then exponential decays."""
    trace = np.full(200, 50.0)
    for onset in (20, 80, 140):
        time = np.arange(200 - onset)
        trace[onset:] += amplitude * np.where(time < rise, time / rise, np.exp(-(time - rise) / decay))
    return trace


def test_events_are_found_where_they_are() -> None:
    events = find_events(transients())
    assert [peak for _, peak, _ in events] == [24, 84, 144]
    assert [onset for onset, _, _ in events] == [20, 80, 140]
    assert find_events(np.full(100, 7.0)) == []
    assert find_events(np.zeros(100)) == []


def test_a_faithful_trace_has_no_bias() -> None:
    traces = np.stack([transients(), transients(300)])
    scores = evaluate_events(traces, 0.5 * traces + 20, 30.0)
    assert scores["events"] == 6
    assert scores["event_amplitude_bias"] == pytest.approx(-0.5)
    assert scores["event_rise_bias_s"] == pytest.approx(0, abs=1e-9)
    assert scores["event_decay_bias_s"] == pytest.approx(0, abs=1e-9)
    assert scores["trace_correlation"] == pytest.approx(1)


def test_slower_transients_show_as_longer_rise_and_decay() -> None:
    clean, slow = transients(rise=4, decay=10.0)[None], transients(rise=4, decay=20.0)[None]
    scores = evaluate_events(clean, slow, 10.0)
    half_life = math.log(2) * 10 / 10.0
    assert scores["event_decay_bias_s"] == pytest.approx(half_life, rel=0.3)
    wide = np.convolve(clean[0], np.ones(9) / 9, mode="same")[None]
    smoothed = evaluate_events(clean, wide, 10.0)
    assert smoothed["event_amplitude_bias"] < -0.1
    assert smoothed["event_rise_bias_s"] > 0.02


@pytest.mark.parametrize("rise", [1, 2])
def test_the_peak_of_a_fast_event_counts(rise: int) -> None:
    clean = transients(rise=rise)
    cut = clean.copy()
    for onset, peak, _ in find_events(clean):
        cut[peak] = cut[onset]
    assert evaluate_events(clean[None], cut[None], 30.0)["event_amplitude_bias"] < -0.2


def test_noise_hardly_biases_the_amplitude() -> None:
    clean = np.repeat(transients()[None], 60, axis=0)
    noisy = clean + np.random.default_rng(0).normal(0, 15, clean.shape)
    scores = evaluate_events(clean, noisy, 30.0)
    assert scores["event_amplitude_bias"] == pytest.approx(0, abs=0.03)
    assert 0.8 < scores["trace_correlation"] < 1


def test_traces_without_events_give_no_numbers() -> None:
    flat = np.full((2, 50), 9.0)
    scores = evaluate_events(flat, flat, 30.0)
    assert scores.pop("events") == 0
    assert all(math.isnan(value) for value in scores.values())
    assert evaluate_events(transients()[None], np.full((1, 200), 3.0), 30.0)["trace_correlation"] == 0
    with pytest.raises(ValueError, match="shapes"):
        evaluate_events(flat, flat[:1], 30.0)
