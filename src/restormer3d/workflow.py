"""Files in, files out: denoise and inspect stacks. Where stacks, plans, training and inference meet."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from restormer3d.arithmetic import Engine, Precision, forced_engine, usable
from restormer3d.baselines import choose_gaussian, gaussian_frames, svd_frames, temporal_mean_frames
from restormer3d.checkpoint import save_weights
from restormer3d.config import Recipe
from restormer3d.inference import denoise_frames
from restormer3d.mixture import adapted_mixture
from restormer3d.model import Restormer3D
from restormer3d.noise import estimate_noise
from restormer3d.ops import why_not_cuda
from restormer3d.patches import TrainingStack, measured_stack
from restormer3d.planning import (
    Pretrained,
    Settings,
    build_model,
    calibrate,
    ends_in_time,
    estimate,
    fit_to_time,
    settings,
    torch_device,
    training_plan,
)
from restormer3d.sidecar import network_record, sidecar, weights_record
from restormer3d.stacks import TiffStack, check_output, check_stack, open_stack, to_dtype, write_stack
from restormer3d.training import fit

Method = Literal["restormer3d", "gaussian", "temporal-mean", "svd"]
Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]

_ADAPTING = 0.15  # most of a time limit that fitting the mixture of filters takes
_CACHE_BYTES = 2**30  # a compressed stack up to this size is decoded once and kept, not once per patch


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


def _silent(*_: Any) -> None:
    """Report nothing."""


def denoise(
    stack: np.ndarray | str | Path,
    *,
    recipe: Recipe = "default",
    method: Method = "restormer3d",
    weights: str | Path | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: tuple[int, int, int] | None = None,
    overlap: float | None = None,
    seed: int | None = None,
    blind_spot: str | None = None,
    symmetries: int | None = None,
    device: str = "auto",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    time_limit: float | None = None,
    progress: Progress = _silent,
) -> np.ndarray:
    """Denoise one stack from itself alone.

    Parameters
    ----------
    stack : numpy.ndarray or path
        Noisy intensities with shape (T, H, W), or the TIFF file that holds them.
    recipe : {"default", "published"}
        Named settings; see :func:`restormer3d.config.recipe`.
    method : {"restormer3d", "gaussian", "temporal-mean", "svd"}
        The network, or one of the plain filters it has to beat.
    weights : path or "none", optional
        Where training starts; by default the weights in the package.
    iterations, batch_size, patch, overlap, seed, blind_spot, symmetries : optional
        Replace the recipe's; see :func:`restormer3d.planning.settings`.
    device : {"auto", "cpu", "cuda", "mps"}
        Where to compute.
    engine : {"auto", "reference", "cpu", "cuda"}
        What computes the slow operators; by default the one of the device. See :mod:`restormer3d.ops`.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic. "tf32" changes nothing but on NVIDIA GPUs, "bf16" is not for the CPU engine.
    time_limit : float, optional
        Minutes; iterations and overlap are reduced so that the work ends in time.
    progress : function, optional
        Called with (stage, done, total).

    Returns
    -------
    numpy.ndarray
        Denoised intensities: same shape, same dtype, rounded and clipped to the dtype's range.

    Raises
    ------
    StackError
        If the stack cannot be denoised: not (T, H, W), constant, NaN, unreadable.
    ValueError
        If a setting is out of range.
    """
    chosen = settings(
        recipe,
        weights,
        iterations=iterations,
        batch_size=batch_size,
        patch=patch,
        overlap=overlap,
        seed=seed,
        blind_spot=blind_spot,
        symmetries=symmetries,
        precision=precision,
        engine=engine,
    )
    if isinstance(stack, np.ndarray):
        return denoise_array(stack, chosen, method=method, device=device, time_limit=time_limit, progress=progress)
    with open_stack(stack) as source:
        return denoise_array(
            _readable(source), chosen, method=method, device=device, time_limit=time_limit, progress=progress
        )


def denoise_array(
    stack: Any,
    chosen: Settings,
    *,
    method: Method = "restormer3d",
    device: str = "auto",
    time_limit: float | None = None,
    pretrained: Pretrained | None = None,
    progress: Progress = _silent,
    say: Say = _silent,
) -> np.ndarray:
    """Denoise a stack of shape (T, H, W) to an array; as :func:`denoise`, with settings put together before.

    `pretrained` are the weights of `chosen`, if the caller has read them already.
    """
    check_stack(stack)
    seconds = None if time_limit is None else 60 * time_limit
    output = np.empty(stack.shape, stack.dtype)
    with forced_engine(chosen.engine):  # frames are computed as they are asked for
        result = _denoised(stack, chosen, method, torch_device(device), seconds, progress, say, pretrained)
        for t, frame in enumerate(result.frames):
            output[t] = to_dtype(frame, stack.dtype)[0]
    return output


def denoise_files(
    stacks: list[Path],
    output: Path,
    chosen: Settings,
    *,
    method: Method = "restormer3d",
    device: str = "auto",
    time_limit: float | None = None,
    overwrite: bool = False,
    save_weights_to: Path | None = None,
    pretrained: Pretrained | None = None,
    progress: Progress = _silent,
    say: Say = _silent,
) -> dict[Path, Exception]:
    """Denoise TIFF files one by one; a bad one does not stop the others.

    Parameters
    ----------
    stacks : list of Path
        Noisy TIFF files.
    output : Path
        A file name if there is one stack and this is no folder; else the folder that gets a file of each input's name.
    chosen : Settings
        From :func:`restormer3d.planning.settings`.
    method, device
        As for :func:`denoise`.
    time_limit : float, optional
        Minutes for all stacks together, shared by their sizes. A stack for which they suffice for no network at all is
        denoised with the Gaussian filter.
    overwrite : bool
        Whether existing outputs are replaced.
    save_weights_to : Path, optional
        Where the weights trained on the (one) stack go.
    pretrained : Pretrained, optional
        The weights of `chosen`, if the caller has read them already.
    progress : function, optional
        Called with (stage, done, total).
    say : function, optional
        Called with one line of text for the user.

    Returns
    -------
    dict of Path to Exception
        The stacks that failed, and why; empty if all went well.
    """
    targets = output_files(stacks, output)
    on = torch_device(device)
    deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
    failures: dict[Path, Exception] = {}
    for number, (source, target) in enumerate(targets.items()):
        share = None
        if deadline is not None:
            sizes = [path.stat().st_size if path.is_file() else 0 for path in list(targets)[number:]]
            share = (deadline - time.monotonic()) * max(1, sizes[0]) / max(1, sum(sizes))
        try:
            _denoise_file(
                source, target, chosen, method, on, share, overwrite, save_weights_to, pretrained, progress, say
            )
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failures[source] = error
            say(f"failed: {_reason(source, error)}")
    return failures


def output_files(stacks: list[Path], output: Path) -> dict[Path, Path]:
    """Where each stack's result goes.

    Raises
    ------
    ValueError
        If no stack is given, two results would have one name, or many stacks would go into one file.
    """
    if not stacks:
        raise ValueError("no stack given: name at least one TIFF file")
    names_a_file = output.suffix.lower() in {".tif", ".tiff"} and not output.is_dir()
    if names_a_file and len(stacks) > 1:
        raise ValueError(f"{len(stacks)} stacks cannot go into one file: give a folder instead of -o {output}")
    targets = {path: output if names_a_file else output / path.name for path in stacks}
    if len(set(targets.values())) < len(stacks):
        raise ValueError("two stacks have the same file name and would overwrite each other: denoise them separately")
    return targets


def _denoise_file(
    source: Path,
    target: Path,
    chosen: Settings,
    method: Method,
    device: torch.device,
    seconds: float | None,
    overwrite: bool,
    save_weights_to: Path | None,
    pretrained: Pretrained | None,
    progress: Progress,
    say: Say,
) -> None:
    """Denoise one file: check everything first, compute, write, leave the sidecar."""
    started = time.monotonic()
    with open_stack(source) as stack, forced_engine(chosen.engine):
        check_output(target, stack.shape, stack.dtype, source=source, overwrite=overwrite)
        say(f"{source.name}: {_described(stack)}" + (f"; {stack.note}" if stack.note else ""))
        check = check_stack(stack, progress=lambda done: progress("check", done, stack.shape[0]))
        remaining = None if seconds is None else seconds - (time.monotonic() - started)
        result = _denoised(_readable(stack), chosen, method, device, remaining, progress, say, pretrained)
        written = write_stack(
            target, result.frames, shape=stack.shape, dtype=stack.dtype, like=stack, overwrite=overwrite
        )
        record = sidecar(stack, check, target, asdict(written), result.record, time.monotonic() - started)
    target.with_name(target.name + ".json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    if save_weights_to is not None and result.model is not None:
        save_weights(save_weights_to, result.model, {"fine_tuned_on": source.name, **result.record["settings"]})
    clipped = f", {written.clipped_voxels} voxels clipped to the range of {stack.dtype}" * bool(written.clipped_voxels)
    say(f"{source.name}: written to {target} in {(time.monotonic() - started) / 60:.1f} min{clipped}")


def _denoised(
    stack: Any,
    chosen: Settings,
    method: Method,
    device: torch.device,
    seconds: float | None,
    progress: Progress,
    say: Say,
    pretrained: Pretrained | None = None,
) -> Denoised:
    """Train on a stack and hand over its denoised frames, still to be computed."""
    if method != "restormer3d":
        return _filtered(stack, chosen, method, progress, say)
    started = time.monotonic()
    engine, precision = usable(chosen.engine, chosen.precision, device)
    if precision != chosen.precision:
        say(f"TF32 is a mode of NVIDIA GPUs: on {device} the network computes in float32")
    source, noise = _source(stack, chosen, say)
    model = copy.deepcopy(pretrained.model) if pretrained else build_model(chosen)
    source, adapted = _adapt(model, source, chosen, device, seconds, say)
    calibration = calibrate(model, source, chosen, device)
    if seconds is not None:
        remaining = seconds - (time.monotonic() - started)
        chosen, note = fit_to_time(chosen, stack.shape, calibration, remaining)
        if note:
            say(note)
        if not ends_in_time(chosen, stack.shape, calibration, remaining):
            say("no network in the time that is left: the stack is denoised with the Gaussian filter instead")
            filtered = _filtered(stack, chosen, "gaussian", progress, say)
            return replace(filtered, record=filtered.record | {"instead_of_the_network": note})
    expected, memory = estimate(chosen, stack.shape, calibration, device)
    say(
        f"about {_duration(expected)} and {memory / 1e9:.1f} GB on {device} ({_compute(device, engine, precision)}): "
        f"{training_plan(chosen)}"
    )
    if device.type == "cuda" and (obstacle := why_not_cuda(device)):
        say(f"plain PyTorch computes on this GPU, which is slower than the Triton kernels: {obstacle}")
    prepared = time.monotonic()
    history = fit(model, [source], chosen.training, device=device, precision=precision, progress=progress)
    weights = pretrained.weights if pretrained else weights_record(chosen)
    record = network_record(chosen, source, history, weights=weights, device=device, engine=engine, precision=precision)
    seconds_spent = {"prepare": prepared - started, "train": time.monotonic() - prepared}
    frames = denoise_frames(
        model,
        stack,
        source.normalization,
        source.background,
        chosen.inference,
        mixture=source.mixture,
        device=device,
        precision=precision,
        progress=progress,
    )
    return Denoised(frames, record | {"noise": noise, "mixture": adapted, "seconds": seconds_spent}, model)


def _adapt(
    model: Restormer3D,
    source: TrainingStack,
    chosen: Settings,
    device: torch.device,
    seconds: float | None,
    say: Say,
) -> tuple[TrainingStack, dict[str, float]]:
    """Fit a mixture of filters to the stack, if the network has one and the stack more than one frame."""
    if not chosen.training.adapt_mixture or model.config.start != "filters" or source.stack.shape[0] < 2:
        return source, {}
    limit = math.inf if seconds is None else _ADAPTING * seconds
    mixture, adapted = adapted_mixture(model.to(device), source, chosen.inference.window, seconds=limit)
    say(f"the mixture of filters is fitted to the stack: {adapted['distance']:.1f} of the usual spread away")
    return replace(source, mixture=mixture.cpu().numpy()), adapted


def _source(stack: Any, chosen: Settings, say: Say) -> tuple[TrainingStack, dict[str, Any]]:
    """Measure what training needs of a stack, its blind spot included."""
    noise = estimate_noise(stack) if stack.shape[0] > 1 else None
    source = measured_stack(stack, noise, chosen.training.blind_spot)
    if chosen.training.blind_spot == "auto" and any(source.blind_spot):
        say(
            "the noise of neighboring voxels is correlated: the blind spot is widened to "
            + " x ".join(str(2 * reach + 1) for reach in source.blind_spot)
            + " (frames x rows x columns)"
        )
    return source, asdict(noise) if noise else {}


def _filtered(stack: Any, chosen: Settings, method: Method, progress: Progress, say: Say) -> Denoised:
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


def _readable(stack: TiffStack) -> Any:
    """A compressed stack of moderate size as an array: patches would decode its frames again and again."""
    if stack.layout.data_offsets is not None or stack.nbytes > min(
        _CACHE_BYTES, psutil.virtual_memory().available // 4
    ):
        return stack
    return stack[:]


def _reason(source: Path, error: Exception) -> str:
    """The error's own words, with the file's name and, where memory ran out, what to do."""
    text = str(error) or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        text = f"not enough memory ({text}); try --batch-size 1, a smaller --patch, or --device cpu"
    return text if source.name in text else f"{source}: {text}"


def _described(stack: TiffStack) -> str:
    frames, height, width = stack.shape
    return f"{frames} frames of {height} x {width}, {stack.dtype}, {stack.nbytes / 1e6:.0f} MB"


def _compute(device: torch.device, engine: str, precision: Precision) -> str:
    threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
    return f"{threads}{engine} operators, {precision}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
