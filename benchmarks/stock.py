"""The network as one would write it from stock PyTorch modules: what the package's speed is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from restormer3d.config import ModelConfig


class LayerNorm(nn.Module):
    """Bias-free LayerNorm over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, T, H, W)."""
        scale = torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        return x * scale * self.weight.view(1, -1, 1, 1, 1)


class Attention(nn.Module):
    """Multi-Dconv head transposed attention with its residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.qkv = nn.Conv3d(dim, 3 * dim, 1, bias=False)
        self.dwconv = nn.Conv3d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.temperature = nn.ParameterList([torch.ones(heads, 1, 1)])  # a list keeps the order of the parameters
        self.project_out = nn.Conv3d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention."""
        temperature = self.temperature[0]
        heads = temperature.shape[0]
        qkv = self.dwconv(self.qkv(self.norm(x))).reshape(x.shape[0], 3, heads, x.shape[1] // heads, -1)
        q, k, v = functional.normalize(qkv[:, 0], dim=-1), functional.normalize(qkv[:, 1], dim=-1), qkv[:, 2]
        attention = ((q @ k.transpose(-2, -1)) * temperature).softmax(-1)
        return x + self.project_out((attention @ v).reshape(x.shape))


class FeedForward(nn.Module):
    """Gated-Dconv feed-forward network with its residual."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.norm = LayerNorm(dim)
        self.project_in = nn.Conv3d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv3d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv3d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + feed-forward."""
        a, b = self.dwconv(self.project_in(self.norm(x))).chunk(2, 1)
        return x + self.project_out(functional.gelu(a) * b)


class Down(nn.Module):
    """1x1x1 convolution, then pixel-unshuffle by two on every axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim // 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resample (B, C, T, H, W)."""
        x = self.conv(x)
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return x.reshape(b, 8 * c, t // 2, h // 2, w // 2)


class Up(nn.Module):
    """1x1x1 convolution, then pixel-shuffle by two on every axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim * 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resample (B, C, T, H, W)."""
        x = self.conv(x)
        b, c, t, h, w = x.shape
        x = x.reshape(b, c // 8, 2, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, c // 8, 2 * t, 2 * h, 2 * w)


class StockRestormer3D(nn.Module):
    """The published network; its parameters come in the order of :class:`restormer3d.model.Restormer3D`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dims = [config.dim * 2**level for level in range(4)]

        def blocks(dim: int, level: int, count: int) -> nn.Sequential:
            pairs = (
                (Attention(dim, config.heads[level]), FeedForward(dim, config.ffn_expansion_factor))
                for _ in range(count)
            )
            return nn.Sequential(*(module for pair in pairs for module in pair))

        self.patch_embed = nn.Conv3d(1, dims[0], 3, padding=1, bias=False)
        self.encoder1 = blocks(dims[0], 0, config.num_blocks[0])
        self.down1 = Down(dims[0])
        self.encoder2 = blocks(dims[1], 1, config.num_blocks[1])
        self.down2 = Down(dims[1])
        self.encoder3 = blocks(dims[2], 2, config.num_blocks[2])
        self.down3 = Down(dims[2])
        self.latent = blocks(dims[3], 3, config.num_blocks[3])
        self.up3 = Up(dims[3])
        self.reduce3 = nn.Conv3d(dims[3], dims[2], 1, bias=False)
        self.decoder3 = blocks(dims[2], 2, config.num_blocks[2])
        self.up2 = Up(dims[2])
        self.reduce2 = nn.Conv3d(dims[2], dims[1], 1, bias=False)
        self.decoder2 = blocks(dims[1], 1, config.num_blocks[1])
        self.up1 = Up(dims[1])
        self.reduce1 = nn.Conv3d(dims[1], dims[0], 1, bias=False)
        self.decoder1 = blocks(dims[0], 0, config.num_blocks[0])
        self.refinement = blocks(dims[0], 0, config.num_refinement_blocks)
        self.output = nn.Conv3d(dims[0], 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, 1, T, H, W), every axis a multiple of 8."""
        level1 = self.encoder1(self.patch_embed(x))
        level2 = self.encoder2(self.down1(level1))
        level3 = self.encoder3(self.down2(level2))
        y = self.up3(self.latent(self.down3(level3)))
        y = self.up2(self.decoder3(self.reduce3(torch.cat([y, level3], 1))))
        y = self.up1(self.decoder2(self.reduce2(torch.cat([y, level2], 1))))
        y = self.decoder1(self.reduce1(torch.cat([y, level1], 1)))
        return x - self.output(self.refinement(y))


def stock_copy(model: nn.Module, config: ModelConfig) -> StockRestormer3D:
    """Return the stock network with the parameters of ``model``."""
    stock = StockRestormer3D(config)
    own, given = list(stock.parameters()), list(model.parameters())
    if [p.shape for p in own] != [p.shape for p in given]:
        raise ValueError("the stock network's parameters differ from the model's: bring benchmarks/stock.py up to date")
    with torch.no_grad():
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
    return stock
