"""Simulated scenes that pretraining draws from: each made from its number alone, by other processes ahead of time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from restormer3d.mixture import adapted_mixture
from restormer3d.model import Restormer3D
from restormer3d.patches import TrainingStack, training_stack
from restormer3d.processes import process_pool
from restormer3d.simulation import NoisyScene, random_scene_parameters, simulate_scene

_ITERATIONS_PER_SCENE = 8  # a new simulated scene replaces the oldest in the pool after so many iterations
_POOL = 6  # simulated scenes that batches are drawn from at one time
_AHEAD = 2  # scenes that each process has to do
_WINDOWS = 4  # of a simulated scene, that its mixture of filters is fitted to


@dataclass(frozen=True)
class Scenes:
    """An endless row of simulated scenes, which repeats after `count`.

    Attributes
    ----------
    seed : int
        Of all of them.
    count : int
        Different scenes.
    shape : tuple of int
        Frames at most, rows and columns; each has 40 to 100 % of the frames.
    recordings : int
        Further noisy recordings of each, whose mean is its second one; 0 for none.
    window : tuple of int
        Frames, rows and columns that the network will see.
    """

    seed: int
    count: int
    shape: tuple[int, int, int]
    recordings: int
    window: tuple[int, int, int]

    def pool(self, iteration: int) -> list[int]:
        """Numbers of the scenes that an iteration draws from: the newest few of the row."""
        newest = iteration // _ITERATIONS_PER_SCENE
        return [number % self.count for number in range(newest, newest + min(_POOL, self.count))]

    def prepared(self, model: Restormer3D, number: int) -> TrainingStack:
        """Simulate the recordings of a scene, with a mixture of filters of its own."""
        return adapted(model, simulated(self.seed, number, self.shape, self.recordings), self.window, _WINDOWS)


@contextmanager
def scenes_ahead(model: Restormer3D, scenes: Scenes, workers: int) -> Iterator[Callable[[int], TrainingStack]]:
    """Give a function that returns the scene of a number, until the block ends.

    Parameters
    ----------
    model : Restormer3D
        Its mixture is what scenes are given their own from; read when the first scene is asked for.
    scenes : Scenes
        What to prepare.
    workers : int
        Processes, each on one thread, that prepare the scenes to come; 0 to prepare each when it is asked for.

    Yields
    ------
    function
        From number to scene. It raises RuntimeError if the processes have died.
    """
    if not workers:
        yield lru_cache(maxsize=2 * _POOL)(lambda number: scenes.prepared(model, number))
        return
    coming: dict[int, Future[TrainingStack]] = {}
    processes: list[ProcessPoolExecutor] = []

    def scene(number: int) -> TrainingStack:
        if not processes:
            processes.append(until_end.enter_context(process_pool(workers, _tell, copy.deepcopy(model).cpu(), scenes)))
        # Numbers of one pool are asked for in any order: what one of them is ahead of, others must not drop.
        last = number + _POOL + _AHEAD * workers
        kept = {each % scenes.count for each in range(number - _POOL, last + _POOL)}
        for each in set(coming) - kept:
            del coming[each]
        for each in (each % scenes.count for each in range(number, last)):
            if each not in coming:
                coming[each] = processes[0].submit(_prepare, each)
        try:
            return coming[number].result()
        except BrokenProcessPool as error:
            raise RuntimeError("the processes that prepare scenes have died; try fewer workers") from error

    with ExitStack() as until_end:
        yield scene


_told: list[tuple[Restormer3D, Scenes]] = []  # in a process that prepares scenes: by what


def _tell(model: Restormer3D, scenes: Scenes) -> None:
    _told.append((model, scenes))


def _prepare(number: int) -> TrainingStack:
    model, scenes = _told[0]
    return scenes.prepared(model, number)


def adapted(
    model: Restormer3D, source: TrainingStack, window: tuple[int, int, int], most_windows: int
) -> TrainingStack:
    """Give a stack a mixture of filters of its own, as denoising does, if the model has filters."""
    if model.config.start != "filters":
        return source
    mixture, _ = adapted_mixture(model, source, window, most_windows=most_windows)
    return replace(source, mixture=mixture.cpu().numpy())


def _mean(recordings: list[NoisyScene]) -> np.ndarray:
    total = np.zeros(recordings[0].shape, np.float32)
    for recording in recordings:
        total += recording[:]
    return total / len(recordings)


def simulated(seed: int, number: int, shape: tuple[int, int, int], recordings: int) -> TrainingStack:
    """Simulate a noisy recording, with the mean of so many further ones whose noise is independent."""
    rng = np.random.default_rng([seed, 1, number])
    parameters = random_scene_parameters(rng)
    frames = int(rng.integers(2 * shape[0] // 5, shape[0] + 1))
    scene = simulate_scene((frames, *shape[1:]), seed=int(rng.integers(2**31)), **parameters["scene"])
    detector = parameters["detector"]
    noisy, *others = (NoisyScene(scene, seed=int(rng.integers(2**31)), **detector) for _ in range(1 + recordings))
    correlation_x, correlation_y = detector["correlation"]
    # The correlation is known here: measuring it again would only cost time.
    extent = (0, int(correlation_y > 0.05), int(correlation_x > 0.05))
    source = training_stack(noisy[:], extent, second=_mean(others) if others else None)
    return replace(source, noise_correlation=((1.0,), (1.0, correlation_y), (1.0, correlation_x)))
