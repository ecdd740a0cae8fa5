"""Restormer3D: a U-Net of transformer blocks whose attention runs over channels, for stacks of frames.

The names follow Restormer (Zamir et al., CVPR 2022) and the page of the published algorithm; the slow operators
live in :mod:`restormer3d.ops`. Tensors are (B, C, T, H, W), float32, normalized intensities.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restormer3d import ops
from restormer3d.config import ModelConfig


class Pointwise(nn.Module):
    """1x1x1 convolution without bias: a matrix product over channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = _conv_weight(out_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, T, H, W) to (B, C_out, T, H, W)."""
        return ops.pointwise(x, self.weight)


class Conv3d(nn.Module):
    """Dense 3x3x3 convolution without bias, zero padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = _conv_weight(out_channels, in_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, T, H, W) to (B, C_out, T, H, W)."""
        return ops.conv3d(x, self.weight)


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention, with its LayerNorm and its residual connection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.qkv = _conv_weight(3 * dim, dim, 1)
        self.qkv_dwconv = _conv_weight(3 * dim, 1, 3)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_out = _conv_weight(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention, with shape (B, C, T, H, W)."""
        return ops.mdta(x, self.norm_weight, self.qkv, self.qkv_dwconv, self.temperature, self.project_out)


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network, with its LayerNorm and its residual connection."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.project_in = _conv_weight(2 * hidden, dim, 1)
        self.dwconv = _conv_weight(2 * hidden, 1, 3)
        self.project_out = _conv_weight(dim, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + feed-forward, with shape (B, C, T, H, W)."""
        return ops.gdfn(x, self.norm_weight, self.project_in, self.dwconv, self.project_out)


class TransformerBlock(nn.Sequential):
    """MDTA, then GDFN."""

    def __init__(self, dim: int, heads: int, expansion: float) -> None:
        super().__init__(MDTA(dim, heads), GDFN(dim, expansion))


class Downsample(nn.Module):
    """Halve T, H and W and double the channels: 1x1x1 convolution, then pixel-unshuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pointwise = Pointwise(dim, dim // 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, 2C, T/2, H/2, W/2)."""
        x = self.pointwise(x)
        b, c, t, h, w = x.shape
        x = x.view(b, c, t // 2, 2, h // 2, 2, w // 2, 2)
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * 8, t // 2, h // 2, w // 2)


class Upsample(nn.Module):
    """Double T, H and W and halve the channels: 1x1x1 convolution, then pixel-shuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pointwise = Pointwise(dim, dim * 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, C/2, 2T, 2H, 2W)."""
        x = self.pointwise(x)
        b, c, t, h, w = x.shape
        x = x.view(b, c // 8, 2, 2, 2, t, h, w)
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, t * 2, h * 2, w * 2)


class UNet(nn.Module):
    """Four levels of transformer blocks between `patch_embed` and `output`."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        dims = [config.dim * 2**level for level in range(4)]
        last = config.last_level_channels

        def blocks(dim: int, level: int, count: int) -> nn.Sequential:
            heads = config.heads[level]
            return nn.Sequential(*(TransformerBlock(dim, heads, config.ffn_expansion_factor) for _ in range(count)))

        self.patch_embed = Conv3d(in_channels, dims[0])
        self.encoder_level1 = blocks(dims[0], 0, config.num_blocks[0])
        self.down1_2 = Downsample(dims[0])
        self.encoder_level2 = blocks(dims[1], 1, config.num_blocks[1])
        self.down2_3 = Downsample(dims[1])
        self.encoder_level3 = blocks(dims[2], 2, config.num_blocks[2])
        self.down3_4 = Downsample(dims[2])
        self.latent = blocks(dims[3], 3, config.num_blocks[3])
        self.up4_3 = Upsample(dims[3])
        self.reduce_level3 = Pointwise(dims[3], dims[2])
        self.decoder_level3 = blocks(dims[2], 2, config.num_blocks[2])
        self.up3_2 = Upsample(dims[2])
        self.reduce_level2 = Pointwise(dims[2], dims[1])
        self.decoder_level2 = blocks(dims[1], 1, config.num_blocks[1])
        self.up2_1 = Upsample(dims[1])
        self.reduce_level1 = Pointwise(dims[1], last) if last != dims[1] else nn.Identity()
        self.decoder_level1 = blocks(last, 0, config.num_blocks[0])
        self.refinement = blocks(last, 0, config.num_refinement_blocks)
        self.output = Conv3d(last, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T, H, W) to (B, out_channels, T, H, W); T, H and W multiples of 8."""
        level1 = self.encoder_level1(self.patch_embed(x))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))
        x = self.decoder_level3(self.reduce_level3(torch.cat([self.up4_3(latent), level3], 1)))
        x = self.decoder_level2(self.reduce_level2(torch.cat([self.up3_2(x), level2], 1)))
        x = self.decoder_level1(self.reduce_level1(torch.cat([self.up2_1(x), level1], 1)))
        return self.output(self.refinement(x))


class Restormer3D(nn.Module):
    """The denoiser: a window of noisy frames in, the same window denoised out.

    Parameters
    ----------
    config : ModelConfig
        Shape of the network and the form of its input. The default is the published one: one channel,
        output = input - predicted noise, 3,570,998 parameters.

    References
    ----------
    Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022.
    Bako et al., "Kernel-Predicting Convolutional Networks for Denoising Monte Carlo Renderings", SIGGRAPH 2017,
    for a network that weighs filters instead of painting voxels (`start="filters"`).
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        if config.start == "input":
            self.unet = UNet(config, in_channels=1, out_channels=1)
            return
        candidates = len(config.sigmas_xy) * (len(config.sigmas_t) + 1)
        self.unet = UNet(config, in_channels=2 + len(config.sigmas_t), out_channels=candidates + 1)
        # Starting as a plain filter, the network has nothing to unlearn: its first output is that filter's.
        nn.init.zeros_(self.unet.output.weight)
        self.filter_weights = nn.Parameter(_first_mixture(config))

    def forward(self, x: Tensor, background: Tensor | None = None) -> Tensor:
        """Denoise windows.

        Parameters
        ----------
        x : Tensor
            Noisy windows with shape (B, 1, T, H, W), normalized; any T, H, W of at least 1.
        background : Tensor, optional
            Temporal mean of the whole stack at these pixels with shape (B, 1, 1, H, W). Needed by
            `start="filters"`, not used by `start="input"`. While training, the masked voxels' share in it has to be
            that of their replacements (see `objectives.blind_spot_loss`).

        Returns
        -------
        Tensor
            Denoised windows with shape (B, 1, T, H, W).
        """
        if self.config.start == "input":
            return x - _padded(self.unet, x)
        if background is None:
            raise ValueError("this network mixes filters and needs `background`, the temporal mean (B, 1, 1, H, W)")
        averages, candidates = _filter_bank(x, background, self.config)
        mixture = _padded(self.unet, torch.cat([x - background, background.expand_as(x), averages], 1))
        weights = self.filter_weights.view(1, -1, 1, 1, 1) + mixture[:, :-1]
        return background + (weights * candidates).sum(1, keepdim=True) + mixture[:, -1:]


def _conv_weight(out_channels: int, in_channels: int, size: int) -> nn.Parameter:
    """Weight of a convolution, with the initial distribution of `torch.nn.Conv3d`."""
    weight = torch.empty(out_channels, in_channels, size, size, size)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


def _padded(unet: nn.Module, x: Tensor) -> Tensor:
    """Apply a network that needs multiples of 8 to any T, H, W: replicate the borders, crop the result."""
    t, h, w = x.shape[2:]
    pad = (0, -w % 8, 0, -h % 8, 0, -t % 8)
    return unet(F.pad(x, pad, mode="replicate"))[:, :, :t, :h, :w] if any(pad) else unet(x)


def gaussian_matrix(length: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian filter along an axis of `length` as a matrix (length, length) whose rows sum to one.

    At the ends the kernel is cut and renormalized.
    """
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    kernel = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def _filter_bank(x: Tensor, background: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Gaussian averages of a window around its background.

    Returns
    -------
    averages : Tensor
        Temporal averages of x - background with shape (B, len(sigmas_t), T, H, W), each divided by the factor by which
        it reduces white noise: every channel then carries noise of the same size.
    candidates : Tensor
        What may be added to the background, (B, (len(sigmas_t) + 1) * len(sigmas_xy), T, H, W): every temporal average
        smoothed in the plane, and what smoothing does to the background itself.
    """
    b, _, t, h, w = x.shape
    fluctuation = (x - background).reshape(b, t, h * w)
    filters = [gaussian_matrix(t, sigma, x) for sigma in config.sigmas_t]
    averages = torch.matmul(torch.cat(filters), fluctuation).view(b, len(filters), t, h, w)

    def smooth(images: Tensor, sigma: float) -> Tensor:
        return gaussian_matrix(h, sigma, x) @ images @ gaussian_matrix(w, sigma, x).T

    candidates = [smooth(averages, sigma) for sigma in config.sigmas_xy]
    candidates += [(smooth(background, sigma) - background).expand_as(x) for sigma in config.sigmas_xy]
    noise = torch.stack([kernel.square().sum(1).sqrt() for kernel in filters])
    return averages / noise.view(1, -1, t, 1, 1), torch.cat(candidates, 1)


def _first_mixture(config: ModelConfig) -> Tensor:
    """Weights of the candidates before any training: the middle temporal average, least smoothed in the plane."""
    weights = torch.zeros(len(config.sigmas_xy) * (len(config.sigmas_t) + 1))
    weights[len(config.sigmas_t) // 2] = 1.0
    return weights
