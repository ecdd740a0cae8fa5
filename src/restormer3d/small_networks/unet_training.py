"""One loop for the training of the small networks: resumes to the same weights, or ends in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restormer3d.arithmetic import float32_products
from restormer3d.checkpoint import CheckpointError, load_state, save_history, save_state, save_unet
from restormer3d.progress import Progress
from restormer3d.training import update_average
from restormer3d.unets import UNet

_LEARNING_RATE = 1e-3
_RAMP = 100  # iterations in which it rises


def train_unet(
    weights: Path,
    build: Callable[[], UNet],
    batches: Callable[[int], AbstractContextManager[Iterator[Any]]],
    loss: Callable[[Any, Any], Tensor],
    validate: Callable[[Any], dict[str, float]],
    settings: dict[str, Any],
    *,
    device: torch.device,
    resume: bool,
    save_every: int,
    clip: float,
    decay: float,
    progress: Progress | None = None,
) -> None:
    """Train a network with one cosine of the learning rate, and keep the running average of its weights.

    Parameters
    ----------
    weights : Path
        The file to write; its folder receives `history.jsonl` and `state.pt` to resume from.
    build : function
        Gives the network with its first weights.
    batches : function
        From the iterations that are done to a context that gives the batches from then on.
    loss, validate : function
        Of the network and a batch; of the network alone, for the history.
    settings : dict
        What a resumed run must agree on, JSON-serializable; of it `iterations` and `seconds` are read. The run ends
        with the first of them, and the learning rate follows the one that is further on.
    device : torch.device
        Where to train. On a GPU convolutions round to TF32.
    resume : bool
        Go on with the run in the folder.
    save_every : int
        Iterations between two savings, each with a validation.
    clip : float
        Norm of the gradient at most.
    decay : float
        Of the running average.
    progress : function, optional
        Called with ("train", iterations done, iterations in all); where `seconds` are further on, as many as their
        share of all.

    Raises
    ------
    CheckpointError
        If the folder holds a run with other settings.
    """
    started = time.monotonic()
    folder, iterations, seconds = weights.parent, settings["iterations"], settings["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    parts = _initial(build, device)
    history = _resumed(folder / "state.pt", settings, parts) if resume else []
    done, before = (history[-1]["iteration"], history[-1]["seconds"]) if history else (0, 0.0)

    def elapsed() -> float:
        return before + time.monotonic() - started

    def passed() -> float:
        """Share of the run that is over."""
        return min(max(done / iterations, elapsed() / seconds if seconds else 0.0), 1.0)

    losses: list[Tensor] = []
    share = passed()
    with _fast_convolutions(device), batches(done) as coming:
        while share < 1:
            value = loss(parts["network"], next(coming))
            losses.append(_step(parts["network"], parts["optimizer"], _rate(done, share), value, clip))
            update_average(parts["average"], parts["network"], decay, done)
            done += 1
            share = passed()
            if progress:
                progress("train", round(share * iterations), iterations)
            if done % save_every == 0 or share == 1:
                entry = {"iteration": done, "seconds": elapsed(), "loss": torch.stack(losses).mean().item()}
                history.append(entry | validate(parts["average"]))
                losses.clear()
                _keep(weights, settings, history, parts)


def check_run(
    run_folder: Path,
    resume: bool,
    widths: tuple[int, ...],
    iterations: int,
    save_every: int,
    batch_size: int,
    workers: int,
    seconds: float | None,
) -> None:
    """Before anything is computed: raise ValueError where a number is out of range.

    CheckpointError if the folder holds a run and `resume` is not set.
    """
    if min(*widths, iterations, save_every, batch_size) < 1:
        raise ValueError(
            "expected widths, iterations, save_every and batch_size of at least 1, "
            f"got {widths}, {iterations}, {save_every} and {batch_size}"
        )
    if workers < 0 or (seconds is not None and seconds <= 0):
        raise ValueError(f"expected workers of at least 0 and seconds above 0, got {workers} and {seconds}")
    if not resume and (run_folder / "state.pt").exists():
        raise CheckpointError(f"{run_folder}: holds a run already; go on with --resume, or choose another folder")


def _initial(build: Callable[[], UNet], device: torch.device) -> dict[str, Any]:
    """Build the network, the running average of its weights, and the optimizer."""
    network, average = (build().to(device) for _ in range(2))
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


def _rate(iteration: int, share: float) -> float:
    """One cosine over the run, after a ramp."""
    return _LEARNING_RATE * min(1, (iteration + 1) / _RAMP) * 0.5 * (1 + math.cos(math.pi * share))


def _step(network: UNet, optimizer: torch.optim.Optimizer, rate: float, loss: Tensor, clip: float) -> Tensor:
    """One iteration; returns the loss, which is not waited for."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return loss.detach()


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


def _keep(weights: Path, settings: dict[str, Any], history: list[dict[str, Any]], parts: dict[str, Any]) -> None:
    save_unet(weights, parts["average"], settings | {"last": history[-1]})
    save_history(weights.parent / "history.jsonl", history)
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(weights.parent / "state.pt", state | {"settings": settings, "history": history})
