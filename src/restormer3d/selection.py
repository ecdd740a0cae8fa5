"""Which weights of a training to keep, and when to end it: by voxels that are never trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restormer3d.arithmetic import autocast, float32_products
from restormer3d.config import Precision, TrainingConfig
from restormer3d.cuda_graph import GraphedStep
from restormer3d.objectives import hide, masked_loss
from restormer3d.patches import TrainingStack, random_patches

_ITERATIONS_PER_BATCH = 50  # of training, for each batch that is looked at in a check
_LEAST_BATCHES = 4  # fewer would not say how sure a difference is
_MOST_BATCHES = 64  # they are held throughout
# Share of the loss that training has to gain from one check to the next. Where a detector correlates the noise of
# neighbors a little, or the field moves, held-out voxels reward less, although no frame is predicted better.
_WORTHWHILE = 5e-4
_FIRST_CHECK = 25  # iterations: sooner, nothing can have been learned


def check_iterations(total: int) -> set[int]:
    """Numbers of iterations after which the weights are checked: 0, then 25, 50, 100 and so on, and `total`."""
    checks, following = {0, total}, _FIRST_CHECK
    while following < total:
        checks.add(following)
        following *= 2
    return checks


def batches_of(total: int) -> int:
    """Batches that a check of a training of so many iterations looks at."""
    return min(max(_LEAST_BATCHES, math.ceil(total / _ITERATIONS_PER_BATCH)), _MOST_BATCHES)


class BestWeights:
    """Look at a network now and then, and remember it where it predicts the held-out voxels best.

    Always the same patches, with the same replacements of the held-out voxels, which the network does not see.

    Parameters
    ----------
    stacks : sequence of TrainingStack
        To draw from.
    config : TrainingConfig
        `held_out` above 0.
    device : torch.device
        Where to compute.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic.

    Attributes
    ----------
    scores : dict of int to float
        Loss on the held-out voxels by iteration.
    kept : int
        The best iteration.
    settled : bool
        Whether the last look showed no gain over the best one before it that is clear (more than its standard error)
        and worth the time.
    """

    def __init__(
        self, stacks: Sequence[TrainingStack], config: TrainingConfig, device: torch.device, precision: Precision
    ) -> None:
        self.scores: dict[int, float] = {}
        self.kept, self.settled = 0, False
        self._best = np.full(0, np.nan)  # loss of the best weights, batch by batch
        self._state: dict[str, Any] = {}
        score = partial(_score, config.loss, precision)
        self._score = GraphedStep(score) if device.type == "cuda" else score
        total = config.warmup_iterations + config.iterations
        batches = batches_of(total)
        self._batches = [[value.to(device) for value in _hidden(stacks, config, number)] for number in range(batches)]

    @torch.no_grad()
    def look(self, model: nn.Module, iteration: int) -> None:
        """Score a network, and remember its weights if it is the best so far."""
        # Read together: every reading makes the host wait for a GPU.
        losses = np.array(torch.stack([self._score(model, *batch) for batch in self._batches]).tolist())
        score = float(losses.mean())
        if self.scores:
            gain = self._best - losses
            least = max(gain.std(ddof=1) / math.sqrt(len(gain)), _WORTHWHILE * abs(self._best.mean()))
            self.settled = not gain.mean() > least
        if math.isfinite(score) and score < min(self.scores.values(), default=math.inf):
            self.kept, self._best, self._state = iteration, losses, copy.deepcopy(model.state_dict())
        self.scores[iteration] = score

    def restore(self, model: nn.Module) -> None:
        """Give a network the best weights."""
        if self._state:
            model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes needs."""
        kept = {"scores": self.scores, "kept": self.kept, "settled": self.settled}
        return kept | {"best": torch.from_numpy(self._best), "weights": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.scores, self.kept, self.settled = state["scores"], state["kept"], state["settled"]
        self._best, self._state = state["best"].numpy(), state["weights"]


def _score(loss: str, precision: Precision, model: nn.Module, *batch: Tensor) -> Tensor:
    with float32_products(precision), autocast(batch[0].device, precision):
        return masked_loss(model, *batch, loss=loss)


def _hidden(stacks: Sequence[TrainingStack], config: TrainingConfig, number: int) -> tuple[Tensor, ...]:
    """What :func:`restormer3d.objectives.masked_loss` needs of one of the batches, its held-out voxels replaced.

    With all around them that a blind spot covers they must not be more than training hides: of a patch that is mostly
    replaced, other weights than those that denoise best predict most.
    """
    rng = np.random.default_rng([config.seed, 3, number])
    batch = random_patches(stacks, config.patch, config.batch_size, rng, config.held_out)
    share = config.masked_fraction / (config.held_out * math.prod(2 * reach + 1 for reach in batch.blind_spot))
    held_out = batch.held_out
    if share < 1:
        held_out = held_out & torch.from_numpy(rng.random(held_out.shape) < share)
    inputs = hide(
        batch.noisy,
        batch.background,
        batch.stack_frames,
        masked_fraction=config.masked_fraction,
        extent=batch.blind_spot,
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        held_out=held_out,
        score=True,
    )
    return (*inputs, batch.mixture)
