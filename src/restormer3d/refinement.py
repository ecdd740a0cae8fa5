"""Frames that a trained network denoises, refined: by components, the networks for these, and the static image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from restormer3d.activity.chunks import LEAST_FRAMES, chunk_frames, in_chunks
from restormer3d.activity.components import AddedNoise, MeanImage, Step, refine_by_components
from restormer3d.activity.courses import denoise_courses
from restormer3d.activity.fields import FIELD_FRAMES, least_deviation
from restormer3d.activity.footprints import denoise_footprints
from restormer3d.activity.tiles import Place, in_tiles, part_shape, tile_places
from restormer3d.arithmetic import float64_device
from restormer3d.artefacts.planes import differences_of, put_back
from restormer3d.checkpoint import small_network
from restormer3d.config import Precision
from restormer3d.inference import denoise_frames
from restormer3d.local_noise import local_variance
from restormer3d.model import Restormer3D
from restormer3d.noise import LEAK_THRESHOLD, NoiseEstimate
from restormer3d.patches import TrainingStack
from restormer3d.progress import Progress, Say, part_of
from restormer3d.settings import Settings
from restormer3d.sidecar import networks_record
from restormer3d.static_image import denoise_change, denoise_mean, stabilized
from restormer3d.unets import CourseNetwork, FootprintNetwork, ImageNetwork
from restormer3d.views import SomePixels

_Denoiser = Callable[..., Iterator[np.ndarray]]  # of a stack, with the `background` of it


def refined_frames(
    model: Restormer3D,
    source: TrainingStack,
    noise: NoiseEstimate,
    measured: np.ndarray | None,
    images: np.ndarray | None,
    chosen: Settings,
    device: torch.device,
    precision: Precision,
    progress: Progress,
    say: Say,
) -> tuple[Iterator[np.ndarray], dict[str, Any]]:
    """Denoise the frames of a stack, and refine them as far as settings ask for that and the stack allows it.

    Parameters
    ----------
    model : Restormer3D
        Trained.
    source : TrainingStack
        The stack, without what planes differ by.
    noise : NoiseEstimate
        Of the stack.
    measured, images, chosen, device, progress, say
        As for :func:`restormer3d.fitting.by_network`.
    precision : Precision
        Of the network's arithmetic.

    Returns
    -------
    tuple of iterator and dict
        Frames (H, W), computed as they are asked for, and a record of what the network's own go through.
    """
    denoise = partial(
        denoise_frames,
        model,
        normalization=source.normalization,
        config=chosen.inference,
        mixture=source.mixture,
        device=device,
        precision=precision,
    )
    config, stack = chosen.inference, source.stack
    added = _added_noise(source, noise, measured, say) if config.components else None
    static, images, mean_of = _static_images(source, noise, added, images, chosen, device)
    steps: dict[str, Callable[[Place], Step]] = {}
    if added is not None:
        part = part_shape(stack.shape, config)
        _say_part(stack.shape, part, say)
        steps = _activity_steps(chosen, added, part[0], static, noise, float64_device(device), say)
        refined = partial(
            _refined_tile,
            denoise=denoise,
            source=source,
            added=added,
            device=device,
            depth=part[0],
            steps=list(steps.values()),
            mean_of=mean_of,
            progress=progress,
        )
        frames = in_tiles(stack.shape, part, refined)
    else:
        frames = denoise(stack, background=source.background, progress=progress)
        if mean_of is not None:
            whole = (slice(None), slice(None))
            frames = _with_means(frames, stack, chunk_frames(stack.shape, config.chunk_voxels), mean_of(whole))
    if images is not None:
        frames = put_back(frames, differences_of(images))
    done = {*steps, "static_image"} if mean_of is not None else set(steps)
    asked = networks_record(chosen)
    networks = {step: asked[step] if step in done else None for step in ("footprints", "courses", "static_image")}
    return frames, {"components": added is not None} | networks


def _static_images(
    source: TrainingStack,
    noise: NoiseEstimate,
    added: AddedNoise | None,
    images: np.ndarray | None,
    chosen: Settings,
    device: torch.device,
) -> tuple[np.ndarray | None, np.ndarray | None, Callable[[Place], MeanImage] | None]:
    """Denoise the temporal mean and the images of planes, as far as asked for, and say what tiles' means become."""
    config = chosen.inference
    if not config.static_image and not config.footprints:
        return None, images, None
    still = {"correlation": source.noise_correlation, "device": device}
    still["network"] = small_network(ImageNetwork, chosen.networks)
    count, mean = source.stack.shape[0], source.normalization.invert(source.mean)
    static = denoise_mean(mean, noise, count, **still)
    if not config.static_image:
        return static, images, None
    if images is not None:
        images = np.stack([denoise_mean(image, noise, count // len(images), **still) for image in images])
    variance = np.maximum(added.variance, added.least_deviation**2) if added else noise.variance(mean)
    return static, images, partial(_mean_image, static, mean, variance, count, still)


def why_no_components(source: TrainingStack) -> str:
    """Why a stack can't be taken apart into components; empty if it can."""
    if source.stack.shape[0] < LEAST_FRAMES:
        return f"{source.stack.shape[0]} frames are too few to tell components from noise"
    if any(abs(r) > LEAK_THRESHOLD for r in source.noise_correlation[0][1:]):
        return "the noise of consecutive frames is correlated: components cannot be told from it"
    return ""


def _say_part(shape: tuple[int, int, int], part: tuple[int, int, int], say: Say) -> None:
    """Say what components see, if that is not all of the stack."""
    if part[1:] != shape[1:]:
        count = len(tile_places(shape, part))
        say(f"components are taken from {count} tiles of {part[1]} x {part[2]} pixels one after the other")
    if part[0] < shape[0]:
        more = "" if part[1:] != shape[1:] else "; [inference] chunk_voxels in a --config file lets them see more"
        say(f"components are taken from {part[0]} frames at a time{more}")


def _refined_tile(
    place: Place,
    number: int,
    count: int,
    *,
    denoise: _Denoiser,
    source: TrainingStack,
    added: AddedNoise,
    device: torch.device,
    depth: int,
    steps: list[Callable[[Place], Step]],
    mean_of: Callable[[Place], MeanImage] | None,
    progress: Progress,
) -> Iterator[np.ndarray]:
    """Denoise and refine a tile as a stack of its own, but by what is known of the whole one."""
    stack = source.stack
    if count > 1:
        stack = SomePixels(stack, *place)
        if depth == stack.shape[0]:  # frames would be read, perhaps decoded, three times
            stack = stack.read()
    noisier = replace(added, stack=stack, variance=added.variance[place])
    background = source.background[:, *place]
    frames = denoise(stack, background=background, progress=part_of(progress, number, count))
    others = denoise(noisier, background=background)
    mean_image = None if mean_of is None else mean_of(place)
    return refine_by_components(frames, others, noisier, device, [step(place) for step in steps], mean_image, depth)


def _activity_steps(
    chosen: Settings,
    added: AddedNoise,
    depth: int,
    static: np.ndarray | None,
    noise: NoiseEstimate,
    device: torch.device,
    say: Say,
) -> dict[str, Callable[[Place], Step]]:
    """What is done with the components of a tile by networks of their own, by name."""
    parts = chosen.inference
    steps: dict[str, Callable[[Place], Step]] = {}
    if depth < FIELD_FRAMES:
        if parts.footprints or parts.courses:
            say(
                f"footprints and courses of activity need {FIELD_FRAMES} frames together in memory, here are {depth}: "
                "these steps are left out"
            )
        return steps
    if parts.footprints and static is not None:
        image = torch.from_numpy(stabilized(static, noise)).to(device, torch.float32)
        of_footprints = copy.deepcopy(small_network(FootprintNetwork, chosen.networks)).to(device)
        steps["footprints"] = lambda place: partial(
            denoise_footprints, static=image[place], correlation=added.correlation, network=of_footprints
        )
    if parts.courses:
        of_courses = copy.deepcopy(small_network(CourseNetwork, chosen.networks)).to(device)
        steps["courses"] = lambda _: partial(denoise_courses, network=of_courses)
    return steps


def _added_noise(
    source: TrainingStack, noise: NoiseEstimate, measured: np.ndarray | None, say: Say
) -> AddedNoise | None:
    """Noise like that of the stack, to tell the denoised stack's components from noise; None where there is none."""
    mean = source.normalization.invert(source.mean)
    variance, by_place = local_variance(source.stack, noise, mean, measured)
    if by_place:
        say("the noise of a pixel is not told by its mean: it is measured everywhere")
    if not variance.any():
        say("differences of frames show no noise: no component can be told from it, that step is left out")
        return None
    least = float(least_deviation(torch.from_numpy(np.sqrt(variance))).min())
    return AddedNoise(source.stack, variance, source.noise_correlation, least)


def _mean_image(
    static: np.ndarray, mean: np.ndarray, variance: np.ndarray, count: int, still: dict[str, Any], place: Place
) -> MeanImage:
    """What denoises the mean of some of `count` frames of a tile: `static` instead of `mean`, and their own change.

    Images are (H, W), of the whole field.
    """

    def denoised(of_some: np.ndarray, frames: int) -> np.ndarray:
        if frames == count:
            return static[place]
        return static[place] + denoise_change(of_some - mean[place], variance[place], (frames, count), **still)

    return denoised


def _with_means(frames: Iterator[np.ndarray], stack: Any, depth: int, mean_image: MeanImage) -> Iterator[np.ndarray]:
    """Replace the mean of denoised frames (H, W), chunk by chunk of `depth` frames."""

    def change(start: int, denoised: np.ndarray) -> np.ndarray:
        recorded = stack[start : start + len(denoised)].mean(0, dtype=np.float64)
        return denoised + (mean_image(recorded, len(denoised)) - denoised.mean(0, dtype=np.float64)).astype(np.float32)

    return in_chunks(((frame,) for frame in frames), stack.shape, depth, change)
