"""The network has the published shape, and its blocks compute what an independent implementation computes."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.cablock import CABlock, FeedForward

from restormer3d.config import ModelConfig
from restormer3d.filters import gaussian_matrix, noise_variance, shrunk_details
from restormer3d.model import GDFN, MDTA, Restormer3D, fold, unfold

from .conftest import TINY, background_of


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_widths_that_leave_the_network_nothing_to_see_are_refused():
    for widths in ({"sigmas_xy": (0.7, 1.0)}, {"sigmas_xy": ()}, {"sigmas_t": ()}, {"sigmas_relative": (0.0,)}):
        with pytest.raises(ValueError, match="sigmas_xy"):
            ModelConfig(start="filters", **widths)


def test_parameter_counts_are_the_published_ones():
    assert parameters(Restormer3D()) == 3_570_998
    assert parameters(Restormer3D(ModelConfig(last_level_channels=64))) == 3_717_142
    assert 3.5e6 < parameters(Restormer3D(ModelConfig(start="filters"))) < 3.75e6


def test_no_layer_has_a_bias():
    names = [name for name, _ in Restormer3D().named_parameters()]
    assert not [name for name in names if "bias" in name]


def bias_free_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x / scale * weight.view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("heads", [1, 4])
def test_mdta_agrees_with_monai(heads):
    torch.manual_seed(1)
    ours = MDTA(16, heads)
    torch.nn.init.uniform_(ours.norm_weight)
    torch.nn.init.uniform_(ours.temperature, 0.5, 3)
    theirs = CABlock(3, 16, heads, bias=False)
    theirs.load_state_dict(
        {
            "temperature": ours.temperature,
            "qkv.conv.weight": ours.qkv,
            "qkv_dwconv.conv.weight": ours.qkv_dwconv,
            "project_out.conv.weight": ours.project_out,
        }
    )
    x = torch.randn(2, 16, 5, 7, 6)
    expected = x + theirs(bias_free_norm(x, ours.norm_weight))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_gdfn_agrees_with_monai():
    torch.manual_seed(2)
    ours = GDFN(16, 2.0)
    torch.nn.init.uniform_(ours.norm_weight)
    theirs = FeedForward(3, 16, 2.0, bias=False)
    theirs.load_state_dict(
        {
            "project_in.conv.weight": ours.project_in,
            "dwconv.conv.weight": ours.dwconv,
            "project_out.conv.weight": ours.project_out,
        }
    )
    x = torch.randn(2, 16, 4, 5, 9)
    expected = x + theirs(bias_free_norm(x, ours.norm_weight))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 17), (16, 8, 8)])
def test_any_window_size_keeps_its_shape(tiny_model, shape):
    x = torch.rand(2, 1, *shape)
    denoised = tiny_model(x, background_of(x.mean(2, keepdim=True)))
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()


def test_the_published_form_subtracts_the_predicted_noise():
    model = Restormer3D()
    torch.nn.init.zeros_(model.unet.output.weight)
    x = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(model(x), x)


def test_an_untrained_mixing_network_is_a_gaussian_filter_relative_to_the_static_image():
    model = Restormer3D(ModelConfig(start="filters"))
    x = torch.rand(1, 1, 24, 16, 16)
    background = background_of(x.mean(2, keepdim=True))
    still = shrunk_details(background[:, :1], noise_variance(x) / 24)[0]
    kernel_t, kernel_xy = gaussian_matrix(24, 9.0, x), gaussian_matrix(16, 5.6, x)
    slow = torch.einsum("st,bcthw->bcshw", kernel_t, x - background[:, :1])
    light = still + 0.02 * still.mean() + 1e-6
    expected = still + light / (kernel_xy @ light @ kernel_xy.T) * (kernel_xy @ slow @ kernel_xy.T)
    with torch.no_grad():
        torch.testing.assert_close(model(x, background), expected, rtol=1e-4, atol=1e-5)


def test_details_that_are_noise_are_shrunk_and_others_kept():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    image = torch.exp(-((y - 24) ** 2 + (x - 24) ** 2) / 18).view(1, 1, 1, 48, 48)
    noisy = image + 0.05 * torch.randn_like(image)
    shrunk = shrunk_details(noisy, torch.full_like(image, 0.05**2))[0]
    assert (shrunk - image).square().mean() < 0.3 * (noisy - image).square().mean()
    torch.testing.assert_close(shrunk_details(image, torch.full_like(image, 1e-12))[0], image, atol=1e-4, rtol=0)


def test_folding_is_undone_by_unfolding():
    x = torch.rand(2, 3, 8, 6, 4)
    assert fold(x, (4, 2, 2)).shape == (2, 48, 2, 3, 2)
    assert torch.equal(unfold(fold(x, (4, 2, 2)), (4, 2, 2)), x)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5, 7), (2, 1, 13, 9, 18), (1, 1, 33, 17, 16)])
def test_a_mixing_network_takes_windows_of_any_size(shape):
    model = Restormer3D(ModelConfig(dim=8, heads=(1, 1, 2, 2), last_level_channels=8, start="filters"))
    torch.nn.init.normal_(model.unet.output.weight)
    x = torch.rand(shape)
    found = model(x, background_of(x.mean(2, keepdim=True)))
    assert found.shape == x.shape
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("shape", [(2, 16, 13, 18), (1, 7, 8, 5), (1, 1, 3, 4)])
def test_rows_that_are_looked_at_together_do_not_matter(monkeypatch, shape):
    torch.manual_seed(5)
    model = Restormer3D(ModelConfig(**TINY, start="filters")).double()  # some gradients are small differences
    torch.nn.init.normal_(model.unet.output.weight, std=0.1)
    x = torch.rand(shape[0], 1, *shape[1:]).double()
    background = background_of(x.mean(2, keepdim=True))
    results = []
    for voxels in (1, 2**30):  # two rows, all rows
        monkeypatch.setattr("restormer3d.filters._STRIP_VOXELS", voxels)
        model.zero_grad()
        denoised = model(x, background)
        denoised.square().mean().backward()
        results.append((denoised.detach(), *(weight.grad for weight in model.parameters())))
    for few, together in zip(*results, strict=True):
        torch.testing.assert_close(few, together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def test_a_mixing_network_asks_for_the_background():
    with pytest.raises(ValueError, match="background"):
        Restormer3D(ModelConfig(start="filters"))(torch.rand(1, 1, 8, 8, 8))
