"""Images of nothing in particular: overlapping disks, rings and lines, with what no simulated preparation has."""

from __future__ import annotations

import numpy as np

from restormer3d.simulation.parameters import log_uniform
from restormer3d.simulation.structures import smooth_field

_LARGEST = 40.0  # pixels


def random_texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw an image (side, side) float32, positive, of a mean between 60 and 600.

    References
    ----------
    Lee, Mumford, Huang, "Occlusion Models for Natural Images", Int. J. Computer Vision 2001, for overlapping shapes.
    """
    image = np.ones((side, side))
    for _ in range(int(rng.integers(30, 200))):
        radius = min(1 + 2 * rng.pareto(1.5), _LARGEST)
        center = rng.uniform(0, side, 2)
        reach = 6 * radius + 1
        low = np.maximum(center - reach, 0).astype(int)
        high = np.minimum(center + reach, side).astype(int) + 1
        box = image[low[0] : high[0], low[1] : high[1]]
        y, x = (np.arange(a, a + n) - c for a, n, c in zip(low, box.shape, center, strict=True))
        brightness = rng.lognormal(0, 0.8)
        seen = _shape(rng, y[:, None], x, radius)
        box[seen] = brightness * (box[seen] if rng.random() < 0.3 else 1)
    image *= np.exp(rng.uniform(0, 0.25) * smooth_field(rng, image.shape, rng.uniform(0.01, 1)))
    image = _blurred(image, rng.uniform(0.3, 1.5))
    image *= np.exp(0.5 * rng.uniform(0, 1) * smooth_field(rng, image.shape, 12))
    return (image * log_uniform(rng, 60, 600) / image.mean()).astype(np.float32)


def _shape(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Where a disk, a ring or a line is seen."""
    kind = rng.random()
    if kind < 0.6:
        return np.hypot(y * rng.uniform(0.6, 1.6), x) < radius
    if kind < 0.8:
        return np.abs(np.hypot(y, x) - radius) < max(0.3 * radius, 0.7)
    angle = rng.uniform(0, np.pi)
    along, across = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    return (np.abs(across) < rng.uniform(0.4, 1.2)) & (np.abs(along) < 6 * radius)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    at = np.arange(len(image))
    kernel = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ image @ kernel.T
