"""One training loop for the warm-up, Noise2Void and fine-tuning, on one stack or many.

Patches and masks of an iteration are drawn from (seed, iteration) alone: a training that resumes sees exactly what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from restormer3d.checkpoint import CheckpointError, load_state, save_state
from restormer3d.config import TrainingConfig
from restormer3d.distributed import average_gradients, is_first, part_of_batch
from restormer3d.model import Restormer3D
from restormer3d.objectives import blind_spot_loss, second_recording_loss, temporal_median_loss
from restormer3d.patches import Patches, TrainingStack, random_patches

StackSource = Sequence[TrainingStack] | Callable[[int], Sequence[TrainingStack]]
Progress = Callable[[str, int, int], None]


class DivergenceError(RuntimeError):
    """The loss is no longer finite; the message says what to try."""


def fit(
    model: Restormer3D,
    stacks: StackSource,
    config: TrainingConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    state_file: str | Path | None = None,
    save_every: int = 500,
    on_save: Callable[[list[dict[str, Any]], Restormer3D], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a model on noisy stacks, in place.

    Within :func:`restormer3d.distributed.joined_processes` every process computes its part of each batch.

    Parameters
    ----------
    model : Restormer3D
        Ends on `device`, holding the trained weights (their running average if `ema_decay` is set).
    stacks : sequence of TrainingStack, or function
        The stacks to draw from; or a function that maps an iteration to the stacks it draws from.
    config : TrainingConfig
        Iterations, patches, optimiser.
    device : str or torch.device
        Where to compute.
    progress : function, optional
        Called after every iteration with ("train", iterations done, iterations in all).
    state_file : path, optional
        Where the state is kept every `save_every` iterations. If the file exists the training goes on from it.
    save_every : int
        Iterations between two savings of the state.
    on_save : function, optional
        Called just before each saving with the history, whose last entry it may extend, and the model as it would be
        kept if training ended here.

    Returns
    -------
    list of dict
        One entry per iteration: iteration, stage, loss, learning_rate, seconds since the start.

    Raises
    ------
    DivergenceError
        If the loss is not finite.
    CheckpointError
        If `state_file` belongs to another training.
    """
    device = torch.device(device)
    model.to(device).train()
    total = config.warmup_iterations + config.iterations
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = copy.deepcopy(model).requires_grad_(False)
    history: list[dict[str, Any]] = []
    if state_file is not None and Path(state_file).exists():
        history = _resume(Path(state_file), config, model, average, optimizer)
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    for iteration in range(len(history), total):
        rate = learning_rate(config, iteration)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _iterate(model, stacks, config, iteration, optimizer, device)
        _update_average(average, model, config.ema_decay, iteration)
        stage = "warmup" if iteration < config.warmup_iterations else "noise2void"
        history.append(
            {
                "iteration": iteration + 1,
                "stage": stage,
                "loss": _finite(loss, iteration),
                "learning_rate": rate,
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        if state_file is not None and is_first() and ((iteration + 1) % save_every == 0 or iteration + 1 == total):
            if on_save is not None:
                on_save(history, average if config.ema_decay else model)
            _save(Path(state_file), config, model, average, optimizer, history)
        if progress is not None:
            progress("train", iteration + 1, total)
    if config.ema_decay and total:
        model.load_state_dict(average.state_dict())
    model.eval()
    return history


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Learning rate of an iteration: one cosine over warm-up and Noise2Void."""
    total = max(1, config.warmup_iterations + config.iterations)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / total)))
    floor = min(config.final_learning_rate, config.learning_rate)
    return floor + (config.learning_rate - floor) * fall


def _iterate(
    model: Restormer3D,
    stacks: StackSource,
    config: TrainingConfig,
    iteration: int,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Tensor:
    """Draw a batch, compute its loss, take one step."""
    rng = np.random.default_rng([config.seed, iteration])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    sources = stacks(iteration) if callable(stacks) else stacks
    batch = random_patches(sources, config.patch, config.batch_size, rng).to(device)
    loss = _loss(model, batch, config, iteration < config.warmup_iterations, generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = average_gradients(model, loss)
    nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    return loss


def _loss(
    model: Restormer3D, batch: Patches, config: TrainingConfig, warmup: bool, generator: torch.Generator
) -> Tensor:
    part = part_of_batch(config.batch_size)
    if warmup:
        return temporal_median_loss(model, batch.noisy, batch.background, batch.median, part)
    if batch.second.numel():
        return second_recording_loss(model, batch.noisy, batch.background, batch.second, part)
    return blind_spot_loss(
        model,
        batch.noisy,
        batch.background,
        batch.stack_frames,
        masked_fraction=config.masked_fraction,
        extent=batch.blind_spot,
        loss=config.loss,
        generator=generator,
        part=part,
    )


def _finite(loss: Tensor, iteration: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise DivergenceError(
            f"the training loss became {value} at iteration {iteration + 1}: the training diverged. "
            "Try a lower learning rate (learning_rate under [training] in --config FILE.toml), "
            "another --seed, or --weights none if the weights do not suit this stack"
        )
    return value


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float, iteration: int) -> None:
    """Move the running average of the weights; early on it follows faster, so that it forgets the first weights."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for target, source in zip(average.parameters(), model.parameters(), strict=True):
        target.lerp_(source, 1 - decay)


def _save(
    path: Path,
    config: TrainingConfig,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
) -> None:
    state = {
        "config": config.model_dump_json(),
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    save_state(path, state)


def _resume(
    path: Path,
    config: TrainingConfig,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list[dict[str, Any]]:
    state = load_state(path)
    if not _same_settings(state["config"], config):
        raise CheckpointError(
            f"{path}: the state of a training with other settings. Give the same settings to resume it, "
            f"or remove the file to start anew. Its settings: {state['config']}"
        )
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["history"])


def _same_settings(saved: str, config: TrainingConfig) -> bool:
    """Compare as settings, not as text: a state from before a setting existed has its default."""
    try:
        return TrainingConfig.model_validate_json(saved) == config
    except ValidationError:
        return False
