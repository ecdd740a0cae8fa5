"""Random patches out of lazy stacks: the seam where numpy frames become torch tensors for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from restormer3d.noise import NoiseEstimate, blind_spot_extent, neighbor_correlation
from restormer3d.normalization import Normalization, estimate_normalization, temporal_mean, temporal_median
from restormer3d.thinning import Thinning, thin


@dataclass(frozen=True)
class TrainingStack:
    """A noisy stack and what training needs to know of the whole of it.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        Raw intensities, read lazily.
    normalization : Normalization
        Of this stack.
    median, mean : numpy.ndarray
        Temporal median and mean, normalized, (H, W) float32.
    blind_spot : tuple of int
        Half-extent of the blind spot in (frames, rows, columns).
    zero : float
        Intensity without light, normalized.
    second : stack of shape (T, H, W), optional
        The same scene recorded once more, with noise of its own, or the mean of several such recordings: simulated
        scenes alone can have that.
    thinning : Thinning or None
        How patches lose photons; None leaves them as recorded.
    noise_correlation : tuple of tuple of float
        Correlation of a voxel's noise with that of its neighbors along frames, rows and columns, from lag 0 on.
    mixture : numpy.ndarray, optional
        Weights of filters (filters, KINDS) for this stack instead of the model's.
    """

    stack: Any
    normalization: Normalization
    median: np.ndarray
    mean: np.ndarray
    blind_spot: tuple[int, int, int] = (0, 0, 0)
    zero: float = 0.0
    second: Any = None
    thinning: Thinning | None = None
    noise_correlation: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,), (1.0,))
    mixture: np.ndarray | None = None

    @property
    def background(self) -> np.ndarray:
        """What a window needs to know of the whole stack, (3, H, W): mean, share of a frame in it, zero."""
        return self.background_of(self.mean, self.zero)

    def background_of(self, mean: np.ndarray, zero: float) -> np.ndarray:
        """Return the same for another mean (..., H, W) and zero, (3, ..., H, W)."""
        return np.stack([mean, np.full_like(mean, 1 / self.stack.shape[0]), np.full_like(mean, zero)])


@dataclass(frozen=True)
class Patches:
    """A batch of patches of stacks.

    Attributes
    ----------
    noisy : Tensor
        (B, 1, T, H, W).
    background, median : Tensor
        Of the whole stacks, (B, 3, 1, H, W) and (B, 1, 1, H, W).
    stack_frames : Tensor
        Frames of each stack, (B,).
    second : Tensor
        The same patches recorded once more, (B, 1, T, H, W); of no frames, (B, 1, 0, H, W), if not all have that.
    held_out : Tensor of bool
        Voxels never to be trained on, (B, 1, T, H, W).
    mixture : Tensor
        Weights of filters for each patch, (B, filters, KINDS), or (B, 0, 0) where not all stacks have their own.
    blind_spot : tuple of int
        Half-extent that all need.
    """

    noisy: Tensor
    background: Tensor
    median: Tensor
    stack_frames: Tensor
    second: Tensor
    held_out: Tensor
    mixture: Tensor
    blind_spot: tuple[int, int, int]

    def to(self, device: torch.device) -> Patches:
        """Copy the batch to a device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Patches:
        """Copy the batch to memory from which a GPU fetches it while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Patches:
        tensors = (self.noisy, self.background, self.median, self.stack_frames)
        others = (self.second, self.held_out, self.mixture)
        return Patches(*map(function, tensors + others), blind_spot=self.blind_spot)


def training_stack(
    stack: Any, blind_spot: tuple[int, int, int] = (0, 0, 0), *, zero: float = 0.0, second: Any = None
) -> TrainingStack:
    """Estimate normalization, temporal median and temporal mean of a stack of shape (T, H, W).

    `zero` is the intensity without light in the stack's units; see :class:`TrainingStack` for the others.
    """
    normalization = estimate_normalization(stack)
    return TrainingStack(
        stack,
        normalization,
        normalization.apply(temporal_median(stack)),
        normalization.apply(temporal_mean(stack)),
        blind_spot,
        (zero - normalization.low) / normalization.scale,
        second,
    )


def measured_stack(
    stack: Any, noise: NoiseEstimate, blind_spot: Literal["auto"] | tuple[int, int, int]
) -> TrainingStack:
    """Prepare a recorded stack, with what its noise estimate says of zero light and of neighbors.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Raw intensities.
    noise : NoiseEstimate
        Of this stack.
    blind_spot : "auto" or tuple of int
        Half-extent in (frames, rows, columns), or as far as the noise is correlated.
    """
    extent = blind_spot_extent(noise) if blind_spot == "auto" else blind_spot
    source = training_stack(stack, extent, zero=noise.offset)
    return replace(source, noise_correlation=neighbor_correlation(noise, extent))


def random_patches(
    stacks: Sequence[TrainingStack],
    patch: tuple[int, int, int],
    batch_size: int,
    rng: np.random.Generator,
    held_out: float = 0.0,
) -> Patches:
    """Draw a batch of patches at random places of random stacks, each turned or flipped in the plane.

    Parameters
    ----------
    stacks : sequence of TrainingStack
        Drawn with equal chance.
    patch : tuple of int
        Frames, rows and columns; stacks that are smaller give patches of their own size.
    batch_size : int
        Patches in the batch.
    rng : numpy.random.Generator
        Of places and symmetries.
    held_out : float
        Share of the voxels that are marked as held out: always the same ones of a stack.

    Returns
    -------
    Patches
        Contiguous float32 tensors on the CPU.
    """
    drawn = [stacks[int(rng.integers(len(stacks)))] for _ in range(batch_size)]
    # One size and one blind spot for the batch: the largest patch that fits all, the widest blind spot any needs.
    size = [min(patch[axis], *(each.stack.shape[axis] for each in drawn)) for axis in range(3)]
    reach = [max(each.blind_spot[axis] for each in drawn) for axis in range(3)]
    # Turning by 90 degrees would exchange the axes of the noise's correlation and the sides of the patch.
    may_turn = size[1] == size[2] and reach[1] == reach[2]
    parts = [_random_patch(each, size, may_turn, rng, held_out) for each in drawn]
    noisy, background, median, second, out = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*parts, strict=True))
    frames = torch.tensor([each.stack.shape[0] for each in drawn], dtype=torch.float32)
    if any(each.second is None for each in drawn):
        second = second[:, :, :0]
    mixtures = [each.mixture for each in drawn if each.mixture is not None]
    mixture = torch.from_numpy(np.stack(mixtures)) if len(mixtures) == len(drawn) else torch.zeros(len(drawn), 0, 0)
    return Patches(noisy, background, median, frames, second, out, mixture, (reach[0], reach[1], reach[2]))


def _random_patch(
    source: TrainingStack, size: list[int], may_turn: bool, rng: np.random.Generator, held_out: float
) -> tuple[np.ndarray, ...]:
    """Fields of `Patches` at a place but for `stack_frames`, each (channels, frames, rows, columns)."""
    t, y, x = (
        slice(start, start + length)
        for length, full in zip(size, source.stack.shape, strict=True)
        for start in [int(rng.integers(full - length + 1))]
    )
    recorded, mean, median = source.stack[t, y, x], source.mean[None, y, x], source.median[None, y, x]
    if source.thinning is None:
        noisy, zero = source.normalization.apply(recorded), source.zero
    else:
        noisy, mean, median, zero = _thinned(source, source.thinning, recorded, mean, median, rng)
    quarter_turns = int(rng.integers(4)) if may_turn else 2 * int(rng.integers(2))
    flip = bool(rng.integers(2))

    def orient(frames: np.ndarray) -> np.ndarray:
        frames = np.rot90(frames, quarter_turns, axes=(-2, -1))
        return np.ascontiguousarray(frames[..., ::-1] if flip else frames)

    second = noisy if source.second is None else source.normalization.apply(source.second[t, y, x])
    background = source.background_of(mean, zero)
    out = _held_out((t, y, x), held_out)
    return orient(noisy[None]), orient(background), orient(median[None]), orient(second[None]), orient(out[None])


def _held_out(place: tuple[slice, slice, slice], share: float) -> np.ndarray:
    """Voxels (T, H, W) whose scrambled place is among the lowest `share`: the same ones in whatever patch."""
    if not share:
        return np.zeros([along.stop - along.start for along in place], dtype=bool)
    t, y, x = (np.arange(along.start, along.stop, dtype=np.uint64) for along in place)
    mixed = t[:, None, None] * np.uint64(0x9E3779B97F4A7C15)
    mixed = mixed + y[:, None] * np.uint64(0xC2B2AE3D27D4EB4F) + x * np.uint64(0x165667B19E3779F9)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed < np.uint64(int(share * 2**64))


def _thinned(
    source: TrainingStack,
    thinning: Thinning,
    recorded: np.ndarray,
    mean: np.ndarray,
    median: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Thin a recorded patch, and normalize it and its images as a stack with so few photons would be."""
    share = thinning.draw_share(rng)
    normalization = thinning.normalization(share)
    level, still = source.normalization.invert(mean), source.normalization.invert(median)
    noisy = thin(recorded, level[0], thinning.noise, share, rng)
    # The objective takes masked voxels out of the mean: it has to hold them as they are in the patch.
    level += (noisy - recorded).sum(0, dtype=np.float64) / source.stack.shape[0]
    zero = float(normalization.apply(source.normalization.invert(np.array(source.zero))))
    return normalization.apply(noisy), normalization.apply(level), normalization.apply(still), zero
