"""Where the strongest activity of a field is: spatial footprints, denoised once more by a small network.

A field's fluctuations are mostly sums of a few courses in time, each with a footprint in the plane. The courses are
known well, as many pixels share them; the footprints hold nearly all of the error. As images they can be denoised by
what cells, dendrites and boutons look like, and by the static image, in which most of them can be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.activity.fields import MOST, Fields, change_fields, misfit, trust
from restormer3d.activity.principal import leading_components
from restormer3d.arithmetic import float32_products
from restormer3d.unets import FootprintNetwork, lag_one

_TOGETHER = 48  # footprints that the network denoises at a time: two fields
_LEAST_ENERGY = 1e-3  # of a pixel of a footprint, relative to its noise: what is weaker is not worth the time


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
        Frames (T, H, W) of the same intensities, up to an image that all frames share; at least three.
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
    known = lag_one(correlation)

    def change(fields: Fields) -> Tensor:
        inside = take_apart(fields.denoised, fields.noisy)
        better = apply_network(network, inside, fields.cut(static), known)
        by_course = (better - inside.denoised).flatten(2)
        by_course *= trust(misfit(*(x.flatten(2) for x in (inside.noisy, inside.denoised, better)))).unsqueeze(2)
        left = (fields.noisy - fields.denoised).flatten(2)
        by_course *= trust(noise_excess(by_course, left, fields.noise.flatten(2))).unsqueeze(2)
        return (inside.courses @ by_course).view_as(fields.denoised)

    return change_fields(denoised, noisy, noise, deviation, change)


def apply_network(
    network: FootprintNetwork, inside: Footprints, static: Tensor, correlation: tuple[float, float]
) -> Tensor:
    """Denoise footprints once more, (fields, footprints, H, W), with the fields' static images (fields, H, W)."""
    height, width = static.shape[1:]
    strong = inside.denoised.square().mean((2, 3)) > _LEAST_ENERGY
    beside = (x[:, None].expand_as(inside.noisy) for x in context(inside, static))
    images = [x[strong].unsqueeze(1) for x in (inside.noisy, inside.denoised, *beside)]
    better = inside.denoised.clone()
    if not len(images[0]):
        return better
    padded = [F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate") for x in images]
    known = torch.tensor([correlation], dtype=torch.float32, device=static.device).expand(len(padded[0]), -1)
    some = [x.split(_TOGETHER) for x in (*padded, known)]
    with float32_products("fp32"):
        denoised = torch.cat([network(*images) for images in zip(*some, strict=True)])
    better[strong] = denoised[:, 0, :height, :width]
    return better


def context(inside: Footprints, static: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees beside footprints: static images (fields, H, W), standardized, and activity's strength."""
    spread, mean = torch.std_mean(static, (1, 2), correction=0, keepdim=True)
    return ((static - mean) / (spread + 1e-9)).float(), inside.denoised.square().sum(1).sqrt()


def noise_excess(change: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Noise that frames hold along changes of footprints, relative to what is expected, (fields, footprints).

    From differences of frames over one frame and over two, as signal that grows with the delay has no part in them.

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
