"""What one denoising will do and cost: settings from a recipe and the user's wishes, and a plan that ends in time.

Times come from a short calibration with the real model, patches and device, never from a table.
"""

from __future__ import annotations

import copy
import math
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from pydantic import ValidationError

from restormer3d.arithmetic import Engine, Precision, autocast, float32_products, usable
from restormer3d.checkpoint import load_weights, shipped_weights
from restormer3d.components import chunk_frames, is_held
from restormer3d.config import InferenceConfig, ModelConfig, Recipe, TrainingConfig, recipe
from restormer3d.inference import count_windows, window_size
from restormer3d.model import Restormer3D
from restormer3d.patches import TrainingStack
from restormer3d.selection import ITERATIONS_PER_BATCH, check_iterations
from restormer3d.static_image import GUIDE_FRAMES
from restormer3d.training import fit

Config = TypeVar("Config", ModelConfig, TrainingConfig, InferenceConfig)

# Overlaps in time and in the plane, from the recipe's down to none: what --time-limit may choose from.
_OVERLAPS = ((0.5, 0.5), (0.5, 0.25), (0.25, 0.25), (0.25, 0.125), (0.125, 0.0), (0.0, 0.0))
_GRAPH_ITERATIONS = 8  # on CUDA the first ones run unrecorded, the next one is recorded (cuda_graph.py)
_TIMED_SIDE = 64  # pixels of the windows that are timed on a CPU
_SAFETY = 0.9  # share of a time limit that is planned with; the rest is for what the calibration did not see
_COMPONENTS = 1.15  # time of a pass when its results are taken apart into components, relative to the pass alone


@dataclass(frozen=True)
class Settings:
    """A recipe as the user changed it.

    Attributes
    ----------
    recipe : {"default", "published"}
        What the rest started from.
    model : ModelConfig
        Of the weights file if there is one.
    training : TrainingConfig
        Of every stack.
    inference : InferenceConfig
        Of every stack.
    weights : Path or None
        Where training starts; None trains from scratch.
    sigma : tuple of float or None
        Widths of the Gaussian filter in frames and pixels, should that be the method; None chooses them.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic.
    engine : {"auto", "reference", "cpu", "cuda"}
        What computes the slow operators; "auto" takes the one of the device.
    """

    recipe: Recipe
    model: ModelConfig
    training: TrainingConfig
    inference: InferenceConfig
    weights: Path | None
    sigma: tuple[float, float] | None = None
    precision: Precision = "fp32"
    engine: Engine = "auto"


@dataclass(frozen=True)
class Calibration:
    """Seconds of one training iteration and of one inference window on this machine."""

    seconds_per_iteration: float
    seconds_per_window: float


@dataclass(frozen=True)
class Pretrained:
    """Where training starts, read once for many stacks.

    Attributes
    ----------
    model : Restormer3D
        From :func:`build_model`; every stack trains a copy.
    weights : dict or None
        What the sidecar says of the weights file.
    """

    model: Restormer3D
    weights: dict[str, Any] | None


def settings(
    recipe_name: Recipe = "default",
    weights: str | Path | None = None,
    *,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: tuple[int, int, int] | None = None,
    overlap: float | None = None,
    seed: int | None = None,
    blind_spot: str | None = None,
    symmetries: int | None = None,
    sigma: tuple[float, float] | None = None,
    precision: Precision = "fp32",
    engine: Engine = "auto",
    config_file: str | Path | None = None,
) -> Settings:
    """Settings of a denoising: the recipe, then the configuration file, then single arguments.

    Parameters
    ----------
    recipe_name : {"default", "published"}
        What everything that is not given comes from.
    weights : path or "none", optional
        Where training starts. By default the pretrained weights in the package, if they suit the recipe.
    iterations, batch_size, patch, overlap, seed : optional
        Replace the recipe's.
    blind_spot : str, optional
        "auto", "point", or axes and odd widths, such as "x3" or "x3y3" or "t3x5".
    symmetries : {1, 4, 8}, optional
        Replaces the recipe's.
    sigma : tuple of float, optional
        Widths of the Gaussian filter in frames and pixels.
    precision, engine
        See :class:`Settings`.
    config_file : path, optional
        TOML with tables [model], [training], [inference].

    Raises
    ------
    ValueError
        If a setting is unknown or out of range; the message names it.
    """
    file = _read_toml(config_file)
    source = _weights_file(recipe_name, weights)
    model, training, inference = recipe(recipe_name, pretrained=source is not None)
    if source is not None:
        model = load_weights(source).config
        if "model" in file and (asked := _changed(model, file["model"])) != model:
            raise ValueError(f"{config_file}: [model] asks for {asked}, but {source} holds {model}")
    training = _changed(
        training,
        file.get("training", {})
        | _given(
            iterations=iterations,
            batch_size=batch_size,
            patch=patch,
            seed=seed,
            blind_spot=None if blind_spot is None else parse_blind_spot(blind_spot),
        ),
    )
    windows = file.get("inference", {}) | _given(
        window=patch,
        stretch=None if patch is None else 1.0,
        overlap_t=overlap,
        overlap_xy=overlap,
        symmetries=symmetries,
    )
    if source is None:
        model = _changed(model, file.get("model", {}))
        if training.iterations == 0:
            raise ValueError("no weights and no iterations would leave the network untrained: give one of the two")
    return Settings(recipe_name, model, training, _changed(inference, windows), source, sigma, precision, engine)


def pretraining_settings(
    recipe_name: Recipe,
    *,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: tuple[int, int, int] | None = None,
    seed: int | None = None,
    config_file: str | Path | None = None,
) -> tuple[ModelConfig, TrainingConfig]:
    """Settings of a pretraining: the page's (50,000 iterations, batch 4), then the file's, then single arguments.

    Raises
    ------
    ValueError
        If a setting is unknown or out of range; the message names it.
    """
    file = _read_toml(config_file)
    model, training, _ = recipe(recipe_name, pretrained=False)
    page = {"batch_size": 4, "warmup_iterations": 2000, "iterations": 48_000, "weight_decay": 1e-5}
    page |= {"held_out": 0.0, "stop_early": False, "adapt_mixture": False}  # both belong to one stack
    page |= {"learning_rate": 3e-4, "loss": "l1"} if recipe_name == "published" else {"warmup_iterations": 0}
    given = _given(iterations=iterations, batch_size=batch_size, patch=patch, seed=seed)
    training = _changed(training, page | file.get("training", {}) | given)
    return _changed(model, file.get("model", {})), training


def parse_blind_spot(text: str) -> str | tuple[int, int, int]:
    """Half-extent in (frames, rows, columns) from "point", "x3", "x3y3"...; "auto" stays as it is.

    >>> parse_blind_spot("x5t3")
    (1, 0, 2)
    """
    if text == "auto":
        return text
    reach = {"t": 0, "y": 0, "x": 0}
    parts = [] if text == "point" else [text[i : i + 2] for i in range(0, len(text), 2)]
    for part in parts:
        if len(part) != 2 or part[0] not in reach or part[1] not in "3579":
            raise ValueError(
                f"blind spot {text!r}: expected auto, point, or axes and odd widths such as x3, x3y3 or t3x5"
            )
        reach[part[0]] = int(part[1]) // 2
    return (reach["t"], reach["y"], reach["x"])


def training_plan(chosen: Settings) -> str:
    """Say what training will be done, in words."""
    total = chosen.training.warmup_iterations + chosen.training.iterations
    start = "from scratch" if chosen.weights is None else f"from {chosen.weights.name}"
    while_it_helps = ", as long as held-out voxels gain by it" if chosen.training.stop_early and total else ""
    return f"{total} iterations {start}{while_it_helps}, then inference"


def build_model(chosen: Settings) -> Restormer3D:
    """Load the weights, or make a network with initial weights drawn from the seed."""
    if chosen.weights is not None:
        return load_weights(chosen.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.training.seed)
        return Restormer3D(chosen.model)


def calibrate(model: Restormer3D, source: TrainingStack, chosen: Settings, device: torch.device) -> Calibration:
    """Time a training iteration and an inference pass of the real sizes, on a copy of the model.

    Each runs before, to compile and allocate, and once for the clock.
    """
    trial = copy.deepcopy(model)
    precision = usable(chosen.engine, chosen.precision, device)[1]
    marks: list[float] = []
    if chosen.training.iterations:
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
    window = window_size(source.stack.shape, chosen.inference)
    per_window = _seconds_per_window(trial.to(device), window, chosen.inference.batch_size, device, precision)
    checks = 0.0
    if chosen.training.held_out:
        patches = chosen.training.batch_size * math.prod(chosen.training.patch) / math.prod(window)
        total = chosen.training.warmup_iterations + chosen.training.iterations
        checks = len(check_iterations(total)) / ITERATIONS_PER_BATCH * patches * per_window
    return Calibration(marks[-1] - marks[-2] + checks if marks else 0.0, per_window)


def _now(device: torch.device) -> float:
    """Read the clock once everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


@torch.inference_mode()
def _seconds_per_window(
    model: Restormer3D, window: tuple[int, int, int], batch_size: int, device: torch.device, precision: Precision
) -> float:
    frames, *plane = window
    if device.type == "cpu":  # a part of a large one is timed as well in less time
        plane = [min(side, _TIMED_SIDE) for side in plane]
    noisy = torch.rand(batch_size, 1, frames, *plane, device=device)
    mean = noisy.mean(2, keepdim=True)
    background = torch.cat([mean, torch.full_like(mean, 1 / window[0]), torch.zeros_like(mean)], 1)
    started = 0.0
    for _ in range(2):
        started = time.monotonic()
        with float32_products(precision), autocast(device, precision):
            model(noisy, background).sum().item()  # .item() waits for the device
    return (time.monotonic() - started) / batch_size * math.prod(window[1:]) / math.prod(plane)


def fit_to_time(
    chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, seconds: float
) -> tuple[Settings, str]:
    """Reduce overlap and iterations, never below what the time forces, so that a stack ends within `seconds`.

    Overlap is given up first where inference would take more than half of the time, then iterations.

    Returns
    -------
    Settings
        The same, or with less overlap and fewer iterations.
    str
        What was chosen, for the user; empty if the whole recipe fits.
    """
    budget = seconds * _SAFETY
    inference, inference_time = chosen.inference, 0.0
    total = chosen.training.warmup_iterations + chosen.training.iterations
    # Where held-out voxels decide how long training is worth it, overlap makes room for no more than their first check.
    wanted = min(check_iterations(total) - {0}, default=0) if chosen.training.stop_early else total
    training_time = wanted * calibration.seconds_per_iteration
    for overlap_t, overlap_xy in _OVERLAPS:
        update = {
            "overlap_t": min(overlap_t, chosen.inference.overlap_t),
            "overlap_xy": min(overlap_xy, chosen.inference.overlap_xy),
        }
        inference = chosen.inference.model_copy(update=update)
        inference_time = _inference_seconds(shape, inference, calibration)
        if inference_time <= max(budget / 2, budget - training_time):
            break
    affordable = max(0, int((budget - inference_time) / max(calibration.seconds_per_iteration, 1e-9)))
    if inference == chosen.inference and affordable >= total:
        return chosen, ""
    training = _shorten(chosen.training, affordable)
    done = training.warmup_iterations + training.iterations
    overlaps = f"overlap {inference.overlap_t:g} in time and {inference.overlap_xy:g} in the plane"
    note = f"to end within {max(0.0, seconds) / 60:.1f} min: {done} of {total} iterations, {overlaps}"
    if inference_time > budget:
        note += "; even so the time will not suffice on this machine"
    return replace(chosen, training=training, inference=inference), note


def ends_in_time(chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, seconds: float) -> bool:
    """Whether what :func:`fit_to_time` chose ends within `seconds`, with a network that has been trained at all."""
    trained = chosen.weights is not None or chosen.training.iterations > 0
    return trained and _inference_seconds(shape, chosen.inference, calibration) <= seconds * _SAFETY


def _inference_seconds(shape: tuple[int, int, int], inference: InferenceConfig, calibration: Calibration) -> float:
    passes = inference.symmetries * (2 * _COMPONENTS if inference.components else 1)
    windows = count_windows(shape, inference) * passes
    if inference.static_image and not is_held(shape):
        share = GUIDE_FRAMES / window_size(shape, inference)[0]
        windows += share * count_windows((GUIDE_FRAMES, *shape[1:]), inference)
    return windows * calibration.seconds_per_window


def _shorten(training: TrainingConfig, affordable: int) -> TrainingConfig:
    total = training.warmup_iterations + training.iterations
    if affordable >= total:
        return training
    warmup = training.warmup_iterations * affordable // total
    return training.model_copy(update={"warmup_iterations": warmup, "iterations": affordable - warmup})


def estimate(
    chosen: Settings, shape: tuple[int, int, int], calibration: Calibration, device: torch.device
) -> tuple[float, float]:
    """Seconds and bytes that a denoising will take beside what Python and its libraries hold already."""
    iterations = chosen.training.warmup_iterations + chosen.training.iterations
    seconds = iterations * calibration.seconds_per_iteration
    seconds += _inference_seconds(shape, chosen.inference, calibration)
    frames = 4 * shape[1] * shape[2]
    held = 3 * window_size(shape, chosen.inference)[0]
    if chosen.inference.components:  # the stack is denoised twice, and chunks of both are compared
        held = 2 * held + 7 * chunk_frames(shape)
    if chosen.inference.static_image:
        held += shape[0] if is_held(shape) else 3 * GUIDE_FRAMES
    buffers = held * frames
    if device.type == "cpu":  # the calibration has just run with everything allocated
        return seconds, psutil.Process().memory_info().rss + buffers
    return seconds, torch.cuda.max_memory_allocated(device) + buffers if device.type == "cuda" else buffers


def _read_toml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as file:
            tables = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a readable TOML file: {error}") from error
    unknown = set(tables) - {"model", "training", "inference"}
    if unknown:
        raise ValueError(
            f"{path}: unknown {', '.join(sorted(unknown))}; expected the tables [model], [training] and [inference]"
        )
    return tables


def _weights_file(recipe_name: Recipe, weights: str | Path | None) -> Path | None:
    if weights is None:
        # The shipped weights mix filters; the published form has to be trained from scratch.
        return shipped_weights() if recipe_name == "default" else None
    return None if str(weights) == "none" else Path(weights)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """Validate a configuration anew with some values replaced."""
    try:
        return type(config).model_validate(config.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or type(config).__name__
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}") from error
