"""Leading principal components of many blocks at once, by powers of their covariance."""

from __future__ import annotations

import torch
from torch import Tensor

_POWERS = 6  # passes to find them
_SEED = 0


def leading_components(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Largest principal components of blocks (blocks, T, pixels), over pixels.

    The powers find the large ones first; where the small ones mix it does not matter.

    Parameters
    ----------
    x : Tensor
        Fluctuations around the temporal mean, (blocks, T, pixels) float32.
    most : int
        Components at most.

    Returns
    -------
    tuple of Tensor
        Energies (blocks, components + 1) float64, increasing; the last one is what is left beyond the components. And
        the components, orthonormal, (blocks, pixels, components).
    """
    count = min(most, x.shape[2], x.shape[1] - 1)
    start = torch.randn(x.shape[2], count, generator=torch.Generator().manual_seed(_SEED))
    components = start.to(x).expand(len(x), -1, -1)
    for _ in range(_POWERS):
        components = _orthonormal(x.mT @ (x @ components))
    courses = x @ components
    energy, turned = torch.linalg.eigh(courses.mT.double() @ courses.double())
    whole = x.square().sum((1, 2), dtype=torch.float64).unsqueeze(1)
    return torch.cat([energy, whole - energy.sum(1, keepdim=True)], 1), components @ turned.float()


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of x (blocks, pixels, columns); those that span nothing become small."""
    x = x.double()
    gram = x.mT @ x
    diagonal = gram.diagonal(dim1=1, dim2=2)  # a view
    diagonal += 1e-12 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x.mT, upper=False).mT.float()
