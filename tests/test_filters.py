"""The filters: what they share with the noise of the voxel that they estimate."""

from __future__ import annotations

import pytest
import torch

from restormer3d.filters import filter_bank, gaussian_matrix, own_noise

from .conftest import background_of

WIDTHS = ((1.0, 3.0), (0.7, 2.0), (1.4,))
FRAMES, SIDE, DRAWS = 12, 9, 1500


def correlated(noise: torch.Tensor, axis: int) -> torch.Tensor:
    """Noise of variance 1 whose correlation along an axis is 0.4 at lag 1 and nothing beyond."""
    return (noise + 0.5 * noise.roll(1, axis)) / 1.25**0.5


@pytest.mark.parametrize("axis", [None, 2, 3, 4])
def test_own_noise_is_the_covariance_that_repeated_recordings_show(axis):
    generator = torch.Generator().manual_seed(0)
    light = 100 + 20 * torch.rand(1, 1, 1, SIDE, SIDE, generator=generator)
    noise = torch.randn(DRAWS, 1, FRAMES, SIDE, SIDE, generator=generator)
    lags = [(1.0,), (1.0,), (1.0,)]
    if axis is not None:
        # Wrapping around would join the ends: draw one more and cut it off.
        longer = torch.randn(*(n + (a == axis) for a, n in enumerate(noise.shape)), generator=generator)
        noise = correlated(longer, axis).narrow(axis, 1, noise.shape[axis])
        lags[axis - 2] = (1.0, 0.4)
    noisy = light + noise
    background = background_of(noisy.mean(2, keepdim=True), FRAMES)
    bank = filter_bank(noisy, background, *WIDTHS)
    moving = bank.moving(slice(0, SIDE)).permute(0, 3, 4, 1, 2)
    filters = torch.cat([moving, bank.still.expand(-1, -1, FRAMES, -1, -1)], 1)
    found = ((filters - filters.mean(0)) * noise).mean((0, 2))

    expected = own_noise(bank, background[:, 1:2, :, :1, :1], *WIDTHS, tuple(lags)).mean(0)

    # For filter values about as large as the noise, a product's deviation is about 1.
    assert (found - expected).abs().max() < 5 / (DRAWS * FRAMES**0.5) ** 0.5
    assert expected.max() > 0.5


def test_a_pixel_has_no_part_in_the_choice_of_its_kind():
    torch.manual_seed(0)
    noisy = 50 + torch.randn(1, 1, 32, 11, 11)
    lively = noisy.clone()
    lively[..., 5, 5] += 5 * torch.sin(torch.arange(32) / 3.0)
    kinds = []
    for x in (noisy, lively):
        # The noise is measured from differences of frames, which the slow wave leaves nearly as they are.
        bank = filter_bank(x, background_of(noisy.mean(2, keepdim=True), 32), *WIDTHS)
        kinds.append(bank.kinds[0].view(-1, 3, 11, 11).sum(0))  # over brightness: how lively

    assert (kinds[0] - kinds[1])[:, 5, 5].abs().max() < 0.05
    assert (kinds[0] - kinds[1])[:, 5, 7].abs().max() > 0.2


@pytest.mark.parametrize(
    "widths", [((1.0, 3.0), (0.7, 2.0), (1.4, 2.0)), ((1.0, 3.0), (0.7, 2.0), ())], ids=["shared", "no relative ones"]
)
def test_filters_are_mixed_as_if_one_by_one(widths):
    torch.manual_seed(0)
    noisy = 50 + 20 * torch.rand(2, 1, 1, 7, 9) + torch.randn(2, 1, 10, 7, 9)
    bank = filter_bank(noisy, background_of(noisy.mean(2, keepdim=True), 10), *widths)
    rows = slice(2, 5)
    moving = bank.moving(rows)
    weights = torch.randn(2, 3, 9, 4, moving.shape[3])

    torch.testing.assert_close(bank.mixed(rows, weights), weights @ moving, rtol=1e-4, atol=1e-4)


def test_frames_are_filtered_alike_in_any_order():
    torch.manual_seed(0)
    noisy = 50 + torch.randn(1, 1, 10, 7, 9)
    background = background_of(noisy.mean(2, keepdim=True), 10)
    order = torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 9, 3, 7, 9])
    plain, ordered = filter_bank(noisy, background, *WIDTHS), filter_bank(noisy, background, *WIDTHS, order)
    rows = slice(0, 7)

    torch.testing.assert_close(ordered.moving(rows), plain.moving(rows)[..., order])
    torch.testing.assert_close(ordered.kinds, plain.kinds)
    for found, expected in zip(ordered.evidence(rows), plain.evidence(rows), strict=True):
        torch.testing.assert_close(found, expected[..., order])


@pytest.mark.parametrize("sigma", [0.45, 1.0, 2.8, 11.2, 27.0])
def test_gaussian_weights_are_normal_numbers_and_those_of_the_formula(sigma):
    matrix = gaussian_matrix(256, sigma, torch.zeros(1))
    assert not ((matrix > 0) & (matrix < torch.finfo(torch.float32).tiny)).any()  # a CPU is slow with those
    at = torch.arange(256, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    torch.testing.assert_close(matrix.double(), kernel / kernel.sum(1, keepdim=True), rtol=1e-5, atol=1e-11)


def test_training_may_use_filters_that_inference_has_made():
    x = torch.rand(3, 37, requires_grad=True)
    with torch.inference_mode():
        gaussian_matrix(37, 1.7, x)
    (x @ gaussian_matrix(37, 1.7, x)).sum().backward()
    assert x.grad is not None
