"""Training of the network for footprints: from what one recording shows of a scene to what many further ones would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from restormer3d.arithmetic import Precision, autocast, torch_device
from restormer3d.checkpoint import FOOTPRINT_WEIGHTS
from restormer3d.footprint_scenes import FootprintScene, load_scene, prepare_scenes
from restormer3d.image_network import FootprintNetwork
from restormer3d.training import Progress
from restormer3d.unet_training import check_run, train_unet

_CLIP = 0.5
_DECAY = 0.997  # of the running average of the weights
_PER_SCENE = 4  # footprints of a batch that are of the same scene
_TURNED = 0.7  # of all footprints: turned together with another one, as other courses would show them
_RECORDINGS = 64  # further recordings of the same scene, whose mean the network learns to predict
_LEAST_ERROR = 0.004  # of a pixel; scenes of less are not weighed more
_VALIDATION = 20  # of so many scenes one is for validation
_LEAST_ENERGY = 1e-3


class Batch(NamedTuple):
    """Images (B, 1, H, W) as `FootprintNetwork` takes them, correlations (B, 2); target (B, 1, H, W), weight (B,)."""

    noisy: Tensor
    denoised: Tensor
    static: Tensor
    strength: Tensor
    correlation: Tensor
    target: Tensor
    weight: Tensor


def pretrain_footprints(
    run_folder: Path,
    iterations: int,
    *,
    scenes: int = 1000,
    seed: int = 1,
    resume: bool = False,
    save_every: int = 500,
    device: str = "cpu",
    precision: Precision = "fp32",
    widths: tuple[int, int, int] = (32, 64, 128),
    batch_size: int = 32,
    workers: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train the network for footprints, on scenes that are simulated and denoised first.

    A killed run goes on with `resume`; on the CPU and without `seconds` it gets to the same weights as if it had not
    been killed.

    Parameters
    ----------
    run_folder : Path
        Receives the scenes, `footprints.safetensors`, `history.jsonl` and `state.pt` to resume from.
    iterations : int
        Of batches of footprints.
    scenes : int
        Simulated recordings, one in twenty of them for validation.
    seed : int
        Of scenes, batches and initial weights.
    resume : bool
        Go on with the run in `run_folder`. Scenes that are there are used in any case.
    save_every : int
        Iterations between two savings, each with a validation.
    device : str
        Where to train: cpu or cuda.
    precision : {"fp32", "tf32", "bf16"}
        Of the training's arithmetic; TF32 on a GPU in any case. bf16 is three times faster on a CPU with matrix units.
    widths : tuple of int
        Channels of the network's three levels.
    batch_size : int
        Footprints per iteration; a multiple of four.
    workers : int
        Processes that prepare scenes; 0 to prepare them here.
    seconds : float, optional
        End the training by then, without the scenes; see `unet_training.train_unet`.
    progress : function, optional
        Called with ("scenes" or "train", done, in all).

    Returns
    -------
    Path
        The weights: their running average.

    Raises
    ------
    ValueError
        If a number is out of range, the device is not there, or no scene is of use.
    CheckpointError
        If `run_folder` holds a run and `resume` is not set, or one with other settings.
    RuntimeError
        If the workers die.
    """
    check_run(run_folder, resume, widths, iterations, save_every, batch_size, workers, seconds)
    if batch_size % _PER_SCENE or scenes < 2:
        raise ValueError(
            f"expected a batch_size that is a multiple of {_PER_SCENE} and at least 2 scenes, "
            f"got {batch_size} and {scenes}"
        )
    place = torch_device(device)
    for done in prepare_scenes(run_folder / "scenes", seed, scenes, workers):
        if progress:
            progress("scenes", done, scenes)
    learned, validation = _loaded(run_folder / "scenes", scenes)
    settings = {"iterations": iterations, "scenes": scenes, "seed": seed, "widths": list(widths)}
    settings |= {"batch_size": batch_size, "precision": precision, "seconds": seconds}

    def build() -> FootprintNetwork:
        torch.manual_seed(seed)
        return FootprintNetwork(widths)

    def loss(network: FootprintNetwork, batch: Batch) -> Tensor:
        with autocast(place, precision):
            denoised = network(*batch[:5])
        return ((denoised.float() - batch.target).square().mean((1, 2, 3)) * batch.weight).mean()

    @contextmanager
    def batches(done: int) -> Iterator[Iterator[Batch]]:
        yield (Batch(*(part.to(place) for part in draw_batch(learned, seed, i, batch_size))) for i in count(done))

    weights = run_folder / FOOTPRINT_WEIGHTS
    train_unet(
        weights,
        build,
        batches,
        loss,
        lambda network: validate_footprints(network, validation, place),
        settings,
        device=place,
        resume=resume,
        save_every=save_every,
        clip=_CLIP,
        decay=_DECAY,
        progress=progress,
    )
    return weights


def draw_batch(scenes: list[FootprintScene], seed: int, number: int, size: int) -> Batch:
    """Draw the batch of an iteration: the same arguments give the same batch."""
    rng = np.random.default_rng([seed, 6, number])
    drawn = [_of_scene(scenes[i], rng) for i in rng.integers(len(scenes), size=size // _PER_SCENE)]
    return Batch(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


@torch.no_grad()
def validate_footprints(
    network: FootprintNetwork, scenes: list[FootprintScene], device: torch.device
) -> dict[str, float]:
    """Decibels by which the squared error to the truth falls: mean, lowest and highest over the scenes."""
    gains = []
    for scene in scenes:
        noisy, denoised, truth = (x.to(device).float()[:, None] for x in scene[:3])
        static, strength = (x.to(device).float().expand_as(noisy) for x in scene[3:5])
        better = network(noisy, denoised, static, strength, scene.correlation.to(device).expand(len(noisy), -1))
        before, after = (float((x - truth).square().sum()) for x in (denoised, better))
        gains.append(10 * math.log10(before / after))
    return {"gain_db": float(np.mean(gains)), "lowest_gain_db": min(gains), "highest_gain_db": max(gains)}


def _loaded(folder: Path, count: int) -> tuple[list[FootprintScene], list[FootprintScene]]:
    """Scenes to learn from, and those for validation."""
    sets: tuple[list[FootprintScene], list[FootprintScene]] = ([], [])
    for number in range(count):
        scene = load_scene(folder, number)
        if scene is not None:
            sets[number % _VALIDATION == 0].append(scene)
    if not all(sets):
        raise ValueError(f"{folder}: of {count} scenes too few are of use; prepare more")
    return sets


def _of_scene(scene: FootprintScene, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Draw some of a scene's footprints, mostly strong ones, flipped and rotated."""
    energy = scene.denoised.float().square().sum((1, 2)).clamp(min=_LEAST_ENERGY).numpy().astype(np.float64)
    likely = energy**0.25 / (energy**0.25).sum()
    some, others = (rng.choice(len(energy), _PER_SCENE, p=likely) for _ in range(2))
    angle = np.where(rng.random(_PER_SCENE) < _TURNED, rng.uniform(0, 2 * np.pi, _PER_SCENE), 0.0)
    angle[some == others] = 0
    cosine, sine = (torch.from_numpy(f(angle)).float()[:, None, None] for f in (np.cos, np.sin))
    noisy, denoised, truth = (cosine * x[some].float() + sine * x[others].float() for x in scene[:3])
    # What the mean of many recordings would show; noise of so many photons is as good as normal.
    noise = torch.from_numpy(rng.standard_normal(truth.shape, np.float32)) / math.sqrt(_RECORDINGS)
    target = truth + noise
    error = (denoised - truth).square().mean().clamp(min=_LEAST_ERROR)
    images = [noisy, denoised, *(x.float().expand_as(noisy) for x in (scene.static, scene.strength)), target]
    correlation = scene.correlation
    for axis in (1, 2):
        if rng.random() < 0.5:
            images = [x.flip(axis) for x in images]
    if rng.random() < 0.5:
        images, correlation = [x.mT for x in images], correlation.flip(0)
    *inputs, target = (x[:, None] for x in images)
    return (*inputs, correlation.expand(_PER_SCENE, -1), target, (1 / error).expand(_PER_SCENE))
