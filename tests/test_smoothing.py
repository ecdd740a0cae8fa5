"""Courses smoothed band by band are those that the whole matrix smooths."""

from __future__ import annotations

import pytest
import torch

from restormer3d.activity.smoothing import own_weights, smoothed
from restormer3d.filters import gaussian_matrix


@pytest.mark.parametrize("sigma", [1.0, 5.0])
@pytest.mark.parametrize("frames", [1, 30, 256, 337, 600, 1300])
def test_as_by_the_whole_matrix(frames, sigma):
    courses = torch.randn(3, frames, 4, generator=torch.Generator().manual_seed(0))
    whole = gaussian_matrix(frames, sigma, courses)
    torch.testing.assert_close(smoothed(courses, sigma), whole @ courses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_weights(frames, sigma, courses), whole.trace(), rtol=1e-5, atol=1e-6)
