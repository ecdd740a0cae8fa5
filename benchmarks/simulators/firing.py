"""Traces of structures that fire in bursts: spikes become calcium, which an indicator like GCaMP6f binds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.signal import lfilter

FRAME_RATE_HZ = 30.0
_STEPS = 4  # of simulated time in a frame
_STEP_SECONDS = 1 / (FRAME_RATE_HZ * _STEPS)
_WARM_UP = 90  # frames before the first one: calcium is under way when the recording begins


class Firing(NamedTuple):
    """How trains of two states fire: bursts per second and their seconds, spikes per second within and between them."""

    bursts_hz: float
    burst_seconds: float
    burst_rate_hz: float
    rest_rate_hz: float


CELLS = Firing(0.16, 0.6, 9.0, 0.06)
PROCESSES = Firing(0.12, 0.5, 8.0, 0.3)
POPULATIONS = Firing(0.35, 0.8, 14.0, 1.5)


def firing_traces(
    rng: np.random.Generator, count: int, frames: int, firing: Firing, calcium_per_spike: float = 0.035
) -> np.ndarray:
    """Changes of fluorescence relative to rest, (count, frames)."""
    spikes = _spike_trains(rng, count, (_WARM_UP + frames) * _STEPS, firing)
    at_rest = 0.05
    binding = np.exp(-_STEP_SECONDS / 0.04)
    traces = np.empty((count, frames), np.float32)
    for trace, train in zip(traces, spikes, strict=True):
        decay = np.exp(-_STEP_SECONDS / (0.24 * rng.lognormal(0, 0.15)))
        calcium = lfilter([calcium_per_spike * rng.lognormal(0, 0.2)], [1, -decay], train)
        calcium = at_rest + np.asarray(lfilter([1 - binding], [1, -binding], calcium))
        change = _indicator(calcium) / _indicator(np.array(at_rest)) - 1
        trace[:] = change[_WARM_UP * _STEPS :].reshape(frames, _STEPS).mean(1)
    return traces


def _spike_trains(rng: np.random.Generator, count: int, steps: int, firing: Firing) -> np.ndarray:
    """Spikes (count, steps); some sources burst more often than others."""
    activity = rng.lognormal(0, 0.6, count)
    bursting = rng.random(count) < firing.bursts_hz * firing.burst_seconds
    start, end = firing.bursts_hz * activity * _STEP_SECONDS, _STEP_SECONDS / firing.burst_seconds
    spikes = np.zeros((count, steps), np.float32)
    for t in range(steps):
        chance = rng.random(count)
        bursting = np.where(bursting, chance > end, chance < start)
        rate_hz = np.where(bursting, firing.burst_rate_hz, firing.rest_rate_hz * activity)
        spikes[:, t] = rng.poisson(rate_hz * _STEP_SECONDS)
    return spikes


def _indicator(calcium: np.ndarray) -> np.ndarray:
    """Fluorescence at a concentration of calcium in µM: a Hill curve."""
    bound = calcium**2.3 / (calcium**2.3 + 0.375**2.3)
    return 1 + 15 * bound
