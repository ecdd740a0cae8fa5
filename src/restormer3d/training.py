"""One training loop for the warm-up, Noise2Void and fine-tuning, on one stack or many.

Patches and masks of an iteration are drawn from (seed, iteration) alone: a training that resumes sees exactly what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from restormer3d.arithmetic import autocast, float32_products
from restormer3d.checkpoint import CheckpointError, load_state, save_state
from restormer3d.config import Precision, TrainingConfig
from restormer3d.cuda_graph import GraphedStep
from restormer3d.distributed import average_gradients, is_first, part_of_batch
from restormer3d.model import Restormer3D
from restormer3d.objectives import hide, masked_loss, second_recording_loss, temporal_median_loss
from restormer3d.patches import Patches, TrainingStack, random_patches
from restormer3d.progress import Progress
from restormer3d.selection import BestWeights, check_iterations

StackSource = Sequence[TrainingStack] | Callable[[int], Sequence[TrainingStack]]

_LOSSES_AT_ONCE = 20  # read from a GPU together: every reading makes the host wait for all that was launched

# Made once: a recorded step is known by its objective.
_MASKED_LOSSES = {name: partial(masked_loss, loss=name) for name in ("l1", "mse", "noise")}


class DivergenceError(RuntimeError):
    """The loss is no longer finite; the message says what to try."""


def fit(
    model: Restormer3D,
    stacks: StackSource,
    config: TrainingConfig,
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
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
        Where to compute. On CUDA the step runs as a graph and patches are drawn while it runs.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic; the weights stay float32.
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
        One entry per iteration that was done: iteration, stage, loss, learning_rate, seconds since the start. With
        `held_out`, the last one also has `held_out`, the loss on those voxels by iteration, and `kept_iteration`, the
        best.

    Raises
    ------
    ValueError
        If voxels are held out and the stacks change with the iteration.
    DivergenceError
        If the loss is not finite; on CUDA a few iterations late.
    CheckpointError
        If `state_file` belongs to another training.
    """
    device, state = torch.device(device), None if state_file is None else Path(state_file)
    model.to(device).train()
    total = config.warmup_iterations + config.iterations
    if not total:  # an optimizer alone takes seconds to import
        model.eval()
        return []
    optimizer = _optimizer(model, config, device)
    average = copy.deepcopy(model).requires_grad_(False)
    history: list[dict[str, Any]] = []
    best, checks = _best_weights(stacks, config, device, precision), check_iterations(total)
    if state is not None and state.exists():
        history = _resume(state, config, model, average, optimizer, best)
    step = partial(_step, model, optimizer, config, device, precision)
    take_step = GraphedStep(step) if device.type == "cuda" else step
    if best is not None and not history:
        best.look(model, 0)
    unread: list[Tensor] = []
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    first = len(history)
    last = first if _ends(config, best, first) else total
    for iteration, drawn in enumerate(_batches(stacks, config, range(first, last), device), start=first):
        rate = _set_learning_rate(optimizer, config, iteration)
        unread.append(take_step(*_objective(drawn, config, iteration, device)))
        update_average(average, model, config.ema_decay, iteration)
        history.append(_entry(config, iteration, rate, time.monotonic() - started))
        if best is not None and iteration + 1 in checks:
            best.look(average if config.ema_decay else model, iteration + 1)
        ending = _ends(config, best, iteration + 1)
        saving = (iteration + 1) % save_every == 0 or ending
        if device.type != "cuda" or saving or len(unread) == _LOSSES_AT_ONCE:
            _read_losses(history, unread)
        if state is not None and saving and is_first():
            if on_save is not None:
                on_save(history, average if config.ema_decay else model)
            _save(state, config, model, average, optimizer, history, best)
        if progress is not None:
            progress("train", iteration + 1, total)
        if ending:
            break
    if config.ema_decay:
        model.load_state_dict(average.state_dict())
    if best is not None:
        best.restore(model)
        history[-1] |= {"held_out": best.scores, "kept_iteration": best.kept}
    model.eval()
    return history


def _best_weights(
    stacks: StackSource, config: TrainingConfig, device: torch.device, precision: Precision
) -> BestWeights | None:
    """What chooses among the weights of a training, if voxels are held out for that."""
    if not config.held_out:
        return None
    if callable(stacks):
        raise ValueError("held_out: always the same voxels are compared, so the stacks have to be the same throughout")
    return BestWeights(stacks, config, device, precision)


def _entry(config: TrainingConfig, iteration: int, rate: float, seconds: float) -> dict[str, Any]:
    stage = "warmup" if iteration < config.warmup_iterations else "noise2void"
    return {
        "iteration": iteration + 1,
        "stage": stage,
        "loss": None,
        "learning_rate": rate,
        "seconds": round(seconds, 3),
    }


def _ends(config: TrainingConfig, best: BestWeights | None, iterations: int) -> bool:
    """Whether a training ends after so many iterations."""
    settled = config.stop_early and best is not None and best.settled
    return settled or iterations == config.warmup_iterations + config.iterations


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Learning rate of an iteration: one cosine over warm-up and Noise2Void."""
    total = max(1, config.warmup_iterations + config.iterations)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / total)))
    floor = min(config.final_learning_rate, config.learning_rate)
    return floor + (config.learning_rate - floor) * fall


def _optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW; on CUDA in one launch and in the form that a graph can record, with its learning rate on the device."""
    if device.type != "cuda":
        return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    rate = torch.tensor(config.learning_rate, device=device)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay, capturable=True, fused=True)


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, iteration: int) -> float:
    rate = learning_rate(config, iteration)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rate


def _batches(
    stacks: StackSource, config: TrainingConfig, iterations: range, device: torch.device
) -> Iterator[tuple[Patches, int]]:
    """Yield every iteration's patches and the seed of its masks; for a GPU the next ones are drawn meanwhile."""

    def draw(iteration: int) -> tuple[Patches, int]:
        rng = np.random.default_rng([config.seed, iteration])
        mask_seed = int(rng.integers(2**62))
        sources = stacks(iteration) if callable(stacks) else stacks
        batch = random_patches(sources, config.patch, config.batch_size, rng, config.held_out)
        return (batch.pin_memory() if device.type == "cuda" else batch), mask_seed

    if device.type != "cuda":
        yield from map(draw, iterations)
    else:
        yield from _drawn_ahead(draw, iterations)


def _drawn_ahead(draw: Callable[[int], tuple[Patches, int]], iterations: range) -> Iterator[tuple[Patches, int]]:
    with ThreadPoolExecutor(1, "patches") as worker:
        coming = deque(worker.submit(draw, iteration) for iteration in iterations[:1])
        for iteration in iterations:
            if iteration + 1 in iterations:
                coming.append(worker.submit(draw, iteration + 1))
            yield coming.popleft().result()


def _objective(
    drawn: tuple[Patches, int], config: TrainingConfig, iteration: int, device: torch.device
) -> tuple[Any, ...]:
    """Return what an iteration learns, a function of the model and tensors, and these tensors on the device."""
    batch, mask_seed = drawn[0].to(device), drawn[1]
    part = part_of_batch(config.batch_size)
    if iteration < config.warmup_iterations:
        shown = batch.noisy, batch.background, batch.median, batch.mixture
        return (temporal_median_loss, *(value[part] for value in shown))
    if batch.second.numel():
        shown = batch.noisy, batch.background, batch.second, batch.mixture
        return (second_recording_loss, *(value[part] for value in shown))
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(mask_seed)
    inputs = hide(
        batch.noisy,
        batch.background,
        batch.stack_frames,
        masked_fraction=config.masked_fraction,
        extent=batch.blind_spot,
        generator=generator,
        held_out=batch.held_out,
    )
    # Masks are drawn for the whole batch, so that they do not depend on how it is shared out.
    return (_MASKED_LOSSES[config.loss], *(value[part] for value in (*inputs, batch.mixture)))


def _step(
    model: Restormer3D,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    device: torch.device,
    precision: Precision,
    objective: Callable[..., Tensor],
    *inputs: Tensor,
) -> Tensor:
    """Take one step of the optimizer and return the loss; nothing here waits for a GPU."""
    optimizer.zero_grad(set_to_none=True)
    with float32_products(precision):
        with autocast(device, precision):
            loss = objective(model, *inputs)
        loss.backward()
        loss = average_gradients(model, loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
    return loss.detach()


def _read_losses(history: list[dict[str, Any]], unread: list[Tensor]) -> None:
    """Fill in the losses of the last iterations.

    Raises
    ------
    DivergenceError
        If one is not finite.
    """
    for entry, value in zip(history[len(history) - len(unread) :], torch.stack(unread).tolist(), strict=True):
        if not math.isfinite(value):
            raise DivergenceError(
                f"the training loss became {value} at iteration {entry['iteration']}: the training diverged. "
                "Try a lower learning rate (learning_rate under [training] in --config FILE.toml), "
                "another --seed, or --weights none if the weights do not suit this stack"
            )
        entry["loss"] = value
    unread.clear()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, iteration: int) -> None:
    """Move the running average of the weights; early on it follows faster, so that it forgets the first weights."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    # All in one launch on a GPU, where two hundred small ones take as long as the step.
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)  # pyright: ignore


def _save(
    path: Path,
    config: TrainingConfig,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    best: BestWeights | None,
) -> None:
    state = {
        "config": config.model_dump_json(),
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "best": best.state_dict() if best is not None else None,
    }
    save_state(path, state)


def _resume(
    path: Path,
    config: TrainingConfig,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: BestWeights | None,
) -> list[dict[str, Any]]:
    state = load_state(path)
    if not _same_settings(state["config"], config):
        raise CheckpointError(
            f"{path}: the state of a training with other settings. Give the same settings to resume it, "
            f"or remove the file to start anew. Its settings: {state['config']}"
        )
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for kept, now in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        kept |= {
            key: now[key] for key in ("capturable", "fused", "lr")
        }  # they depend on the device, not on the training
    optimizer.load_state_dict(state["optimizer"])
    if best is not None:
        best.load_state_dict(state["best"])
    return list(state["history"])


def _same_settings(saved: str, config: TrainingConfig) -> bool:
    """Compare as settings, not as text: a state from before a setting existed has its default."""
    try:
        return TrainingConfig.model_validate_json(saved) == config
    except ValidationError:
        return False
