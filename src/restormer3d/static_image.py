"""The temporal mean, denoised as an image: by a small network, and by what patches that look alike have in common.

The mean of all frames holds little noise, but all of it stays in every frame. In a short recording it is most of the
error that is left once activity has been denoised.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.checkpoint import shipped_image_network
from restormer3d.filters import smooth_plane
from restormer3d.image_network import denoise_image
from restormer3d.noise import NoiseEstimate

SAMPLE_FRAMES = 64
"""Of a stack too long to be held: they show what its denoised frames have in common."""

_PATCH = 7  # pixels
_REACH = 10  # pixels around a patch where others like it are looked for
_ALIKE = 40  # patches of a group
_STRIDE = 2  # pixels from one patch that is estimated to the next
_LEAST_NOISE = 1e-6  # relative to the image's variance: equations stay solvable
_MOST_CORRELATION = 0.3  # that the network was trained with
_NEAR = 6.0  # pixels over which it is looked at whether the network took away more than noise


@torch.no_grad()
def denoise_mean(
    mean: np.ndarray,
    noise: NoiseEstimate,
    frames: int,
    correlation: tuple[tuple[float, ...], ...],
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Denoise the temporal mean of a stack.

    A network gives a first image. For every patch, those nearby are gathered that are most like it in this image; what
    they have in common says how far each direction of its deviation from their mean is to be trusted, against the
    noise that is known (a Wiener filter for each group). The result is half of each, but where the network took away
    more than noise, it is the patches' alone. Intensities are first transformed so that their noise is the same
    everywhere.

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
    device : str or torch.device
        Where to compute; MPS, which has no float64, leaves it to the CPU.

    Returns
    -------
    numpy.ndarray
        (H, W) float32.

    References
    ----------
    Lebrun, Buades, Morel, "A Nonlocal Bayesian Image Denoising Algorithm", SIAM J. Imaging Sciences 2013: its second
    step, with the network in place of its first; Mohan et al., "Robust and Interpretable Blind Image Denoising via
    Bias-Free Convolutional Neural Networks", ICLR 2020; Anscombe, "The transformation of Poisson, binomial and
    negative-binomial data", Biometrika 1948, for the transform.
    """
    if not noise.variance(mean).any():
        return mean.astype(np.float32)
    where = torch.device("cpu" if torch.device(device).type == "mps" else device)
    image = torch.from_numpy(stabilized(mean, noise)).to(where)
    variance = max((2 * sum(correlation[0]) - 1) / frames, _LEAST_NOISE * max(1.0, float(image.var(correction=0))))
    image /= variance**0.5
    lag_one = (min(max([*lags[1:2], 0.0]), _MOST_CORRELATION) for lags in correlation[1:])
    guide = denoise_image(shipped_image_network().to(where), image, (next(lag_one), next(lag_one)))
    by_patches = _from_patches(image, guide, correlation)
    share = 0.5 * (2 - smooth_plane((image - guide).square(), _NEAR)).clamp(0, 1)  # 1 is the noise's variance
    both = (by_patches + share * (guide - by_patches)) * variance**0.5
    return restored(both.cpu().numpy(), noise).astype(np.float32)


def _from_patches(image: Tensor, guide: Tensor, correlation: tuple[tuple[float, ...], ...]) -> Tensor:
    """Estimate an image (H, W) with noise of unit variance from patches that are alike in the guide."""
    rows, columns = (min(_PATCH, length) for length in image.shape)
    of_noise = torch.kron(_covariance(rows, correlation[1]), _covariance(columns, correlation[2])).to(image)
    patches, alike = (_patches(values, rows, columns) for values in (image, guide))
    total, weight = torch.zeros_like(image), torch.zeros_like(image)
    lefts = torch.tensor(_places(patches.shape[1]), device=image.device)
    of_row, counted = (image.new_zeros(patches.shape[1], rows * columns) for _ in range(2))
    counted[lefts] = 1
    for top in _places(patches.shape[0]):
        of_row[lefts] = _estimated(patches, alike, top, lefts, of_noise)
        for sums, values in ((total, of_row), (weight, counted)):
            # Adds up where patches overlap; one by one they would be tens of thousands of launches on a GPU.
            sums[top : top + rows] += F.fold(values.T[None], (rows, image.shape[1]), (rows, columns))[0, 0]
    return total / weight


def _estimated(patches: Tensor, alike: Tensor, top: int, at: Tensor, of_noise: Tensor) -> Tensor:
    """Estimate the patches `at` some columns of a row, (patches, pixels); both images' are (rows, columns, pixels)."""
    rows, columns, pixels = alike.shape
    near_rows, near_columns = (min(2 * _REACH + 1, length) for length in (rows, columns))
    first_row = min(max(top - _REACH, 0), rows - near_rows)
    first_column = (at - _REACH).clamp(0, columns - near_columns)
    near = (torch.arange(first_row, first_row + near_rows) * columns)[:, None] + torch.arange(near_columns)
    near = near.to(at)
    candidates = first_column[:, None] + near.flatten()  # (patches, candidates), numbers of places
    places = alike.reshape(-1, pixels)
    distance = (places[candidates] - alike[top, at][:, None]).square().sum(2)
    count = min(_ALIKE, distance.shape[1])
    chosen = candidates.gather(1, distance.topk(count, largest=False).indices)
    group = places[chosen]  # (patches, count, pixels)
    center = group.mean(1, keepdim=True)
    deviation = group - center
    covariance = deviation.mT @ deviation / max(count - 1, 1)
    # What the guide lost in this group: where the mean differs from it by more than noise.
    lost = (patches.reshape(-1, pixels)[chosen] - group).square().mean((1, 2)) - of_noise[0, 0]
    covariance.diagonal(dim1=1, dim2=2).add_(lost.clamp(min=0)[:, None])
    trusted = torch.linalg.solve(covariance + of_noise, (patches[top, at][:, None] - center).mT)
    return (center + trusted.mT @ covariance).squeeze(1)


def _patches(image: Tensor, rows: int, columns: int) -> Tensor:
    return image.unfold(0, rows, 1).unfold(1, columns, 1).flatten(2)


def _places(count: int) -> list[int]:
    """Every `_STRIDE`-th place, and the last one."""
    return sorted({*range(0, count, _STRIDE), count - 1})


def _covariance(length: int, lags: tuple[float, ...]) -> Tensor:
    """Covariance (length, length) of unit noise with this correlation, from lag 0 on, along an axis."""
    lag = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    return torch.from_numpy(np.array([*lags, *[0.0] * length])[np.minimum(lag, len(lags))])


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
