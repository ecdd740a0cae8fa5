"""`simulate_scene`: draw the structures and the activity of a recording and set its brightness and contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from restormer3d.simulation import activity, structures
from restormer3d.simulation.parameters import SceneParameters
from restormer3d.simulation.scene import Scene
from restormer3d.simulation.structures import CellBody, Footprint

CALIBRATION_FRAMES = 24  # brightness is set from this many evenly spaced frames
HIDDEN_SOURCES = 200  # neurites and blurred cells share at most this many time courses: axons branch


def simulate_scene(shape: tuple[int, int, int], *, seed: int, **parameters: Any) -> Scene:
    """Simulate a clean two-photon calcium recording with known cells.

    The scene is a sum of cell bodies with their dendrites, pieces of neurites, boutons, cells out of focus and a
    textured neuropil with slow fluctuations, seen between vessels and through vignetting. The same arguments give the
    same scene; the number of frames does not change its structure.

    Parameters
    ----------
    shape : tuple of int
        Frames, height and width.
    seed : int
        Not negative.
    **parameters
        Fields of `SceneParameters`; the defaults give the statistics of the calcium imaging challenge at 30 Hz.

    Returns
    -------
    Scene
        A lazy stack of float32 in ADU with `masks` and `traces`.

    Raises
    ------
    ValueError
        If the shape or a parameter is out of range.
    TypeError
        If `SceneParameters` has no field of that name.

    Examples
    --------
    >>> scene = simulate_scene((300, 128, 128), seed=1, indicator="jgcamp8m", frame_rate_hz=45.0)
    >>> scene[10:20].shape
    (10, 128, 128)
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape is {shape}; expected frames, height and width, each at least 1")
    settings = SceneParameters(**parameters)
    anatomy_rng, firing_rng, slow_rng, motion_rng = np.random.default_rng(seed).spawn(4)
    margin = int(np.ceil(3 * settings.motion_px)) + 2 if settings.motion_px else 0
    canvas = (shape[1] + 2 * margin, shape[2] + 2 * margin)
    anatomy = draw_anatomy(anatomy_rng, canvas, settings)
    inner = slice(margin, -margin or None)
    scene = Scene(
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        seed=seed,
        parameters=settings,
        masks=anatomy.masks[inner, inner],
        traces=np.empty((0, shape[0]), np.float32),
        static=anatomy.static,
        modes=anatomy.modes,
        courses=activity.neuropil_courses(slow_rng, len(anatomy.modes), shape[0], settings.frame_rate_hz),
        footprints=anatomy.footprints,
        source_traces=draw_activity(firing_rng, shape[0], anatomy.cell_brightness, anatomy.hidden_sources, settings),
        shifts=draw_motion(motion_rng, shape[0], settings),
        margin=margin,
        brightness=activity.photobleaching(shape[0], settings.bleaching),
    )
    scene = set_brightness(scene, slow_rng.uniform(0.97, 1.03))
    return with_rois(scene, anatomy.masks, len(anatomy.cell_brightness))


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What stands still on the canvas; source n is cell n of `cell_brightness` and ROI n + 1 of `masks`."""

    cell_brightness: np.ndarray
    hidden_sources: int
    masks: np.ndarray
    footprints: list[Footprint]
    static: np.ndarray
    modes: np.ndarray


def draw_anatomy(rng: np.random.Generator, canvas: tuple[int, int], settings: SceneParameters) -> Anatomy:
    """Draw cells, neurites, vessels and the neuropil with its modes."""
    radius = settings.cell_radius_px
    static = structures.baseline_texture(rng, canvas, radius, settings.roughness)
    cells = structures.place_cells(rng, canvas, radius, settings.cell_density, settings.donut_fraction)
    brightness = stratified_lognormal(rng, settings.brightness_spread, len(cells))
    masks, footprints = draw_cells(rng, cells, brightness, static)
    neurites = draw_hidden_sources(rng, canvas, settings, first_source=len(cells))
    light = structures.vignette(rng, canvas, settings.vignetting)
    light *= structures.vessel_shadow(rng, canvas, radius, settings.vessel_density)
    static *= light
    modes = structures.neuropil_modes(
        rng, static, radius, settings.neuropil_modes, settings.neuropil_strength, settings.neuropil_follows
    )
    footprints = [illuminate(footprint, light) for footprint in footprints + neurites]
    return Anatomy(brightness, min(len(neurites), HIDDEN_SOURCES), masks, footprints, static, modes)


def draw_cells(
    rng: np.random.Generator,
    cells: Sequence[CellBody],
    brightness: np.ndarray,
    static: np.ndarray,
) -> tuple[np.ndarray, list[Footprint]]:
    """Draw bodies and dendrites; darkens the neuropil of `static` where bodies stand."""
    canvas = (static.shape[0], static.shape[1])
    masks = np.zeros(canvas, dtype=np.uint16)
    footprints: list[Footprint] = []
    for source, cell in enumerate(cells):
        body, outline = structures.body_footprint(rng, cell, canvas, source)
        structures.darken(static, body, rng.uniform(0.4, 0.9))
        rows, columns = outline.shape
        box = masks[body.top : body.top + rows, body.left : body.left + columns]
        box[outline & (box == 0)] = source + 1
        parts = [body, *structures.process_footprints(rng, cell, canvas, source)]
        footprints += [scaled(part, float(brightness[source])) for part in parts]
    return masks, footprints


def draw_hidden_sources(
    rng: np.random.Generator, canvas: tuple[int, int], settings: SceneParameters, first_source: int
) -> list[Footprint]:
    """Draw neurites and blurred cells of sources without an ROI."""
    cell_areas = canvas[0] * canvas[1] / (np.pi * settings.cell_radius_px**2)
    neurites = rng.poisson(settings.neurite_density * cell_areas)
    blurred = rng.poisson(settings.cell_density * cell_areas)
    footprints: list[Footprint] = []
    for number in range(neurites + blurred):
        source = first_source + len(footprints) % HIDDEN_SOURCES
        draw = structures.neurite_footprint if number < neurites else structures.blurred_cell_footprint
        footprint = draw(rng, canvas, settings.cell_radius_px, source)
        if footprint is not None:
            footprints.append(scaled(footprint, rng.lognormal(0.0, 0.5)))
    return footprints


def draw_activity(
    rng: np.random.Generator, frames: int, cell_brightness: np.ndarray, hidden: int, settings: SceneParameters
) -> np.ndarray:
    """Relative fluorescence (sources, frames) of the cells and then of the hidden sources.

    Cells that are bright at rest change less relative to it: they hold more indicator, or more calcium at rest.
    """
    brightness = np.concatenate([cell_brightness, np.ones(hidden)])
    response = activity.calcium_responses(
        rng,
        len(brightness),
        frames,
        settings.frame_rate_hz,
        activity.INDICATORS[settings.indicator],
        bout_rate_hz=settings.bout_rate_hz,
        bout_s=settings.bout_s,
        silent_fraction=settings.silent_fraction,
        bursting_fraction=settings.bursting_fraction,
    )
    return (1 + response * brightness[:, None] ** -0.3).astype(np.float32)


def draw_motion(rng: np.random.Generator, frames: int, settings: SceneParameters) -> np.ndarray | None:
    """Shifts (frames, 2) in pixels, or None for a still brain."""
    if not settings.motion_px:
        return None
    return activity.brain_motion(rng, frames, settings.frame_rate_hz, settings.motion_px)


def stratified_lognormal(rng: np.random.Generator, spread: float, count: int) -> np.ndarray:
    """Log-normal numbers, one from each of `count` equally likely ranges: every scene has its share of bright cells."""
    quantiles = (rng.permutation(count) + rng.random(count)) / max(count, 1)
    normal = NormalDist()
    return np.exp([spread * normal.inv_cdf(float(np.clip(quantile, 0.05, 0.95))) for quantile in quantiles])


def scaled(footprint: Footprint, factor: float) -> Footprint:
    """Return the footprint `factor` times as bright."""
    return replace(footprint, weights=np.float32(factor) * footprint.weights)


def illuminate(footprint: Footprint, light: np.ndarray) -> Footprint:
    """Return the footprint as seen under vignetting and vessels."""
    rows, columns = footprint.weights.shape
    box = light[footprint.top : footprint.top + rows, footprint.left : footprint.left + columns]
    return replace(footprint, weights=footprint.weights * box)


def set_brightness(scene: Scene, jitter: float) -> Scene:
    """Scale the cells to the wanted contrast, then everything to the wanted mean times `jitter`."""
    frames = np.unique(np.linspace(0, scene.shape[0] - 1, CALIBRATION_FRAMES).astype(int))
    sample = replace(
        scene,
        courses=scene.courses[:, frames],
        source_traces=scene.source_traces[:, frames],
        brightness=scene.brightness[frames],
        shape=(len(frames), *scene.shape[1:]),
        shifts=None if scene.shifts is None else np.zeros((len(frames), 2)),  # what lies around the field has no part
    )
    together = sample[:].astype(np.float64)
    background = replace(sample, footprints=[])[:].astype(np.float64)
    cells = together - background
    cell_gain = gain_for_contrast(background, cells, scene.parameters.contrast)
    scale = jitter * scene.parameters.mean_adu / (background + cell_gain * cells).mean()
    return replace(
        scene,
        static=(scene.static * scale).astype(np.float32),
        modes=(scene.modes * scale).astype(np.float32),
        footprints=[scaled(footprint, scale * cell_gain) for footprint in scene.footprints],
    )


def gain_for_contrast(background: np.ndarray, cells: np.ndarray, contrast: float) -> float:
    """Gain a of the cells for which rms(background + a cells) = contrast x mean(background + a cells).

    Kept between 0.05 and 20, so that a small field of view with one dim cell is not made all cell.
    """
    b, c = background.mean(), cells.mean()
    coefficients = (
        np.mean(cells**2) - (contrast * c) ** 2,
        2 * (np.mean(background * cells) - contrast**2 * b * c),
        np.mean(background**2) - (contrast * b) ** 2,
    )
    roots = np.roots(coefficients) if np.any(cells) else np.empty(0)
    gains = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return float(np.clip(gains.min(), 0.05, 20.0)) if len(gains) else 1.0


def with_rois(scene: Scene, masks: np.ndarray, cells: int) -> Scene:
    """Add the traces, and number the ROIs without gaps: cells that lie outside the frame are no ROIs."""
    visible = np.unique(scene.masks[scene.masks > 0])
    number_of_cell = np.zeros(cells + 1, dtype=np.uint16)
    number_of_cell[visible] = np.arange(1, len(visible) + 1)
    weights = np.zeros(cells, dtype=np.float64)
    for footprint in scene.footprints:
        if footprint.source < cells:
            rows, columns = footprint.weights.shape
            box = masks[footprint.top : footprint.top + rows, footprint.left : footprint.left + columns]
            weights[footprint.source] += footprint.weights[box == footprint.source + 1].sum()
    area = np.maximum(np.bincount(masks.ravel(), minlength=cells + 1)[1:], 1)
    traces = (weights / area)[:, None] * scene.source_traces[:cells] * scene.brightness
    return replace(scene, masks=number_of_cell[scene.masks], traces=traces[visible - 1].astype(np.float32))
