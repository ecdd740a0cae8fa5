"""A small U-Net that denoises one image whose noise is known: what stands still in a stack.

Without biases it answers twice the image, in twice the noise, with twice the result: it has no scale of its own, and
one set of weights serves images of every brightness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STRIP_PIXELS = 2**18  # that are computed together
_MARGIN = 48  # rows beyond a strip that its pixels depend on, and some more


class ImageNetwork(nn.Module):
    """A U-Net of three levels over the image, a constant, and the correlation of its noise.

    Parameters
    ----------
    widths : tuple of int
        Channels of the levels.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__()
        fine, middle, coarse = widths
        self.encoder_level1 = _convolutions(4, fine)
        self.encoder_level2 = _convolutions(fine, middle)
        self.latent = _convolutions(middle, coarse)
        self.up2 = nn.ConvTranspose2d(coarse, middle, 2, 2, bias=False)
        self.decoder_level2 = _convolutions(2 * middle, middle)
        self.up1 = nn.ConvTranspose2d(middle, fine, 2, 2, bias=False)
        self.decoder_level1 = _convolutions(2 * fine, fine)
        self.output = nn.Conv2d(fine, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            self.output.weight *= 0.05  # starts close to the image itself

    def forward(self, image: Tensor, correlation: Tensor) -> Tensor:
        """Denoise images (B, 1, H, W) of mean about 0, in deviations of their noise; H and W multiples of four.

        `correlation` (B, 2) is that of the noise of neighbors along rows' axis (y) and columns' axis (x).
        """
        known = torch.cat([torch.ones_like(correlation[:, :1]), correlation], 1)[:, :, None, None]
        x = torch.cat([image, known.expand(-1, -1, *image.shape[-2:])], 1)
        x = x.contiguous(memory_format=torch.channels_last)
        first = self.encoder_level1(x)
        second = self.encoder_level2(F.max_pool2d(first, 2))
        latent = self.latent(F.max_pool2d(second, 2))
        second = self.decoder_level2(torch.cat([self.up2(latent), second], 1))
        first = self.decoder_level1(torch.cat([self.up1(second), first], 1))
        return image - self.output(first)


@torch.no_grad()
def denoise_image(network: ImageNetwork, image: Tensor, correlation: tuple[float, float]) -> Tensor:
    """Denoise an image (H, W) whose noise has unit variance, averaged over flips; strip by strip if it is large.

    `correlation` is that of the noise of neighbors along y and x. The network computes on its own device; the result
    is where the image is.
    """
    device = network.output.weight.device
    offset = image.mean()
    height, width = image.shape
    centered = (image - offset).float()[None, None].to(device)
    centered = F.pad(centered, (0, -width % 4, 0, -height % 4), mode="replicate")
    known = torch.tensor([correlation], dtype=torch.float32, device=device)
    step = max(_MARGIN, _STRIP_PIXELS // width) // 4 * 4  # so that every strip is pooled alike
    out = torch.empty_like(image)
    for top in range(0, height, step):
        first, last = max(top - _MARGIN, 0), min(top + step + _MARGIN, centered.shape[2])
        strip = centered[:, :, first:last]
        flips: tuple[list[int], ...] = ([], [-1], [-2], [-2, -1])
        mean = torch.stack([network(strip.flip(axes), known).flip(axes) for axes in flips]).mean(0)
        count = min(step, height - top)
        out[top : top + count] = mean[0, 0, top - first : top - first + count, :width]
    return out + offset


def _convolutions(inside: int, outside: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, outside, 3, padding=1, bias=False) for channels in (inside, outside)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
