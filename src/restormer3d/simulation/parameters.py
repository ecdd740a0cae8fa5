"""What a scene is drawn from: `SceneParameters`, and the wide prior over microscopes that pretraining draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.simulation.activity import INDICATORS


@dataclass(frozen=True)
class SceneParameters:
    """What a scene is drawn from; the defaults give the statistics of the calcium imaging challenge at 30 Hz.

    Attributes
    ----------
    frame_rate_hz : float
        Frames per second; 7 to 45 are usual.
    indicator : str
        A key of `INDICATORS`.
    cell_radius_px : float
        Mean radius of cell bodies: the magnification. Cells differ by 20 % from it, every other length scales with it.
    cell_density : float
        Share of the area that labeled cell bodies in the plane cover.
    donut_fraction : float
        Share of cells with a dark nucleus.
    brightness_spread : float
        Standard deviation of the natural logarithm of the cells' brightness.
    neurite_density : float
        Processes and boutons of cells outside the plane, per cell-sized area.
    roughness : float
        Relative standard deviation of the static neuropil texture.
    neuropil_strength, neuropil_modes : float, int
        Relative standard deviation in time of the neuropil, and how many spatial modes share it.
    neuropil_follows : float
        How far the neuropil's fluctuation follows its static texture: 1 in proportion, 0 not at all (a smooth glow).
    vessel_density, vignetting : float
        Number of vessels per (20 radii)^2, and strength of the fall-off towards the corners (0: none).
    bout_rate_hz, bout_s : float
        Mean rate of firing bouts per source and their mean length; 0.2 s is sparse, some seconds is a response.
    silent_fraction, bursting_fraction : float
        Share of sources that hardly ever fire, and share that fires in short dense bursts.
    mean_adu : float
        Mean of the clean scene in ADU, kept within 3 %.
    contrast : float
        Root mean square of the clean scene over its mean: how much brighter cells are than their surroundings.
    motion_px : float
        Standard deviation of rigid brain motion in pixels; 0 for none.
    bleaching : float
        Share of the fluorescence that is lost by the last frame.
    """

    frame_rate_hz: float = 30.0
    indicator: str = "gcamp6s"
    cell_radius_px: float = 2.5
    cell_density: float = 0.032
    donut_fraction: float = 0.4
    brightness_spread: float = 1.8
    neurite_density: float = 0.1
    roughness: float = 0.42
    neuropil_strength: float = 0.2
    neuropil_modes: int = 5
    neuropil_follows: float = 1.0
    vessel_density: float = 0.2
    vignetting: float = 0.3
    bout_rate_hz: float = 0.09
    bout_s: float = 4.0
    silent_fraction: float = 0.25
    bursting_fraction: float = 0.1
    mean_adu: float = 191.0
    contrast: float = 1.2
    motion_px: float = 0.0
    bleaching: float = 0.0

    def __post_init__(self) -> None:
        if self.indicator not in INDICATORS:
            raise ValueError(f"indicator is {self.indicator!r}; expected one of {', '.join(INDICATORS)}")
        for name in ("frame_rate_hz", "cell_radius_px", "bout_rate_hz", "bout_s", "mean_adu"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("cell_density", "donut_fraction", "silent_fraction", "bursting_fraction", "bleaching"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to below 1")
        if not 0 <= self.neuropil_follows <= 1:
            raise ValueError(f"neuropil_follows is {self.neuropil_follows}; expected a number from 0 to 1")
        if self.motion_px < 0 or self.contrast <= 1 or not 0 <= self.neuropil_strength <= 0.3:
            raise ValueError("expected motion_px >= 0, contrast > 1 and neuropil_strength from 0 to 0.3")
        if self.neuropil_modes < 1:
            raise ValueError(f"neuropil_modes is {self.neuropil_modes}; expected at least 1")


def random_scene_parameters(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Draw a microscope, a preparation and a detector: `{"scene": ..., "detector": ...}`.

    The prior is wide on purpose: a network that is pretrained on it should meet nothing new in a real recording.

    Returns
    -------
    dict
        `scene` holds keywords of `simulate_scene`, `detector` those of `NoisyScene`.

    Examples
    --------
    >>> parameters = random_scene_parameters(np.random.default_rng(0))
    >>> scene = simulate_scene((64, 64, 64), seed=0, **parameters["scene"])
    >>> noisy = NoisyScene(scene, seed=0, **parameters["detector"])
    """
    return {"scene": random_scene(rng), "detector": random_detector(rng)}


def random_scene(rng: np.random.Generator) -> dict[str, Any]:
    """Draw keywords of `simulate_scene`: magnification, frame rate, indicator, structure, activity, motion."""
    return {
        "frame_rate_hz": log_uniform(rng, 7.0, 45.0),
        "indicator": str(rng.choice(list(INDICATORS))),
        "cell_radius_px": log_uniform(rng, 2.0, 8.0),
        "cell_density": log_uniform(rng, 0.01, 0.25),
        "donut_fraction": rng.uniform(0.0, 0.9),
        "brightness_spread": rng.uniform(0.4, 2.0),
        "neurite_density": log_uniform(rng, 0.02, 0.6),
        "roughness": rng.uniform(0.15, 0.7),
        "neuropil_strength": rng.uniform(0.0, 0.3),
        "neuropil_modes": int(rng.integers(1, 9)),
        "neuropil_follows": 1.0 if rng.random() < 0.5 else rng.uniform(0.0, 1.0),
        "vessel_density": rng.uniform(0.0, 1.5),
        "vignetting": rng.uniform(0.0, 3.0),
        "bout_rate_hz": log_uniform(rng, 0.02, 1.0),
        "bout_s": log_uniform(rng, 0.05, 6.0),
        "silent_fraction": rng.uniform(0.0, 0.7),
        "bursting_fraction": rng.uniform(0.0, 0.5),
        "mean_adu": log_uniform(rng, 60.0, 600.0),
        "contrast": rng.uniform(1.08, 1.6),
        "motion_px": rng.uniform(0.0, 1.0) if rng.random() < 0.3 else 0.0,
        "bleaching": rng.uniform(0.0, 0.3) if rng.random() < 0.3 else 0.0,
    }


def random_detector(rng: np.random.Generator) -> dict[str, Any]:
    """Draw keywords of `NoisyScene`: gain, read noise, and now and then correlation, line noise and outliers."""
    correlated = rng.random() < 0.5
    return {
        "gain": log_uniform(rng, 10.0, 2000.0),
        "read_noise_variance": log_uniform(rng, 10.0, 10_000.0),
        "correlation": (rng.uniform(0.0, 0.3), rng.uniform(0.0, 0.2)) if correlated else (0.0, 0.0),
        "line_noise": log_uniform(rng, 1.0, 30.0) if rng.random() < 0.2 else 0.0,
        "outlier_fraction": 0.01 if rng.random() < 0.1 else 0.0,
    }


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between those of `low` and `high`."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
