"""The filters that Restormer3D weighs voxel by voxel: what may be added to the temporal mean, and what each one shows.

Fluorescence that changes, changes in proportion to what is there: a cell, or neuropil, brightens as a whole. The
fluctuations around the temporal mean are therefore averaged in the plane in two ways: as they are, and relative to the
temporal mean, which keeps the edges of the static image sharp. All filters are linear in the fluctuations.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_NOISE_SIGMA = 2.0  # pixels over which the noise variance of a window, and how lively its pixels are, is averaged
_DETAIL_SIGMAS = (0.45, 0.8, 1.6, 3.2)  # pixels: scales into which the static image is taken apart
_BRIGHTNESS_KNOTS = (-2.0, -1.0, -0.25, 0.5, 1.25, 2.25)  # logarithm of a pixel's light over its noise
_ACTIVITY_KNOTS = (0.1, 0.6, 1.8)  # logarithm of the energy of slow fluctuations over that of noise
_EPS = 1e-6
_KEPT_LENGTH = 512  # of an axis, up to which matrices of filters are kept: a megabyte each
_LEAST_WEIGHT = 1e-12  # of a neighbor, relative to the middle
_STRIP_VOXELS = 2**16  # of the rows of pixels that are looked at together

KINDS = len(_BRIGHTNESS_KNOTS) * len(_ACTIVITY_KNOTS)
"""Kinds of pixels that a fixed mixture of filters tells apart."""
NEIGHBORING_KINDS = tuple(
    (a, b)
    for a, b in combinations_with_replacement(range(KINDS), 2)
    if max(abs(i - j) for i, j in zip(*(divmod(kind, len(_ACTIVITY_KNOTS)) for kind in (a, b)), strict=True)) <= 1
)
"""Pairs of kinds (a, b), a <= b, that a pixel may belong to at once."""
DETAILS = len(_DETAIL_SIGMAS)
"""Details that the static image is taken apart into."""


class FilterBank(NamedTuple):
    """Filters applied to a window; what is large is put together for a few rows of pixels at a time.

    Attributes
    ----------
    base : Tensor
        The static image, its details shrunk by their reliability, (B, 1, 1, H, W).
    fluctuation : Tensor
        The window around the temporal mean, by pixel, (B, H, W, 1, T); T in the order of :func:`filter_bank`.
    averages : Tensor
        The same, averaged over time by each width, (B, H, W, averages, T).
    over_rows : Tensor
        Averages smoothed over rows, by each of `widths`, (B, widths, H, W, averages * T).
    still : Tensor
        What may be added to all frames alike: details of the static image, (B, M, 1, H, W).
    still_evidence : Tensor
        The static image: details in units of their noise, contrast, and brightness over noise, (B, S, 1, H, W).
    kinds : Tensor
        How far a pixel belongs to each kind, bright or dark, among lively neighbors or not, (B, KINDS, H, W); sums
        to 1. A pixel's own fluctuations have no part in it: else noise would choose the weights of noise.
    gains : Tensor
        What the relative filters multiply averages by, (B, sigmas_relative, H, W): light over its own average.
    deviation : Tensor
        Of the noise, (B, H, W, 1, 1).
    kept_noise : Tensor
        Share of the noise's deviation that each average keeps, (averages, T).
    widths, sigmas_xy, sigmas_relative : tuple of float
        Of the spatial averages: all, those as they are, those relative to the static image; pixels.
    """

    base: Tensor
    fluctuation: Tensor
    averages: Tensor
    over_rows: Tensor
    still: Tensor
    still_evidence: Tensor
    kinds: Tensor
    gains: Tensor
    deviation: Tensor
    kept_noise: Tensor
    widths: tuple[float, ...]
    sigmas_xy: tuple[float, ...]
    sigmas_relative: tuple[float, ...]

    def strips(self, step: int) -> list[slice]:
        """Rows of pixels to look at together, a multiple of `step`: on a CPU few, so that they stay in its cache."""
        b, h, w, _, t = self.fluctuation.shape
        together = h if self.fluctuation.is_cuda else max(step, _STRIP_VOXELS // (b * w * t) // step * step)
        return [slice(first, min(first + together, h)) for first in range(0, h, together)]

    def moving(self, rows: slice) -> Tensor:
        """What may be added frame by frame to pixels of some rows, (B, rows, W, N, T)."""
        smooth = {sigma: self._smooth(sigma, rows) for sigma in self.widths}
        gains = self._gains(rows).unsqueeze(4)
        relative = [gains[:, :, :, i] * smooth[sigma] for i, sigma in enumerate(self.sigmas_relative)]
        return torch.cat([self.fluctuation[:, rows], *(smooth[sigma] for sigma in self.sigmas_xy), *relative], 3)

    def mixed(self, rows: slice, weights: Tensor) -> Tensor:
        """Sum :meth:`moving` with weights of each pixel (B, rows, W, M, N): (B, rows, W, M, T).

        Averages that are taken as they are and relative to the static image differ by a pixel's factor only.
        """
        count = len(self.kept_noise)
        own, plain, relative = weights.split([1, count * len(self.sigmas_xy), count * len(self.sigmas_relative)], 4)
        relative = relative.unflatten(4, (len(self.sigmas_relative), count)) * self._gains(rows).unsqueeze(3)
        of_width = dict(zip(self.sigmas_xy, plain.split(count, 4), strict=True))
        for sigma, added in zip(self.sigmas_relative, relative.unbind(4), strict=True):
            of_width[sigma] = of_width[sigma] + added if sigma in of_width else added
        averages = [self._smooth(sigma, rows) for sigma in self.widths]
        together = torch.cat([own, *(of_width[sigma] for sigma in self.widths)], 4)
        return together @ torch.cat([self.fluctuation[:, rows], *averages], 3)

    def _gains(self, rows: slice) -> Tensor:
        """Gains of some rows by pixel, (B, rows, W, sigmas_relative, 1)."""
        return self.gains[:, :, rows].permute(0, 2, 3, 1).unsqueeze(4)

    def evidence(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Fluctuations in units of their noise: at full resolution, and smoothed in the plane.

        (B, rows, W, 1 + averages, T) and (B, rows, W, L, T).
        """
        per_noise = 1 / self.deviation[:, rows]
        fine = torch.cat([self.fluctuation[:, rows], self.averages[:, rows] / self.kept_noise], 3) * per_noise
        h, w = self.fluctuation.shape[1:3]
        broad = [
            self._smooth(sigma, rows) * (per_noise / _plane_norm(h, w, sigma, per_noise)[rows, :, None, None])
            for sigma in self.sigmas_xy
            if sigma > 1
        ]
        together = torch.cat(broad, 3).unflatten(3, (len(broad), -1)) / self.kept_noise
        return _asinh(fine), _asinh(together.flatten(3, 4))

    def _smooth(self, sigma: float, rows: slice) -> Tensor:
        """Averages smoothed in the plane, (B, rows, W, averages, T)."""
        smooth = self.over_rows[:, self.widths.index(sigma), rows]
        across = gaussian_matrix(smooth.shape[2], sigma, smooth)
        return torch.matmul(across, smooth).unflatten(3, self.averages.shape[3:])


def filter_bank(
    x: Tensor,
    background: Tensor,
    sigmas_t: tuple[float, ...],
    sigmas_xy: tuple[float, ...],
    sigmas_relative: tuple[float, ...],
    order: Tensor | None = None,
) -> FilterBank:
    """Apply all filters to windows.

    Parameters
    ----------
    x : Tensor
        Noisy windows, (B, 1, T, H, W), normalized.
    background : Tensor
        What is known of the whole stack at these pixels, (B, 3, 1, H, W), normalized: the temporal mean, the share of
        one frame in it (one over the number of frames), and the intensity without light.
    sigmas_t : tuple of float
        Widths of the temporal averages, frames.
    sigmas_xy : tuple of float
        Widths of the spatial averages, pixels.
    sigmas_relative : tuple of float
        Widths of the spatial averages relative to the static image, pixels.
    order : Tensor, optional
        Frames in the order in which what filters give of them is wanted, some of them twice if need be.
    """
    b, _, frames, h, w = x.shape
    mean, share, zero = background.split(1, dim=1)
    noise = noise_variance(x)
    base, details, detail_noise = shrunk_details(mean, noise * share)
    averaging = [gaussian_matrix(frames, sigma, x) for sigma in sigmas_t]
    fluctuation = (x - mean)[:, 0].permute(0, 2, 3, 1).contiguous()  # (B, H, W, T)
    temporal = torch.cat(averaging if order is None else [matrix[order] for matrix in averaging])  # (averages * T, T)
    averages = fluctuation @ temporal.T
    widths = tuple(dict.fromkeys((*sigmas_xy, *sigmas_relative)))
    down = torch.cat([gaussian_matrix(h, sigma, x) for sigma in widths])  # (widths * H, H)
    over_rows = torch.matmul(down, averages.flatten(2)).view(b, len(widths), h, w, -1)
    averages = averages.view(b, h, w, len(sigmas_t), -1)
    light = base - zero
    light = light.clamp(min=0).add(0.02 * light.abs().mean((2, 3, 4), keepdim=True) + _EPS)
    image = light[:, :, 0]
    gains = torch.cat([image[:, :0], *(image / smooth_plane(image, sigma) for sigma in sigmas_relative)], 1)
    deviation = noise.sqrt()
    kept_noise = temporal.square().sum(1).sqrt().view(len(sigmas_t), -1)
    middle = len(sigmas_t) // 2
    lively = (averages[:, :, :, middle] / kept_noise[middle]).square()
    # Every frame counts once, also where it is there twice.
    times = lively.new_full((frames,), frames) if order is None else (order[:, None] == order).sum(1) * frames
    lively = (lively @ (1 / times.to(x.dtype)))[:, None, None] / noise
    brightness = torch.log(light / deviation)
    contrast = light / smooth_plane(light, 4.0) - 1
    count = -0.5 * torch.log(share)
    still_evidence = torch.cat([torch.asinh(details / detail_noise), contrast, brightness, count], 1)
    return FilterBank(
        base,
        (fluctuation if order is None else fluctuation[..., order]).unsqueeze(3),
        averages,
        over_rows,
        details,
        still_evidence,
        _kinds(brightness, _activity(lively)),
        gains,
        _by_pixel(deviation),
        kept_noise,
        widths,
        sigmas_xy,
        sigmas_relative,
    )


def own_noise(
    bank: FilterBank,
    share: Tensor,
    sigmas_t: tuple[float, ...],
    sigmas_xy: tuple[float, ...],
    sigmas_relative: tuple[float, ...],
    correlation: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]],
) -> Tensor:
    """Covariance of every filter's value at a voxel with the noise of that voxel, in units of its variance.

    Parameters
    ----------
    bank : FilterBank
        From :func:`filter_bank`, of the same filters.
    share : Tensor
        Share of one frame in the temporal mean, (B, 1, 1, 1, 1).
    sigmas_t, sigmas_xy, sigmas_relative : tuple of float
        Widths of the filters.
    correlation : tuple of tuple of float
        Correlation of the noise with that of neighbors along frames, rows and columns, from lag 0 (which is 1) on.

    Returns
    -------
    Tensor
        Means over frames, moving filters first, then still ones, (B, N + M, H, W).
    """
    b, h, w, _, t = bank.fluctuation.shape
    over_time, over_rows, over_columns = correlation
    in_mean = share.view(b, 1, 1, 1) * (2 * sum(over_time) - 1)
    averages = torch.stack([_own(t, sigma, over_time, share).mean() for sigma in sigmas_t]).view(1, -1, 1, 1) - in_mean

    def plane(sigma: float) -> Tensor:
        return torch.outer(_own(h, sigma, over_rows, share), _own(w, sigma, over_columns, share))

    spatial = [averages * plane(sigma) for sigma in sigmas_xy]
    relative = [averages * plane(sigma) * bank.gains[:, i, None] for i, sigma in enumerate(sigmas_relative)]
    smooth = [share.new_ones(h, w), *(plane(sigma) for sigma in _DETAIL_SIGMAS)]
    still = torch.stack([fine - coarse for fine, coarse in pairwise(smooth)]) * in_mean
    return torch.cat([(1 - in_mean).expand(b, 1, h, w), *spatial, *relative, still], 1)


def _own(length: int, sigma: float, correlation: tuple[float, ...], like: Tensor) -> Tensor:
    """Covariance of Gaussian averages with their middles, (length,), for correlated noise of variance 1."""
    lags = torch.zeros(max(length, len(correlation)), device=like.device, dtype=like.dtype)
    lags[: len(correlation)] = torch.tensor(correlation, device=like.device, dtype=like.dtype)
    position = torch.arange(length, device=like.device)
    return (gaussian_matrix(length, sigma, like) * lags[(position[:, None] - position).abs()]).sum(1)


def noise_variance(x: Tensor) -> Tensor:
    """Noise variance per pixel of windows (B, 1, T, H, W) from differences of frames, as (B, 1, 1, H, W).

    Averaged over neighbors, but for those that never change: a border of zeros says nothing of the noise beside it.
    """
    if x.shape[2] < 2:
        return torch.ones_like(x)
    squares = pixel_variance(x)
    changes = smooth_plane((squares > 0).to(x.dtype), _NOISE_SIGMA)
    return smooth_plane(squares, _NOISE_SIGMA) / changes.clamp(min=_EPS) + _EPS


def pixel_variance(x: Tensor) -> Tensor:
    """Noise variance of each pixel alone of windows (B, 1, T, H, W), T at least 2, as (B, 1, 1, H, W)."""
    return (x[:, :, 1:] - x[:, :, :-1]).square().mean(2, keepdim=True) / 2


def _asinh(x: Tensor) -> Tensor:
    """`torch.asinh` to 3e-7, several times faster on a CPU, where that is not vectorized."""
    return torch.log(torch.sqrt(1 + x * x) + x.abs()).copysign(x)


def _by_pixel(x: Tensor) -> Tensor:
    """(B, C, T, H, W) as (B, H, W, C, T)."""
    return x.permute(0, 3, 4, 1, 2)


def _activity(energy: Tensor) -> Tensor:
    """Logarithm of the energy of the neighbors' fluctuations, in units of noise, (B, 1, 1, H, W)."""
    return torch.log(_smooth_around(energy, _NOISE_SIGMA).clamp(min=1.0))


def _kinds(brightness: Tensor, activity: Tensor) -> Tensor:
    """Bilinear weights of each pixel on the grid of knots, (B, KINDS, H, W)."""
    along = _hats(brightness[:, 0, 0], _BRIGHTNESS_KNOTS), _hats(activity[:, 0, 0], _ACTIVITY_KNOTS)
    return (along[0].unsqueeze(2) * along[1].unsqueeze(1)).flatten(1, 2)


def _hats(x: Tensor, knots: tuple[float, ...]) -> Tensor:
    """Linear interpolation weights of x (B, H, W) between knots, constant beyond the ends; (B, len(knots), H, W)."""
    at = _constants(knots, x.device, x.dtype).view(1, -1, 1, 1)
    x = x.clamp(knots[0], knots[-1]).unsqueeze(1)
    rising = (x - at[:, :-1]) / (at[:, 1:] - at[:, :-1])
    up = F.pad(rising, (0, 0, 0, 0, 1, 0), value=1.0)
    down = F.pad(1 - rising, (0, 0, 0, 0, 0, 1), value=1.0)
    return torch.minimum(up, down).clamp(min=0)


def shrunk_details(mean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take an image apart into details of several scales, and put it together with the unreliable ones shrunk.

    Parameters
    ----------
    mean, noise : Tensor
        Image and its noise variance, (B, 1, 1, H, W).

    Returns
    -------
    image, details, deviation : Tensor
        The image with each detail multiplied by the share of its local energy that is not noise (a local Wiener
        filter); the details (B, scales, 1, H, W); the standard deviation of their noise, of the same shape.
    """
    smooth = [mean, *(smooth_plane(mean, sigma) for sigma in _DETAIL_SIGMAS)]
    details = torch.cat([fine - coarse for fine, coarse in pairwise(smooth)], 1)
    expected = noise * _constants(_detail_noise(), mean.device, mean.dtype).view(1, -1, 1, 1, 1)
    energy = torch.cat(
        [smooth_plane(details[:, k : k + 1].square(), 2 * sigma) for k, sigma in enumerate(_DETAIL_SIGMAS)], 1
    )
    reliable = ((energy - expected) / (energy + 1e-12)).clamp(min=0)
    image = smooth[-1] + (reliable * details).sum(1, keepdim=True)
    return image, details, expected.sqrt()


def gaussian_matrix(length: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian filter along an axis of `length` as a matrix (length, length) whose rows sum to one.

    At the ends the kernel is cut and renormalized. On a CPU, which would spend more time on them than on products with
    them, small matrices are kept: do not change one.
    """
    is_kept = like.device.type == "cpu" and length <= _KEPT_LENGTH
    return (_kept_matrix if is_kept else _matrix)(length, sigma, like.device, like.dtype)


def _matrix(length: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    kernel = _kernel(length, sigma, device, dtype)
    return kernel / kernel.sum(1, keepdim=True)


_kept_matrix = lru_cache(maxsize=64)(torch.inference_mode(False)(_matrix))  # training uses what inference has made


def _kernel(length: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    position = torch.arange(length, device=device, dtype=dtype)
    kernel = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    # Numbers too small to be normal would make a CPU's products many times slower, and add nothing to them.
    return torch.where(kernel < _LEAST_WEIGHT, 0.0, kernel)


def smooth_plane(images: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of images (..., H, W) in the plane, as :func:`gaussian_matrix` at the ends."""
    h, w = images.shape[-2:]
    return gaussian_matrix(h, sigma, images) @ images @ gaussian_matrix(w, sigma, images).T


def _smooth_around(images: Tensor, sigma: float) -> Tensor:
    """Average around every pixel, itself and the eight that touch it left out."""
    h, w = images.shape[-2:]
    full = [_kernel(size, sigma, images.device, images.dtype) for size in (h, w)]
    near = [kernel.triu(-1).tril(1) for kernel in full]

    def around(x: Tensor) -> Tensor:
        return full[0] @ x @ full[1] - near[0] @ x @ near[1]

    # A plane of three pixels has nothing else.
    return around(images) / around(torch.ones_like(images)).clamp(min=_EPS)


def _plane_norm(h: int, w: int, sigma: float, like: Tensor) -> Tensor:
    """Factor by which smoothing in the plane reduces the deviation of white noise, (h, w)."""
    rows, columns = (gaussian_matrix(size, sigma, like).square().sum(1).sqrt() for size in (h, w))
    return torch.outer(rows, columns)


@lru_cache
@torch.inference_mode(False)  # else training could not use what inference has made
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Put numbers on a device, once: while a CUDA graph is recorded nothing can be copied there."""
    return torch.tensor(values, device=device, dtype=dtype)


@lru_cache(maxsize=1)
def _detail_noise() -> tuple[float, ...]:
    """Variance that white noise of variance 1 has in each scale of details."""
    size = 65
    impulse = torch.zeros(1, 1, 1, size, size, dtype=torch.float64)
    impulse[..., size // 2, size // 2] = 1
    smooth = [impulse, *(smooth_plane(impulse, sigma) for sigma in _DETAIL_SIGMAS)]
    return tuple(float((a - b).square().sum()) for a, b in pairwise(smooth))
