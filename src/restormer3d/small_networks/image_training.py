"""Training of the network for the static image: pairs of noisy means of simulated scenes, never a clean target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from restormer3d.arithmetic import float32_products, torch_device
from restormer3d.checkpoint import IMAGE_WEIGHTS
from restormer3d.progress import Progress
from restormer3d.simulation.images import images_ahead
from restormer3d.small_networks import image_pairs
from restormer3d.small_networks.image_pairs import Pairs, numbered_batch, pooled_batches
from restormer3d.small_networks.unet_training import check_run, train_unet
from restormer3d.unets import ImageNetwork

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
    check_run(run_folder, resume, widths, iterations, save_every, batch_size, workers, seconds)
    place, weights = torch_device(device), run_folder / IMAGE_WEIGHTS
    settings = {"iterations": iterations, "seed": seed, "widths": list(widths), "batch_size": batch_size}

    def build() -> ImageNetwork:
        torch.manual_seed(seed)
        return ImageNetwork(widths)

    train_unet(
        weights,
        build,
        lambda done: _batches(seed, done, batch_size, workers, place),
        lambda network, pairs: F.mse_loss(network(pairs.noisy, pairs.correlation), pairs.target),
        validate_image,
        settings | {"seconds": seconds},
        device=place,
        resume=resume,
        save_every=save_every,
        clip=_CLIP,
        decay=_DECAY,
        progress=progress,
    )
    return weights


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


@lru_cache(maxsize=_VALIDATION)
def _validation_batch(number: int) -> Pairs:
    return numbered_batch(_VALIDATION_SEED, number * image_pairs.POOL, _VALIDATION_BATCH)
