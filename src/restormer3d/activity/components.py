"""What neighboring pixels do together: denoised blocks, taken apart into components and put together with less noise.

A network looks at a few pixels and frames; a cell keeps its footprint over the whole recording. Components of a block
that stand out of noise are kept and weighed once more against the noisy stack, the others fade. How noise alone would
look is measured: the stack is denoised a second time with a little more noise of its own kind, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from restormer3d.activity.chunks import in_chunks
from restormer3d.activity.principal import leading_components
from restormer3d.activity.smoothing import own_weights, smoothed
from restormer3d.arithmetic import float64_device
from restormer3d.threads import thread_count
from restormer3d.tiling import hann_weights, window_starts
from restormer3d.views import ChangedStack

_ADDED = 0.25  # deviations of noise that are added: little, so that the network weighs its filters as before
_BLOCKS = (8, 16, 32)  # pixels: small ones follow what is near, large ones know more of it; their mean is better
# Components of a block that are looked at one by one. Larger matrices PyTorch decomposes one after the other on CUDA.
_MOST = 32
_DRAWN = 32  # frames of noise that are drawn; others are these, moved
_BLOCK_VOXELS = 2**25  # of blocks that a GPU takes apart together; a CPU takes one row of them, and keeps its cache
_HALF = 0.45  # energy of noise, relative to a component's, at which half of the component is kept
_STEEPNESS = 3
_SPREAD = 0.2  # expected deviation of a component's weight from what its energy says
_SHARP_SPREAD = 0.3  # of the weight of its less smoothed course, where a frame says enough
_SHARP_SIGMA = 1.0  # frames
_SLOW_SIGMA = 5.0  # frames over which what a fitted course left out is looked at
_SLOW_EXCESS = 4.0  # energy of noise that it must exceed there, for part of it to be put back
_SLOW_RELIABLE = 0.75  # of a component: others are partly made of the very noise that would be put back
_SEED = 0
_MOST_MORE = 100.0  # noise that a component may have, in units of the noise expected: flicker, jitter of the field
_TINY = 1e-30


Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From denoised frames (T, H, W), the noisy ones but for an image, noise like theirs and its deviation (H, W) to
denoised frames."""
MeanImage = Callable[[np.ndarray, int], np.ndarray]
"""From the mean (H, W) of some recorded frames, and their number, to what it is without noise."""


@dataclass(frozen=True)
class AddedNoise(ChangedStack):
    """A lazy stack: another one with noise added that is like its own, the same at each reading.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        The recording.
    variance : numpy.ndarray
        Of its noise, (H, W), in squared intensities.
    correlation : tuple of tuple of float
        Of a voxel's noise with its neighbors' along frames (not used), rows and columns, from lag 0 on.
    least_deviation : float
        What the deviation of a pixel's noise is taken to be at least: pixels that say they have none (masked ones)
        would outweigh all others.
    """

    variance: np.ndarray
    correlation: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,), (1.0,))
    least_deviation: float = 0.0

    def __getitem__(self, frames: slice) -> np.ndarray:
        """Read frames with `_ADDED` times the noise of :meth:`noise` added."""
        first, last, _ = frames.indices(self.shape[0])
        return (self.stack[first:last] + np.float32(_ADDED) * self.noise(first, last)).astype(self.dtype, copy=False)

    def noise(self, first: int, last: int) -> np.ndarray:
        """Draw noise of frames `first` to `last` - 1, (frames, H, W) float32."""
        noise, deviation = np.empty((last - first, *self.shape[1:]), np.float32), np.sqrt(self.variance)
        fields = self._drawn

        def fill(t: int) -> None:
            rng, frame = np.random.default_rng([_SEED, t]), noise[t - first]
            drawn = fields[rng.integers(_DRAWN)]
            np.multiply(deviation, np.roll(drawn, rng.integers(frame.shape), (0, 1)), out=frame, casting="same_kind")

        with ThreadPoolExecutor(thread_count()) as pool:
            for _ in pool.map(fill, range(first, last)):  # an error in a thread is raised here
                pass
        return noise

    @cached_property
    def _drawn(self) -> np.ndarray:
        """Noise of unit variance, (frames, H, W): as it closes on itself, frames can be moved around."""
        roots = (_root_spectrum(n, lags) for n, lags in zip(self.shape[1:], self.correlation[1:], strict=True))
        root, correlated = np.outer(*roots), max(len(lags) for lags in self.correlation[1:]) > 1
        drawn = np.random.default_rng(_SEED).standard_normal((_DRAWN, *self.shape[1:]), np.float32)
        if correlated:
            for frame in drawn:
                frame[:] = np.fft.ifft2(np.fft.fft2(frame) * root).real
        return drawn


def refine_by_components(
    denoised: Iterator[np.ndarray],
    noisier: Iterator[np.ndarray],
    added: AddedNoise,
    device: str | torch.device = "cpu",
    then: Sequence[Step] = (),
    mean_image: MeanImage | None = None,
    depth: int | None = None,
) -> Iterator[np.ndarray]:
    """Reduce denoised frames to the components that stand out of noise, block by block.

    The fluctuations of a block around their temporal mean are taken apart into principal components. A component is
    kept as far as its energy exceeds that of the same component of noise alone. Its weight, and that of its course
    in the noisy stack smoothed by little more than a frame, are then fitted to the noisy stack; the noise that both
    share with it is taken off, as in Stein's estimate; where differences of frames show more noise in a component than
    its pixels have of their own (flicker of the light, jitter of the field), that counts. Slow activity that the fit
    left out is put back where it exceeds several times the noise. What is left beyond the largest components is kept
    in the same way, as one. Blocks of three sizes overlap, and their results are blended.

    Parameters
    ----------
    denoised, noisier : iterator of numpy.ndarray
        Denoised frames (H, W) of the stack and of `added`, by the same network, in order.
    added : AddedNoise
        The noisy stack and its noise; at least `chunks.LEAST_FRAMES` frames.
    device : str or torch.device
        Where to compute, see `arithmetic.float64_device`.
    then : sequence of Step
        What is done with the result, chunk by chunk.
    mean_image : MeanImage, optional
        What the mean of a chunk's frames becomes in the end; by default it stays as it was denoised.
    depth : int, optional
        Frames of a chunk; all by default.

    Returns
    -------
    iterator of numpy.ndarray
        Frames (H, W) float32, in order. Memory does not grow with the length of the stack: a long one is taken in
        overlapping chunks.

    References
    ----------
    Horn, "A rationale and test for the number of factors in factor analysis", Psychometrika 1965, for comparing with
    components of noise; Stein, "Estimation of the Mean of a Multivariate Normal Distribution", Ann. Stat. 1981.
    """
    where = float64_device(device)
    pairs = ((clear, (other - clear) / _ADDED) for clear, other in zip(denoised, noisier, strict=True))

    def refined(start: int, clear: np.ndarray, response: np.ndarray) -> np.ndarray:
        return _refined(clear, response, added, start, where, then, mean_image)

    return in_chunks(pairs, added.shape, depth or added.shape[0], refined)


def _refined(
    clear: np.ndarray,
    response: np.ndarray,
    added: AddedNoise,
    start: int,
    device: torch.device,
    then: Sequence[Step],
    mean_image: MeanImage | None,
) -> np.ndarray:
    """Refine a chunk of frames from `start` on, (T, H, W): the mean of what blocks of all sizes give."""
    depth = len(clear)
    noisy, recorded = np.empty_like(clear), added.stack[start : start + depth]
    mean = recorded.mean(0, dtype=np.float64)  # taken off as recorded: a large offset would cost digits
    for frame, as_recorded in zip(noisy, recorded, strict=True):
        frame[:] = as_recorded - mean
    noise = added.noise(start, start + depth)
    fields = [torch.from_numpy(values).to(device) for values in (clear, noisy, response, noise)]
    total = torch.zeros_like(fields[0])
    for size in _BLOCKS:
        _add_refined(total, fields, size, _BLOCK_VOXELS if total.is_cuda else 0)
    total /= len(_BLOCKS)
    deviation = torch.from_numpy(np.sqrt(added.variance)).to(device, torch.float32).clamp(min=added.least_deviation)
    for step in then:
        total = step(total, fields[1], fields[3], deviation)
    if mean_image is not None:
        total += (torch.from_numpy(mean_image(mean, depth)).to(device) - total.mean(0, dtype=torch.float64)).float()
    return total.cpu().numpy()


def _add_refined(total: Tensor, fields: list[Tensor], size: int, voxels_together: int) -> None:
    """Refine the fields (T, H, W) in blocks of one size, and add the result to `total`.

    One row of blocks at a time, or as many as have `voxels_together`.
    """
    depth, height, width = total.shape
    rows, columns = min(size, height), min(size, width)
    tops, lefts = (window_starts(*span, 0.5) for span in ((height, rows), (width, columns)))
    across, down = (torch.from_numpy(hann_weights(n)).to(total) for n in (columns, rows))
    weights = [torch.zeros(n).to(total) for n in (height, width)]
    for weight, starts, hann in zip(weights, (tops, lefts), (down, across), strict=True):
        for first in starts:
            weight[first : first + len(hann)] += hann
    at_columns = _places(lefts, columns, total.device)
    together = max(1, voxels_together // (len(lefts) * depth * rows * columns))
    for first in range(0, len(tops), together):
        some = tops[first : first + together]
        at_rows = _places(some, rows, total.device)
        strips = (values[:, at_rows][..., at_columns] for values in fields)  # (T, tops, rows, lefts, columns)
        blocks = (strip.permute(1, 3, 0, 2, 4).reshape(len(some) * len(lefts), depth, -1) for strip in strips)
        refined = _refined_blocks(*blocks).view(len(some), len(lefts), depth, rows, columns)
        refined *= (down / weights[0][at_rows]).view(len(some), 1, 1, rows, 1) * across
        refined /= weights[1][at_columns].view(len(lefts), 1, 1, columns)
        for top, row in zip(some, refined, strict=True):
            for left, block in zip(lefts, row, strict=True):
                total[:, top : top + rows, left : left + columns] += block


def _places(starts: list[int], length: int, device: torch.device) -> Tensor:
    """Places that blocks from `starts` on cover along an axis, (starts, length)."""
    return torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)


@torch.no_grad()
def _refined_blocks(*fields: Tensor) -> Tensor:
    """Refine blocks, all (blocks, T, pixels): denoised, noisy, and how noise comes out of the denoiser; that noise."""
    mean = fields[0].mean(1, keepdim=True)
    fluctuations = [x - x.mean(1, keepdim=True) for x in fields]
    energy, components = leading_components(fluctuations[0], _MOST)
    of_noise, _ = leading_components(fluctuations[2], _MOST)
    clear, noisy, response, noise = (_Split(x, x @ components) for x in fluctuations)
    expected = _inner(noise, noise)
    more = (_noise_energy(noisy) / expected.clamp(min=_TINY)).clamp(1, _MOST_MORE)
    ratio = of_noise.clamp(min=0) / energy.clamp(min=_TINY) * more
    reliable = (1 / (1 + (ratio / _HALF) ** _STEEPNESS)).float()
    variance = (more * expected / fields[0].shape[1]).float()
    courses = _refitted(
        *(split.courses for split in (clear, noisy, response, noise)),
        *(values[:, :-1] for values in (more.float(), reliable, variance)),
    )
    rest = reliable[:, -1:].unsqueeze(2)
    return mean + rest * clear.whole + (courses - rest * clear.courses) @ components.mT


class _Split(NamedTuple):
    """Fluctuations of blocks (blocks, T, pixels), and their components' courses (blocks, T, components)."""

    whole: Tensor
    courses: Tensor


def _inner(a: _Split, b: _Split) -> Tensor:
    """Inner products over time of the courses, and of what is left beyond them: (blocks, components + 1)."""
    courses = (a.courses * b.courses).sum(1, dtype=torch.float64)
    whole = (a.whole * b.whole).sum((1, 2), dtype=torch.float64).unsqueeze(1)
    return torch.cat([courses, whole - courses.sum(1, keepdim=True)], 1)


def _noise_energy(noisy: _Split) -> Tensor:
    """Energy (blocks, components + 1) of noise that differences of frames show.

    Those over one frame and over two: signal that grows with the delay has no part in it. It shows noise that pixels
    share and that their own variances do not tell of.
    """
    frames = noisy.whole.shape[1]
    steps = [_Split(*(x[:, lag:] - x[:, :-lag] for x in noisy)) for lag in (1, 2)]
    one, two = (_inner(step, step) / (2 * step.whole.shape[1]) for step in steps)
    return (2 * one - two).clamp(min=0) * frames


def _refitted(
    clear: Tensor, noisy: Tensor, response: Tensor, noise: Tensor, more: Tensor, reliable: Tensor, variance: Tensor
) -> Tensor:
    """Put together courses (blocks, T, components) from the denoised, the slightly smoothed and the slow noisy ones."""
    sharp = smoothed(noisy, _SHARP_SIGMA)
    exceeds = (noisy.square().mean(1) / variance.clamp(min=_TINY) - 1).clamp(min=0)
    informed = (exceeds / (1 + exceeds)) ** 2  # how far a single frame tells a component from noise
    first, second = _fitted(
        torch.stack([clear, sharp]),
        noisy,
        torch.stack([more * (response * noise).sum(1), own_weights(clear.shape[1], _SHARP_SIGMA, clear) * variance]),
        torch.stack([_SPREAD * reliable, _SHARP_SPREAD * informed * reliable]),
        reliable,
        variance,
    )
    refitted = first * clear + second * sharp
    left_noise = more.sqrt().unsqueeze(1) * (noise - first * response - second * smoothed(noise, _SHARP_SIGMA))
    share = ((reliable - _SLOW_RELIABLE) / (1 - _SLOW_RELIABLE)).clamp(min=0).unsqueeze(1)
    return refitted + share * _left_out(noisy - refitted, left_noise)


def _left_out(left: Tensor, noise: Tensor) -> Tensor:
    """What of the rest of courses (blocks, T, components) is slow and exceeds, there and then, what noise leaves."""
    slow = smoothed(left, _SLOW_SIGMA)
    energy = smoothed(slow.square(), _SLOW_SIGMA)
    of_noise = smoothed(noise, _SLOW_SIGMA).square().mean(1, keepdim=True)
    return (1 - _SLOW_EXCESS * of_noise / energy.clamp(min=_TINY)).clamp(min=0) * slow


def _fitted(
    courses: Tensor, noisy: Tensor, own: Tensor, spread: Tensor, expected: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of two courses (2, blocks, T, components) whose sum is closest to the noisy one, but for noise.

    `own` (2, blocks, components) is what the courses share with the noisy one by noise alone, of `variance`. Weights
    are expected to be `expected` and 0, with deviations `spread`. Both are returned as (blocks, 1, components).
    """
    a, b = courses
    precision = variance.double() / spread.double().clamp(min=1e-6).square() + _TINY
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
