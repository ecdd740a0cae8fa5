"""Training of the network for the static image: pairs of noisy means of simulated scenes, never a clean target."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d import image_pairs
from restormer3d.arithmetic import float32_products, torch_device
from restormer3d.checkpoint import (
    IMAGE_WEIGHTS,
    CheckpointError,
    load_state,
    save_history,
    save_image_weights,
    save_state,
)
from restormer3d.image_network import ImageNetwork
from restormer3d.image_pairs import Pairs, numbered_batch, pooled_batches
from restormer3d.simulation.images import images_ahead
from restormer3d.training import Progress, update_average

_LEARNING_RATE = 1e-3
_RAMP = 100  # iterations in which it rises
_CLIP = 0.1
_DECAY = 0.995  # of the running average of the weights
_VALIDATION = 8  # batches
_VALIDATION_BATCH = 16
_VALIDATION_SEED = 9_300_000


def pretrain_image(
    run_folder: Path,
    iterations: int,
    *,
    seed: int = 1,
    resume: bool = False,
    save_every: int = 500,
    device: str = "cpu",
    widths: tuple[int, int, int] = (32, 64, 128),
    batch_size: int = 16,
    workers: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train the network for the static image; a killed run goes on with `resume`.

    On the CPU, without workers and `seconds`, it then gets to the same weights as if it had not been killed. A GPU
    rounds differently each time, workers deliver images in no particular order, and time is never the same.

    Parameters
    ----------
    run_folder : Path
        Receives `static_image.safetensors`, `history.jsonl` and `state.pt` to resume from.
    iterations : int
        Of batches of patches of 64 x 64 pixels.
    seed : int
        Of images, noise and initial weights.
    resume : bool
        Go on with the run in `run_folder`.
    save_every : int
        Iterations between two savings, each with a validation.
    device : str
        cpu or cuda. On a GPU convolutions round to TF32.
    widths : tuple of int
        Channels of the network's three levels.
    batch_size : int
        Patches per iteration.
    workers : int
        Processes that draw images; patches and noise are then drawn on the device, from all images that came so far,
        and training waits for the first ones only. With 0, all is drawn in the process that trains.
    seconds : float, optional
        End by then: the cosine of the learning rate follows the time that has passed, where that is further on than
        the iterations are.
    progress : function, optional
        Called with ("train", iterations done, iterations in all); where `seconds` are further on, as many as their
        share of all.

    Returns
    -------
    Path
        The weights: their running average.

    Raises
    ------
    ValueError
        If a number is out of range or the device is not there.
    CheckpointError
        If `run_folder` holds a run and `resume` is not set, or one with other settings.
    RuntimeError
        If the workers die before they have drawn an image.
    """
    _check(widths, iterations, save_every, batch_size, workers, seconds)
    started, place = time.monotonic(), torch_device(device)
    run_folder.mkdir(parents=True, exist_ok=True)
    settings = {"iterations": iterations, "seed": seed, "widths": list(widths), "batch_size": batch_size}
    settings |= {"seconds": seconds}
    parts = _initial(seed, widths, place)
    history = _resumed(run_folder / "state.pt", settings, parts) if resume else []
    if not resume and (run_folder / "state.pt").exists():
        raise CheckpointError(f"{run_folder}: holds a run already; go on with --resume, or choose another folder")
    done, before = (history[-1]["iteration"], history[-1]["seconds"]) if history else (0, 0.0)

    def elapsed() -> float:
        return before + time.monotonic() - started

    def passed() -> float:
        """Share of the run that is over."""
        return min(max(done / iterations, elapsed() / seconds if seconds else 0.0), 1.0)

    losses: list[Tensor] = []
    share = passed()
    with _fast_convolutions(place), _batches(seed, done, batch_size, workers, place) as batches:
        while share < 1:
            losses.append(_step(parts["network"], parts["optimizer"], _rate(done, share), next(batches)))
            update_average(parts["average"], parts["network"], _DECAY, done)
            done += 1
            share = passed()
            if progress:
                progress("train", round(share * iterations), iterations)
            if done % save_every == 0 or share == 1:
                entry = {"iteration": done, "seconds": elapsed(), "loss": torch.stack(losses).mean().item()}
                history.append(entry | validate_image(parts["average"]))
                losses.clear()
                _keep(run_folder, settings, history, parts)
    return run_folder / IMAGE_WEIGHTS


@torch.no_grad()
def validate_image(network: ImageNetwork) -> dict[str, float]:
    """Squared error to the truth, in units of the noise variance, over images that training never sees."""
    errors, before = [], []
    with float32_products("fp32"):
        for number in range(_VALIDATION):
            noisy, _, truth, correlation = _validation_batch(number).to(network.output.weight.device)
            errors.append(F.mse_loss(network(noisy, correlation), truth).item())
            before.append(F.mse_loss(noisy, truth).item())
    return {"error": float(np.mean(errors)), "error_of_noisy": float(np.mean(before))}


def _check(
    widths: tuple[int, ...], iterations: int, save_every: int, batch_size: int, workers: int, seconds: float | None
) -> None:
    if min(*widths, iterations, save_every, batch_size) < 1:
        raise ValueError(
            "expected widths, iterations, save_every and batch_size of at least 1, "
            f"got {widths}, {iterations}, {save_every} and {batch_size}"
        )
    if workers < 0 or (seconds is not None and seconds <= 0):
        raise ValueError(f"expected workers of at least 0 and seconds above 0, got {workers} and {seconds}")


def _initial(seed: int, widths: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Build the network, the running average of its weights, and the optimizer."""
    torch.manual_seed(seed)
    network, average = (ImageNetwork(widths).to(device) for _ in range(2))
    on_gpu = device.type == "cuda"
    for each in (network, average) if on_gpu else ():
        each.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=1e-4, fused=on_gpu or None)
    return {"network": network, "average": average, "optimizer": optimizer}


@contextmanager
def _fast_convolutions(device: torch.device) -> Iterator[None]:
    """Let a GPU round to TF32 and try which algorithm is fastest; bfloat16 would round away noise in bright pixels."""
    on_gpu, before = device.type == "cuda", torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on_gpu
    try:
        with float32_products("tf32" if on_gpu else "fp32"):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _batches(seed: int, done: int, size: int, workers: int, device: torch.device) -> Iterator[Iterator[Pairs]]:
    """Give the batches from iteration `done` on."""
    if not workers:
        # Not drawn ahead in a thread: it would hold up those that compute for longer than it takes.
        yield (numbered_batch(seed, number, size).to(device) for number in count(done))
        return
    with images_ahead(seed, done * size, image_pairs.SIDE, workers) as take:
        for number in range(_VALIDATION):
            _validation_batch(number)  # while the processes start
        yield pooled_batches(take, size, (seed, done), device)


def _rate(iteration: int, share: float) -> float:
    """One cosine over the run, after a ramp."""
    return _LEARNING_RATE * min(1, (iteration + 1) / _RAMP) * 0.5 * (1 + math.cos(math.pi * share))


def _step(network: ImageNetwork, optimizer: torch.optim.Optimizer, rate: float, pairs: Pairs) -> Tensor:
    """One iteration; returns the loss, which is not waited for."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = F.mse_loss(network(pairs.noisy, pairs.correlation), pairs.target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    optimizer.step()
    return loss.detach()


@lru_cache(maxsize=_VALIDATION)
def _validation_batch(number: int) -> Pairs:
    return numbered_batch(_VALIDATION_SEED, number * image_pairs.POOL, _VALIDATION_BATCH)


def _resumed(path: Path, settings: dict[str, Any], parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Take a run up where it was saved; returns its history."""
    if not path.exists():
        return []
    state = load_state(path)
    if state["settings"] != settings:
        raise CheckpointError(f"{path}: a run with {state['settings']}, not {settings}; choose another folder")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"]


def _keep(run_folder: Path, settings: dict[str, Any], history: list[dict[str, Any]], parts: dict[str, Any]) -> None:
    save_image_weights(run_folder / IMAGE_WEIGHTS, parts["average"], settings | {"last": history[-1]})
    save_history(run_folder / "history.jsonl", history)
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(run_folder / "state.pt", state | {"settings": settings, "history": history})
