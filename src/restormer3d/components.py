"""What neighboring pixels do together: denoised blocks, taken apart into components and put together with less noise.

A network looks at a few pixels and frames; a cell keeps its footprint over the whole recording. Components of a block
that stand out of noise are kept and weighed once more against the noisy stack, the others fade. How noise alone would
look is measured: the stack is denoised a second time with a little more noise of its own kind, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restormer3d.filters import gaussian_matrix
from restormer3d.tiling import hann_weights, window_starts

LEAST_FRAMES = 16
"""Frames that a stack must have: fewer say nothing of what pixels do together."""

_ADDED = 0.25  # deviations of noise that are added: little, so that the network weighs its filters as before
_BLOCK = 16  # pixels
_CHUNK_VOXELS = 2**26  # of frames that are looked at together
_HALF = 0.45  # energy of noise, relative to a component's, at which half of the component is kept
_STEEPNESS = 3
_SPREAD = 0.2  # expected deviation of a component's weight from what its energy says
_SHARP_SPREAD = 0.3  # of the weight of its less smoothed course, where a frame says enough
_SHARP_SIGMA = 1.0  # frames
_SEED = 0
_MOST_MORE = 100.0  # noise that a component may have, in units of the noise expected: flicker, jitter of the field
_TINY = 1e-30


@dataclass(frozen=True)
class AddedNoise:
    """A lazy stack: another one with noise added that is like its own, the same at each reading.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        The recording.
    variance : numpy.ndarray
        Of its noise, (H, W), in squared intensities.
    correlation : tuple of tuple of float
        Of a voxel's noise with its neighbors' along frames (not used), rows and columns, from lag 0 on.
    """

    stack: Any
    variance: np.ndarray
    correlation: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,), (1.0,))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        return self.stack.shape

    @property
    def dtype(self) -> np.dtype:
        """That of floating-point sums."""
        return np.result_type(self.stack.dtype, np.float32)

    def __getitem__(self, frames: slice) -> np.ndarray:
        """Read frames with `_ADDED` times the noise of :meth:`noise` added."""
        first, last, _ = frames.indices(self.shape[0])
        return (self.stack[first:last] + np.float32(_ADDED) * self.noise(first, last)).astype(self.dtype, copy=False)

    def noise(self, first: int, last: int) -> np.ndarray:
        """Draw noise of frames `first` to `last` - 1, (frames, H, W) float32."""
        roots = (_root_spectrum(n, lags) for n, lags in zip(self.shape[1:], self.correlation[1:], strict=True))
        root, correlated = np.outer(*roots), max(len(lags) for lags in self.correlation[1:]) > 1
        drawn, deviation = np.empty((last - first, *self.shape[1:]), np.float32), np.sqrt(self.variance)
        for t, frame in zip(range(first, last), drawn, strict=True):
            white = np.random.default_rng([_SEED, t]).standard_normal(frame.shape, np.float32)
            frame[:] = deviation * (np.fft.ifft2(np.fft.fft2(white) * root).real if correlated else white)
        return drawn


def refine_by_components(
    denoised: Iterator[np.ndarray], noisier: Iterator[np.ndarray], added: AddedNoise, device: str | torch.device = "cpu"
) -> Iterator[np.ndarray]:
    """Reduce denoised frames to the components that stand out of noise, block by block.

    The fluctuations of a block around their temporal mean are taken apart into principal components. A component is
    kept as far as its energy exceeds that of the same component of noise alone. Its weight, and that of its course
    in the noisy stack smoothed by little more than a frame, are then fitted to the noisy stack; the noise that both
    share with it is taken off, as in Stein's estimate; where differences of frames show more noise in a component than
    its pixels have of their own (flicker of the light, jitter of the field), that counts. Blocks overlap, and their
    results are blended.

    Parameters
    ----------
    denoised, noisier : iterator of numpy.ndarray
        Denoised frames (H, W) of the stack and of `added`, by the same network, in order.
    added : AddedNoise
        The noisy stack and its noise; at least :data:`LEAST_FRAMES` frames.
    device : str or torch.device
        Where to compute; MPS leaves it to the CPU.

    Yields
    ------
    numpy.ndarray
        Frames (H, W) float32, in order. Memory does not grow with the length of the stack: a long one is taken in
        overlapping chunks.

    References
    ----------
    Horn, "A rationale and test for the number of factors in factor analysis", Psychometrika 1965, for comparing with
    components of noise; Stein, "Estimation of the Mean of a Multivariate Normal Distribution", Ann. Stat. 1981.
    """
    frames, height, width = added.shape
    depth = chunk_frames(added.shape)
    starts = window_starts(frames, depth, 0.5)
    clear, response, blended = (np.zeros((depth, height, width), np.float32) for _ in range(3))
    hann, weight = hann_weights(depth), np.zeros(depth, np.float32)
    held = 0  # frames of this chunk that are there from the one before
    for start, following in pairwise([*starts, starts[-1] + depth]):
        for t in range(held, depth):
            clear[t] = next(denoised)
            response[t] = (next(noisier) - clear[t]) / _ADDED
        refined = _refined(clear, response, added, start, torch.device(device))
        refined *= hann[:, None, None]
        blended += refined
        weight += hann
        done = following - start
        yield from blended[:done] / weight[:done, None, None]
        held = depth - done
        for values in (clear, response, blended, weight):
            values[:held] = values[done:].copy()
        blended[held:], weight[held:] = 0, 0


def chunk_frames(shape: tuple[int, int, int]) -> int:
    """Frames of a stack of this shape that :func:`refine_by_components` looks at together."""
    return min(shape[0], max(LEAST_FRAMES, _CHUNK_VOXELS // (shape[1] * shape[2])))


def _refined(
    clear: np.ndarray, response: np.ndarray, added: AddedNoise, start: int, device: torch.device
) -> np.ndarray:
    """Refine a chunk of frames from `start` on, (T, H, W), one row of blocks at a time."""
    depth, height, width = clear.shape
    noisy, noise = added.stack[start : start + depth], added.noise(start, start + depth)
    rows, columns = min(_BLOCK, height), min(_BLOCK, width)
    plane = np.outer(hann_weights(rows), hann_weights(columns))
    total, weight = np.zeros_like(clear), np.zeros((height, width), np.float32)
    lefts = window_starts(width, columns, 0.5)
    where = torch.device("cpu") if device.type == "mps" else device

    def blocks(values: np.ndarray, top: int) -> Tensor:
        strip = values[:, top : top + rows]
        if values is noisy:  # as recorded: a large offset would cost digits
            strip = strip - strip.mean(0, dtype=np.float64)
        strip = torch.from_numpy(strip.astype(np.float32)).to(where)
        return torch.stack([strip[:, :, left : left + columns].flatten(1) for left in lefts])  # (blocks, T, pixels)

    for top in window_starts(height, rows, 0.5):
        refined = _refined_blocks(*(blocks(values, top) for values in (clear, noisy, response, noise)))
        for left, block in zip(lefts, refined.cpu().numpy(), strict=True):
            total[:, top : top + rows, left : left + columns] += block.reshape(depth, rows, columns) * plane
            weight[top : top + rows, left : left + columns] += plane
    total /= weight
    return total


@torch.no_grad()
def _refined_blocks(clear: Tensor, noisy: Tensor, response: Tensor, noise: Tensor) -> Tensor:
    """Refine blocks, all (blocks, T, pixels): denoised, noisy, and how `noise` comes out of the denoiser."""
    mean = clear.mean(1, keepdim=True)
    clear, noisy, response, noise = (x - x.mean(1, keepdim=True) for x in (clear, noisy, response, noise))
    energy, components = torch.linalg.eigh(_products(clear))
    of_noise = torch.linalg.eigvalsh(_products(response))
    components = components.float()
    clear, noisy, response, noise = (x @ components for x in (clear, noisy, response, noise))
    expected = noise.square().mean(1)  # (blocks, components)
    more = (_variance(noisy) / expected.clamp(min=_TINY)).clamp(1, _MOST_MORE)
    variance = more * expected
    ratio = of_noise.clamp(min=0) / energy.clamp(min=_TINY) * more
    reliable = (1 / (1 + (ratio / _HALF) ** _STEEPNESS)).float()
    smooth = gaussian_matrix(clear.shape[1], _SHARP_SIGMA, clear)
    sharp = smooth @ noisy
    exceeds = (noisy.square().mean(1) / variance.clamp(min=_TINY) - 1).clamp(min=0)
    informed = (exceeds / (1 + exceeds)) ** 2  # how far a single frame tells a component from noise
    first, second = _fitted(
        torch.stack([clear, sharp]),
        noisy,
        torch.stack([more * (response * noise).sum(1), smooth.trace() * variance]),
        torch.stack([_SPREAD * reliable, _SHARP_SPREAD * informed * reliable]),
        reliable,
        variance,
    )
    return mean + (first * clear + second * sharp) @ components.transpose(1, 2)


def _variance(courses: Tensor) -> Tensor:
    """Noise variance (blocks, components) of courses (blocks, T, components), from differences of frames.

    Those over one frame and over two: signal that grows with the delay has no part in it. It shows noise that pixels
    share and that their own variances do not tell of.
    """
    one, two = (((courses[:, lag:] - courses[:, :-lag]).square().mean(1) / 2) for lag in (1, 2))
    return (2 * one - two).clamp(min=0)


def _products(x: Tensor) -> Tensor:
    return (x.transpose(1, 2) @ x).double()


def _fitted(
    courses: Tensor, noisy: Tensor, own: Tensor, spread: Tensor, expected: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of two courses (2, blocks, T, components) whose sum is closest to the noisy one, but for noise.

    `own` (2, blocks, components) is what the courses share with the noisy one by noise alone, of `variance`. Weights
    are expected to be `expected` and 0, with deviations `spread`. Both are returned as (blocks, 1, components).
    """
    a, b = courses
    precision = (variance / spread.clamp(min=1e-6).square()).double() + _TINY
    targets = ((courses * noisy).sum(2) - own).double()
    targets[0] += precision[0] * expected
    aa, bb, ab = ((x * y).sum(1).double() for x, y in ((a, a), (b, b), (a, b)))
    aa, bb = aa + precision[0], bb + precision[1]
    determinant = (aa * bb - ab * ab).clamp(min=1e-6 * aa * bb)
    first = (bb * targets[0] - ab * targets[1]) / determinant
    second = (aa * targets[1] - ab * targets[0]) / determinant
    return first.float().unsqueeze(1), second.float().unsqueeze(1)


def _root_spectrum(length: int, correlation: tuple[float, ...]) -> np.ndarray:
    """Square root of the spectrum (length,) of noise with this correlation along an axis that closes on itself."""
    lags = np.arange(1, len(correlation))
    angles = 2 * np.pi * np.arange(length)[:, None] / length
    spectrum = 1 + 2 * (np.array(correlation[1:]) * np.cos(angles * lags)).sum(1)
    spectrum = np.maximum(spectrum, 0)
    return np.sqrt(spectrum / max(spectrum.mean(), _TINY))
