"""What changes in a scene: spike trains, the calcium indicator's response to them, and slow neuropil courses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BURN_IN_S = 12.0  # time simulated before the first frame, so that decays are under way when the recording starts
FINE_RATE_HZ = 60.0  # transients are computed at this rate or above and then sampled at the frames


@dataclass(frozen=True)
class Indicator:
    """A calcium indicator: time constants in seconds, peak dF/F of one spike, and the spikes that half fill it."""

    rise_s: float
    decay_s: float
    response: float
    saturation: float


# Of the order published with each sensor for single spikes (Chen et al. 2013; Dana et al. 2016 and 2019; Zhang et al.
# 2023); individual cells vary around them.
INDICATORS = {
    "gcamp6s": Indicator(0.070, 0.80, 0.35, 14.0),
    "gcamp6m": Indicator(0.040, 0.40, 0.20, 12.0),
    "gcamp6f": Indicator(0.020, 0.22, 0.19, 15.0),
    "jgcamp7s": Indicator(0.050, 0.85, 0.45, 6.0),
    "jgcamp7f": Indicator(0.020, 0.30, 0.30, 10.0),
    "jgcamp8s": Indicator(0.008, 0.30, 0.60, 8.0),
    "jgcamp8m": Indicator(0.006, 0.15, 0.50, 10.0),
    "jgcamp8f": Indicator(0.006, 0.10, 0.35, 12.0),
    "jrgeco1a": Indicator(0.030, 0.35, 0.20, 10.0),
}


def spike_trains(
    rng: np.random.Generator,
    bout_rates_hz: np.ndarray,
    bouts_s: np.ndarray,
    spike_rates_hz: np.ndarray,
    bins: int,
    rate_hz: float,
) -> np.ndarray:
    """Spike counts (n, bins): bouts of firing that start at gamma-distributed intervals, one mean rate per source.

    A source with short, dense bouts bursts; one whose bouts are rarer than the recording is silent.
    """
    duration = bins / rate_hz
    n = len(bout_rates_hz)
    draws = int(2 * duration * bout_rates_hz.max(initial=0.0)) + 8
    intervals = rng.gamma(4.0, 0.25, (n, draws)) / bout_rates_hz[:, None]
    starts = np.cumsum(intervals, axis=1) - intervals[:, :1] * rng.random((n, 1))
    lengths = bouts_s[:, None] * rng.gamma(3.0, 1 / 3, (n, draws))
    counts = np.where(starts < duration, 1 + rng.poisson(spike_rates_hz[:, None] * lengths), 0)
    source = np.repeat(np.repeat(np.arange(n), draws), counts.ravel())
    times = np.repeat(starts.ravel(), counts.ravel())
    times += np.repeat(lengths.ravel(), counts.ravel()) * rng.random(len(times))
    bin_of_spike = (times * rate_hz).astype(int)
    inside = bin_of_spike < bins
    return np.bincount(source[inside] * bins + bin_of_spike[inside], minlength=n * bins).reshape(n, bins)


def indicator_response(
    rng: np.random.Generator, spikes: np.ndarray, indicator: Indicator, rate_hz: float
) -> np.ndarray:
    """Fluorescence change dF/F (n, bins): each spike adds a rise and a decay; many spikes saturate the sensor."""
    n, bins = spikes.shape
    time = np.arange(bins) / rate_hz
    decay = indicator.decay_s * rng.uniform(0.8, 1.25, (n, 1))
    rise = indicator.rise_s * rng.uniform(0.8, 1.25, (n, 1))
    kernel = np.exp(-time / decay) * (1 - np.exp(-time / rise))
    kernel /= kernel.max(axis=1, keepdims=True)
    size = 1 << (2 * bins - 1).bit_length()
    calcium = np.fft.irfft(np.fft.rfft(spikes, size) * np.fft.rfft(kernel, size), size)[:, :bins]
    calcium = np.maximum(calcium, 0)
    return indicator.response * calcium / (1 + calcium / indicator.saturation)


def calcium_responses(
    rng: np.random.Generator,
    count: int,
    frames: int,
    frame_rate_hz: float,
    indicator: Indicator,
    *,
    bout_rate_hz: float,
    bout_s: float,
    silent_fraction: float,
    bursting_fraction: float,
) -> np.ndarray:
    """Fluorescence changes dF/F (count, frames), 0 at rest.

    Rates of firing differ from source to source by about a factor of two around `bout_rate_hz`; a share of the
    sources is nearly silent, and another share fires in bursts: bouts 12 times shorter with 10 times denser spikes.
    """
    oversampling = int(np.ceil(FINE_RATE_HZ / frame_rate_hz))
    rate_hz = frame_rate_hz * oversampling
    burn_in = int(BURN_IN_S * frame_rate_hz) * oversampling
    rates = bout_rate_hz * rng.lognormal(0.0, 0.5, count)
    rates[rng.random(count) < silent_fraction] *= 0.03
    lengths = bout_s * rng.lognormal(0.0, 0.3, count)
    spike_rates = rng.lognormal(np.log(4.0), 0.5, count)
    bursting = rng.random(count) < bursting_fraction
    lengths[bursting] *= 0.08
    spike_rates[bursting] *= 10
    spikes = spike_trains(rng, rates, lengths, spike_rates, burn_in + frames * oversampling, rate_hz)
    response = indicator_response(rng, spikes, indicator, rate_hz)
    return response[:, burn_in::oversampling]


def neuropil_courses(rng: np.random.Generator, count: int, frames: int, frame_rate_hz: float) -> np.ndarray:
    """Slow time courses (count, frames) of unit variance: activity averaged over many cells, and vasomotion."""
    padded = frames + int(20 * frame_rate_hz)  # the filter is periodic; the surplus keeps the ends apart
    frequency_hz = np.fft.rfftfreq(padded, 1 / frame_rate_hz)
    corner = rng.uniform(0.1, 0.2, (count, 1))
    transfer = frequency_hz / (frequency_hz + 0.08) / (1 + (frequency_hz / corner) ** 3)
    noise = rng.standard_normal((count, padded))
    course = np.fft.irfft(np.fft.rfft(noise) * transfer, padded)
    course /= course.std(axis=1, keepdims=True)
    return np.clip(course[:, :frames], -2.5, 4.0).astype(np.float32)


def photobleaching(frames: int, loss: float) -> np.ndarray:
    """Brightness (frames,) that falls exponentially from 1 to 1 - `loss` over the recording."""
    course = 1 - np.exp(-2.0 * np.arange(frames) / max(frames - 1, 1))
    return (1 - loss * course / (1 - np.exp(-2.0))).astype(np.float32)


def brain_motion(rng: np.random.Generator, frames: int, frame_rate_hz: float, amplitude_px: float) -> np.ndarray:
    """Rigid shift (frames, 2) in pixels along y and x: slow drift, fast jitter, at most 3 x `amplitude_px`."""
    drift = neuropil_courses(rng, 2, frames, frame_rate_hz).T
    jitter = rng.normal(0, 0.3, (frames, 2))
    return np.clip(amplitude_px * (drift + jitter), -3 * amplitude_px, 3 * amplitude_px)
