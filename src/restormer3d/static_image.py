"""The temporal mean, denoised as an image by a small network.

The mean of all frames holds little noise, but all of it stays in every frame. In a short recording it is most of the
error that is left once activity has been denoised.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from restormer3d.activity.fields import least_deviation, trust
from restormer3d.arithmetic import float64_device
from restormer3d.filters import smooth_plane
from restormer3d.noise import NoiseEstimate
from restormer3d.unets import ImageNetwork, denoise_image, lag_one

_NEAR = 6.0  # pixels over which it is looked at whether the network took away more than noise
_LEAST_NOISE = 1e-6  # relative to the image's variance


@torch.no_grad()
def denoise_mean(
    mean: np.ndarray,
    noise: NoiseEstimate,
    frames: int,
    correlation: tuple[tuple[float, ...], ...],
    network: ImageNetwork,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Denoise the temporal mean of a stack.

    Intensities are first transformed so that their noise is the same everywhere. Where the network took away much more
    than noise, the mean stays as it was recorded.

    Parameters
    ----------
    mean : numpy.ndarray
        Of all frames, (H, W), intensities.
    noise : NoiseEstimate
        Of a single frame.
    frames : int
        That the mean was taken of.
    correlation : tuple of tuple of float
        Of a voxel's noise with its neighbors' along frames, rows and columns, from lag 0 on.
    network : ImageNetwork
        On any device; a copy computes.
    device : str or torch.device
        Where to compute, see `arithmetic.float64_device`.

    Returns
    -------
    numpy.ndarray
        (H, W) float32.

    References
    ----------
    Mohan et al., "Robust and Interpretable Blind Image Denoising via Bias-Free Convolutional Neural Networks", ICLR
    2020, for the network; Anscombe, "The transformation of Poisson, binomial and negative-binomial data", Biometrika
    1948, for the transform.
    """
    if not noise.variance(mean).any():
        return mean.astype(np.float32)
    image = torch.from_numpy(stabilized(mean, noise)).to(float64_device(device))
    variance = max(_in_a_mean(correlation, frames), _LEAST_NOISE * max(1.0, float(image.var(correction=0))))
    image = _denoised(image / variance**0.5, correlation, network) * variance**0.5
    return restored(image.cpu().numpy(), noise).astype(np.float32)


@torch.no_grad()
def denoise_change(
    change: np.ndarray,
    variance: np.ndarray,
    frames: tuple[int, int],
    correlation: tuple[tuple[float, ...], ...],
    network: ImageNetwork,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Denoise what the mean of some frames of a stack has that the mean of all frames has not.

    Parameters
    ----------
    change : numpy.ndarray
        Difference of the two temporal means, (H, W), intensities.
    variance : numpy.ndarray
        Of the noise of a single frame, (H, W).
    frames : tuple of int
        How many they are, and how many all frames are.
    correlation, network, device
        As for :func:`denoise_mean`.

    Returns
    -------
    numpy.ndarray
        (H, W) float32.
    """
    some, count = frames
    left = _in_a_mean(correlation, some) - _in_a_mean(correlation, count)
    if left <= 0 or not variance.any():
        return change.astype(np.float32)
    deviation = least_deviation(torch.from_numpy(np.sqrt(left * variance)).to(float64_device(device)))
    image = torch.from_numpy(change).to(deviation) / deviation
    # Nothing tells a change from its negative, and what other frames have instead must come out alike.
    image = (_denoised(image, correlation, network) - _denoised(-image, correlation, network)) / 2
    return (image * deviation).cpu().numpy().astype(np.float32)


def _denoised(image: Tensor, correlation: tuple[tuple[float, ...], ...], network: ImageNetwork) -> Tensor:
    """Denoise an image (H, W) whose noise has unit variance, where the network takes away no more than that."""
    denoised = denoise_image(copy.deepcopy(network).to(image.device), image, lag_one(correlation))
    taken_away = smooth_plane((image - denoised).square(), _NEAR)
    return image + trust(taken_away) * (denoised - image)


def _in_a_mean(correlation: tuple[tuple[float, ...], ...], frames: int) -> float:
    """Variance of the noise of a mean of frames, relative to that of a single one."""
    return (2 * sum(correlation[0]) - 1) / frames


def stabilized(values: np.ndarray, noise: NoiseEstimate) -> np.ndarray:
    """Intensities whose noise has unit variance, float64; below zero light, where it no longer changes, a line."""
    above, below, read = *_around_zero_light(values.astype(np.float64), noise), _read_noise(noise)
    if not noise.gain:
        return (above + below) / read
    return 2 / noise.gain * (np.sqrt(noise.gain * above + read**2) - read) + below / read


def restored(values: np.ndarray, noise: NoiseEstimate) -> np.ndarray:
    """Take :func:`stabilized` back."""
    read = _read_noise(noise)
    above, below = np.maximum(values, 0), np.minimum(values, 0) * read
    if not noise.gain:
        return above * read + below + noise.offset
    return ((noise.gain * above / 2 + read) ** 2 - read**2) / noise.gain + below + noise.offset


def _around_zero_light(values: np.ndarray, noise: NoiseEstimate) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(values - noise.offset, 0), np.minimum(values - noise.offset, 0)


def _read_noise(noise: NoiseEstimate) -> float:
    """Deviation of the noise at zero light, above 0: at least a tenth of a photon's."""
    return max(noise.read_noise_variance, 0.01 * noise.gain**2) ** 0.5 or 1.0
