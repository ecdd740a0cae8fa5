"""Sliding windows over a stack as a generator of finished frames, in memory that does not grow with the stack.

The seam where numpy frames become torch tensors and come back. Frames are added up over one window depth; those
that no later window reaches are finished and leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restormer3d.arithmetic import autocast, float32_products
from restormer3d.config import InferenceConfig, Precision
from restormer3d.cuda_graph import GraphedStep
from restormer3d.normalization import Normalization
from restormer3d.tiling import (
    even_window,
    gaussian_weights,
    hann_weights,
    mirror_indices,
    temporal_starts,
    window_starts,
)

_CROP = tuple[slice, slice]
_Denoiser = Callable[[Tensor, Tensor], Tensor]  # windows and their background to denoised windows

_PASS_VOXELS = 2**21  # of the windows of a pass on CUDA, which fewer would not keep busy
_LEAST_SIDE = 24  # pixels of a window that is made smaller to save memory
_BYTES_PER_VOXEL = 2**12  # of memory that a pass takes at most, about


def denoise_frames(
    model: nn.Module,
    stack: Any,
    normalization: Normalization,
    background: np.ndarray,
    config: InferenceConfig,
    *,
    mixture: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Denoise a stack window by window and yield its frames in order.

    Parameters
    ----------
    model : nn.Module
        Maps windows (B, 1, T, H, W) and their background (B, 3, 1, H, W) to denoised windows.
    stack : stack of shape (T, H, W)
        Noisy intensities, read lazily, each frame at most a few times.
    normalization : Normalization
        Of this stack; undone on the way out.
    background : numpy.ndarray
        What the model needs to know of the whole stack, (3, H, W) float32; see `patches.TrainingStack`.
    config : InferenceConfig
        Window, overlaps, batch size, symmetries.
    mixture : numpy.ndarray, optional
        Weights of filters for this stack instead of the model's; see `patches.TrainingStack`.
    device : str or torch.device
        Where to compute. Beside the model it holds four window depths of frames: noisy, blended, done, on their way.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic; windows are blended in float32.
    progress : function, optional
        Called after every pass with ("denoise", windows done, windows in all).

    Yields
    ------
    numpy.ndarray
        Denoised frames (H, W) float32, in the stack's intensities, not rounded.

    """
    frames, height, width = stack.shape
    depth, *window = window_size(stack.shape, config)
    starts = _starts(frames, depth, config)
    crops = _crops((height, width), window, config.overlap_xy)
    plane = torch.from_numpy(np.outer(gaussian_weights(window[0]), gaussian_weights(window[1]))).to(device)
    plane_sum = torch.zeros(height, width, device=device)
    for crop in crops:
        plane_sum[crop] += plane
    hann = torch.from_numpy(hann_weights(depth)).to(device)
    image = torch.from_numpy(np.ascontiguousarray(background, dtype=np.float32)).to(device)
    blended = torch.zeros(depth, height, width, device=device)
    weight = torch.zeros(depth, device=device)
    per_pass = windows_per_pass(stack.shape, config, blended.device)
    weighted = _weighted_pass(model, mixture, hann[:, None, None] * plane, config.symmetries, precision)
    arriving: Callable[[], np.ndarray] | None = None
    for position, noisy in enumerate(_noisy_frames(stack, starts, depth, normalization, blended.device)):
        for first in range(0, len(crops), per_pass):
            batch = crops[first : first + per_pass]
            _blend(weighted, noisy, image, batch, blended, per_pass if _is_recorded(blended.device) else len(batch))
            if progress is not None:
                progress("denoise", position * len(crops) + first + len(batch), len(starts) * len(crops))
        weight += hann
        start = starts[position]
        following = starts[position + 1] if position + 1 < len(starts) else start + depth
        done = min(following - start, depth)
        finished = blended[:done] / (weight[:done, None, None] * plane_sum)
        kept = slice(max(0, -start), max(0, min(done, frames - start)))
        # Frames leave one position late, so that a GPU computes the next while they are on their way.
        if arriving is not None:
            yield from (normalization.invert(frame).astype(np.float32) for frame in arriving())
        arriving = _to_host(finished[kept])
        _shift(blended, done)
        _shift(weight, done)
    if arriving is not None:
        yield from (normalization.invert(frame).astype(np.float32) for frame in arriving())


def window_size(shape: tuple[int, int, int], config: InferenceConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of the windows that slide over a stack of this shape.

    As `config` says, or as far as the stack goes, and square where they are to be turned by a quarter.
    """
    overlaps = config.overlap_t, config.overlap_xy, config.overlap_xy
    frames, rows, columns = (
        full
        if full <= part * config.stretch
        else even_window(full, part, int(part * (1 + config.stretch) / 2), overlap)
        for full, part, overlap in zip(shape, config.window, overlaps, strict=True)
    )
    if config.symmetries == 8:
        rows = columns = min(rows, columns)
    return frames + frames % 2 if frames == shape[0] else frames, rows, columns


def count_windows(shape: tuple[int, int, int], config: InferenceConfig) -> int:
    """Count the windows that :func:`denoise_frames` computes for a stack of this shape."""
    depth, *window = window_size(shape, config)
    rows, columns = (
        len(window_starts(full, part, config.overlap_xy)) for full, part in zip(shape[1:], window, strict=True)
    )
    return len(_starts(shape[0], depth, config)) * rows * columns


def windows_per_pass(shape: tuple[int, int, int], config: InferenceConfig, device: torch.device) -> int:
    """Windows that go through the network together: on CUDA more than `config` says, where they are small.

    As many as memory allows, and about the same number in every pass: what is short of it is computed in vain.
    """
    if not _is_recorded(device):
        return config.batch_size
    window = window_size(shape, config)
    voxels = min(_PASS_VOXELS, _free_bytes(device) // (2 * _BYTES_PER_VOXEL))
    most = max(config.batch_size, voxels // math.prod(window))
    crops = len(_crops(shape[1:], window[1:], config.overlap_xy))
    return math.ceil(crops / math.ceil(crops / most))


def within_memory(
    shape: tuple[int, int, int], config: InferenceConfig, device: torch.device
) -> tuple[InferenceConfig, str]:
    """Make windows so small that a GPU's free memory holds one, and say so; unchanged where it does, and on a CPU."""
    if not _is_recorded(device):
        return config, ""
    most = _free_bytes(device) // _BYTES_PER_VOXEL
    smaller = config
    if math.prod(window_size(shape, smaller)) > most:
        smaller = smaller.model_copy(update={"stretch": 1.0})
    while math.prod(window_size(shape, smaller)) > most and min(smaller.window[1:]) >= 2 * _LEAST_SIDE:
        frames, rows, columns = smaller.window
        smaller = smaller.model_copy(update={"window": (frames, rows // 2, columns // 2)})
    if smaller is config:
        return config, ""
    window = " x ".join(map(str, window_size(shape, smaller)))
    return smaller, f"windows of {window}: the GPU's free memory holds no more than {most:,} voxels"


def _is_recorded(device: torch.device) -> bool:
    """Whether passes run as a CUDA graph, which needs all of them to have the same shape."""
    return device.type == "cuda"


def _free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free, or that PyTorch keeps unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _starts(frames: int, depth: int, config: InferenceConfig) -> list[int]:
    """First frames of the windows; a window deeper than the stack, or one that begins before it, sees it mirrored."""
    if config.mirror_t:
        return temporal_starts(frames, depth, config.overlap_t)
    return window_starts(frames, depth, config.overlap_t) if depth < frames else [0]


def _crops(size: tuple[int, int], window: Sequence[int], overlap: float) -> list[_CROP]:
    rows, columns = (window_starts(full, part, overlap) for full, part in zip(size, window, strict=True))
    return [(slice(y, y + window[0]), slice(x, x + window[1])) for y in rows for x in columns]


def _noisy_frames(
    stack: Any, starts: list[int], depth: int, normalization: Normalization, device: torch.device
) -> Iterator[Tensor]:
    """Yield the normalized frames of every position, (depth, H, W); what two have in common is read once."""
    ends = [start + depth for start in starts]
    spans = list(zip([starts[0], *ends[:-1]], ends, strict=True))

    def read(span: tuple[int, int]) -> Tensor:
        values = torch.from_numpy(_read_mirrored(stack, *span, normalization))
        return values.pin_memory() if device.type == "cuda" else values

    noisy = torch.zeros(0, *stack.shape[1:], device=device)
    for added in _ahead(read, spans) if device.type == "cuda" else map(read, spans):
        noisy = torch.cat([noisy[len(added) :], added.to(device, non_blocking=True)])
        yield noisy


def _ahead(read: Callable[[tuple[int, int]], Tensor], spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Map `read` over spans, in a thread that is one ahead: a GPU need not wait for the file."""
    with ThreadPoolExecutor(1, "frames") as worker:
        coming = worker.submit(read, spans[0])
        for following in spans[1:]:
            values = coming.result()
            coming = worker.submit(read, following)
            yield values
        yield coming.result()


def _read_mirrored(stack: Any, start: int, stop: int, normalization: Normalization) -> np.ndarray:
    """Read normalized frames `start` to `stop`, the time axis mirrored at its ends; (stop - start, H, W)."""
    indices = mirror_indices(start, stop, stack.shape[0])
    first = int(indices.min())
    return normalization.apply(stack[first : int(indices.max()) + 1])[indices - first]


def _to_host(frames: Tensor) -> Callable[[], np.ndarray]:
    """Start copying frames to the host; the returned function waits for them."""
    if not frames.is_cuda:
        return lambda: frames.cpu().numpy()
    arriving = frames.to("cpu", non_blocking=True)  # to pinned memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(frames.device))

    def wait() -> np.ndarray:
        arrived.synchronize()
        return arriving.numpy()

    return wait


def _weighted_pass(
    model: nn.Module, mixture: np.ndarray | None, weight: Tensor, symmetries: int, precision: Precision
) -> _Denoiser:
    """Return the function that denoises windows (B, 1, T, H, W) and weighs them for blending, (B, T, H, W).

    On CUDA all passes but the first few run as a graph: launched one by one, its kernels would wait for the host.
    """
    device = weight.device
    weights = None if mixture is None else torch.from_numpy(mixture).to(device)
    model.eval()

    def denoiser(windows: Tensor, images: Tensor) -> Tensor:
        return (
            model(windows, images) if weights is None else model(windows, images, weights.expand(len(windows), -1, -1))
        )

    def weighted(windows: Tensor, images: Tensor) -> Tensor:
        with float32_products(precision), autocast(device, precision):
            return _over_symmetries(denoiser, windows, images, symmetries).squeeze(1).float() * weight

    if not _is_recorded(device):
        return weighted
    graphed = GraphedStep(lambda run, *inputs: run(*inputs))
    return lambda *inputs: graphed(weighted, *inputs)


@torch.inference_mode()
def _blend(
    weighted: _Denoiser, noisy: Tensor, background: Tensor, crops: list[_CROP], blended: Tensor, windows_in_pass: int
) -> None:
    """Denoise the windows at `crops` in one pass, filled up with the last, and add them to `blended` (depth, H, W)."""
    filled = crops + crops[-1:] * (windows_in_pass - len(crops))
    windows = torch.stack([noisy[:, y, x] for y, x in filled]).unsqueeze(1)
    images = torch.stack([background[:, y, x] for y, x in filled]).unsqueeze(2)
    for (y, x), frames in zip(crops, weighted(windows, images), strict=False):
        blended[:, y, x] += frames


def _over_symmetries(denoiser: _Denoiser, windows: Tensor, images: Tensor, symmetries: int) -> Tensor:
    """Denoise windows (B, 1, T, H, W) in 1, 4 or 8 orientations and average what comes back, turned upright."""
    if symmetries == 1:
        return denoiser(windows, images)
    total = torch.zeros_like(windows)
    for quarter_turns in range(0, 4, 8 // symmetries):  # half turns and flips, with quarter turns all eight
        for flipped in ([], [-1]):
            turned = (torch.rot90(x, quarter_turns, (-2, -1)).flip(flipped).contiguous() for x in (windows, images))
            total += torch.rot90(denoiser(*turned).flip(flipped), -quarter_turns, (-2, -1))
    return total / symmetries


def _shift(values: Tensor, done: int) -> None:
    """Drop the first `done` entries and make room for as many at the end."""
    kept = values.shape[0] - done
    values[:kept] = values[done:].clone()
    values[kept:] = 0
