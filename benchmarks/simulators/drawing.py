"""Spots, smooth noise and winding paths: what the simulators draw with. Positions are (y, x) in pixels."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

Field = tuple[int, int]
"""Height and width."""


def offsets(center: np.ndarray, field: Field) -> np.ndarray:
    """Rows and columns between a point and each pixel, (2, H, W)."""
    return np.mgrid[: field[0], : field[1]] - center[:, None, None]


def distance(center: np.ndarray, field: Field) -> np.ndarray:
    """Distance of each pixel (H, W) to a point."""
    return np.hypot(*offsets(center, field))


def spot(center: np.ndarray, sigma: float, field: Field) -> np.ndarray:
    """Gaussian of height 1."""
    return np.exp(-(distance(center, field) ** 2) / (2 * sigma**2))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    """Noise of unit variance, smoothed by a Gaussian."""
    return gaussian_filter(rng.standard_normal(shape), width) * (2 * np.pi**0.5 * width) ** (len(shape) / 2)


def entry(rng: np.random.Generator, field: Field, margin: float, corner: float = 0.1) -> tuple[np.ndarray, float]:
    """Draw a point `margin` outside of the field, not near a corner, and the heading from it inward."""
    height, width = field
    along = rng.uniform(corner, 1 - corner)
    side = rng.integers(4)
    start = [
        (-margin, along * width),
        (along * height, width + margin),
        (height + margin, along * width),
        (along * height, -margin),
    ]
    return np.array(start[side]), (np.pi / 2, np.pi, -np.pi / 2, 0.0)[side]


def walk(start: np.ndarray, heading: float, turns: np.ndarray, step: float = 1.0) -> np.ndarray:
    """Path (n, 2) of steps whose heading changes by `turns` (n,), in radians from the axis x toward y."""
    headings = heading + np.cumsum(turns)
    return start + step * np.cumsum(np.stack([np.sin(headings), np.cos(headings)], 1), 0)


def nearest(path: np.ndarray, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each pixel to a path (n, 2), infinite if it never enters the field, and the index of what is near."""
    pixels = np.rint(path).astype(int)
    inside = ((pixels >= 0) & (pixels < field)).all(1)
    if not inside.any():
        return np.full(field, np.inf), np.zeros(field, int)
    index = np.full(field, -1)
    index[tuple(pixels[inside].T)] = np.flatnonzero(inside)
    y, x = np.asarray(distance_transform_edt(index < 0, return_distances=False, return_indices=True))
    index = index[y, x]
    # The transform is between whole pixels; which point is nearest, and how near, is not.
    around = np.clip(index + np.arange(-2, 3)[:, None, None], 0, len(path) - 1)
    y, x = np.moveaxis(path[around], -1, 0) - np.mgrid[: field[0], : field[1]][:, None]
    return np.hypot(y, x).min(0), index


def tube(path: np.ndarray, radii: np.ndarray, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of a glowing cylinder along a path, as deep as it is wide, and the index of the path at each pixel."""
    gap, index = nearest(path, field)
    radius = radii[index]
    return np.sqrt(np.clip(1 - (gap / radius) ** 2, 0, None)) * radius / radii.max(), index
