"""What one training step learns: the temporal median, or masked voxels that the network cannot see (Noise2Void).

The blind spot is strict: neither a masked voxel nor one whose noise is correlated with it reaches the network, not
at borders and not through the temporal mean. Where images of planes have been taken away from their frames
(`planes.WithoutPlanes`), the share of a voxel in its plane's image, one over the frames of that plane, stays in the
other frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restormer3d.filters import noise_variance

_CANDIDATES = 8  # neighbors tried for each masked voxel before its patch mean is taken


def temporal_median_loss(
    model: nn.Module, noisy: Tensor, background: Tensor, median: Tensor, mixture: Tensor | None = None
) -> Tensor:
    """L1 distance of the denoised patches from their stacks' temporal median, broadcast over frames.

    Parameters
    ----------
    model : nn.Module
        Maps noisy patches and background to denoised patches.
    noisy : Tensor
        Patches with shape (B, 1, T, H, W).
    background : Tensor
        What is known of the whole stacks at these pixels, (B, 3, 1, H, W); see `patches.TrainingStack`.
    median : Tensor
        Temporal median of the whole stacks, (B, 1, 1, H, W).
    mixture : Tensor, optional
        Weights of filters for each patch; see `model.Restormer3D`.
    """
    return (_denoised(model, noisy, background, mixture) - median).abs().mean()


def blind_spot_loss(
    model: nn.Module,
    noisy: Tensor,
    background: Tensor,
    stack_frames: Tensor,
    *,
    masked_fraction: float,
    extent: tuple[int, int, int],
    loss: str,
    generator: torch.Generator,
) -> Tensor:
    """Noise2Void loss: predict the chosen voxels from patches in which they are replaced.

    Parameters
    ----------
    model : nn.Module
        Maps noisy patches and background to denoised patches.
    noisy : Tensor
        Patches with shape (B, 1, T, H, W).
    background : Tensor
        What is known of the whole stacks, (B, 3, 1, H, W), the temporal mean first. The masked voxels are part of the
        mean; their share is exchanged for that of their replacements, else a network could solve for them.
    stack_frames : Tensor
        Frames of each patch's stack, (B,): what the temporal mean was divided by.
    masked_fraction, extent, generator
        See :func:`blind_spot`.
    loss : {"l1", "mse", "noise"}
        Loss on the chosen voxels; "noise" is the mean squared error in units of the local noise variance.

    References
    ----------
    Krull et al., "Noise2Void - Learning Denoising from Single Noisy Images", CVPR 2019.
    """
    inputs = hide(noisy, background, stack_frames, masked_fraction=masked_fraction, extent=extent, generator=generator)
    return masked_loss(model, *inputs, loss=loss)


def hide(
    noisy: Tensor,
    background: Tensor,
    stack_frames: Tensor,
    *,
    masked_fraction: float,
    extent: tuple[int, int, int],
    generator: torch.Generator,
    held_out: Tensor | None = None,
    score: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the masks of a step: what :func:`masked_loss` needs. Arguments as for :func:`blind_spot_loss`.

    Of the voxels `held_out` (B, 1, T, H, W) none is chosen; to `score`, all of them are and no others.

    Returns
    -------
    masked : Tensor
        The patches with replaced voxels, (B, 1, T, H, W).
    background : Tensor
        The temporal mean with the replacements' share instead of the masked voxels', (B, 3, 1, H, W).
    noisy : Tensor
        The patches as they came.
    chosen : Tensor of bool
        Voxels that count in the loss, (B, 1, T, H, W).
    """
    # Everywhere on CUDA: counting the hidden voxels would make the host wait for the GPU.
    masked, chosen = blind_spot(
        noisy, masked_fraction, extent, generator, everywhere=noisy.is_cuda, chosen=held_out if score else None
    )
    if held_out is not None and not score:
        chosen = chosen & ~held_out
    share = (masked - noisy).sum(2, keepdim=True) / stack_frames.view(-1, 1, 1, 1, 1).to(noisy.dtype)
    background = torch.cat([background[:, :1] + share, background[:, 1:]], 1)
    return masked, background, noisy, chosen


def masked_loss(
    model: nn.Module,
    masked: Tensor,
    background: Tensor,
    noisy: Tensor,
    chosen: Tensor,
    mixture: Tensor | None = None,
    *,
    loss: str,
) -> Tensor:
    """Mean loss ("l1", "mse" or "noise") of the prediction on the chosen voxels, from what :func:`hide` returns."""
    error = torch.where(
        chosen, _denoised(model, masked, background, mixture) - noisy, 0.0
    )  # selecting them would need their number
    if loss == "noise":
        error = error * noise_variance(masked).rsqrt()
    return (error.abs() if loss == "l1" else error.square()).sum() / chosen.sum().clamp(min=1)


def second_recording_loss(
    model: nn.Module, noisy: Tensor, background: Tensor, second: Tensor, mixture: Tensor | None = None
) -> Tensor:
    """Noise2Noise loss: predict one noisy recording of a scene from another.

    Every voxel counts, and none has to be hidden, for the noise of the two is independent. Only simulated scenes can
    be recorded twice. The squared error is in units of the local noise variance: the best unbiased weights.

    Parameters
    ----------
    model : nn.Module
        Maps noisy patches and background to denoised patches.
    noisy, second : Tensor
        Patches of the two recordings, (B, 1, T, H, W), in one normalization.
    background : Tensor
        Of the first recording, (B, 3, 1, H, W).
    mixture : Tensor, optional
        Weights of filters for each patch; see `model.Restormer3D`.

    References
    ----------
    Lehtinen et al., "Noise2Noise: Learning Image Restoration without Clean Data", ICML 2018.
    """
    error = _denoised(model, noisy, background, mixture) - second
    return (error.square() / noise_variance(noisy)).mean()


def _denoised(model: nn.Module, noisy: Tensor, background: Tensor, mixture: Tensor | None) -> Tensor:
    """Pass a mixture on only if there is one: other models need not know of it."""
    own = mixture is not None and mixture.numel() > 0
    return model(noisy, background, mixture) if own else model(noisy, background)


def blind_spot(
    noisy: Tensor,
    masked_fraction: float,
    extent: tuple[int, int, int],
    generator: torch.Generator,
    *,
    everywhere: bool = False,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose voxels at random and replace them, and all within `extent` of them, by neighbors.

    A replacement is another voxel of the patch, at most one further away than `extent` reaches along each axis,
    never the voxel itself and never one that is itself replaced. Where no candidate qualifies, the mean of the
    patch's visible voxels stands in.

    Parameters
    ----------
    noisy : Tensor
        Patches with shape (B, 1, T, H, W).
    masked_fraction : float
        Share of voxels that are replaced; with an extended blind spot fewer are chosen for the loss.
    extent : tuple of int
        Half-extent of the blind spot in frames, rows and columns; (0, 0, 0) masks single voxels.
    generator : torch.Generator
        On the CPU or on the patches' device.
    everywhere : bool
        Draw replacements for all voxels and use those of the hidden ones: more work, but no shape depends on the
        draw, so that nothing has to be read back from a GPU. Other replacements, just as random.
    chosen : Tensor of bool, optional
        Voxels to replace instead of random ones, (B, 1, T, H, W).

    Returns
    -------
    masked : Tensor
        The patches with replaced voxels, (B, 1, T, H, W).
    chosen : Tensor of bool
        Voxels that count in the loss, (B, 1, T, H, W).
    """
    if chosen is None:
        chosen = _choose(noisy, masked_fraction, extent, generator)
    hidden = _dilate(chosen, extent)
    flat = hidden.flatten()
    index = torch.arange(flat.numel(), device=flat.device) if everywhere else flat.nonzero().squeeze(1)
    source = _visible_neighbors(index, hidden, extent, generator)
    visible_mean = (noisy * ~hidden).sum((1, 2, 3, 4)) / (~hidden).sum((1, 2, 3, 4)).clamp(min=1)
    fallback = visible_mean[index // noisy[0].numel()]
    values = torch.where(source >= 0, noisy.flatten()[source.clamp(min=0)], fallback)
    values = torch.where(flat[index], values, noisy.flatten()[index])
    return noisy.flatten().index_put((index,), values).view_as(noisy), chosen


def _choose(noisy: Tensor, fraction: float, extent: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Voxels to predict: the same number in every patch, at least one."""
    voxels = noisy[0].numel()
    covered = 1
    for reach in extent:
        covered *= 2 * reach + 1
    count = max(1, round(fraction * voxels / covered))
    ranks = torch.rand(noisy.shape[0], voxels, generator=generator, device=generator.device)
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, ranks.topk(count, dim=1).indices, True)
    return chosen.view(noisy.shape).to(noisy.device)


def _dilate(chosen: Tensor, extent: tuple[int, int, int]) -> Tensor:
    """Voxels (B, 1, T, H, W) that are no further than `extent` from a chosen one, along each axis."""
    for axis, reach in enumerate(extent, start=2):
        length, grown = chosen.shape[axis], chosen.clone()
        for lag in range(1, min(reach, length - 1) + 1):  # not max_pool3d, which not every device has
            span = length - lag
            grown.narrow(axis, lag, span).logical_or_(chosen.narrow(axis, 0, span))
            grown.narrow(axis, 0, span).logical_or_(chosen.narrow(axis, lag, span))
        chosen = grown
    return chosen


def _visible_neighbors(
    index: Tensor, hidden: Tensor, extent: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """For each hidden voxel the flat index of a visible neighbor, -1 where no candidate is visible."""
    sizes = hidden.shape[2:]
    patch, rest = index // hidden[0].numel(), index % hidden[0].numel()
    place = torch.stack([rest // (sizes[1] * sizes[2]), rest // sizes[2] % sizes[1], rest % sizes[2]])
    flat_hidden = hidden.flatten()
    source = torch.full_like(index, -1)
    for _ in range(_CANDIDATES):
        neighbor = patch
        for axis, (size, reach) in enumerate(zip(sizes, extent, strict=True)):
            offset = _offsets(index, reach + 1, generator)
            neighbor = neighbor * size + _reflect(place[axis] + offset, size)
        usable = (source < 0) & ~flat_hidden[neighbor]
        source = torch.where(usable, neighbor, source)
    return source


def _offsets(index: Tensor, radius: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(-radius, radius + 1, index.shape, generator=generator, device=generator.device)
    return drawn.to(index.device)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions that fall outside [0, size); the border itself is not repeated."""
    position = position.abs()
    return torch.minimum(position, 2 * (size - 1) - position).clamp(0, size - 1)
