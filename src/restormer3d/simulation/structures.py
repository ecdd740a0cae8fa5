"""What stands still in a scene: cell bodies, processes, vessels, vignetting and the texture of the neuropil.

Every bright structure is a `Footprint`, a small box of weights tied to the time course of one source; everything
else is a static image. All lengths scale with the cell radius, which stands for the magnification.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELL_REACH = 2.5  # a cell body's box extends this many radii from its center: the halo has faded there


@dataclass(frozen=True, eq=False)
class Footprint:
    """A box of weights at (top, left) of the canvas that follows the time course of one source."""

    top: int
    left: int
    weights: np.ndarray
    source: int


@dataclass(frozen=True)
class CellBody:
    """Center (y, x) and radius in pixels, and whether the nucleus is dark."""

    y: float
    x: float
    radius: float
    is_donut: bool


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], sigma_px: float) -> np.ndarray:
    """White noise blurred with a Gaussian of `sigma_px`, scaled to mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    transfer = np.exp(-2.0 * (np.pi * sigma_px * frequency) ** 2)
    transfer[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * transfer, s=shape)
    return (field / max(field.std(), 1e-12)).astype(np.float32)


def blurred_points(
    points: np.ndarray, amplitudes: np.ndarray, sigma_px: float, shape: tuple[int, int], source: int
) -> Footprint | None:
    """Footprint of a string of points seen through a Gaussian of `sigma_px`; None where it misses the canvas.

    A Gaussian is separable, so the sum over points is one product of two narrow matrices.
    """
    low = np.maximum(np.floor(points.min(0) - 3 * sigma_px).astype(int), 0)
    high = np.minimum(np.ceil(points.max(0) + 3 * sigma_px).astype(int) + 1, shape)
    if np.any(high <= low):
        return None
    along_y, along_x = (
        np.exp(-((np.arange(low[axis], high[axis]) - points[:, axis, None]) ** 2) / (2 * sigma_px**2))
        for axis in (0, 1)
    )
    weights = (along_y * amplitudes[:, None]).T @ along_x
    return Footprint(int(low[0]), int(low[1]), weights.astype(np.float32), source)


def random_path(
    rng: np.random.Generator, start: np.ndarray, length_px: float, bend: float, step_px: float = 0.7
) -> np.ndarray:
    """Points (n, 2) of a curve that starts at `start` in a random direction and wanders by `bend` radians a px."""
    steps = max(int(length_px / step_px), 2)
    turns = rng.normal(0, bend * np.sqrt(step_px), steps)
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(turns)
    return start + step_px * np.cumsum(np.stack([np.sin(angle), np.cos(angle)], axis=1), axis=0)


def place_cells(
    rng: np.random.Generator, shape: tuple[int, int], radius_px: float, density: float, donut_fraction: float
) -> list[CellBody]:
    """Draw cell bodies that cover about `density` of the canvas and hardly overlap."""
    wanted = round(density * shape[0] * shape[1] / (np.pi * radius_px**2) * rng.uniform(0.85, 1.15))
    candidates = rng.uniform(-0.5 * radius_px, np.array(shape) + 0.5 * radius_px, (4 * wanted + 8, 2))
    centers = np.empty((0, 2))
    for candidate in candidates:
        if len(centers) == wanted:
            break
        if np.all(np.sum((centers - candidate) ** 2, axis=1) > (1.8 * radius_px) ** 2):
            centers = np.vstack([centers, candidate])
    radii = radius_px * rng.uniform(0.8, 1.2, len(centers))
    donuts = rng.random(len(centers)) < donut_fraction
    return [
        CellBody(float(center[0]), float(center[1]), float(radius), bool(donut))
        for center, radius, donut in zip(centers, radii, donuts, strict=True)
    ]


def body_footprint(
    rng: np.random.Generator, cell: CellBody, shape: tuple[int, int], source: int
) -> tuple[Footprint, np.ndarray]:
    """Weights of one cell body with its out-of-focus halo, and the mask of its outline (same box)."""
    reach = int(np.ceil(CELL_REACH * cell.radius))
    top, bottom = max(int(cell.y) - reach, 0), min(int(cell.y) + reach + 1, shape[0])
    left, right = max(int(cell.x) - reach, 0), min(int(cell.x) + reach + 1, shape[1])
    dy, dx = np.arange(top, bottom)[:, None] - cell.y, np.arange(left, right)[None, :] - cell.x
    angle, tilt = np.arctan2(dy, dx), rng.uniform(0, 2 * np.pi, 2)
    outline = 1 + rng.uniform(0, 0.2) * np.cos(2 * (angle - tilt[0]))  # an oval ...
    outline += rng.uniform(0, 0.1) * np.cos(3 * (angle - tilt[1]))  # ... with a corner or two
    distance = np.hypot(dy, dx) / (cell.radius * outline)
    softness = 0.12 + 0.5 / cell.radius  # the optical blur, in radii
    weights = 1 / (1 + np.exp(np.clip((distance - 1) / softness, -30, 30)))
    if cell.is_donut:
        weights *= 1 - rng.uniform(0.3, 0.7) * np.exp(-((distance / 0.55) ** 2))
    weights += rng.uniform(0.01, 0.06) * np.exp(-(distance**2) / 2)
    return Footprint(top, left, weights.astype(np.float32), source), distance <= 1


def process_footprints(
    rng: np.random.Generator, cell: CellBody, shape: tuple[int, int], source: int
) -> list[Footprint]:
    """Zero to four dendrites of one cell: thin, dimmer than the body and fading with distance."""
    dendrites = []
    for _ in range(rng.integers(0, 5)):
        length = cell.radius * rng.uniform(3, 12)
        path = random_path(rng, np.array([cell.y, cell.x]), length, 0.2 / np.sqrt(cell.radius))
        fading = rng.uniform(0.02, 0.08) * np.linspace(1, 0, len(path)) * rng.gamma(4.0, 0.25, len(path))
        width = max(0.9, cell.radius * rng.uniform(0.12, 0.25))
        dendrites.append(blurred_points(path, fading, width, shape, source))
    return [dendrite for dendrite in dendrites if dendrite is not None]


def neurite_footprint(
    rng: np.random.Generator, shape: tuple[int, int], radius_px: float, source: int
) -> Footprint | None:
    """One piece of axon or dendrite of a cell outside the plane, or a bouton, a bright point, on it."""
    start = rng.uniform(0, shape)
    width = max(1.0, radius_px * rng.uniform(0.15, 0.35))
    if rng.random() < 0.6:
        return blurred_points(start[None], np.array([rng.uniform(0.1, 0.4)]), width, shape, source)
    path = random_path(rng, start, radius_px * rng.uniform(4, 25), 0.25 / np.sqrt(radius_px))
    fading = np.sin(np.linspace(0, np.pi, len(path)))  # it enters and leaves the plane
    beads = rng.uniform(0.02, 0.1) * fading * rng.gamma(2.0, 0.5, len(path))
    return blurred_points(path, beads, width, shape, source)


def blurred_cell_footprint(
    rng: np.random.Generator, shape: tuple[int, int], radius_px: float, source: int
) -> Footprint | None:
    """A cell body above or below the plane: a wide, dim spot."""
    sigma = radius_px * rng.uniform(1.2, 3.0)
    return blurred_points(rng.uniform(0, shape, (1, 2)), rng.uniform(0.03, 0.2, 1), sigma, shape, source)


def vessel_shadow(rng: np.random.Generator, shape: tuple[int, int], radius_px: float, density: float) -> np.ndarray:
    """Transmission (H, W) between 0 and 1: dark curved bands where blood absorbs the light."""
    count = rng.poisson(density * shape[0] * shape[1] / (20 * radius_px) ** 2)
    optical_depth = np.zeros(shape, dtype=np.float32)
    for _ in range(count):
        width = radius_px * rng.uniform(0.5, 2.0)
        path = random_path(rng, np.zeros(2), 2 * sum(shape), 0.08 / np.sqrt(radius_px), step_px=width)
        path += rng.uniform(0, shape) - path[len(path) // 2]  # its ends lie outside the frame
        vessel = blurred_points(path, np.full(len(path), rng.uniform(0.1, 0.5)), width, shape, 0)
        if vessel is not None:
            rows, columns = vessel.weights.shape
            optical_depth[vessel.top : vessel.top + rows, vessel.left : vessel.left + columns] += vessel.weights
    return np.exp(-np.minimum(optical_depth, 1.5))


def vignette(rng: np.random.Generator, shape: tuple[int, int], strength: float) -> np.ndarray:
    """Fall-off (H, W) of the excitation towards the corners around a center near the middle; 1 at the center."""
    center = rng.uniform(0.35, 0.65, 2)
    y, x = np.arange(shape[0]) / shape[0] - center[0], np.arange(shape[1]) / shape[1] - center[1]
    return (1 / (1 + strength * 2 * (y[:, None] ** 2 + x[None, :] ** 2))).astype(np.float32)


def baseline_texture(
    rng: np.random.Generator, shape: tuple[int, int], radius_px: float, roughness: float
) -> np.ndarray:
    """Static neuropil fluorescence (H, W), mean about 1: log-normal on three scales, with dark unlabeled cells."""
    log_texture = np.zeros(shape, dtype=np.float32)
    for scale, share in ((12.0, 0.55), (2.5, 0.35), (0.6, 0.25)):
        log_texture += roughness * share * smooth_field(rng, shape, scale * radius_px)
    texture = np.exp(log_texture)
    for cell in place_cells(rng, shape, radius_px, 0.06, 0.0):
        hole, _ = body_footprint(rng, cell, shape, 0)
        darken(texture, hole, rng.uniform(0.2, 0.6))
    return texture


def darken(image: np.ndarray, footprint: Footprint, share: float) -> None:
    """Take `share` of the light away where the footprint is: a cell body holds no neuropil."""
    rows, columns = footprint.weights.shape
    box = image[footprint.top : footprint.top + rows, footprint.left : footprint.left + columns]
    box *= 1 - share * np.minimum(footprint.weights, 1)


def neuropil_modes(
    rng: np.random.Generator, texture: np.ndarray, radius_px: float, count: int, strength: float, follows: float = 1.0
) -> np.ndarray:
    """Spatial modes (count, H, W) of neuropil fluctuation: broad fields over the static texture.

    With unit-variance courses the fluctuation's standard deviation is about `strength` times the texture, which is
    taken to the power `follows` with its mean kept.
    """
    shape = (texture.shape[0], texture.shape[1])
    scales = radius_px * rng.uniform(3, 25, count)
    fields = np.stack([smooth_field(rng, shape, scale) for scale in scales])
    fields[0] = 1 + 0.3 * fields[0]  # one mode that the whole field of view shares
    followed = texture**follows
    followed *= texture.mean() / followed.mean()
    return (strength / np.sqrt(count) * fields * followed).astype(np.float32)
