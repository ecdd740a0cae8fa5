"""What the networks for activity learn from: simulated recordings, denoised as far as each, and taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from restormer3d.activity import footprints
from restormer3d.activity.components import AddedNoise
from restormer3d.activity.courses import course_noise, sparse_footprints, strength_of
from restormer3d.activity.fields import SIDE, least_deviation
from restormer3d.activity.footprints import take_apart
from restormer3d.checkpoint import CheckpointError, load_state, save_state, small_network
from restormer3d.denoising import start_denoising
from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.patches import measured_stack
from restormer3d.processes import process_pool
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, random_scene_parameters, simulate_scene
from restormer3d.simulation.parameters import log_uniform
from restormer3d.static_image import denoise_mean, stabilized
from restormer3d.unets import ImageNetwork, lag_one

_FOOTPRINT_FRAMES = (50, 220)
_COURSE_FRAMES = (50, 320)
_USUAL = 0.4  # of all scenes: like the default one
_USUAL_RADIUS = (2.0, 5.0)  # pixels
_USUAL_RATE = (10.0, 40.0)  # Hz
_USUAL_GAIN = (25.0, 1500.0)
_USUAL_READ_NOISE_VARIANCE = (50.0, 3000.0)
# Variance of the noise: beyond, the recording's was not found, and teaches nothing. Of courses it grows with activity.
_NOISE = (0.5, 2.0)
_COURSE_NOISE = 4.0


class FootprintScene(NamedTuple):
    """Footprints of one scene.

    Attributes
    ----------
    noisy, denoised, truth : Tensor
        (footprints, H, W), in deviations of the noise of `noisy`; float16 as on disk.
    static, strength : Tensor
        (H, W), float16, as `footprints.context` gives them.
    correlation : Tensor
        Of the noise of neighbors along y and x, (2,).
    """

    noisy: Tensor
    denoised: Tensor
    truth: Tensor
    static: Tensor
    strength: Tensor
    correlation: Tensor


class CourseScene(NamedTuple):
    """Courses of one scene.

    Attributes
    ----------
    noisy, denoised, truth, strength : Tensor
        (courses, T), in deviations of each course's noise, float32; strength as `courses.strength_of` gives it.
    """

    noisy: Tensor
    denoised: Tensor
    truth: Tensor
    strength: Tensor


AnyScene = FootprintScene | CourseScene
Scene = TypeVar("Scene", FootprintScene, CourseScene)


def prepare_scenes(
    simulated: Callable[[int, int], AnyScene | None], folder: Path, seed: int, count: int, workers: int = 0
) -> Iterator[int]:
    """Write the scenes 0 to `count` - 1 that the folder does not hold yet, and give how many there are, after each.

    Parameters
    ----------
    simulated : function
        :func:`simulated_footprints` or :func:`simulated_courses`.
    folder : Path
        A scene is a file of its own: what is interrupted goes on where it was.
    seed : int
        Of all scenes; the same one for the same folder.
    count : int
        Of scenes.
    workers : int
        Processes, each on one thread; 0 to prepare them here.

    Raises
    ------
    RuntimeError
        If the processes have died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(count) if not _path(folder, number).is_file()]
    there = count - len(missing)
    yield there
    if not workers:
        for number in missing:
            _prepare(simulated, folder, seed, number)
            there += 1
            yield there
        return
    with process_pool(workers) as processes:
        for done in as_completed([processes.submit(_prepare, simulated, folder, seed, number) for number in missing]):
            done.result()
            there += 1
            yield there


def load_scene(kind: type[Scene], folder: Path, number: int) -> Scene | None:
    """Read a prepared scene; None if it turned out to be of no use, CheckpointError if it is of the other kind."""
    parts = load_state(_path(folder, number))
    if parts and set(parts) != set(kind._fields):
        raise CheckpointError(
            f"{_path(folder, number)}: expected a {kind.__name__}, found something else; choose another folder"
        )
    return kind(**parts) if parts else None


def simulated_footprints(seed: int, number: int, side: int = SIDE) -> FootprintScene | None:
    """Simulate a recording, denoise it but for its footprints, and take it and the truth apart alike.

    None if its noise is not found, or is not what the detector added.
    """
    recording = _simulated(np.random.default_rng([seed, 5, number]), _FOOTPRINT_FRAMES, side, "footprints", "courses")
    if recording is None:
        return None
    fields = take_apart(recording.denoised, recording.noisy)
    truth = (fields.courses.mT @ recording.clean.flatten(2)).view_as(fields.noisy)
    if not _NOISE[0] < float((fields.noisy - truth).square().mean()) < _NOISE[1]:
        return None
    frames = recording.noisy.shape[1]
    mean = denoise_mean(recording.mean, recording.estimate, frames, recording.correlation, small_network(ImageNetwork))
    static = torch.from_numpy(stabilized(mean, recording.estimate))[None]
    images = (fields.noisy, fields.denoised, truth, *footprints.context(fields, static))
    noisy, denoised, truth, static, strength = (x[0].half() for x in images)
    return FootprintScene(noisy, denoised, truth, static, strength, torch.tensor(lag_one(recording.correlation)))


def simulated_courses(seed: int, number: int, side: int = SIDE) -> CourseScene | None:
    """Simulate a recording, denoise it but for its courses, and take it and the truth apart alike.

    None if its noise is not found, or is not what the detector added.
    """
    recording = _simulated(np.random.default_rng([seed, 7, number]), _COURSE_FRAMES, side, "courses")
    if recording is None:
        return None
    along = sparse_footprints(recording.denoised)
    denoised, noisy, clean, noise = (
        x.flatten(2) @ along for x in (recording.denoised, recording.noisy, recording.clean, recording.noise)
    )
    scale, _ = course_noise(denoised, noisy, noise)
    if not _NOISE[0] < float((noisy - clean).square().mean()) < _COURSE_NOISE:
        return None
    lines = (noisy, denoised, clean, strength_of(denoised))
    return CourseScene(*((x / scale)[0].mT.contiguous() for x in lines))


class _Recording(NamedTuple):
    """A recording as one field, (1, T, H, W), in deviations of its noise; its temporal mean (H, W); its noise."""

    denoised: Tensor
    noisy: Tensor
    clean: Tensor
    noise: Tensor
    mean: np.ndarray
    estimate: NoiseEstimate
    correlation: tuple[tuple[float, ...], ...]


def _simulated(rng: np.random.Generator, frames: tuple[int, int], side: int, *without: str) -> _Recording | None:
    """Simulate a recording and denoise it, but for some steps; None if its noise is not found."""
    length = round(log_uniform(rng, *frames))
    scene_parameters, detector = _parameters(rng)
    scene_seed = int(rng.integers(2**31))
    scene = simulate_scene((length, side, side), seed=scene_seed, **scene_parameters)
    recorded = NoisyScene(scene, seed=scene_seed, **detector)[:]
    noise = estimate_noise(recorded)
    mean = recorded.mean(0, np.float64)
    variance = noise.variance(mean)
    if not variance.any():
        return None
    correlation = measured_stack(recorded, noise, "auto").noise_correlation
    chosen = settings(iterations=0)
    left_out = chosen.inference.model_copy(update=dict.fromkeys(without, False))
    chosen = replace(chosen, inference=left_out)
    cpu = torch.device("cpu")
    denoised = start_denoising(recorded, chosen, "restormer3d", cpu, None, silent, silent).frames
    drawn = AddedNoise(recorded, variance, correlation).noise(0, length)
    deviation = least_deviation(torch.from_numpy(np.sqrt(variance)).float())

    def fluctuations(frames: np.ndarray) -> Tensor:
        values = torch.from_numpy(frames.astype(np.float32))
        return ((values - values.mean(0)) / deviation)[None]

    stacks = (np.stack(list(denoised)), recorded, scene[:], drawn)
    clear, noisy, clean, of_noise = map(fluctuations, stacks)
    return _Recording(clear, noisy, clean, of_noise, mean, noise, correlation)


def _parameters(rng: np.random.Generator) -> tuple[dict, dict]:
    """Draw what is simulated, and the detector."""
    if rng.random() >= _USUAL:
        parameters = random_scene_parameters(rng)
        return parameters["scene"], parameters["detector"]
    scene = {"cell_radius_px": log_uniform(rng, *_USUAL_RADIUS), "frame_rate_hz": float(rng.uniform(*_USUAL_RATE))}
    gain, read = log_uniform(rng, *_USUAL_GAIN), float(rng.uniform(*_USUAL_READ_NOISE_VARIANCE))
    return scene, {"gain": gain, "read_noise_variance": read}


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.pt"


def _prepare(simulated: Callable[[int, int], AnyScene | None], folder: Path, seed: int, number: int) -> None:
    scene = simulated(seed, number)
    save_state(_path(folder, number), scene._asdict() if scene else {})
