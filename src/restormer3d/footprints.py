"""Where the strongest activity of a field is: spatial footprints, denoised once more by a small network.

A field's fluctuations are mostly sums of a few courses in time, each with a footprint in the plane. The courses are
known well, as many pixels share them; the footprints hold nearly all of the error. As images they can be denoised by
what cells, dendrites and boutons look like, and by the static image, in which most of them can be seen.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.arithmetic import float32_products
from restormer3d.image_network import FootprintNetwork, lag_one
from restormer3d.principal import leading_components
from restormer3d.tiling import hann_weights, window_starts

SIDE = 64
"""Pixels of a field."""
MOST = 24
"""Footprints of a field at most."""
FOOTPRINT_FRAMES = 48
"""Frames that a stack must have: of shorter ones the courses are not known well enough."""

_OVERLAP = 0.5  # of fields
_VOXELS = 2**23  # of fields that are looked at together
_TRUSTED, _REFUSED = 1.5, 3.0  # noise along a change, in units of the expected: up to where it is made, and not at all
_LEAST_DEVIATION = 0.1  # of the noise, relative to the mean one


class Footprints(NamedTuple):
    """The activity of fields in deviations of its noise, as far as a few courses make it up.

    Attributes
    ----------
    courses : Tensor
        Orthonormal, (fields, T, footprints).
    denoised, noisy : Tensor
        Footprints (fields, footprints, H, W): of the denoised fluctuations, and of the recorded ones, with noise of
        variance 1.
    """

    courses: Tensor
    denoised: Tensor
    noisy: Tensor


def take_apart(denoised: Tensor, noisy: Tensor) -> Footprints:
    """Take fluctuations of fields (fields, T, H, W), in deviations of the noise, apart into courses and footprints."""
    flat, recorded = denoised.flatten(2), noisy.flatten(2)
    energy, components = leading_components(flat, MOST)
    norms = energy[:, None, :-1].clamp(min=0).sqrt().float()
    courses = (flat @ components) / norms.clamp(min=1e-12 * float(norms.max()) + 1e-30)
    shape = (len(flat), -1, *denoised.shape[2:])
    return Footprints(courses, (courses.mT @ flat).view(shape), (courses.mT @ recorded).view(shape))


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
    corners = itertools.product(window_starts(height, rows, _OVERLAP), window_starts(width, columns, _OVERLAP))
    fields = [(..., slice(top, top + rows), slice(left, left + columns)) for top, left in corners]
    together = max(1, _VOXELS // (len(denoised) * rows * columns))
    for first in range(0, len(fields), together):
        some = fields[first : first + together]
        scale = torch.stack([deviation[field] for field in some])[:, None]
        stacks = (torch.stack([x[field] for field in some]) for x in (denoised, noisy, noise))
        clear, recorded, drawn = ((x - x.mean(1, keepdim=True)) / scale for x in stacks)
        inside = take_apart(clear, recorded)
        better = answer(network, inside, torch.stack([static[field] for field in some]), lag_one(correlation))
        by_course = (better - inside.denoised).flatten(2)
        excess = noise_excess(by_course, (recorded - clear).flatten(2), drawn.flatten(2))
        by_course *= ((_REFUSED - excess) / (_REFUSED - _TRUSTED)).clamp(0, 1).unsqueeze(2)
        changes = (inside.courses @ by_course).view_as(clear) * (hann * scale)
        for field, of_field in zip(some, changes, strict=True):
            change[field] += of_field
            weight[field] += hann
    return denoised + change / weight


def answer(network: FootprintNetwork, fields: Footprints, static: Tensor, correlation: tuple[float, float]) -> Tensor:
    """Denoise footprints once more, (fields, footprints, H, W), with the fields' static images (fields, H, W)."""
    height, width = static.shape[1:]
    beside = (x[:, None].expand_as(fields.noisy) for x in context(fields, static))
    images = (x.reshape(-1, 1, height, width) for x in (fields.noisy, fields.denoised, *beside))
    padded = [F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate") for x in images]
    known = torch.tensor([correlation], dtype=torch.float32, device=static.device).expand(len(padded[0]), -1)
    with float32_products("fp32"):
        denoised = network(*padded, known)
    return denoised[:, 0, :height, :width].reshape(fields.noisy.shape)


def context(fields: Footprints, static: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees beside footprints: static images (fields, H, W), standardized, and activity's strength."""
    spread, mean = torch.std_mean(static, (1, 2), correction=0, keepdim=True)
    return ((static - mean) / (spread + 1e-9)).float(), fields.denoised.square().sum(1).sqrt()


def noise_excess(change: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Noise that frames hold along changes of footprints, relative to what is expected, (fields, footprints).

    From differences of frames over one frame and over two, as signal that grows with the delay has no part in them.
    Light that flickers and a field that jitters are not in the variance of single pixels, and look like activity that
    every frame has of its own.

    Parameters
    ----------
    change : Tensor
        (fields, footprints, pixels).
    left : Tensor
        What denoising has left of the frames, (fields, T, pixels).
    noise : Tensor
        As it is expected, (fields, T, pixels).
    """
    direction = (change / change.norm(dim=2, keepdim=True).clamp(min=1e-30)).mT
    courses = left @ direction
    one, two = ((courses[:, lag:] - courses[:, :-lag]).square().mean(1) / 2 for lag in (1, 2))
    return (2 * one - two) / (noise @ direction).square().mean(1).clamp(min=1e-30)


def least_deviation(deviation: Tensor) -> Tensor:
    """Deviations (H, W), none much below the mean one: pixels that say they have no noise would outweigh all others."""
    return deviation.clamp(min=_LEAST_DEVIATION * float(deviation.mean()) + 1e-30)
