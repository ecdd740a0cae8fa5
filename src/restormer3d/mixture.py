"""The mixture of filters that a mixing network starts from: learned from many scenes, then fitted to one stack.

One weight for every filter and kind of pixel: linear in the filters, so the best weights solve one set of equations,
without a learning rate. From pairs of noisy recordings of simulated scenes come the usual weights and the modes in
which scenes differ from them; to a stack, a few numbers are fitted, how far it goes along each mode.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restormer3d.arithmetic import float64_device
from restormer3d.filters import KINDS, NEIGHBORING_KINDS, filter_bank, noise_variance, own_noise, pixel_variance
from restormer3d.model import Restormer3D
from restormer3d.patches import TrainingStack
from restormer3d.tiling import window_starts

_OVERLAP = 0.25  # of the windows that are looked at
_ROUNDS = 10  # of the expectation-maximization
_FIRST_SPREAD = 0.15  # standard deviation of a weight over scenes, before any is seen
_RIDGE = 1e-5
_LEAST_CHANGE = 0.05  # of noise from frame to frame, relative to noise without a memory
_OWN_PENALTY = 100.0  # on weight for a voxel itself: no sum over noise is known well enough to trust it freely


@dataclass(frozen=True)
class _Sums:
    """Sums over voxels, in units of their noise; P counts filters x kinds of pixels.

    Attributes
    ----------
    products : Tensor
        Of filters with filters, (P, P).
    targets : Tensor
        Of filters with what they should add up to, (P,).
    own : Tensor
        Of products of what the filters have of the voxel itself, (P, P).
    windows : int
        That were looked at.
    """

    products: Tensor
    targets: Tensor
    own: Tensor
    windows: int

    def __add__(self, other: _Sums) -> _Sums:
        sums = (self.products + other.products, self.targets + other.targets, self.own + other.own)
        return _Sums(*sums, self.windows + other.windows)

    def times(self, factor: float) -> _Sums:
        return _Sums(self.products * factor, self.targets * factor, self.own * factor, self.windows)


@torch.no_grad()
def fit_mixture(model: Restormer3D, pairs: Iterable[TrainingStack], window: tuple[int, int, int]) -> None:
    """Set the usual mixture of a model, and the modes in which scenes differ from it, in place.

    Every scene is taken to have weights of its own, drawn from one normal distribution, whose mean and covariance are
    found by expectation-maximization.

    Parameters
    ----------
    model : Restormer3D
        With `start="filters"`.
    pairs : iterable of TrainingStack
        Recordings with a second one of the same scene, whose noise is independent.
    window : tuple of int
        Frames, rows and columns of the windows that the network will see.

    Raises
    ------
    ValueError
        If there are no pairs, or some have no second recording.

    References
    ----------
    Dempster, Laird, Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", J. R. Stat. Soc. B 1977.
    """
    scenes: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        if pair.second is None:
            raise ValueError("a mixture is fitted to pairs of recordings: a scene has no second recording")
        sums = _stack_sums(model, pair, window, pair.second)
        scenes.append((sums.products.float(), sums.targets))  # half of the memory: there are hundreds
    if not scenes:
        raise ValueError("a mixture is fitted to pairs of recordings, and there are none")
    mean, covariance = _expectation_maximization(scenes)
    usual, modes = model.filter_weights, model.mixture_modes
    usual.copy_(mean.view_as(usual))
    importance = sum((products.double() for products, _ in scenes), torch.zeros_like(covariance)) / len(scenes)
    modes.copy_(_main_modes(covariance, importance, modes.shape[0]).view_as(modes))


@torch.no_grad()
def adapted_mixture(
    model: Restormer3D,
    source: TrainingStack,
    window: tuple[int, int, int],
    *,
    most_windows: int = 64,
    seconds: float = math.inf,
) -> tuple[Tensor, dict[str, float]]:
    """Fit a model's mixture to a noisy stack by Stein's unbiased estimate of the risk.

    The squared distance to the truth is that to the noisy stack, but for the noise that a filter shares with the voxel
    that it estimates. That share follows from the filter, and the noise's variance from differences of frames. The
    network itself has no part in it: it is trained on top of fitted mixtures.

    Parameters
    ----------
    model : Restormer3D
        With `start="filters"` and modes from :func:`fit_mixture`.
    source : TrainingStack
        The stack, at least two frames.
    window : tuple of int
        Frames, rows and columns of the windows that the network will see.
    most_windows : int
        Windows to look at, spread over the stack at random; more say little that is new.
    seconds : float
        After these no further window is looked at; one is at least.

    Returns
    -------
    Tensor
        Weights (filters, KINDS), to take the place of the model's `filter_weights`.
    dict
        `windows` looked at, and `distance`: how far the stack is from the usual, the root mean square over modes in
        units of the scenes' spread.

    References
    ----------
    Stein, "Estimation of the Mean of a Multivariate Normal Distribution", Annals of Statistics 1981.
    """
    directions, weights = model.mixture_modes.flatten(1).cpu().double(), model.filter_weights.cpu().double()
    sums = _stack_sums(model, source, window, source.stack, most_windows, seconds)
    system = directions @ (sums.products + _OWN_PENALTY * sums.own) @ directions.T
    system += torch.eye(len(directions), dtype=torch.float64)  # as likely as among scenes
    missing = sums.targets - sums.products @ weights.flatten()
    along = torch.linalg.solve(system, directions @ missing)
    fitted = weights + (along @ directions).view_as(weights)
    return fitted.to(model.filter_weights), {"windows": sums.windows, "distance": float(along.square().mean().sqrt())}


def _stack_sums(
    model: Restormer3D,
    source: TrainingStack,
    window: tuple[int, int, int],
    target: Any,
    most_windows: int = sys.maxsize,
    seconds: float = math.inf,
) -> _Sums:
    """Sums over a stack, from windows at random places; each counts for as much of the stack as was left out."""
    started = time.monotonic()
    shape = source.stack.shape
    size = [min(pair) for pair in zip(window, shape, strict=True)]
    starts = [window_starts(full, part, _OVERLAP) for full, part in zip(shape, size, strict=True)]
    total = None
    for place in np.random.default_rng(0).permutation(list(product(*starts)))[:most_windows]:
        at = [slice(start, start + length) for start, length in zip(place.tolist(), size, strict=True)]
        sums = _window_sums(model, source, at, target)
        total = sums if total is None else total + sums
        if time.monotonic() - started > seconds:
            break
    assert total is not None
    # Where neighbors share their noise, voxels say less than their number.
    alike = math.prod(2 * sum(lags) - 1 for lags in source.noise_correlation)
    return total.times(math.prod(shape) / (total.windows * math.prod(size) * max(1.0, alike)))


def _window_sums(model: Restormer3D, source: TrainingStack, place: list[slice], target: Any) -> _Sums:
    """Sums over a window: a filter's product with its target, the stack itself or a second recording of the scene.

    What the stack itself shares with the filters by noise alone is taken off.
    """
    t, y, x = place
    config = model.config
    widths = config.sigmas_t, config.sigmas_xy, config.sigmas_relative

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(model.filter_weights.device)

    noisy, wanted = (tensor(source.normalization.apply(each[t, y, x]))[None, None] for each in (source.stack, target))
    background = tensor(source.background[:, y, x])[None, :, None]
    frames = noisy.shape[2]
    bank = filter_bank(noisy, background, *widths)
    variance = pixel_variance(noisy)[0, 0, 0]  # (H, W)
    weight = (variance > 0) / noise_variance(noisy)[0, 0, 0]  # a border of zeros has nothing to say
    variance /= max(1 - sum(source.noise_correlation[0][1:2]), _LEAST_CHANGE)
    share = own_noise(bank, background[:, 1:2, :, :1, :1], *widths, source.noise_correlation)[0].permute(1, 2, 0)
    own = share * (frames * variance * weight).sqrt().unsqueeze(2)  # (H, W, N)
    by_noise = frames * share * variance.unsqueeze(2) if target is source.stack else torch.zeros_like(share)
    missing = (wanted - bank.base)[0, 0].permute(1, 2, 0).unsqueeze(3)  # (H, W, T, 1)
    kinds, still = (values.permute(1, 2, 0) for values in (bank.kinds[0], bank.still[0, :, 0]))
    products = targets = of_own = _float64(kinds.new_zeros(()))
    for rows in bank.strips(1):
        filters = torch.cat([bank.moving(rows)[0], still[rows].unsqueeze(3).expand(-1, -1, -1, frames)], 2)
        shared = ((filters @ missing[rows]).squeeze(3) - by_noise[rows]) * weight[rows].unsqueeze(2)
        of_kind = _float64(kinds[rows].flatten(0, 1))  # (pixels, K)
        at = _float64(weight[rows].flatten())
        products = _by_pair(filters.flatten(0, 1), of_kind, at) + products
        targets = (_float64(shared.flatten(0, 1).T) @ of_kind).flatten() + targets
        of_own = _by_pair(own[rows].flatten(0, 1).unsqueeze(2), of_kind, torch.ones_like(at)) + of_own
    return _Sums(_of_all_pairs(products.cpu()), targets.cpu(), _of_all_pairs(of_own.cpu()), 1)


def _by_pair(values: Tensor, kinds: Tensor, weight: Tensor) -> Tensor:
    """Sum products of values (pixels, N, T) over frames and, times both of a pair of kinds, over pixels: (pairs, N N).

    Other pairs of kinds have no pixel.
    """
    products = _float64((values @ values.transpose(1, 2)).flatten(1))
    first, second = torch.tensor(NEIGHBORING_KINDS, device=kinds.device).T
    return (kinds[:, first] * kinds[:, second] * weight.unsqueeze(1)).T @ products


def _of_all_pairs(sums: Tensor) -> Tensor:
    """From (pairs, N N) to (N K, N K)."""
    count = math.isqrt(sums.shape[1])
    first, second = torch.tensor(NEIGHBORING_KINDS, device=sums.device).T
    together = sums.new_zeros(KINDS, KINDS, count, count)
    together[first, second] = together[second, first] = sums.unflatten(1, (count, count))
    return together.permute(2, 0, 3, 1).reshape(count * KINDS, -1)


def _float64(values: Tensor) -> Tensor:
    """In double precision, on the device that they are on if it has that."""
    return values.to(float64_device(values.device)).double()


def _expectation_maximization(scenes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and covariance over scenes of weights (P,), each scene's known by its products and targets only."""
    products = sum((each.double() for each, _ in scenes), torch.zeros(1, dtype=torch.float64))
    size = products.diagonal()
    ridge = _RIDGE * torch.diag(size + 1e-3 * size.mean())
    mean = torch.linalg.solve(products + ridge, torch.stack([targets for _, targets in scenes]).sum(0))
    covariance = _FIRST_SPREAD**2 * torch.eye(len(mean), dtype=torch.float64)
    for _ in range(_ROUNDS):
        precision = torch.linalg.inv(covariance)
        found, spread = [], torch.zeros_like(covariance)
        for each, targets in scenes:
            posterior = torch.cholesky_inverse(torch.linalg.cholesky(each.double() + precision))
            found.append(posterior @ (targets + precision @ mean))
            spread += posterior
        weights = torch.stack(found)
        mean = weights.mean(0)
        covariance = (spread + (weights - mean).T @ (weights - mean)) / len(scenes)
    return mean, covariance


def _main_modes(covariance: Tensor, importance: Tensor, count: int) -> Tensor:
    """Directions (count, P), one standard deviation long, in which the filters' sum differs most between scenes.

    `importance` (P, P) says how much a difference of weights changes the sum.
    """
    values, vectors = torch.linalg.eigh(importance + _RIDGE * importance.diagonal().mean() * torch.eye(len(importance)))
    root = (vectors * values.sqrt()) @ vectors.T
    back = (vectors / values.sqrt()) @ vectors.T
    spread, directions = torch.linalg.eigh(root @ covariance @ root)
    return ((directions * spread.clamp(min=0).sqrt()).T @ back).flip(0)[:count]
