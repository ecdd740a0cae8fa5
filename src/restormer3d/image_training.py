"""Training of the network for the static image: pairs of noisy means of simulated scenes, never a clean target."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.checkpoint import CheckpointError, load_state, save_state
from restormer3d.image_network import IMAGE_WEIGHTS, ImageNetwork, save_image_weights
from restormer3d.noise import NoiseEstimate
from restormer3d.simulation import random_scene_parameters, random_texture, simulate_scene
from restormer3d.simulation.detector import correlate_neighbors
from restormer3d.simulation.parameters import log_uniform
from restormer3d.static_image import stabilized
from restormer3d.training import Progress

_SIDE = 128  # pixels of an image
_FRAMES = 12  # of a simulated scene, that its image is the mean of
_POOL = 64  # images that batches are drawn from at one time; each iteration replaces the oldest
_PATCH = 64  # pixels
_BATCH = 16
_RECORDINGS = 8  # further noisy recordings of the same image, whose mean the network learns to predict
_LEARNING_RATE = 1e-3
_RAMP = 100  # iterations in which it rises
_CLIP = 0.1
_DECAY = 0.995  # of the running average of the weights
_VALIDATION = 8  # batches
_VALIDATION_SEED = 9_300_000


def pretrain_image(
    run_folder: Path,
    iterations: int,
    *,
    seed: int = 1,
    resume: bool = False,
    save_every: int = 500,
    progress: Progress | None = None,
) -> Path:
    """Train the network for the static image, on the CPU; a killed run goes on with `resume` to the same weights.

    Parameters
    ----------
    run_folder : Path
        Receives `static_image.safetensors`, `history.jsonl` and `state.pt` to resume from.
    iterations : int
        Of batches of 16 patches of 64 x 64 pixels.
    seed : int
        Of images, noise and initial weights.
    resume : bool
        Go on with the run in `run_folder`.
    save_every : int
        Iterations between two savings, each with a validation.
    progress : function, optional
        Called with ("train", iterations done, iterations in all).

    Returns
    -------
    Path
        The weights: their running average.

    Raises
    ------
    ValueError
        If `iterations` or `save_every` is below 1.
    CheckpointError
        If `run_folder` holds a run and `resume` is not set, or one with other iterations or another seed.
    """
    if min(iterations, save_every) < 1:
        raise ValueError(f"expected iterations and save_every of at least 1, got {iterations} and {save_every}")
    run_folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    network, average = ImageNetwork(), ImageNetwork()
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=1e-4)
    settings = {"iterations": iterations, "seed": seed}
    history = _resumed(run_folder / "state.pt", settings, network, average, optimizer) if resume else []
    if not resume and (run_folder / "state.pt").exists():
        raise CheckpointError(f"{run_folder}: holds a run already; go on with --resume, or choose another folder")
    done = history[-1]["iteration"] if history else 0
    losses: list[float] = []
    for iteration in range(done, iterations):
        # Not drawn ahead in a thread: it would hold up those that compute for longer than it takes.
        noisy, target, _, correlation = _batch(seed, iteration)
        losses.append(_step(network, optimizer, iteration, iterations, noisy, target, correlation))
        _follow(average, network, iteration)
        if progress:
            progress("train", iteration + 1, iterations)
        if (iteration + 1) % save_every == 0 or iteration + 1 == iterations:
            history.append({"iteration": iteration + 1, "loss": float(np.mean(losses)), **validate_image(average)})
            losses.clear()
            _keep(run_folder, settings, history, network, average, optimizer)
    return run_folder / IMAGE_WEIGHTS


@torch.no_grad()
def validate_image(network: ImageNetwork) -> dict[str, float]:
    """Squared error to the truth, in units of the noise variance, over images that training never sees."""
    errors, before = [], []
    for number in range(_VALIDATION):
        noisy, _, truth, correlation = _validation_batch(number)
        errors.append(F.mse_loss(network(noisy, correlation), truth).item())
        before.append(F.mse_loss(noisy, truth).item())
    return {"error": float(np.mean(errors)), "error_of_noisy": float(np.mean(before))}


def _step(
    network: ImageNetwork,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    iterations: int,
    noisy: Tensor,
    target: Tensor,
    correlation: Tensor,
) -> float:
    """One iteration of one cosine; returns the loss."""
    rate = min(1, (iteration + 1) / _RAMP) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE * rate
    loss = F.mse_loss(network(noisy, correlation), target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _follow(average: ImageNetwork, network: ImageNetwork, iteration: int) -> None:
    """Move the running average of the weights; the first iterations are soon forgotten."""
    kept = min(_DECAY, (iteration + 1) / (iteration + 11))
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - kept)


def _batch(seed: int, iteration: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy patches (B, 1, H, W) in deviations of their noise, second recordings, truth, and correlations (B, 2)."""
    rng = np.random.default_rng([seed, 2, iteration])
    pairs = [_pair(rng, _image(seed, iteration + int(rng.integers(_POOL)))) for _ in range(_BATCH)]
    return tuple(torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*pairs, strict=True))  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=_VALIDATION)
def _validation_batch(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _batch(_VALIDATION_SEED, number * _POOL)


def _pair(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Record a patch of an image twice, with light, detector and length drawn at random; the second time longer."""
    top, left = rng.integers(0, _SIDE - _PATCH + 1, 2)
    clean = np.rot90(image[top : top + _PATCH, left : left + _PATCH], int(rng.integers(4)))
    clean = clean[:, ::-1] if rng.random() < 0.5 else clean
    noise = NoiseEstimate(log_uniform(rng, 10, 2000), log_uniform(rng, 10, 10_000), 0.0, None, {}, 0.0, 0.0)
    frames = log_uniform(rng, 16, 30_000)
    correlation = (rng.uniform(0, 0.2), rng.uniform(0, 0.3)) if rng.random() < 0.4 else (0.0, 0.0)

    def in_noise(values: np.ndarray) -> np.ndarray:
        return stabilized(values, noise) * np.sqrt(frames)

    noisy, target = (
        in_noise(_recorded(rng, clean, noise, count, correlation)) for count in (frames, _RECORDINGS * frames)
    )
    return (*((each - noisy.mean())[None] for each in (noisy, target, in_noise(clean))), np.array(correlation))


def _recorded(
    rng: np.random.Generator,
    clean: np.ndarray,
    noise: NoiseEstimate,
    frames: float,
    correlation: tuple[float, float],
) -> np.ndarray:
    """Mean of so many frames of an image."""
    light = noise.gain / frames * rng.poisson(clean * frames / noise.gain)
    error = light - clean + np.sqrt(noise.read_noise_variance / frames) * rng.standard_normal(clean.shape)
    for axis, lag_one in enumerate(correlation):
        error = correlate_neighbors(error, lag_one, axis)
    return clean + error


@lru_cache(maxsize=2 * _POOL)
def _image(seed: int, number: int) -> np.ndarray:
    """Draw what stands still: mostly of a simulated scene, of any kind or like the default one; else any shapes."""
    rng = np.random.default_rng([seed, 3, number])
    kind = rng.random()
    if kind < 0.3:
        return random_texture(rng, _SIDE)
    parameters = {"cell_radius_px": log_uniform(rng, 2, 4)}
    if kind < 0.75:
        parameters = random_scene_parameters(rng)["scene"] | {"motion_px": 0.0}
    scene = simulate_scene((_FRAMES, _SIDE, _SIDE), seed=int(rng.integers(2**31)), **parameters)
    return scene[:].mean(0)


def _resumed(
    path: Path,
    settings: dict[str, int],
    network: ImageNetwork,
    average: ImageNetwork,
    optimizer: torch.optim.Optimizer,
) -> list[dict[str, Any]]:
    """Take a run up where it was saved; returns its history."""
    if not path.exists():
        return []
    state = load_state(path)
    if state["settings"] != settings:
        raise CheckpointError(f"{path}: a run with {state['settings']}, not {settings}; choose another folder")
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def _keep(
    run_folder: Path,
    settings: dict[str, int],
    history: list[dict[str, Any]],
    network: ImageNetwork,
    average: ImageNetwork,
    optimizer: torch.optim.Optimizer,
) -> None:
    save_image_weights(run_folder / IMAGE_WEIGHTS, average, settings | {"last": history[-1]})
    (run_folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    parts = {"network": network, "average": average, "optimizer": optimizer}
    state = {name: part.state_dict() for name, part in parts.items()}
    save_state(run_folder / "state.pt", state | {"settings": settings, "history": history})
