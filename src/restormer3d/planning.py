"""What one denoising will cost in time and memory, and a plan that ends in time.

Times come from a short calibration with the real model, patches and device, never from a table.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import psutil
import torch

from restormer3d.activity.chunks import count_chunks
from restormer3d.activity.fields import FIELD_FRAMES
from restormer3d.activity.tiles import part_shape, tile_places, tile_shape
from restormer3d.arithmetic import autocast, float32_products, usable
from restormer3d.config import InferenceConfig, Precision, TrainingConfig
from restormer3d.inference import count_windows, window_size, windows_per_pass
from restormer3d.model import Restormer3D
from restormer3d.patches import TrainingStack
from restormer3d.selection import batches_of, check_iterations
from restormer3d.settings import Settings
from restormer3d.training import fit

# Overlaps in time and in the plane, from what was asked for down to none: what --time-limit may choose from.
_OVERLAPS = ((1.0, 1.0), (0.5, 0.5), (0.5, 0.25), (0.25, 0.25), (0.25, 0.125), (0.125, 0.0), (0.0, 0.0))
# What is left out where even without overlap the time would not suffice: first what brings least for its time.
_SPARED = ("footprints", "courses", "components")
_GRAPH_ITERATIONS = 8  # on CUDA the first ones run unrecorded, the next one is recorded (cuda_graph.py)
_TIMED_SIDE = 64  # frames and pixels of the windows that are timed on a CPU, at most
_VOXEL_BYTES = 200  # that the default network computes a voxel of a large window with on a CPU
_FRAME_BYTES = 90_000  # of memory that the network for courses takes for each frame of a field of 48 courses
_SAFETY = 0.9  # share of a time limit that is planned with; the rest is for what the calibration did not see
# What the steps after the network take, relative to the network's time for a voxel: on two CPU cores, on recordings of
# 96 to 256 pixels a side, rather too much than too little.
_STATIC_IMAGE = 25.0  # to denoise a pixel of the static image
_FOOTPRINTS = 200.0  # for footprints of a chunk of frames, for a pixel
_COURSES = 0.15  # for courses, for a voxel
_FIELDS = 0.25  # to take fields apart, for footprints and for courses, for a voxel
_COMPONENTS = 1.25  # to take a stack apart into components, for a voxel


@dataclass(frozen=True)
class Calibration:
    """Seconds of one training iteration, and of inference for a voxel of a window, on this machine."""

    seconds_per_iteration: float
    seconds_per_voxel: float


def calibrate(model: Restormer3D, source: TrainingStack, chosen: Settings, device: torch.device) -> Calibration:
    """Time a training iteration and an inference pass on a copy of the model, of large windows a part.

    Each runs before, to compile and allocate, and once for the clock.
    """
    trial = copy.deepcopy(model)
    precision = usable(chosen.engine, chosen.precision, device)[1]
    marks: list[float] = []
    if chosen.training.warmup_iterations + chosen.training.iterations:
        few = {"iterations": _GRAPH_ITERATIONS if device.type == "cuda" else 2, "warmup_iterations": 0, "held_out": 0.0}
        training = chosen.training.model_copy(update=few)
        fit(
            trial,
            [source],
            training,
            device=device,
            precision=precision,
            progress=lambda *_: marks.append(_now(device)),
        )
    tile = tile_shape(source.stack.shape, chosen.inference)
    window, together = window_size(tile, chosen.inference), windows_per_pass(tile, chosen.inference, device)
    per_voxel = _seconds_per_voxel(trial.to(device), window, together, device, precision)
    checks = 0.0
    total = chosen.training.warmup_iterations + chosen.training.iterations
    if chosen.training.held_out and total:
        voxels = chosen.training.batch_size * math.prod(chosen.training.patch)
        checks = len(check_iterations(total)) * batches_of(total) / total * voxels * per_voxel
    return Calibration(marks[-1] - marks[-2] + checks if marks else 0.0, per_voxel)


def _now(device: torch.device) -> float:
    """Read the clock once everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


@torch.inference_mode()
def _seconds_per_voxel(
    model: Restormer3D, window: tuple[int, int, int], batch_size: int, device: torch.device, precision: Precision
) -> float:
    sides = window
    if device.type == "cpu":  # a part of a large one is timed as well in less time
        frames, height, width = (min(side, _TIMED_SIDE) for side in window)
        sides = (frames, height, width)
    noisy = torch.rand(batch_size, 1, *sides, device=device)
    mean = noisy.mean(2, keepdim=True)
    background = torch.cat([mean, torch.full_like(mean, 1 / window[0]), torch.zeros_like(mean)], 1)
    started = 0.0
    for _ in range(2):
        started = time.monotonic()
        with float32_products(precision), autocast(device, precision):
            model(noisy, background).sum().item()  # .item() waits for the device
    return (time.monotonic() - started) / batch_size / math.prod(sides)


def fit_to_time(
    chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, seconds: float
) -> tuple[Settings, str]:
    """Reduce overlap and iterations, never below what the time forces, so that a stack ends within `seconds`.

    Overlap is given up first where inference would take more than half of the time, then iterations, then steps after
    the network; without these there may be room for overlap again.

    Returns
    -------
    Settings
        The same, or with less overlap, fewer iterations and fewer steps.
    str
        What was chosen, for the user; empty if the whole recipe fits.
    """
    budget = seconds * _SAFETY
    total = chosen.training.warmup_iterations + chosen.training.iterations
    # Where held-out voxels decide how long training is worth it, overlap makes room for no more than their first check.
    wanted = min(check_iterations(total) - {0}, default=0) if chosen.training.stop_early else total
    room = max(budget / 2, budget - wanted * calibration.seconds_per_iteration)
    spared: list[str] = []
    inference, inference_time = _most_overlap(chosen.inference, shape, calibration, room)
    for part in _SPARED:
        if inference_time > budget and getattr(chosen.inference, part):
            spared.append(part)
            fewer = chosen.inference.model_copy(update=dict.fromkeys(spared, False))
            inference, inference_time = _most_overlap(fewer, shape, calibration, room)
    affordable = max(0, int((budget - inference_time) / max(calibration.seconds_per_iteration, 1e-9)))
    if inference == chosen.inference and affordable >= total:
        return chosen, ""
    training = _shorten(chosen.training, affordable)
    done = training.warmup_iterations + training.iterations
    overlaps = f"overlap {inference.overlap_t:g} in time and {inference.overlap_xy:g} in the plane"
    note = f"to end within {max(0.0, seconds) / 60:.1f} min: {done} of {total} iterations, {overlaps}"
    if spared:
        note += f", without {' and '.join(spared)}"
    if inference_time > budget:
        note += "; even so the time will not suffice on this machine"
    return replace(chosen, training=training, inference=inference), note


def _most_overlap(
    asked: InferenceConfig, shape: tuple[int, int, int], calibration: Calibration, seconds: float
) -> tuple[InferenceConfig, float]:
    """Reduce overlap until inference takes no more than so many seconds, or there is none; and how many it takes."""
    inference, inference_time = asked, 0.0
    for overlap_t, overlap_xy in _OVERLAPS:
        update = {"overlap_t": min(overlap_t, asked.overlap_t), "overlap_xy": min(overlap_xy, asked.overlap_xy)}
        inference = asked.model_copy(update=update)
        inference_time = _inference_seconds(shape, inference, calibration)
        if inference_time <= seconds:
            break
    return inference, inference_time


def ends_in_time(chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, seconds: float) -> bool:
    """Whether what :func:`fit_to_time` chose ends within `seconds`, with a network that has been trained at all."""
    trained = chosen.weights is not None or chosen.training.warmup_iterations + chosen.training.iterations > 0
    return trained and _inference_seconds(shape, chosen.inference, calibration) <= seconds * _SAFETY


def _inference_seconds(shape: tuple[int, int, int], inference: InferenceConfig, calibration: Calibration) -> float:
    tile, depth = tile_shape(shape, inference), part_shape(shape, inference)[0]
    window = window_size(tile, inference)  # larger or smaller with other overlaps
    voxels = float(inference.symmetries * count_windows(tile, inference) * math.prod(window))
    chunks, pixels = count_chunks(shape[0], depth), math.prod(tile[1:])
    if inference.components:
        voxels = 2 * voxels + _COMPONENTS * chunks * depth * pixels
    if inference.components and depth >= FIELD_FRAMES:
        each = inference.footprints * _FOOTPRINTS + (inference.footprints + inference.courses) * _FIELDS * depth
        each += inference.courses * _COURSES * depth
        voxels += each * chunks * pixels
    if inference.static_image and chunks > 1:  # what the mean of each has of its own
        voxels += 2 * _STATIC_IMAGE * chunks * pixels
    voxels *= len(tile_places(shape, tile))
    if inference.static_image or inference.footprints:
        voxels += _STATIC_IMAGE * math.prod(shape[1:])
    return voxels * calibration.seconds_per_voxel


def _shorten(training: TrainingConfig, affordable: int) -> TrainingConfig:
    total = training.warmup_iterations + training.iterations
    if affordable >= total:
        return training
    warmup = training.warmup_iterations * affordable // total
    return training.model_copy(update={"warmup_iterations": warmup, "iterations": affordable - warmup})


def estimate(
    chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, device: torch.device
) -> tuple[float, float]:
    """Seconds and bytes that a denoising will take; on a CPU with what the process holds already."""
    iterations = chosen.training.warmup_iterations + chosen.training.iterations
    seconds = iterations * calibration.seconds_per_iteration
    seconds += _inference_seconds(shape, chosen.inference, calibration)
    inference = chosen.inference
    tile, depth = tile_shape(shape, inference), part_shape(shape, inference)[0]
    window = window_size(tile, inference)
    held = 4 * window[0]
    if inference.components:  # the stack is denoised twice, and chunks of both are compared
        held = 2 * held + (7 + (inference.footprints or inference.courses)) * depth
        held += depth * (tile != shape and depth == shape[0])  # a tile as it was recorded
    elif inference.static_image:
        held += 3 * depth
    buffers = 4 * held * math.prod(tile[1:])
    if device.type == "cpu":  # the calibration has just run, but for the part of the window that it did not time
        timed = inference.batch_size * math.prod(min(side, _TIMED_SIDE) for side in window) * _VOXEL_BYTES
        computed = inference.batch_size * math.prod(window) * _VOXEL_BYTES
        if inference.components and inference.courses and depth >= FIELD_FRAMES:
            computed = max(computed, depth * _FRAME_BYTES)
        return seconds, psutil.Process().memory_info().rss + buffers + computed - timed
    return seconds, torch.cuda.max_memory_allocated(device) + buffers if device.type == "cuda" else buffers
