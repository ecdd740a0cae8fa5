"""Training of the networks for activity: from what one recording shows of a scene to what many further ones would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.activity import courses, footprints
from restormer3d.activity.footprints import Footprints
from restormer3d.arithmetic import autocast, torch_device
from restormer3d.checkpoint import COURSE_WEIGHTS, FOOTPRINT_WEIGHTS
from restormer3d.config import Precision
from restormer3d.progress import Progress
from restormer3d.small_networks.activity_scenes import (
    CourseScene,
    FootprintScene,
    Scene,
    load_scene,
    prepare_scenes,
    simulated_courses,
    simulated_footprints,
)
from restormer3d.small_networks.unet_training import check_run, train_unet
from restormer3d.unets import CourseNetwork, FootprintNetwork, UNet

_CLIP = 0.5
_DECAY = 0.997  # of the running average of the weights
_PER_SCENE = 4  # footprints of a batch that are of the same scene; of courses all are
_TURNED = 0.7  # of all footprints: turned together with another one, as other courses would show them
_COURSES_TURNED = (0.15, 0.6)  # share of pairs, and radians at most: a cell's events stay in one course
_REDRAWN = 0.5  # of all scenes of courses: with other noise
_REACH = 12  # frames before and after, over which denoising spreads the noise of one
_RIDGE = 0.02  # added to the noise's variance, that the spread over many frames is not made up
_LENGTHS = (48, 96, 96, 160, 256)  # frames of courses that are looked at; multiples of four
_LEAST_SHARE = 0.1  # of all scenes must be as long, or a few would be drawn again and again
_RECORDINGS = 64  # further recordings of the same scene, whose mean the network learns to predict
_LEAST_ERROR = 0.004  # of a pixel; scenes of less are not weighed more
_LEAST_COURSE_ERROR = 0.01
_VALIDATION = 20  # of so many scenes one is for validation
_LEAST_ENERGY = 1e-3


class Batch(NamedTuple):
    """What a network for activity takes, each (B, ...); the target, as its answer, and its weight (B,)."""

    inputs: tuple[Tensor, ...]
    target: Tensor
    weight: Tensor


Activity = Literal["footprints", "courses"]


def pretrain_activity(
    what: Activity,
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
    batch_size: int = 8,
    workers: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train the network for footprints or that for courses, on scenes that are simulated and denoised first.

    A killed run goes on with `resume`; on the CPU and without `seconds` it gets to the same weights as if it had not
    been killed.

    Parameters
    ----------
    what : {"footprints", "courses"}
        Which network. Scenes for courses are denoised with the shipped weights for footprints.
    run_folder : Path
        Receives the scenes, the weights, `history.jsonl` and `state.pt` to resume from.
    iterations : int
        Of batches.
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
        Scenes per iteration: four footprints, or all courses, of each.
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
    if scenes < 2:
        raise ValueError(f"expected at least 2 scenes, got {scenes}")
    place = torch_device(device)
    simulated, scene_kind, network_kind, name = _KINDS[what]
    for done in prepare_scenes(simulated, run_folder / "scenes", seed, scenes, workers):
        if progress:
            progress("scenes", done, scenes)
    learned, validation = _loaded(scene_kind, run_folder / "scenes", scenes)
    settings = {"what": what, "iterations": iterations, "scenes": scenes, "seed": seed, "widths": list(widths)}
    settings |= {"batch_size": batch_size, "precision": precision, "seconds": seconds}

    def build() -> UNet:
        torch.manual_seed(seed)
        return network_kind(widths)

    def loss(network: UNet, batch: Batch) -> Tensor:
        with autocast(place, precision):
            denoised = network(*batch.inputs)
        return ((denoised.float() - batch.target).square().flatten(1).mean(1) * batch.weight).mean()

    @contextmanager
    def batches(done: int) -> Iterator[Iterator[Batch]]:
        drawn = (draw_batch(learned, seed, number, batch_size) for number in count(done))
        yield (Batch(tuple(x.to(place) for x in b.inputs), b.target.to(place), b.weight.to(place)) for b in drawn)

    train_unet(
        run_folder / name,
        build,
        batches,
        loss,
        lambda network: validate_activity(network, validation, place),
        settings,
        device=place,
        resume=resume,
        save_every=save_every,
        clip=_CLIP,
        decay=_DECAY,
        progress=progress,
    )
    return run_folder / name


def draw_batch(scenes: list[Scene], seed: int, number: int, size: int) -> Batch:
    """Draw the batch of an iteration, of `size` scenes: the same arguments give the same batch."""
    rng = np.random.default_rng([seed, 6, number])
    if isinstance(scenes[0], FootprintScene):
        drawn = [_some_footprints(scenes[i], rng) for i in rng.integers(len(scenes), size=size)]
    else:
        lengths = np.array([scene.noisy.shape[1] for scene in scenes])
        possible = [n for n in _LENGTHS if (lengths >= n).mean() >= _LEAST_SHARE] or [lengths.min() // 4 * 4]
        frames = int(rng.choice(possible))
        usable = np.flatnonzero(lengths >= frames)
        drawn = [_some_courses(scenes[i], rng, frames) for i in rng.choice(usable, size)]
    *inputs, target, weight = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Batch(tuple(inputs), target, weight)


@torch.no_grad()
def validate_activity(network: Any, scenes: list[Scene], device: torch.device) -> dict[str, float]:
    """Decibels by which the squared error to the truth falls: mean, lowest and highest over the scenes."""
    gains = []
    for scene in scenes:
        noisy, denoised, truth = (x.to(device).float()[None] for x in scene[:3])
        if isinstance(scene, FootprintScene):
            inside = Footprints(torch.empty(0), denoised, noisy)
            static = scene.static.to(device).float()[None]
            better = footprints.apply_network(
                network, inside, static, (float(scene.correlation[0]), float(scene.correlation[1]))
            )
        else:
            lines = [x.mT for x in (noisy, denoised, scene.strength.to(device)[None])]
            better = courses.apply_network(network, *lines, weights=courses.weights_of_others(lines[1])).mT
        before, after = (float((x - truth).square().sum()) for x in (denoised, better))
        gains.append(10 * math.log10(before / after))
    return {"gain_db": float(np.mean(gains)), "lowest_gain_db": min(gains), "highest_gain_db": max(gains)}


def _loaded(kind: type[Scene], folder: Path, count: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes to learn from, and those for validation."""
    sets: tuple[list[Scene], list[Scene]] = ([], [])
    for number in range(count):
        scene = load_scene(kind, folder, number)
        if scene is not None:
            sets[number % _VALIDATION == 0].append(scene)
    if not all(sets):
        raise ValueError(f"{folder}: of {count} scenes too few are of use; prepare more")
    return sets


def _some_footprints(scene: FootprintScene, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Draw footprints of a scene, mostly strong ones: inputs of the network, target, weight.

    Most are turned together with another one; all are flipped and rotated.
    """
    energy = scene.denoised.float().square().flatten(1).sum(1).clamp(min=_LEAST_ENERGY).numpy().astype(np.float64)
    likely = energy**0.25 / (energy**0.25).sum()
    some, others = (rng.choice(len(energy), _PER_SCENE, p=likely) for _ in range(2))
    angle = np.where(rng.random(_PER_SCENE) < _TURNED, rng.uniform(-np.pi, np.pi, _PER_SCENE), 0.0)
    angle[some == others] = 0
    cosine, sine = (torch.from_numpy(f(angle)).float().view(-1, 1, 1) for f in (np.cos, np.sin))
    noisy, denoised, truth = (cosine * x[some].float() + sine * x[others].float() for x in scene[:3])
    error = (denoised - truth).square().mean().clamp(min=_LEAST_ERROR)
    static, strength = (x.float().expand_as(noisy) for x in (scene.static, scene.strength))
    images = [noisy, denoised, static, strength, _mean_of_many(truth, rng)]
    correlation = scene.correlation
    for axis in (1, 2):
        if rng.random() < 0.5:
            images = [x.flip(axis) for x in images]
    if rng.random() < 0.5:
        images, correlation = [x.mT for x in images], correlation.flip(0)
    *inputs, target = (x[:, None] for x in images)
    return (*inputs, correlation.expand(_PER_SCENE, -1), target, (1 / error).expand(_PER_SCENE))


def _some_courses(scene: CourseScene, rng: np.random.Generator, frames: int) -> tuple[Tensor, ...]:
    """Draw all courses of a scene, `frames` long: inputs of the network, target, weight.

    Some pairs are turned a little towards one another.
    """
    if rng.random() < _REDRAWN:
        scene = with_other_noise(scene, rng)
    pairs = rng.permutation(len(scene.noisy))[: len(scene.noisy) // 2 * 2].reshape(-1, 2)
    turn = np.eye(len(scene.noisy))
    for i, j in pairs[rng.random(len(pairs)) < _COURSES_TURNED[0]]:
        angle = rng.uniform(-_COURSES_TURNED[1], _COURSES_TURNED[1])
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    noisy, denoised, truth = (torch.from_numpy(turn).float() @ x for x in scene[:3])
    weights = courses.weights_of_others(denoised.mT[None])
    first = int(rng.integers(noisy.shape[1] - frames + 1))
    lines = (noisy, denoised, scene.strength, _mean_of_many(truth, rng), truth)
    noisy, denoised, strength, target, truth = (x[None, :, first : first + frames] for x in lines)
    error = (denoised - truth).square().mean().clamp(min=_LEAST_COURSE_ERROR)
    return noisy, denoised, strength, weights, target, (1 / error)[None]


def _mean_of_many(truth: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw what the mean of many recordings would show: noise of so many photons is as good as normal."""
    return truth + torch.from_numpy(rng.standard_normal(truth.shape, np.float32)) / math.sqrt(_RECORDINGS)


def with_other_noise(scene: CourseScene, rng: np.random.Generator) -> CourseScene:
    """Draw the noise of courses anew, and pass it on to the denoised ones as their own noise was passed on.

    How it was is found by least squares: a filter along time for each course, the same forward and backward.
    """
    noise, error = scene.noisy - scene.truth, scene.denoised - scene.truth
    around = _around(noise - noise.mean(1, keepdim=True)).double()
    gram = around.mT @ around + _RIDGE * noise.shape[1] * torch.eye(2 * _REACH + 1, dtype=torch.float64)
    response = torch.linalg.solve(gram, around.mT @ (error - error.mean(1, keepdim=True)).double()[..., None])
    response = ((response + response.flip(1)) / 2).float()
    other = torch.from_numpy(rng.standard_normal(noise.shape, np.float32)) * noise.std(1, keepdim=True)
    change = (_around(other - noise) @ response)[..., 0]
    return scene._replace(noisy=scene.truth + other, denoised=scene.denoised + change - change.mean(1, keepdim=True))


def _around(lines: Tensor) -> Tensor:
    """From (courses, T) to what is around each frame, (courses, T, frames)."""
    return F.pad(lines, (_REACH, _REACH), mode="reflect").unfold(1, 2 * _REACH + 1, 1)


_KINDS: dict[str, tuple[Any, Any, Any, str]] = {
    "footprints": (simulated_footprints, FootprintScene, FootprintNetwork, FOOTPRINT_WEIGHTS),
    "courses": (simulated_courses, CourseScene, CourseNetwork, COURSE_WEIGHTS),
}
