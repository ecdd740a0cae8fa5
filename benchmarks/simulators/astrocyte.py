"""An astrocyte: a bush of fine processes that slow waves of calcium run through, from its center outward."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks.simulators.drawing import Field, distance, smooth_noise, tube, walk


def astrocyte(
    rng: np.random.Generator, frames: int, frame_rate_hz: float, occupied: np.ndarray, margin: int
) -> np.ndarray:
    """Light (T, H, W) of an astrocyte between what is `occupied` (H, W), with about one wave in 2.5 seconds."""
    height, width = occupied.shape
    field = (height, width)
    center = _free_place(rng, occupied, margin)
    gap = distance(center, field)
    footprint = _drawn(rng, center, gap, field) * (1 - 0.85 * occupied)
    lit = footprint > 2e-3
    light = np.zeros((frames, *field), np.float32)
    delays = 0.054 * smooth_noise(rng, field, 5)[lit]  # seconds: fronts are not round
    light[:, lit] = footprint[lit] * (1 + _waves(rng, np.arange(frames) / frame_rate_hz, gap[lit], delays))
    return light


def _free_place(rng: np.random.Generator, occupied: np.ndarray, margin: int) -> np.ndarray:
    """Draw a point that no soma covers, if one is found."""
    center = np.zeros(2)
    for _ in range(400):
        center = rng.uniform(margin + 8, np.subtract(occupied.shape, margin + 8))
        y, x = center.astype(int)
        if occupied[y, x] < 0.1:
            break
    return center


def _drawn(rng: np.random.Generator, center: np.ndarray, gap: np.ndarray, field: Field) -> np.ndarray:
    """A bright center, processes in all directions, and fluff between them."""
    bush = np.zeros(field)
    for heading in np.linspace(0, 2 * np.pi, rng.integers(8, 12), endpoint=False).repeat(2):
        length = int(rng.integers(20, 48))
        path = walk(center, heading + rng.normal(0, 0.3), 0.018 * smooth_noise(rng, (length,), 12))
        process, _ = tube(path, np.linspace(2.2, 1.0, length), field)
        bush = np.maximum(bush, process)
    fluff = 0.64 * np.maximum(smooth_noise(rng, field, 1.1), 0) * np.exp(-((gap / 24) ** 2))
    return 0.9 * gaussian_filter(0.75 * bush + 0.45 * fluff + 1.1 * np.exp(-((gap / 5.5) ** 4)), 0.9)


def _waves(rng: np.random.Generator, time: np.ndarray, gap: np.ndarray, delays: np.ndarray) -> np.ndarray:
    """Changes relative to rest (T, n) of pixels at distances from the center: steep fronts, longer tails."""
    seconds = time[-1]
    change = np.zeros((len(time), len(gap)))
    for _ in range(max(1, round(seconds / 2.5))):
        start, speed = rng.uniform(0.3, max(seconds - 0.8, 0.31)), rng.uniform(25, 60)  # seconds, pixels per second
        since = (time[:, None] - (start + gap / speed + delays)) / rng.uniform(0.35, 0.8)
        change += rng.uniform(0.5, 1.3) * np.exp(-np.where(since < 0, 2.2, 0.7) * since**2)
    return change
