"""Gaussian filters of courses along time, band by band: the work grows with the frames, not with their square."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from restormer3d.filters import gaussian_matrix

_BAND = 256  # frames that are computed together
_REACH = 8.0  # deviations from the middle, beyond which a Gaussian's weights are zero in float32


def smoothed(courses: Tensor, sigma: float) -> Tensor:
    """Filter courses (..., T, n) along time, as the product with :func:`filters.gaussian_matrix` does.

    `sigma` is in frames.
    """
    frames, reach = courses.shape[-2], math.ceil(_REACH * sigma)
    if frames <= _BAND + 2 * reach:
        return gaussian_matrix(frames, sigma, courses) @ courses
    out = torch.empty_like(courses)
    for first in range(0, frames, _BAND):
        last = min(first + _BAND, frames)
        start, end = max(first - reach, 0), min(last + reach, frames)
        band = gaussian_matrix(end - start, sigma, courses)[first - start : last - start]
        out[..., first:last, :] = band @ courses[..., start:end, :]
    return out


def own_weights(frames: int, sigma: float, like: Tensor) -> Tensor:
    """Sum of the weights that each of so many frames has in its own average: the trace of the matrix."""
    some = gaussian_matrix(min(frames, _BAND + 2 * math.ceil(_REACH * sigma)), sigma, like)
    return some.trace() + (frames - len(some)) * some[len(some) // 2, len(some) // 2]
