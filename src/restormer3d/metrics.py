"""How close a denoised stack is to the clean one: the challenge's SNR and PSNR, SSIM, and the fidelity of activity.

Stacks are compared a few frames at a time; what is kept is one number per frame and a few sums per pixel, in float64.
Decibels stop at `MAX_DB`, where the error is zero, and frames or pixels without any clean signal are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MAX_DB = 100.0
SSIM_FRAMES = 32
SAMPLED_VALUES = 2**24  # of a float stack, from which its percentiles are estimated
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # Wang et al. 2004: an 11 x 11 Gaussian window


def evaluate_stacks(
    clean: Any,
    denoised: Any,
    *,
    noisy: Any = None,
    masks: np.ndarray | None = None,
    frame_rate_hz: float = 30.0,
    block: int = 16,
) -> dict[str, float]:
    """Compare a denoised stack with the clean one.

    With y clean, x denoised, both (T, H, W), and R = p97 - p3 of the whole clean stack:

    ====================================== ==========================================================================
    `ssnr`, `tsnr`                         mean over frames, over pixels, of 10 log10(sum y^2 / sum (y - x)^2)
    `spsnr`, `tpsnr`                       the same of 10 log10(R^2 / mean (y - x)^2)
    `si_spsnr`, `si_tpsnr`                 the same after x is fitted to y, frame by frame or pixel by pixel: both
                                           lose their mean, x is scaled to least squares (CARE, Weigert et al. 2018)
    `stsnr`, `stpsnr`, `si_stpsnr`         the mean of the two; `stsnr` is the challenge's score
    `activity_snr`                         10 log10 of sum (y - ym)^2 / sum ((y - ym) - (x - xm))^2 over all voxels,
                                           ym and xm being each pixel's mean over time: the static image is out
    `activity_tsnr`                        the same ratio pixel by pixel, mean over pixels
    `ssim`                                 structural similarity with data range R, mean over up to 32 frames
    `trace_correlation`, `event_...`       with `masks`: see `evaluate_events`
    `noisy_...`                            with `noisy`: the image metrics of the noisy stack
    ====================================== ==========================================================================

    Parameters
    ----------
    clean, denoised, noisy : stack, shape (T, H, W)
        Anything with `shape`, `dtype` and slicing along T.
    masks : ndarray of int, shape (H, W), optional
        Labeled ROIs, 0 outside.
    frame_rate_hz : float
        Only used for the times of events.
    block : int
        Frames read at a time; has no influence on the result.

    Returns
    -------
    dict of str to float
        Decibels, but for `ssim`, `trace_correlation` and `event_...`; NaN where a value is undefined.

    Raises
    ------
    ValueError
        If shapes differ.
    """
    for name, stack in (("denoised", denoised), ("noisy", noisy)):
        if stack is not None and tuple(stack.shape) != tuple(clean.shape):
            raise ValueError(f"{name} has shape {tuple(stack.shape)}, clean {tuple(clean.shape)}; expected the same")
    data_range = percentile_range(clean, 3.0, 97.0, block=block)
    scores = image_scores(clean, denoised, data_range, block)
    if masks is not None:
        traces = roi_traces(clean, masks, block=block), roi_traces(denoised, masks, block=block)
        scores |= evaluate_events(*traces, frame_rate_hz)
    if noisy is not None:
        scores |= {f"noisy_{key}": value for key, value in image_scores(clean, noisy, data_range, block).items()}
    return scores


def image_scores(clean: Any, other: Any, data_range: float, block: int = 16) -> dict[str, float]:
    """Return all metrics of `evaluate_stacks` that need no ROIs."""
    frames, pixels = _accumulate(clean, other, block)
    (length, height, width), range_squared = clean.shape, data_range**2
    clean_change, change_error = _centered(pixels, length)
    spatial = {
        "snr": _mean_db(frames["yy"], frames["ee"]),
        "psnr": _mean_db(range_squared, frames["ee"] / (height * width)),
        "si": _mean_db(range_squared, frames["fit"] / (height * width)),
    }
    temporal = {
        "snr": _mean_db(pixels["yy"], pixels["ee"]),
        "psnr": _mean_db(range_squared, pixels["ee"] / length),
        "si": _mean_db(range_squared, _fit_error(*_moments(pixels, length)) / length),
    }
    scores = {}
    for key, pattern in (("snr", "{}snr"), ("psnr", "{}psnr"), ("si", "si_{}psnr")):
        scores[pattern.format("s")] = spatial[key]
        scores[pattern.format("t")] = temporal[key]
        scores[pattern.format("st")] = (spatial[key] + temporal[key]) / 2
    scores["activity_snr"] = _mean_db(clean_change.sum(), change_error.sum())
    scores["activity_tsnr"] = _mean_db(clean_change, change_error)
    scores["ssim"] = _mean_ssim(clean, other, data_range)
    return scores


def _blocks(*stacks: Any, block: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the same frames of all stacks, (n, H, W) float64 each."""
    for start in range(0, stacks[0].shape[0], block):
        yield tuple(np.asarray(stack[start : start + block], dtype=np.float64) for stack in stacks)


def _accumulate(clean: Any, other: Any, block: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums for every frame (T,) and for every pixel (H, W).

    Sums over time are taken of the differences u, v from the first frame: no digits are lost where a bright pixel
    hardly changes.
    """
    height, width = clean.shape[1:]
    pixels = {name: np.zeros((height, width)) for name in ("yy", "ee", "u", "v", "uu", "vv", "uv")}
    frames: dict[str, list[np.ndarray]] = {"yy": [], "ee": [], "fit": []}
    first: tuple[np.ndarray, np.ndarray] | None = None
    for y, x in _blocks(clean, other, block=block):
        first = first or (y[0], x[0])
        error = y - x
        frames["yy"].append(_over_frame(y, y))
        frames["ee"].append(_over_frame(error, error))
        frames["fit"].append(_frame_fit_error(y, x))
        pixels["yy"] += _over_time(y, y)
        pixels["ee"] += _over_time(error, error)
        u, v = y - first[0], x - first[1]
        for name, values in (("u", u), ("v", v)):
            pixels[name] += values.sum(axis=0)
        for name, (a, b) in {"uu": (u, u), "vv": (v, v), "uv": (u, v)}.items():
            pixels[name] += _over_time(a, b)
    return {name: np.concatenate(parts) for name, parts in frames.items()}, pixels


def _over_frame(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("thw,thw->t", a, b)


def _over_time(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("thw,thw->hw", a, b)


def _frame_fit_error(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Squared error (n,) of each frame that an offset and a factor on x leave."""
    y, x = (values - values.mean(axis=(1, 2), keepdims=True) for values in (y, x))
    return _fit_error(_over_frame(y, y), _over_frame(x, x), _over_frame(y, x))


def _fit_error(yy: np.ndarray, xx: np.ndarray, yx: np.ndarray) -> np.ndarray:
    """Return min over a of sum (y - a x)^2 from the sums of squares and products of zero-mean y and x."""
    explained = np.divide(yx**2, xx, out=np.zeros_like(xx), where=xx > 0)
    return np.maximum(yy - explained, 0)


def _moments(pixels: dict[str, np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over time of squares and products after each pixel's mean is removed."""
    u, v = pixels["u"], pixels["v"]
    yy, xx = pixels["uu"] - u * u / length, pixels["vv"] - v * v / length
    return np.maximum(yy, 0), np.maximum(xx, 0), pixels["uv"] - u * v / length


def _centered(pixels: dict[str, np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Energy over time of the clean signal's changes, and of the error of the changes, for every pixel."""
    yy, xx, yx = _moments(pixels, length)
    return yy, np.maximum(yy + xx - 2 * yx, 0)


def _mean_db(signal: np.ndarray | float, error: np.ndarray | float) -> float:
    """Mean of 10 log10(signal / error) over the entries that have a signal; NaN if none has."""
    signal, error = np.broadcast_arrays(np.asarray(signal, dtype=np.float64), np.asarray(error, dtype=np.float64))
    valid = signal > 0
    if not valid.any():
        return float("nan")
    signal, error = signal[valid], error[valid]
    smallest = signal * 10 ** (-MAX_DB / 10)
    return float(np.mean(10 * np.log10(signal / np.maximum(error, smallest))))


def percentile_range(stack: Any, low: float, high: float, *, block: int = 16) -> float:
    """Distance between two percentiles of all values of a stack.

    Exact for integers of up to 16 bits (from their histogram); otherwise from evenly spaced frames that together hold
    at most 2^24 values, or from all where there are fewer.
    """
    dtype, (length, height, width) = np.dtype(stack.dtype), stack.shape
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        offset = int(np.iinfo(dtype).min)
        counts = np.zeros(1 << (8 * dtype.itemsize), dtype=np.int64)
        for start in range(0, length, block):
            values = np.asarray(stack[start : start + block]).ravel().astype(np.int64) - offset
            counts += np.bincount(values, minlength=len(counts))
        bounds = [_histogram_percentile(counts, percent) for percent in (low, high)]
    else:
        count = min(length, max(SAMPLED_VALUES // (height * width), 1))
        chosen = np.unique(np.linspace(0, length - 1, count).round().astype(int))
        sample = np.stack([np.asarray(stack[frame]) for frame in chosen.tolist()])
        bounds = np.percentile(sample.astype(np.float64), [low, high]).tolist()
    return float(bounds[1] - bounds[0])


def _histogram_percentile(counts: np.ndarray, percent: float) -> float:
    """Percentile of integers 0, 1, 2, ... that occur `counts` times, interpolated as numpy.percentile does."""
    cumulative = np.cumsum(counts)
    rank = percent / 100 * (int(cumulative[-1]) - 1)
    below, above = np.searchsorted(cumulative, [np.floor(rank), np.ceil(rank)], side="right")
    return float(below + (rank - np.floor(rank)) * (above - below))


def _mean_ssim(clean: Any, other: Any, data_range: float) -> float:
    """Mean structural similarity of up to `SSIM_FRAMES` evenly spaced frames."""
    chosen = np.unique(np.linspace(0, clean.shape[0] - 1, SSIM_FRAMES).round().astype(int)).tolist()
    return float(np.mean([ssim(clean[frame], other[frame], data_range) for frame in chosen]))


def ssim(y: np.ndarray, x: np.ndarray, data_range: float) -> float:
    """Structural similarity of two images with Gaussian windows of sigma 1.5 (Wang et al. 2004).

    The mean is taken over the pixels whose 11 x 11 window lies inside the image. NaN for images smaller than that, or
    for a data range that is not positive.
    """
    if min(y.shape) < 2 * _SSIM_RADIUS + 1 or data_range <= 0:
        return float("nan")
    y, x = np.asarray(y, dtype=np.float64), np.asarray(x, dtype=np.float64)
    mean_y, mean_x = _window_mean(y), _window_mean(x)
    variance_y = _window_mean(y * y) - mean_y**2
    variance_x = _window_mean(x * x) - mean_x**2
    covariance = _window_mean(y * x) - mean_y * mean_x
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_y * mean_x + c1) / (mean_y**2 + mean_x**2 + c1)
    structure = (2 * covariance + c2) / (variance_y + variance_x + c2)
    return float(np.mean(luminance * structure))


def _window_mean(image: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean around each pixel whose window lies inside the image."""
    weights = np.exp(-(np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1) ** 2) / (2 * _SSIM_SIGMA**2))
    weights /= weights.sum()
    windows = np.lib.stride_tricks.sliding_window_view(image, len(weights), axis=0)
    return np.lib.stride_tricks.sliding_window_view(windows @ weights, len(weights), axis=1) @ weights


def roi_traces(stack: Any, masks: np.ndarray, *, block: int = 64) -> np.ndarray:
    """Mean of every ROI in every frame.

    Parameters
    ----------
    stack : stack, shape (T, H, W)
        Anything with `shape` and slicing along T.
    masks : ndarray of int, shape (H, W)
        Labeled ROIs, 0 outside.

    Returns
    -------
    ndarray, shape (n_rois, T), float64
        One row for each label in ascending order.

    Raises
    ------
    ValueError
        If the masks do not have the shape of a frame.
    """
    if tuple(masks.shape) != tuple(stack.shape[1:]):
        raise ValueError(f"masks have shape {tuple(masks.shape)}; expected that of a frame, {tuple(stack.shape[1:])}")
    inside = np.flatnonzero(masks)
    labels, roi = np.unique(np.ravel(masks)[inside], return_inverse=True)
    area = np.bincount(roi, minlength=len(labels))
    traces = np.empty((len(labels), stack.shape[0]))
    frame = 0
    for (frames,) in _blocks(stack, block=block):
        for values in frames.reshape(len(frames), -1)[:, inside]:
            traces[:, frame] = np.bincount(roi, weights=values, minlength=len(labels)) / area
            frame += 1
    return traces


def evaluate_events(clean_traces: np.ndarray, denoised_traces: np.ndarray, frame_rate_hz: float) -> dict[str, float]:
    """Compare the calcium transients of ROI traces with those of the clean traces.

    Events are found on the clean trace: rises by at least 10 % of the ROI's median fluorescence and 20 % of its range
    that are followed by a fall by half as much. Both traces are then measured over the same frames: the amplitude at
    the clean peak over the clean onset (means of three frames, hence without bias from noise), the rise from 20 % to
    80 % of the trace's own amplitude, the decay from the peak to 50 %.

    Parameters
    ----------
    clean_traces, denoised_traces : ndarray, shape (n_rois, T)
        For example from `roi_traces`.
    frame_rate_hz : float
        Frames per second.

    Returns
    -------
    dict of str to float
        `events`: their number; `event_amplitude_bias`: median of (denoised - clean) / clean amplitude;
        `event_rise_bias_s`, `event_decay_bias_s`: median difference in seconds; `trace_correlation`: median over ROIs
        of Pearson's correlation. NaN where nothing can be measured.

    Raises
    ------
    ValueError
        If the shapes differ or the frame rate is not positive.
    """
    if clean_traces.shape != denoised_traces.shape or clean_traces.ndim != 2:
        raise ValueError(
            f"expected two arrays of traces (n_rois, T), got shapes {clean_traces.shape} and {denoised_traces.shape}"
        )
    if frame_rate_hz <= 0:
        raise ValueError(f"frame_rate_hz is {frame_rate_hz}; expected frames per second above 0")
    rows = [
        (*_measure_event(clean, *event), *_measure_event(denoised, *event))
        for clean, denoised in zip(clean_traces, denoised_traces, strict=True)
        for event in find_events(clean)
    ]
    measured = np.array(rows).reshape(-1, 6)
    amplitude, rise, decay, other_amplitude, other_rise, other_decay = measured[measured[:, 0] > 0].T
    return {
        "events": float(len(rows)),
        "event_amplitude_bias": _median((other_amplitude - amplitude) / amplitude),
        "event_rise_bias_s": _median(other_rise - rise) / frame_rate_hz,
        "event_decay_bias_s": _median(other_decay - decay) / frame_rate_hz,
        "trace_correlation": _median(_correlations(clean_traces, denoised_traces)),
    }


def find_events(trace: np.ndarray) -> list[tuple[int, int, int]]:
    """Onset, peak and end frame of every transient of a noise-free trace; see `evaluate_events`.

    The trace is walked through once: a peak is left when the trace has fallen by half the threshold, a trough when it
    has risen by the threshold.
    """
    threshold = max(0.1 * float(np.median(trace)), 0.2 * float(np.ptp(trace)))
    if threshold <= 0:
        return []
    values = trace.tolist()
    rises: list[tuple[int, int]] = []
    trough = peak = 0
    is_rising = False
    for frame, value in enumerate(values):
        if is_rising and value > values[peak]:
            peak = frame
        elif is_rising and values[peak] - value >= threshold / 2:
            rises.append((trough, peak))
            is_rising, trough = False, frame
        elif not is_rising and value <= values[trough]:
            trough = frame
        elif not is_rising and value - values[trough] >= threshold:
            is_rising, peak = True, frame
    onsets = [*(onset for onset, _ in rises), len(values) - 1]
    return [(onset, peak, onsets[number + 1]) for number, (onset, peak) in enumerate(rises)]


def _measure_event(trace: np.ndarray, onset: int, peak: int, end: int) -> tuple[float, float, float]:
    """Amplitude, 20-80 % rise and 50 % decay (frames) of one transient; NaN for what does not cross its level."""
    first = max(onset - 1, 0)
    base = float(np.mean(trace[first : max(min(onset + 2, peak - 1), first + 1)]))  # of fast rises, less of the peak
    amplitude = float(np.mean(trace[max(peak - 1, 0) : peak + 2])) - base
    if amplitude <= 0:
        return amplitude, float("nan"), float("nan")
    level = (trace - base) / amplitude
    decay = _falls_below(level[peak : end + 1], 0.5)
    at_80 = _falls_below(-level[onset : peak + 1], -0.8)
    if np.isnan(at_80):
        return amplitude, at_80, decay
    last = onset + int(np.ceil(at_80))
    since_20 = _falls_below(level[onset : last + 1][::-1], 0.2)
    return amplitude, since_20 - (last - onset - at_80), decay


def _falls_below(level: np.ndarray, threshold: float) -> float:
    """Position, linearly interpolated, where values first go from `threshold` or above to below it; NaN if never."""
    falls = np.flatnonzero((level[:-1] >= threshold) & (level[1:] < threshold))
    if not len(falls):
        return float("nan")
    before, after = level[falls[0]], level[falls[0] + 1]
    return float(falls[0] + (before - threshold) / (before - after))


def _correlations(clean_traces: np.ndarray, denoised_traces: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each pair of traces; 0 for a flat denoised trace, NaN for a flat clean one."""
    y, x = (traces - traces.mean(axis=1, keepdims=True) for traces in (clean_traces, denoised_traces))
    energy_y, energy_x = (y * y).sum(axis=1), (x * x).sum(axis=1)
    product = np.sqrt(energy_y * energy_x)
    correlation = np.divide((y * x).sum(axis=1), product, out=np.zeros_like(product), where=product > 0)
    return np.where(energy_y > 0, correlation, np.nan)


def _median(values: np.ndarray) -> float:
    """Median of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")
