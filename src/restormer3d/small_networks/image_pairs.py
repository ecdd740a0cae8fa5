"""What the network for the static image learns from: two noisy means of the same simulated image.

Drawn one by one, each batch from its number alone; or many at a time on the device that trains, from images that other
processes draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from restormer3d.noise import NoiseEstimate
from restormer3d.simulation.detector import correlate_neighbors
from restormer3d.simulation.images import draw_image
from restormer3d.simulation.parameters import log_uniform
from restormer3d.static_image import stabilized

SIDE = 128
"""Pixels of an image."""
POOL = 64
"""Images that a numbered batch is drawn from; the next batch has one other."""

_PATCH = 64  # pixels
_LARGE_POOL = 8192  # images that batches are drawn from on the device
_FIRST = 64  # images to begin with there
_TOGETHER = 16  # batches drawn at a time there
_RECORDINGS = 8  # further noisy recordings of the same image, whose mean the network learns to predict
_GAIN = (10.0, 2000.0)
_READ_NOISE_VARIANCE = (10.0, 10_000.0)
_LENGTH = (16.0, 30_000.0)  # frames
_CORRELATED = 0.4  # of all patches
_CORRELATION = (0.2, 0.3)  # at most, along y and x
_UNUSUAL = 0.2  # of all patches drawn on the device
_MANY_PHOTONS = 1e6  # Poisson's distribution is a normal one


class Pairs(NamedTuple):
    """Noisy patches (B, 1, H, W) in deviations of their noise, second recordings, truth, and correlations (B, 2)."""

    noisy: Tensor
    target: Tensor
    truth: Tensor
    correlation: Tensor

    def to(self, device: torch.device) -> Pairs:
        """Move to a device."""
        return Pairs(*(part.to(device) for part in self))


def numbered_batch(seed: int, number: int, size: int) -> Pairs:
    """Draw the batch of an iteration: the same arguments give the same batch."""
    rng = np.random.default_rng([seed, 2, number])
    pairs = [_pair(rng, _image(seed, number + int(rng.integers(POOL)))) for _ in range(size)]
    return Pairs(*(torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*pairs, strict=True)))


def pooled_batches(
    take: Callable[[int], list[np.ndarray]], size: int, seed: tuple[int, int], device: torch.device
) -> Iterator[Pairs]:
    """Draw batches on a device without end, of all images that came so far, the last 8192 at most.

    Parameters
    ----------
    take : function
        As :func:`restormer3d.simulation.images.images_ahead` gives it. Only the first images are waited for.
    size : int
        Patches of a batch.
    seed : tuple of int
        Of everything but the images.
    device : torch.device
        Where the images are kept.
    """
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    pool = torch.empty(_LARGE_POOL, SIDE, SIDE, device=device)
    came = 0
    while True:
        for image in take(0 if came else _FIRST):
            fresh = torch.from_numpy(image)
            # Pinned and not waited for: the device has work to do meanwhile.
            fresh = fresh.pin_memory() if device.type == "cuda" else fresh
            pool[came % len(pool)].copy_(fresh, non_blocking=True)
            came += 1
        drawn = draw_pairs(pool[:came], _TOGETHER * size, generator)
        yield from map(Pairs._make, zip(*(part.split(size) for part in drawn), strict=True))


def draw_pairs(images: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Record patches of images (N, side, side) twice, all at once on their device.

    Four in five are distributed as those of :func:`numbered_batch`; the others are flatter or of more contrast, with
    less light in the dark, are more correlated, or their noise is known less exactly.
    """

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        drawn = torch.rand((count, 1, 1), generator=generator, device=images.device, dtype=torch.float64)
        return low + (high - low) * drawn

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    unusual = uniform(0, 1) < _UNUSUAL
    clean = _random_patches(images, count, generator)
    clean = torch.where(unusual, _varied(clean, log_uniform(0.6, 1.6), uniform(0, 1)), clean)
    gain, read, frames = log_uniform(*_GAIN), log_uniform(*_READ_NOISE_VARIANCE).sqrt(), log_uniform(*_LENGTH)
    correlated = uniform(0, 1) < _CORRELATED
    most_y = torch.where(unusual, max(_CORRELATION), _CORRELATION[0])
    correlation = (correlated * uniform(0, most_y), correlated * uniform(0, _CORRELATION[1]))
    known = torch.where(unusual, log_uniform(0.9, 1.1), 1.0) * frames.sqrt()
    noisy, target = (
        known * _stabilized(clean + _error(clean, gain, read, length, correlation, generator), gain, read)
        for length in (frames, _RECORDINGS * frames)
    )
    mean = noisy.mean((1, 2), keepdim=True)
    truth = known * _stabilized(clean, gain, read)
    noisy, target, truth = ((part - mean)[:, None].float() for part in (noisy, target, truth))
    return Pairs(noisy, target, truth, torch.cat(correlation, 1).squeeze(2).float())


def _random_patches(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Patches (count, H, W) float64 anywhere in the images, flipped and rotated."""

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=images.device)

    places = []
    for _ in range(2):
        along = torch.arange(_PATCH, device=images.device)
        places.append(integers(images.shape[1] - _PATCH + 1) + torch.where(integers(2) == 0, along, along.flip(0)))
    rows, columns = places
    patches = images[integers(len(images))[:, :, None], rows[:, :, None], columns[:, None, :]].double()
    return torch.where(integers(2)[:, :, None] == 0, patches, patches.mT)


def _varied(clean: Tensor, power: Tensor, share: Tensor) -> Tensor:
    """Change the contrast, and take away a share of the light that all pixels have; the mean is then as before."""
    darker = (clean - share * clean.amin((1, 2), keepdim=True)).clamp(min=0) ** power
    return darker * (clean.mean((1, 2), keepdim=True) / darker.mean((1, 2), keepdim=True).clamp(min=1e-6))


def _error(
    clean: Tensor,
    gain: Tensor,
    read: Tensor,
    frames: Tensor,
    correlation: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Noise of the mean of so many frames, as :func:`_recorded` adds it."""
    photons = clean * frames / gain
    normal = torch.empty_like(clean)
    counted = torch.poisson(photons.clamp(max=_MANY_PHOTONS), generator)
    many = photons + photons.sqrt() * normal.normal_(generator=generator)
    error = gain / frames * torch.where(photons < _MANY_PHOTONS, counted, many) - clean
    error += read / frames.sqrt() * normal.normal_(generator=generator)
    for axis, lag_one in enumerate(correlation, start=1):
        b = 2 * lag_one / (1 + (1 - 4 * lag_one**2).sqrt())
        error = (error + b * error.roll(1, axis)) / (1 + b**2).sqrt()
    return error


def _stabilized(values: Tensor, gain: Tensor, read: Tensor) -> Tensor:
    """As :func:`restormer3d.static_image.stabilized`, with a detector for each patch."""
    read = torch.maximum(read, 0.1 * gain)
    light = 2 / gain * ((gain * values.clamp(min=0) + read**2).sqrt() - read)
    return light + values.clamp(max=0) / read


def _pair(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Record a patch of an image twice, with light, detector and length drawn at random; the second time longer."""
    top, left = rng.integers(0, SIDE - _PATCH + 1, 2)
    clean = np.rot90(image[top : top + _PATCH, left : left + _PATCH], int(rng.integers(4)))
    clean = clean[:, ::-1] if rng.random() < 0.5 else clean
    noise = NoiseEstimate(log_uniform(rng, *_GAIN), log_uniform(rng, *_READ_NOISE_VARIANCE), 0.0, None, {}, 0.0, 0.0)
    frames = log_uniform(rng, *_LENGTH)
    correlated = rng.random() < _CORRELATED
    correlation = tuple(rng.uniform(0, most) for most in _CORRELATION) if correlated else (0.0, 0.0)

    def in_noise(values: np.ndarray) -> np.ndarray:
        return stabilized(values, noise) * np.sqrt(frames)

    noisy, target = (
        in_noise(_recorded(rng, clean, noise, count, correlation)) for count in (frames, _RECORDINGS * frames)
    )
    return (*((each - noisy.mean())[None] for each in (noisy, target, in_noise(clean))), np.array(correlation))


def _recorded(
    rng: np.random.Generator,
    clean: np.ndarray,
    noise: NoiseEstimate,
    frames: float,
    correlation: tuple[float, ...],
) -> np.ndarray:
    """Mean of so many frames of an image."""
    light = noise.gain / frames * rng.poisson(clean * frames / noise.gain)
    error = light - clean + np.sqrt(noise.read_noise_variance / frames) * rng.standard_normal(clean.shape)
    for axis, lag_one in enumerate(correlation):
        error = correlate_neighbors(error, lag_one, axis)
    return clean + error


@lru_cache(maxsize=2 * POOL)
def _image(seed: int, number: int) -> np.ndarray:
    return draw_image(seed, number, SIDE)
