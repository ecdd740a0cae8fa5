"""Principal components by powers are those of the whole decomposition."""

from __future__ import annotations

import numpy as np
import torch

from restormer3d.activity.principal import leading_components


def test_leading_components_are_those_of_the_whole_decomposition():
    rng = np.random.default_rng(6)
    sizes = 0.8 ** np.arange(60) + 0.01  # signal above a floor of noise
    blocks = rng.normal(size=(3, 80, 60)) * sizes @ np.linalg.qr(rng.normal(size=(60, 60)))[0]
    energy, found = leading_components(torch.from_numpy(blocks.astype(np.float32)), 32)
    for block, own, vectors in zip(blocks, energy.numpy(), found.numpy(), strict=True):
        values, expected = np.linalg.eigh(block.T @ block)
        np.testing.assert_allclose(own[-17:-1], values[-16:], rtol=1e-3)
        np.testing.assert_allclose(own.sum(), values.sum(), rtol=1e-5)
        np.testing.assert_allclose(np.abs((expected[:, -8:] * vectors[:, -8:]).sum(0)), 1, atol=1e-3)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-5)
