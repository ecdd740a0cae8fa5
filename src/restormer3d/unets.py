"""Small U-Nets that denoise what is left to denoise, where the noise is known.

What stands still in a stack, footprints of activity, and courses of activity in time. Values come in deviations of
their noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restormer3d.arithmetic import float32_products

_LAYERS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
_MOST_CORRELATION = 0.3  # that the networks were trained with
_STRIP_PIXELS = 2**18  # that are computed together
_MARGIN = 48  # rows beyond a strip that its pixels depend on, and some more


class UNet(nn.Module):
    """A U-Net of three levels without biases, from some channels to one.

    Parameters
    ----------
    channels : int
        Of the input.
    widths : tuple of int
        Channels of the levels.
    start : float
        Scale of the last convolution's first weights: the correction starts close to nothing.
    dimensions : int
        2 for images, 1 for courses in time.
    kernel : int
        Pixels or frames of a convolution along each axis.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, int, int],
        start: float = 0.05,
        dimensions: Literal[1, 2] = 2,
        kernel: int = 3,
    ):
        super().__init__()
        fine, middle, coarse = widths
        convolution, transposed = _LAYERS[dimensions]

        def convolutions(inside: int, outside: int) -> nn.Sequential:
            layers = [convolution(n, outside, kernel, padding=kernel // 2, bias=False) for n in (inside, outside)]
            for layer in layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())

        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool1d(2)
        self.encoder_level1 = convolutions(channels, fine)
        self.encoder_level2 = convolutions(fine, middle)
        self.latent = convolutions(middle, coarse)
        self.up2 = transposed(coarse, middle, 2, 2, bias=False)
        self.decoder_level2 = convolutions(2 * middle, middle)
        self.up1 = transposed(middle, fine, 2, 2, bias=False)
        self.decoder_level1 = convolutions(2 * fine, fine)
        self.output = convolution(fine, 1, kernel, padding=kernel // 2, bias=False)
        with torch.no_grad():
            self.output.weight *= start

    def correction(self, x: Tensor, seen: Callable[[int, Tensor], Tensor] = lambda _, features: features) -> Tensor:
        """From (B, channels, H, W) to (B, 1, H, W), or without H; sides that are multiples of four.

        `seen` is what each level makes of the features of its encoder.
        """
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        first = seen(0, self.encoder_level1(x))
        second = seen(1, self.encoder_level2(self.pool(first)))
        latent = seen(2, self.latent(self.pool(second)))
        second = self.decoder_level2(torch.cat([self.up2(latent), second], 1))
        first = self.decoder_level1(torch.cat([self.up1(second), first], 1))
        return self.output(first)


class ImageNetwork(UNet):
    """For the temporal mean: it sees the image, a constant, and the correlation of the image's noise."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__(4, widths)

    def forward(self, image: Tensor, correlation: Tensor) -> Tensor:
        """Denoise images (B, 1, H, W) of mean about 0, in deviations of their noise; H and W multiples of four.

        `correlation` (B, 2) is that of the noise of neighbors along rows' axis (y) and columns' axis (x).
        """
        x = torch.cat([image, _everywhere(correlation, image.shape[-2:])], 1)
        return image - self.correction(x)


class FootprintNetwork(UNet):
    """For spatial footprints of temporal components.

    It sees what a denoised footprint leaves of the noisy one, the denoised one, the static image, how strong the
    activity of each pixel is, a constant, and the correlation of the noise.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__(7, widths, start=0.02)

    def forward(self, noisy: Tensor, denoised: Tensor, static: Tensor, strength: Tensor, correlation: Tensor) -> Tensor:
        """Denoise footprints (B, 1, H, W) once more; H and W multiples of four.

        Parameters
        ----------
        noisy, denoised : Tensor
            Footprints (B, 1, H, W) in deviations of their noise; a footprint and its negative are treated alike.
        static : Tensor
            The static image of each, (B, 1, H, W), of mean 0 and variance 1.
        strength : Tensor
            Norm over all footprints of a field, (B, 1, H, W).
        correlation : Tensor
            Of the noise of neighbors along y and x, (B, 2).
        """
        sign = denoised.pow(3).sum((1, 2, 3), keepdim=True).sign()
        fields = [(noisy - denoised) * sign, denoised * sign, static, strength]
        x = torch.cat([*fields, _everywhere(correlation, noisy.shape[-2:])], 1)
        return denoised + sign * self.correction(x)


class CourseNetwork(UNet):
    """For courses in time of the activity of a field, all of them together.

    Of each it sees what the denoised course leaves of the noisy one, the denoised one, how strong the activity of each
    frame is, what is left of the other courses, and a constant; on every level, the features of the others as well.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__(5, widths, start=0.02, dimensions=1, kernel=5)
        self.others = nn.ModuleList(nn.Conv1d(width, width, 1, bias=False) for width in widths)
        for weight in self.others.parameters():
            weight.data *= 0.3

    def forward(self, noisy: Tensor, denoised: Tensor, strength: Tensor, weights: Tensor) -> Tensor:
        """Denoise courses (fields, courses, T) once more; T a multiple of four.

        Parameters
        ----------
        noisy, denoised : Tensor
            Courses (fields, courses, T) in deviations of their noise; where a cell is active they rise.
        strength : Tensor
            Norm over all courses of a field, in deviations of each one's noise, (fields, courses, T).
        weights : Tensor
            Of the other courses in an estimate of each, (fields, courses, courses); see
            `activity.courses.weights_of_others`.
        """
        left = noisy - denoised
        fields = torch.stack([left, denoised, strength, weights @ left, torch.ones_like(left)], 2)

        def seen(level: int, features: Tensor) -> Tensor:
            by_course = features.unflatten(0, left.shape[:2])  # (fields, courses, channels, T)
            of_others = torch.einsum("fkj,fjct->fkct", weights, by_course).flatten(0, 1)
            return features + F.relu(self.others[level](of_others))

        return denoised + self.correction(fields.flatten(0, 1), seen).view_as(denoised)


def lag_one(correlation: tuple[tuple[float, ...], ...]) -> tuple[float, float]:
    """Correlation of the noise of neighbors along y and x, as far as the networks know it.

    `correlation` is that of a voxel's noise with its neighbors' along frames, rows and columns, from lag 0 on.
    """
    y, x = (min(max([*lags[1:2], 0.0]), _MOST_CORRELATION) for lags in correlation[1:])
    return y, x


def _everywhere(correlation: Tensor, plane: tuple[int, ...]) -> Tensor:
    """A constant and the correlation (B, 2), as images (B, 3, H, W)."""
    known = torch.cat([torch.ones_like(correlation[:, :1]), correlation], 1)
    return known[:, :, None, None].expand(-1, -1, *plane)


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
        with float32_products("fp32"):  # rounded products would lose the noise of bright pixels
            mean = torch.stack([network(strip.flip(axes), known).flip(axes) for axes in flips]).mean(0)
        count = min(step, height - top)
        out[top : top + count] = mean[0, 0, top - first : top - first + count, :width]
    return out + offset
