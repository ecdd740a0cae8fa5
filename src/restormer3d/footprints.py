"""Where the strongest activity of a field is: spatial footprints, denoised once more by a small network.

A field's fluctuations are mostly sums of a few courses in time, each with a footprint in the plane. The courses are
known well, as many pixels share them; the footprints hold nearly all of the error. As images they can be denoised by
what cells, dendrites and boutons look like, and by the static image, in which most of them can be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.image_network import FootprintNetwork
from restormer3d.principal import leading_components
from restormer3d.tiling import hann_weights, window_starts

SIDE = 64
"""Pixels of a field."""
MOST = 24
"""Footprints of a field at most."""
FOOTPRINT_FRAMES = 48
"""Frames that a stack must have: of shorter ones the courses are not known well enough."""

_OVERLAP = 0.5  # of fields
_MOST_CORRELATION = 0.3  # that the network was trained with
_TRUSTED, _REFUSED = 1.5, 3.0  # noise along a change, in units of the expected: up to where it is made, and not at all
_LEAST_DEVIATION = 0.1  # of the noise, relative to the mean one


class Footprints(NamedTuple):
    """A field's activity in deviations of its noise, as far as a few courses make it up.

    Attributes
    ----------
    courses : Tensor
        Orthonormal, (T, footprints).
    denoised, noisy : Tensor
        Footprints (footprints, H, W): of the denoised fluctuations, and of the recorded ones, with noise of variance 1.
    """

    courses: Tensor
    denoised: Tensor
    noisy: Tensor


def take_apart(denoised: Tensor, noisy: Tensor) -> Footprints:
    """Take the fluctuations of a field (T, H, W), in deviations of its noise, apart into courses and footprints."""
    frames, *plane = denoised.shape
    flat = denoised.reshape(1, frames, -1)
    energy, components = leading_components(flat, MOST)
    norms = energy[0, :-1].clamp(min=0).sqrt().float()
    courses = (flat @ components)[0] / norms.clamp(min=1e-12 * float(norms.max()) + 1e-30)
    footprints = (courses.mT @ x.reshape(frames, -1) for x in (denoised, noisy))
    return Footprints(courses, *(x.reshape(-1, *plane) for x in footprints))


@torch.no_grad()
def denoise_footprints(
    denoised: Tensor,
    noisy: Tensor,
    noise: Tensor,
    deviation: Tensor,
    static: Tensor,
    correlation: tuple[tuple[float, ...], ...],
    network: FootprintNetwork,
) -> Tensor:
    """Denoise the footprints of the strongest activity of denoised frames, field by field.

    Parameters
    ----------
    denoised, noisy : Tensor
        Frames (T, H, W) of the same intensities, up to an image that all frames share; at least two.
    noise : Tensor
        Drawn like that of the noisy frames, (T, H, W).
    deviation : Tensor
        Of the noise, (H, W).
    static : Tensor
        The denoised temporal mean (H, W), transformed so that its noise is the same everywhere.
    correlation : tuple of tuple of float
        Of a voxel's noise with its neighbors' along frames (not used), rows and columns, from lag 0 on.
    network : FootprintNetwork
        On the device of the frames.

    Returns
    -------
    Tensor
        Frames (T, H, W) with the mean over time of `denoised`.
    """
    height, width = deviation.shape
    rows, columns = min(SIDE, height), min(SIDE, width)
    deviation = least_deviation(deviation)
    hann = torch.from_numpy(np.outer(hann_weights(rows), hann_weights(columns))).to(denoised)
    change, weight = torch.zeros_like(denoised), torch.zeros_like(deviation)
    for top in window_starts(height, rows, _OVERLAP):
        for left in window_starts(width, columns, _OVERLAP):
            field = (..., slice(top, top + rows), slice(left, left + columns))
            scale = deviation[field]
            inside = take_apart(*(in_deviations(x[field], scale) for x in (denoised, noisy)))
            better = answer(network, inside, static[field], lag_one(correlation))
            by_course = (better - inside.denoised).flatten(1)
            left = ((noisy[field] - denoised[field]) / scale).flatten(1)
            excess = noise_excess(by_course, left, (noise[field] / scale).flatten(1))
            by_course *= ((_REFUSED - excess) / (_REFUSED - _TRUSTED)).clamp(0, 1).unsqueeze(1)
            change[field] += (inside.courses @ by_course).view(-1, rows, columns) * (hann * scale)
            weight[field] += hann
    return denoised + change / weight


def answer(network: FootprintNetwork, field: Footprints, static: Tensor, correlation: tuple[float, float]) -> Tensor:
    """Denoise the footprints of one field once more, (footprints, H, W)."""
    count, height, width = field.noisy.shape
    images = (field.noisy, field.denoised, *(x.expand(count, -1, -1) for x in context(field, static)))
    padded = (F.pad(x[:, None], (0, -width % 4, 0, -height % 4), mode="replicate") for x in images)
    known = torch.tensor([correlation], dtype=torch.float32, device=field.noisy.device)
    return network(*padded, known.expand(count, -1))[:, 0, :height, :width]


def context(field: Footprints, static: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees beside a footprint: the static image (H, W), standardized, and the activity's strength."""
    standardized = (static - static.mean()) / (static.std(correction=0) + 1e-9)
    return standardized.float(), field.denoised.square().sum(0).sqrt()


def noise_excess(change: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Noise that frames hold along changes of footprints (footprints, pixels), relative to what is expected.

    From differences of frames in what denoising has left (T, pixels), over one frame and over two, as signal that grows
    with the delay has no part in them; `noise` (T, pixels) is drawn as expected. Light that flickers and a field that
    jitters are not in the variance of single pixels, and look like activity that every frame has of its own.
    """
    direction = change.mT / change.norm(dim=1).clamp(min=1e-30)
    courses = left @ direction
    one, two = ((courses[lag:] - courses[:-lag]).square().mean(0) / 2 for lag in (1, 2))
    return (2 * one - two) / (noise @ direction).square().mean(0).clamp(min=1e-30)


def in_deviations(frames: Tensor, deviation: Tensor) -> Tensor:
    """Fluctuations of frames (T, H, W) around their mean, in deviations (H, W) of their noise."""
    return (frames - frames.mean(0)) / deviation


def least_deviation(deviation: Tensor) -> Tensor:
    """Deviations (H, W), none much below the mean one: pixels that say they have no noise would outweigh all others."""
    return deviation.clamp(min=_LEAST_DEVIATION * float(deviation.mean()) + 1e-30)


def lag_one(correlation: tuple[tuple[float, ...], ...]) -> tuple[float, float]:
    """Correlation of the noise of neighbors along y and x, as far as the network knows it."""
    y, x = (min(max([*lags[1:2], 0.0]), _MOST_CORRELATION) for lags in correlation[1:])
    return y, x
