"""The fixed mixture of filters that a mixing network starts from, fitted by least squares to pairs of noisy recordings.

One weight for every filter and kind of pixel: linear in the filters, so the best weights solve one set of equations,
in minutes and without a learning rate. The network then only has to learn what is different from place to place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from restormer3d.filters import filter_bank, noise_variance
from restormer3d.model import Restormer3D
from restormer3d.patches import Patches

_EVERY = 8  # frames between those that count: neighbors say almost the same
_RIDGE = 1e-5


@torch.no_grad()
def fit_mixture(model: Restormer3D, pairs: Iterable[Patches]) -> None:
    """Set the fixed mixture of a model to what predicts second recordings best, in place.

    Parameters
    ----------
    model : Restormer3D
        With `start="filters"`.
    pairs : iterable of Patches
        Batches with second recordings.

    Raises
    ------
    ValueError
        If there are no pairs, or some have no second recording.
    """
    products, targets = torch.zeros(0), torch.zeros(0)
    for batch in pairs:
        if not batch.second.numel():
            raise ValueError("a mixture is fitted to pairs of recordings: a batch has no second recording")
        for design, wanted in _equations(model, batch):
            if not products.numel():
                products = torch.zeros(design.shape[1], design.shape[1], dtype=torch.float64)
                targets = torch.zeros(design.shape[1], dtype=torch.float64)
            products += (design.T @ design).double()
            targets += (design.T @ wanted).double()
    if not products.numel():
        raise ValueError("a mixture is fitted to pairs of recordings, and there are none")
    size = products.diagonal()
    ridge = _RIDGE * torch.diag(size + 1e-3 * size.mean())
    weights = model.filter_weights
    assert isinstance(weights, Tensor)
    weights.copy_(torch.linalg.solve(products + ridge, targets).view_as(weights))


def _equations(model: Restormer3D, batch: Patches) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield design matrix (voxels, filters x kinds) and right-hand side (voxels,) of every patch."""
    config = model.config
    bank = filter_bank(batch.noisy, batch.background, config.sigmas_t, config.sigmas_xy, config.sigmas_relative)
    per_noise = noise_variance(batch.noisy).rsqrt()
    moving = bank.moving[:, :, ::_EVERY] * per_noise
    still = (bank.still * per_noise).expand(-1, -1, moving.shape[2], -1, -1)
    wanted = ((batch.second - bank.base) * per_noise)[:, 0, ::_EVERY]
    for filters, kinds, right in zip(torch.cat([moving, still], 1), bank.kinds, wanted, strict=True):
        yield torch.einsum("nthw,khw->thwnk", filters, kinds).flatten(0, 2).flatten(1), right.flatten()
