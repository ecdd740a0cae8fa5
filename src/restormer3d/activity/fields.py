"""Fields of a recording: overlapping squares that are changed one by one and blended again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from restormer3d.tiling import hann_weights, window_starts

SIDE = 64
"""Pixels of a field."""
MOST = 24
"""Components of a field at most."""
FIELD_FRAMES = 48
"""Frames that are looked at together, at least: in fewer, courses and footprints are not known well enough."""

_OVERLAP = 0.5
_VOXELS = 2**23  # of fields that are looked at together
_LEAST_DEVIATION = 0.1  # of the noise, relative to the mean one


class Fields(NamedTuple):
    """Fluctuations of fields (fields, T, H, W) around their temporal means, in deviations of the noise.

    Attributes
    ----------
    denoised, noisy : Tensor
        Of the denoised and of the recorded frames.
    noise : Tensor
        Drawn like that of the recorded ones.
    cut : function
        From an image (H, W) of the recording to the fields' parts of it, (fields, H, W).
    """

    denoised: Tensor
    noisy: Tensor
    noise: Tensor
    cut: Callable[[Tensor], Tensor]


def change_fields(
    denoised: Tensor,
    noisy: Tensor,
    noise: Tensor,
    deviation: Tensor,
    change: Callable[[Fields], Tensor],
) -> Tensor:
    """Change denoised frames field by field.

    Parameters
    ----------
    denoised, noisy : Tensor
        Frames (T, H, W) of the same intensities, up to an image that all frames share; at least two.
    noise : Tensor
        Drawn like that of the noisy frames, (T, H, W).
    deviation : Tensor
        Of the noise, (H, W).
    change : function
        From some fields to what is to be added to each, (fields, T, H, W) in deviations of the noise.

    Returns
    -------
    Tensor
        Frames (T, H, W).
    """
    height, width = deviation.shape
    rows, columns = min(SIDE, height), min(SIDE, width)
    deviation = least_deviation(deviation)
    hann = torch.from_numpy(np.outer(hann_weights(rows), hann_weights(columns))).to(denoised)
    total, weight = torch.zeros_like(denoised), torch.zeros_like(deviation)
    corners = itertools.product(window_starts(height, rows, _OVERLAP), window_starts(width, columns, _OVERLAP))
    places = [(..., slice(top, top + rows), slice(left, left + columns)) for top, left in corners]
    together = max(1, _VOXELS // (len(denoised) * rows * columns))
    for first in range(0, len(places), together):
        some = places[first : first + together]

        def cut(x: Tensor, some: list = some) -> Tensor:
            return torch.stack([x[place] for place in some])

        scale = cut(deviation)[:, None]
        clear, recorded, drawn = ((x - x.mean(1, keepdim=True)) / scale for x in map(cut, (denoised, noisy, noise)))
        changes = change(Fields(clear, recorded, drawn, cut)) * (hann * scale)
        for place, of_field in zip(some, changes, strict=True):
            total[place] += of_field
            weight[place] += hann
    total /= weight
    total += denoised
    return total


def least_deviation(deviation: Tensor) -> Tensor:
    """Deviations (H, W), none much below the mean one: pixels that say they have no noise would outweigh all others."""
    return deviation.clamp(min=_LEAST_DEVIATION * float(deviation.mean()) + 1e-30)


def trust(excess: Tensor) -> Tensor:
    """How far a network is followed where there is this much noise, relative to what is expected: from 1 to 0.

    Light that flickers and a field that jitters are not in the noise of single pixels, and look like activity that
    every frame has of its own.
    """
    trusted, refused = 1.5, 3.0
    return ((refused - excess) / (refused - trusted)).clamp(0, 1)


def misfit(noisy: Tensor, denoised: Tensor, better: Tensor) -> Tensor:
    """How far a network's output is from what was recorded, relative to noise or to what was there before: (..., n).

    All (..., n, values), in deviations of the noise. A network takes away more than noise where it has not seen the
    like: the light of a stimulus is a hundred times as strong as any activity.
    """
    before, after = ((noisy - x).square().mean(-1) for x in (denoised, better))
    return after / before.clamp(min=1)
