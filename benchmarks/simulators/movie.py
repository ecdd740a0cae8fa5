"""What a simulator gives, and how its light adds up: still footprints, each of which follows a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DARKEST = 1e-3  # of a movie whose light is of the order of 1: a voxel expects some light


class Movie(NamedTuple):
    """A recording without noise, and where its cells are.

    Attributes
    ----------
    clean : ndarray of float32, shape (T, H, W)
        Expected photons of each voxel, positive, 1 on average.
    masks : ndarray of int, shape (H, W)
        Number of the ROI at each pixel, from 1; 0 outside of all. An ROI is where its footprint is above half of its
        peak; where several are, the one that is brighter relative to its own peak.
    frame_rate_hz : float
        Frames per second.
    """

    clean: np.ndarray
    masks: np.ndarray
    frame_rate_hz: float


class Source(NamedTuple):
    """A structure that glows: its image at rest (H, W), and what multiplies it in each frame (T,)."""

    footprint: np.ndarray
    trace: np.ndarray


def summed(sources: Sequence[Source]) -> np.ndarray:
    """Light of all sources, (T, H, W) float32."""
    footprints = np.stack([source.footprint for source in sources], dtype=np.float32)
    traces = np.stack([source.trace for source in sources], dtype=np.float32)
    return np.tensordot(traces.T, footprints, 1)


def movie_of(light: np.ndarray, footprints: np.ndarray, frame_rate_hz: float) -> Movie:
    """Scale light (T, H, W) to one photon per voxel, and number the footprints (n, H, W)."""
    light = np.maximum(light, _DARKEST)
    clean = (light / light.mean(dtype=np.float64)).astype(np.float32)
    return Movie(clean, labeled(footprints), frame_rate_hz)


def labeled(footprints: np.ndarray) -> np.ndarray:
    """Masks (H, W) of footprints (n, H, W), as :class:`Movie` describes them."""
    relative = footprints / footprints.max((1, 2), keepdims=True)
    outside = np.full((1, *footprints.shape[1:]), 0.5)
    return np.concatenate([outside, relative]).argmax(0)
