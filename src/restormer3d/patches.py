"""Random patches out of lazy stacks: the seam where numpy frames become torch tensors for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restormer3d.normalization import Normalization, estimate_normalization, temporal_mean, temporal_median


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
    """

    stack: Any
    normalization: Normalization
    median: np.ndarray
    mean: np.ndarray
    blind_spot: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Patches:
    """A batch: noisy (B, 1, T, H, W), mean and median (B, 1, 1, H, W), frames of each stack (B,)."""

    noisy: Tensor
    mean: Tensor
    median: Tensor
    stack_frames: Tensor
    blind_spot: tuple[int, int, int]

    def to(self, device: torch.device) -> Patches:
        """Copy the batch to a device."""
        return Patches(
            *(value.to(device, non_blocking=True) for value in (self.noisy, self.mean, self.median, self.stack_frames)),
            blind_spot=self.blind_spot,
        )

    def pin_memory(self) -> Patches:
        """Copy the batch to memory from which a GPU fetches it while the host goes on."""
        return Patches(
            *(value.pin_memory() for value in (self.noisy, self.mean, self.median, self.stack_frames)),
            blind_spot=self.blind_spot,
        )


def training_stack(stack: Any, blind_spot: tuple[int, int, int] = (0, 0, 0)) -> TrainingStack:
    """Estimate normalization, temporal median and temporal mean of a stack of shape (T, H, W)."""
    normalization = estimate_normalization(stack)
    return TrainingStack(
        stack,
        normalization,
        normalization.apply(temporal_median(stack)),
        normalization.apply(temporal_mean(stack)),
        blind_spot,
    )


def random_patches(
    stacks: Sequence[TrainingStack], patch: tuple[int, int, int], batch_size: int, rng: np.random.Generator
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
    parts = [_random_patch(each, size, may_turn, rng) for each in drawn]
    noisy, mean, median = (torch.from_numpy(np.stack(arrays)[:, None]) for arrays in zip(*parts, strict=True))
    frames = torch.tensor([each.stack.shape[0] for each in drawn], dtype=torch.float32)
    return Patches(noisy, mean, median, frames, (reach[0], reach[1], reach[2]))


def _random_patch(
    source: TrainingStack, size: list[int], may_turn: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    t, y, x = (
        slice(start, start + length)
        for length, full in zip(size, source.stack.shape, strict=True)
        for start in [int(rng.integers(full - length + 1))]
    )
    noisy = source.normalization.apply(source.stack[t, y, x])
    quarter_turns = int(rng.integers(4)) if may_turn else 2 * int(rng.integers(2))
    flip = bool(rng.integers(2))

    def orient(frames: np.ndarray) -> np.ndarray:
        frames = np.rot90(frames, quarter_turns, axes=(-2, -1))
        return np.ascontiguousarray(frames[..., ::-1] if flip else frames)

    return orient(noisy), orient(source.mean[None, y, x]), orient(source.median[None, y, x])
