"""Settings: a recipe, changed by a file and by arguments, and the model that they ask for."""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError

from restormer3d.checkpoint import (
    SHIPPED_WEIGHTS,
    SMALL_NETWORKS,
    load_weights,
    shipped_weights,
    small_network,
)
from restormer3d.config import Engine, InferenceConfig, ModelConfig, Precision, Recipe, TrainingConfig, recipe
from restormer3d.model import Restormer3D

# What a setting is called as an argument, and where it is in a configuration file.
_ARGUMENTS = {"overlap_t": "overlap", "overlap_xy": "overlap", "window": "patch"}
_TABLES = {ModelConfig: "model", TrainingConfig: "training", InferenceConfig: "inference"}

Config = TypeVar("Config", ModelConfig, TrainingConfig, InferenceConfig)


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
    networks : Path or None
        Folder whose files stand in for those of the small networks in the package, where it has them.
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
    networks: Path | None = None
    sigma: tuple[float, float] | None = None
    precision: Precision = "fp32"
    engine: Engine = "auto"


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
    planes: int | Literal["auto"] | None = None,
    movement: Literal["none", "smooth", "all"] | None = None,
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
        Where training starts. By default the pretrained weights in the package; with the published recipe "none", from
        scratch. A folder may hold weights of any of the networks under the names that they have in the package (such as
        `courses.safetensors`, from `pretrain-activity`); the others are the package's.
    iterations, batch_size, patch, overlap, seed : optional
        Replace the recipe's.
    blind_spot : str, optional
        "auto", "point", or axes and odd widths, such as "x3" or "x3y3" or "t3x5".
    symmetries : {1, 4, 8}, optional
        Replaces the recipe's.
    planes : int or "auto", optional
        Replaces the recipe's: how many planes or channels the stack shows in turns, frame by frame.
    movement : {"none", "smooth", "all"}, optional
        Replaces the recipe's: movement of the field that frames follow.
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
    if sigma is not None and not (min(sigma) >= 0 and math.isfinite(sum(sigma))):
        raise ValueError(
            f"sigma: expected widths of at least 0 in frames and pixels, got {sigma[0]:g} and {sigma[1]:g}"
        )
    source, networks = _weights_files(recipe_name, weights)
    model, training, inference = recipe(recipe_name, pretrained=source is not None)
    if source is not None:
        model = load_weights(source).config
        if "model" in file and (asked := _changed(model, file["model"])) != model:
            raise ValueError(f"{config_file}: [model] asks for {asked}, but {source} holds {model}")
    training = _changed(
        training,
        file.get("training", {}),
        _given(
            iterations=iterations,
            batch_size=batch_size,
            patch=patch,
            seed=seed,
            blind_spot=None if blind_spot is None else parse_blind_spot(blind_spot),
        ),
    )
    windows = _given(
        window=patch,
        stretch=None if patch is None else 1.0,
        overlap_t=overlap,
        overlap_xy=overlap,
        symmetries=symmetries,
        planes=planes,
        movement=movement,
    )
    if source is None:
        model = _changed(model, file.get("model", {}))
        if training.warmup_iterations + training.iterations == 0:
            raise ValueError("no weights and no iterations would leave the network untrained: give one of the two")
    inference = _changed(inference, file.get("inference", {}), windows)
    steps = (inference.static_image, inference.footprints, inference.courses)
    if networks is not None and source != networks / SHIPPED_WEIGHTS and not any(steps):
        raise ValueError(f"{networks}: it holds weights of small networks, but none of their steps is switched on")
    return Settings(recipe_name, model, training, inference, source, networks, sigma, precision, engine)


def check_time_limit(minutes: float | None) -> None:
    """Raise ValueError if a time limit is no number of minutes above 0."""
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"time-limit: expected a number of minutes above 0, got {minutes:g}")


def pretraining_settings(
    recipe_name: Recipe,
    *,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: tuple[int, int, int] | None = None,
    seed: int | None = None,
    config_file: str | Path | None = None,
) -> tuple[ModelConfig, TrainingConfig]:
    """Settings of a pretraining: the page's, then the file's, then single arguments.

    The page has 2,000 iterations of warm-up, 48,000 of Noise2Void and L1. "default" leaves the warm-up out, as its
    network starts from filters, and keeps the loss that knows the noise, its patches and its masks.

    Raises
    ------
    ValueError
        If a setting is unknown or out of range; the message names it.
    """
    file = _read_toml(config_file)
    model, training, _ = recipe(recipe_name, pretrained=False)
    if "inference" in file:
        raise ValueError(f"{config_file}: [inference] is for denoising; a pretraining takes [model] and [training]")
    page = {"batch_size": 4, "warmup_iterations": 2000, "iterations": 48_000, "weight_decay": 1e-5}
    page |= {"held_out": 0.0, "stop_early": False, "adapt_mixture": False}  # both belong to one stack
    page |= {"learning_rate": 3e-4, "loss": "l1"} if recipe_name == "published" else {"warmup_iterations": 0}
    given = _given(iterations=iterations, batch_size=batch_size, patch=patch, seed=seed)
    training = _changed(training, page | file.get("training", {}), given)
    return _changed(model, file.get("model", {})), training


def parse_blind_spot(text: str) -> str | tuple[int, int, int]:
    """Half-extent in (frames, rows, columns) from "point", "x3", "x3y3"...; "auto" stays as it is.

    >>> parse_blind_spot("x5t3")
    (1, 0, 2)
    """
    if text == "auto":
        return text
    reach = {"t": 0, "y": 0, "x": 0}
    parts = [] if text == "point" else [text[i : i + 2] for i in range(0, max(len(text), 1), 2)]
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
    if flat := [name for name, table in tables.items() if not isinstance(table, dict)]:
        raise ValueError(f"{path}: expected tables, such as [{flat[0]}] on a line of its own, got {flat[0]} = ...")
    return tables


def _weights_files(recipe_name: Recipe, weights: str | Path | None) -> tuple[Path | None, Path | None]:
    """Weights where training starts, and the folder of others, as far as there are any."""
    # The shipped weights mix filters; the published form has to be trained from scratch.
    usual = shipped_weights() if recipe_name == "default" else None
    if weights is None or str(weights) == "none":
        return (usual if weights is None else None), None
    if not Path(weights).is_dir():
        return Path(weights), None
    names = (SHIPPED_WEIGHTS, *SMALL_NETWORKS)
    found = [name for name in names if (Path(weights) / name).is_file()]
    if not found:
        raise ValueError(f"{weights}: expected a weights file, or a folder with any of {', '.join(names)}")
    for kind in SMALL_NETWORKS.values():
        small_network(kind, Path(weights))  # what cannot be read is refused here, not after training
    return (Path(weights) / SHIPPED_WEIGHTS if SHIPPED_WEIGHTS in found else usual), Path(weights)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changed(config: Config, file: dict[str, Any], given: dict[str, Any] | None = None) -> Config:
    """Validate a configuration anew with some values replaced: by the configuration file's, then by arguments."""
    given = given or {}
    try:
        return type(config).model_validate(config.model_dump() | file | given)
    except ValidationError as error:
        found = error.errors()
        # Where a number or "auto" is expected, what is wrong with the number says more.
        first = next((each for each in found if each["type"] != "literal_error"), found[0])
        setting = str(first["loc"][0]) if first["loc"] else type(config).__name__
        name = _ARGUMENTS.get(setting, setting) if setting in given else setting
        if setting in file and setting not in given:
            name = f"configuration file, [{_TABLES[type(config)]}] {setting}"
        near = difflib.get_close_matches(setting, type(config).model_fields)
        meant = f" (did you mean {near[0]}?)" if near and first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}{meant}") from error
