"""Clean images of what stands still, for training on noisy recordings of them, and processes that draw them ahead.

Nothing here imports PyTorch: the processes start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Full
from typing import Any

import numpy as np

from restormer3d.processes import SPAWN, leave_ctrl_c_to_the_caller, one_thread_each
from restormer3d.simulation.generation import simulate_scene
from restormer3d.simulation.parameters import log_uniform, random_scene_parameters
from restormer3d.simulation.textures import random_texture

_FRAMES = 12  # of a simulated scene, that its image is the mean of
_WAITING = 2048  # images that are drawn ahead


def draw_image(seed: int, number: int, side: int) -> np.ndarray:
    """Draw what stands still: mostly of a simulated scene, of any kind or like the default one; else any shapes.

    Parameters
    ----------
    seed, number : int
        The same two give the same image.
    side : int
        Pixels.

    Returns
    -------
    numpy.ndarray
        (side, side) float32, ADU.
    """
    rng = np.random.default_rng([seed, 3, number])
    kind = rng.random()
    if kind < 0.3:
        return random_texture(rng, side)
    parameters = {"cell_radius_px": log_uniform(rng, 2, 4)}
    if kind < 0.75:
        parameters = random_scene_parameters(rng)["scene"] | {"motion_px": 0.0}
    scene = simulate_scene((_FRAMES, side, side), seed=int(rng.integers(2**31)), **parameters)
    return scene[:].mean(0)


@contextmanager
def images_ahead(seed: int, first: int, side: int, workers: int) -> Iterator[Callable[[int], list[np.ndarray]]]:
    """Let processes draw the images from number `first` on, each on one thread, until the block ends.

    Yields
    ------
    function
        Takes the images that are there, in no particular order; waits only until there are as many as its argument.
        It raises RuntimeError if the processes it waits for have died.
    """
    images = SPAWN.Queue(_WAITING)
    processes = [
        SPAWN.Process(target=_draw_on, args=(images, seed, first + worker, workers, side), daemon=True)
        for worker in range(workers)
    ]

    def take(least: int) -> list[np.ndarray]:
        taken = []
        while len(taken) < least or not images.empty():
            try:
                taken.append(images.get(timeout=1))
            except Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError("the processes that draw images have died; try fewer workers") from None
        return taken

    try:
        with one_thread_each():
            for process in processes:
                process.start()
        yield take
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
        images.close()


def _draw_on(images: Any, seed: int, number: int, step: int, side: int) -> None:
    """Draw every `step`-th image until the process that wants them is gone, even if it was killed."""
    leave_ctrl_c_to_the_caller()
    images.cancel_join_thread()
    parent = multiprocessing.parent_process()
    image = draw_image(seed, number, side)
    while parent is not None and parent.is_alive():
        try:
            images.put(image, timeout=1)
        except Full:
            continue
        number += step
        image = draw_image(seed, number, side)
