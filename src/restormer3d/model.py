"""Restormer3D: a U-Net of transformer blocks whose attention runs over channels, for stacks of frames.

The names follow Restormer (Zamir et al., CVPR 2022) and the page of the published algorithm; the slow operators
live in :mod:`restormer3d.ops`. Tensors are (B, C, T, H, W), float32, normalized intensities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restormer3d import ops
from restormer3d.config import ModelConfig
from restormer3d.filters import DETAILS, KINDS, FilterBank, filter_bank

_MODES = 128  # in which the mixture of filters may differ from stack to stack
_LOCAL_MODES = 40  # the first of them, in which the network lets it differ from place to place; at least all filters
_FIRST_STEP = 0.15  # of a filter's weight, as a mode, before scenes have shown how they differ


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
        return fold(self.pointwise(x), (2, 2, 2))


class Upsample(nn.Module):
    """Double T, H and W and halve the channels: 1x1x1 convolution, then pixel-shuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pointwise = Pointwise(dim, dim * 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, C/2, 2T, 2H, 2W)."""
        return unfold(self.pointwise(x), (2, 2, 2))


class UNet(nn.Module):
    """Four levels of transformer blocks between `patch_embed` and `output`."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int, output_size: int = 3) -> None:
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
        self.output = Conv3d(last, out_channels) if output_size == 3 else Pointwise(last, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T, H, W) to (B, out_channels, T, H, W); T, H and W multiples of 8."""
        return self.output(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Compute what `output` is a map of, (B, last_level_channels, T, H, W)."""
        level1 = self.encoder_level1(self.patch_embed(x))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))
        x = self.decoder_level3(self.reduce_level3(torch.cat([self.up4_3(latent), level3], 1)))
        x = self.decoder_level2(self.reduce_level2(torch.cat([self.up3_2(x), level2], 1)))
        x = self.decoder_level1(self.reduce_level1(torch.cat([self.up2_1(x), level1], 1)))
        return self.refinement(x)


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

    filter_weights: Tensor  # (filters, KINDS): the usual mixture
    mixture_modes: Tensor  # (modes, filters, KINDS): how stacks differ from it

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        if config.start == "input":
            self.unet = UNet(config, in_channels=1, out_channels=1)
            return
        cell, plane = math.prod(config.fold), config.fold[1] * config.fold[2]
        averages = len(config.sigmas_t)
        broad = averages * sum(sigma > 1 for sigma in config.sigmas_xy)
        inputs = cell * 2 + plane * (averages - 1) + broad + plane * 7
        self.unet = UNet(config, in_channels=inputs, out_channels=cell * _LOCAL_MODES, output_size=1)
        # Starting as a plain filter, the network has nothing to unlearn: its first output is that filter's.
        nn.init.zeros_(self.unet.output.weight)
        self.register_buffer("filter_weights", _first_mixture(config))
        self.register_buffer("mixture_modes", _first_modes(len(self.filter_weights)))

    def forward(self, x: Tensor, background: Tensor | None = None, mixture: Tensor | None = None) -> Tensor:
        """Denoise windows.

        Parameters
        ----------
        x : Tensor
            Noisy windows with shape (B, 1, T, H, W), normalized; any T, H, W of at least 1.
        background : Tensor, optional
            What is known of the whole stack at these pixels, (B, 3, 1, H, W): temporal mean, share of a frame in it,
            intensity without light (see `patches.TrainingStack`). Needed by `start="filters"`, not used by
            `start="input"`. While training, the masked voxels' share in the mean has to be that of their
            replacements (see `objectives.blind_spot_loss`).
        mixture : Tensor, optional
            Weights of the filters for each window, (B, filters, KINDS), instead of `filter_weights`; windows of
            several stacks need that in training. One without weights, (B, 0, 0), counts as none.

        Returns
        -------
        Tensor
            Denoised windows with shape (B, 1, T, H, W).
        """
        if self.config.start == "input":
            return x - _padded(self.unet, x)
        if background is None:
            raise ValueError("this network mixes filters and needs `background`, (B, 3, 1, H, W): temporal mean, ...")
        config = self.config
        usual = self.filter_weights.expand(x.shape[0], -1, -1) if mixture is None or not mixture.numel() else mixture
        modes = self.mixture_modes[:_LOCAL_MODES].expand(len(usual), -1, -1, -1)
        weights = torch.cat([usual.unsqueeze(1), modes], 1)
        not_in_bfloat16 = partial(torch.autocast, x.device.type, enabled=False)  # the filters are most of the result
        order = _folded_order(x.shape[2], config.fold[0], x.device)
        with not_in_bfloat16():
            bank = filter_bank(x, background, config.sigmas_t, config.sigmas_xy, config.sigmas_relative, order)
            strips = bank.strips(config.fold[1])
            evidence = torch.cat([_folded_evidence(bank, rows, config.fold) for rows in strips], 3)
        features = _padded(self.unet.features, evidence).split(math.ceil(strips[0].stop / config.fold[1]), 3)
        changes = []
        for rows, cells in zip(strips, features, strict=True):
            along = self._along(cells).to(x.dtype)
            with not_in_bfloat16():
                mixed = _cells(_mixed(bank, rows, weights), config.fold)  # (B, r, W/fw, fh, fw, 1 + modes, T)
                change = mixed[..., 0, :] + (along * mixed[..., 1:, :]).sum(5)
                changes.append(change.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : rows.stop - rows.start])
        change = torch.cat(changes, 1)[:, :, : x.shape[4]].unflatten(3, (config.fold[0], -1))  # (B, H, W, ft, T/ft)
        return bank.base + change.permute(0, 4, 3, 1, 2).flatten(1, 2)[:, : x.shape[2]].unsqueeze(1)

    def _along(self, cells: Tensor) -> Tensor:
        """How far to go along each mode, from features (B, C, T/ft, r, W/fw): (B, r, W/fw, fh, fw, modes, T).

        Frames are in the order of :func:`_folded_order`.
        """
        b, channels, t, rows, columns = cells.shape
        ft, fh, fw = self.config.fold
        weight = self.unet.output.weight.view(_LOCAL_MODES, ft, fh, fw, channels).permute(2, 3, 0, 1, 4)
        by_cell = cells.permute(0, 3, 4, 1, 2).reshape(-1, channels, t)
        along = weight.reshape(1, -1, channels).expand(len(by_cell), -1, -1) @ by_cell
        return along.view(b, rows, columns, fh, fw, _LOCAL_MODES, ft * t)


def _folded_order(frames: int, factor: int, device: torch.device) -> Tensor:
    """Frames in the order in which :func:`fold` puts them into channels: every `factor`-th from the first one on, ...

    The last one is repeated until there is a multiple of `factor`.
    """
    cells = torch.arange(-(-frames // factor), device=device) * factor
    return (torch.arange(factor, device=device)[:, None] + cells).flatten().clamp(max=frames - 1)


def _mixed(bank: FilterBank, rows: slice, weights: Tensor) -> Tensor:
    """Sum the filters at some rows with each of the weights (B, M, N, KINDS): (B, rows, W, M, T), by pixel."""
    per_pixel = torch.einsum("bmnk,bkhw->bhwmn", weights, bank.kinds[:, :, rows])
    moving, still = per_pixel.split([per_pixel.shape[4] - DETAILS, DETAILS], 4)
    mixed = bank.mixed(rows, moving)
    mixed += still @ bank.still[:, :, :, rows].permute(0, 3, 4, 1, 2)
    return mixed


def _cells(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Put pixels (B, rows, W, ...) that share a cell side by side: (B, rows/fh, W/fw, fh, fw, ...)."""
    x = _filled(x, {1: factors[1], 2: factors[2]})
    return x.unflatten(2, (-1, factors[2])).unflatten(1, (-1, factors[1])).transpose(2, 3)


def fold(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Move blocks of voxels into channels: (B, C, T, H, W) to (B, C*ft*fh*fw, T/ft, H/fh, W/fw)."""
    b, c, t, h, w = x.shape
    ft, fh, fw = factors
    x = x.reshape(b, c, t // ft, ft, h // fh, fh, w // fw, fw)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * ft * fh * fw, t // ft, h // fh, w // fw)


def unfold(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Undo :func:`fold`."""
    b, c, t, h, w = x.shape
    ft, fh, fw = factors
    x = x.reshape(b, c // (ft * fh * fw), ft, fh, fw, t, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // (ft * fh * fw), t * ft, h * fh, w * fw)


def _folded_evidence(bank: FilterBank, rows: slice, factors: tuple[int, int, int]) -> Tensor:
    """What the network sees of some rows, (B, C, T/ft, rows/fh, W/fw): the finer, the more of it in channels.

    The bank's frames are in the order of :func:`_folded_order`.
    """
    ft, fh, fw = factors
    evidence, broad = (_cells(x, factors).unflatten(6, (ft, -1)) for x in bank.evidence(rows))
    # (B, r, W/fw, fh, fw, C, ft, T/ft) to (B, C, ..., T/ft, r, W/fw)
    fine = evidence[..., :2, :, :].permute(0, 5, 6, 3, 4, 7, 1, 2).flatten(1, 4)
    slow = evidence[..., 2:, :, :].mean(6).permute(0, 5, 3, 4, 6, 1, 2).flatten(1, 3)
    broad = broad.mean(6).mean((3, 4)).permute(0, 3, 4, 1, 2)
    still = fold(_filled(bank.still_evidence[:, :, :, rows], {3: fh, 4: fw}), (1, fh, fw))
    return torch.cat([fine, slow, broad, still.expand(-1, -1, fine.shape[2], -1, -1)], 1)


def _filled(x: Tensor, factors: dict[int, int]) -> Tensor:
    """Repeat the last entries along axes until their lengths are multiples of `factors`, by axis."""
    for axis, factor in factors.items():
        last = x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([x, *[last] * (-x.shape[axis] % factor)], axis) if x.shape[axis] % factor else x
    return x


def _conv_weight(out_channels: int, in_channels: int, size: int) -> nn.Parameter:
    """Weight of a convolution, with the initial distribution of `torch.nn.Conv3d`."""
    weight = torch.empty(out_channels, in_channels, size, size, size)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


def _padded(unet: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a network that needs multiples of 8 to any T, H, W: replicate the borders, crop the result."""
    t, h, w = x.shape[2:]
    pad = (0, -w % 8, 0, -h % 8, 0, -t % 8)
    return unet(F.pad(x, pad, mode="replicate"))[:, :, :t, :h, :w] if any(pad) else unet(x)


def _first_mixture(config: ModelConfig) -> Tensor:
    """Weights (filters, KINDS) before any fit: one filter, in the middle, for all pixels."""
    averages = len(config.sigmas_t)
    moving = 1 + averages * (len(config.sigmas_xy) + len(config.sigmas_relative))
    weights = torch.zeros(moving + DETAILS, KINDS)
    weights[1 + averages * (len(config.sigmas_xy) + len(config.sigmas_relative) // 2) + averages // 2] = 1.0
    return weights


def _first_modes(filters: int) -> Tensor:
    """Modes (_MODES, filters, KINDS) before any fit: each filter by itself, alike for all kinds of pixels."""
    modes = torch.zeros(_MODES, filters, KINDS)
    for number in range(min(filters, _LOCAL_MODES)):
        modes[number, number] = _FIRST_STEP
    return modes
