"""Filters and network fitted to one stack, and its frames denoised by them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from restormer3d.activity.tiles import tile_shape, waiting_bytes
from restormer3d.arithmetic import usable
from restormer3d.artefacts.planes import differences_of, put_back, with_one_image
from restormer3d.baselines import choose_gaussian, gaussian_frames, svd_frames, temporal_mean_frames
from restormer3d.config import Method
from restormer3d.inference import window_size, within_memory
from restormer3d.mixture import adapted_mixture
from restormer3d.model import Restormer3D
from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.normalization import temporal_mean, temporal_median
from restormer3d.ops import why_not_cuda
from restormer3d.patches import TrainingStack, measured_stack
from restormer3d.planning import Calibration, calibrate, ends_in_time, estimate, fit_to_time
from restormer3d.progress import Progress, Say
from restormer3d.refinement import refined_frames, why_no_components
from restormer3d.settings import Pretrained, Settings, build_model, training_plan
from restormer3d.sidecar import network_record, weights_record
from restormer3d.spool import has_room
from restormer3d.training import fit
from restormer3d.views import SomeFrames

_ADAPTING = 0.15  # most of a time limit that fitting the mixture of filters takes


@dataclass(frozen=True)
class Denoised:
    """A stack being denoised: its frames, still to be computed, and what was done so far.

    Attributes
    ----------
    frames : iterator of numpy.ndarray
        Denoised frames (H, W) in order, not rounded.
    record : dict
        Settings, losses and timings, for the sidecar.
    model : Restormer3D or None
        The network trained on this stack; None for a filter.
    """

    frames: Iterator[np.ndarray]
    record: dict[str, Any]
    model: Restormer3D | None = None


def by_network(
    stack: Any,
    measured: np.ndarray | None,
    images: np.ndarray | None,
    chosen: Settings,
    device: torch.device,
    seconds: float | None,
    progress: Progress,
    say: Say,
    pretrained: Pretrained | None,
    drawn: Sequence[int] = (),
) -> Denoised:
    """Fit filters and network.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.
    measured : numpy.ndarray or None
        Numbers of the frames that noise is measured on; None for all.
    images : numpy.ndarray or None
        Means of planes that the frames show in turns, (planes, H, W), if they are several.
    chosen, device, progress, say, pretrained
        As for :func:`restormer3d.denoising.start_denoising`.
    seconds : float or None
        For all, frames included. Where they suffice for no network, the Gaussian filter stands in.
    drawn : sequence of int, optional
        Numbers of frames that were drawn towards others (see `artefacts.stimulus_light.steadied`).
    """
    started = time.monotonic()
    recorded = stack
    stack = with_one_image(stack, images)
    engine, precision = usable(chosen.engine, chosen.precision, device)
    if precision != chosen.precision:
        say(f"TF32 is a mode of NVIDIA GPUs: on {device} the network computes in float32")
    source, noise = _source(stack, measured, chosen, say)
    chosen = _as_memory_allows(_without_components(chosen, source, say), stack.shape, device, say)
    model = copy.deepcopy(pretrained.model) if pretrained else build_model(chosen)
    source, adapted = _adapt(model, source, chosen, device, seconds, say)
    learned = to_learn_from(source, drawn)
    calibration = calibrate(model, learned, chosen, device)
    if seconds is not None:
        remaining = seconds - (time.monotonic() - started)
        chosen, note = fit_to_time(chosen, stack.shape, calibration, remaining)
        if note:
            say(note)
        if not ends_in_time(chosen, stack.shape, calibration, remaining):
            say("no network in the time that is left: the stack is denoised with the Gaussian filter instead")
            filtered = by_filter(recorded, images, chosen, "gaussian", progress, say)
            return replace(filtered, record=filtered.record | {"instead_of_the_network": note})
    _say_plan(chosen, stack.shape, calibration, device, f"{engine} operators, {precision}", say)
    prepared = time.monotonic()
    history = fit(model, [learned], chosen.training, device=device, precision=precision, progress=progress)
    if history and "kept_iteration" in history[-1]:
        kept = history[-1]["kept_iteration"]
        say(
            f"{len(history)} iterations done; held-out voxels chose the weights of "
            + (f"iteration {kept}" if kept else "before")
        )
    weights = pretrained.weights if pretrained else weights_record(chosen)
    record = network_record(chosen, source, history, weights=weights, device=device, engine=engine, precision=precision)
    seconds_spent = {"prepare": prepared - started, "train": time.monotonic() - prepared}
    record |= {"noise": asdict(noise), "mixture": adapted, "seconds": seconds_spent}
    frames, afterwards = refined_frames(
        model, source, noise, measured, images, chosen, device, precision, progress, say
    )
    return Denoised(frames, record | afterwards, model)


def by_filter(
    stack: Any, images: np.ndarray | None, chosen: Settings, method: Method, progress: Progress, say: Say
) -> Denoised:
    """Denoise by one of the plain filters; arguments as for :func:`by_network`."""
    if images is not None:
        filtered = by_filter(with_one_image(stack, images), None, chosen, method, progress, say)
        return replace(filtered, frames=put_back(filtered.frames, differences_of(images)))
    if method == "temporal-mean":
        return Denoised(temporal_mean_frames(stack), {"method": method, "settings": {}})
    if method == "svd":
        frames = svd_frames(stack, progress=progress)
        return Denoised(frames, {"method": method, "settings": {}})
    # Filtering what differs from the temporal mean leaves the static image sharp: better at every noise level.
    sigma_t, sigma_xy = chosen.sigma or choose_gaussian(stack, around_mean=True)
    why = "given" if chosen.sigma else "chosen by held-out frames"
    say(f"Gaussian filter of {sigma_t:g} frames and {sigma_xy:g} pixels around the temporal mean, {why}")
    frames = gaussian_frames(stack, sigma_t, sigma_xy, around_mean=True)
    return Denoised(frames, {"method": method, "settings": {"sigma_t": sigma_t, "sigma_xy": sigma_xy}})


def _say_plan(
    chosen: Settings,
    shape: tuple[int, int, int],
    calibration: Calibration,
    device: torch.device,
    computing: str,
    say: Say,
) -> None:
    """Say what will be done, in which time and memory, and by what it is computed."""
    seconds, memory = estimate(chosen, shape, calibration, device)
    waiting = waiting_bytes(shape, chosen.inference)
    files = f" (and {waiting / 1e9:.1f} GB of temporary files)" if waiting else ""
    most = "at most " if chosen.training.stop_early and chosen.training.iterations else ""
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    say(
        f"{most}about {_duration(seconds)} and {memory / 1e9:.1f} GB{files} on {device} ({threads}{computing}): "
        f"{training_plan(chosen)}"
    )
    if device.type == "cuda" and (obstacle := why_not_cuda(device)):
        say(f"plain PyTorch computes on this GPU, which is slower than the Triton kernels: {obstacle}")


def _without_components(chosen: Settings, source: TrainingStack, say: Say) -> Settings:
    """Leave out components where it is known before any plan that they can't be told from noise."""
    why = why_no_components(source) if chosen.inference.components else ""
    if not why:
        return chosen
    say(f"{why}, that step is left out")
    return replace(chosen, inference=chosen.inference.model_copy(update={"components": False}))


def _as_memory_allows(chosen: Settings, shape: tuple[int, int, int], device: torch.device, say: Say) -> Settings:
    """Take the field as a whole where denoised tiles have nowhere to wait, and windows that a GPU's memory holds."""
    inference = chosen.inference
    needed = waiting_bytes(shape, inference)
    if needed and not has_room(needed):
        say(
            f"the folder for temporary files has no room for {needed / 1e9:.1f} GB of denoised tiles and as much "
            "again: components see fewer frames at a time instead. TMPDIR=FOLDER names another one."
        )
        inference = inference.model_copy(update={"tiles": False})
    # Tiles may have larger windows than the field; where a time limit leaves components out, there are no tiles.
    for windows_of in (tile_shape(shape, inference), shape):
        inference, smaller = within_memory(windows_of, inference, device)
        if smaller:
            say(smaller)
    return replace(chosen, inference=inference)


def _adapt(
    model: Restormer3D,
    source: TrainingStack,
    chosen: Settings,
    device: torch.device,
    seconds: float | None,
    say: Say,
) -> tuple[TrainingStack, dict[str, float]]:
    """Fit a mixture of filters to the stack, if the network has one."""
    if not chosen.training.adapt_mixture or model.config.start != "filters":
        return source, {}
    limit = math.inf if seconds is None else _ADAPTING * seconds
    window = window_size(source.stack.shape, chosen.inference)
    mixture, adapted = adapted_mixture(model.to(device), source, window, seconds=limit)
    say(f"the mixture of filters is fitted to the stack: {adapted['distance']:.1f} of the usual spread away")
    return replace(source, mixture=mixture.cpu().numpy()), adapted


def _source(stack: Any, measured: np.ndarray | None, chosen: Settings, say: Say) -> tuple[TrainingStack, NoiseEstimate]:
    """Measure what training needs of a stack, its blind spot included."""
    noise = estimate_noise(stack, frames=measured)
    source = measured_stack(stack, noise, chosen.training.blind_spot)
    if chosen.training.blind_spot == "auto" and any(source.blind_spot):
        say(
            "the noise of neighboring voxels is correlated: the blind spot is widened to "
            + " x ".join(str(2 * reach + 1) for reach in source.blind_spot)
            + " (frames x rows x columns)"
        )
    return source, noise


def to_learn_from(source: TrainingStack, drawn: Sequence[int]) -> TrainingStack:
    """Leave out frames that were drawn towards others: in them, the network would see voxels that it is to predict."""
    if not drawn:
        return source
    some = SomeFrames(source.stack, np.setdiff1d(np.arange(source.stack.shape[0]), drawn))
    mean, median = (source.normalization.apply(of(some)) for of in (temporal_mean, temporal_median))
    return replace(source, stack=some, mean=mean, median=median)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
