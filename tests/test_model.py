"""The network has the published shape, and its blocks compute what an independent implementation computes."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.cablock import CABlock, FeedForward

from restormer3d.config import ModelConfig
from restormer3d.model import GDFN, MDTA, Restormer3D, gaussian_matrix


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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
    denoised = tiny_model(x, x.mean(2, keepdim=True))
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()


def test_the_published_form_subtracts_the_predicted_noise():
    model = Restormer3D()
    torch.nn.init.zeros_(model.unet.output.weight)
    x = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(model(x), x)


def test_an_untrained_mixing_network_is_a_gaussian_filter():
    model = Restormer3D(ModelConfig(start="filters"))
    x = torch.rand(1, 1, 24, 16, 16)
    background = x.mean(2, keepdim=True)
    kernel_t, kernel_xy = gaussian_matrix(24, 9.0, x), gaussian_matrix(16, 0.6, x)
    fluctuation = torch.einsum("st,bcthw->bcshw", kernel_t, x - background)
    expected = background + kernel_xy @ fluctuation @ kernel_xy.T
    with torch.no_grad():
        torch.testing.assert_close(model(x, background), expected, rtol=1e-4, atol=1e-6)


def test_a_mixing_network_asks_for_the_background():
    with pytest.raises(ValueError, match="background"):
        Restormer3D(ModelConfig(start="filters"))(torch.rand(1, 1, 8, 8, 8))
