"""Which weights of a training to keep: those that best predict voxels that were never trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restormer3d.arithmetic import Precision, autocast, float32_products
from restormer3d.config import TrainingConfig
from restormer3d.objectives import hide, masked_loss
from restormer3d.patches import TrainingStack, random_patches

CHECKS = 4  # during a training, beside the one before it
ITERATIONS_PER_BATCH = 50  # of training, for each batch that is looked at in a check: a tenth of a pass an iteration
_LEAST_BATCHES = 2


def check_iterations(total: int) -> set[int]:
    """Numbers of iterations after which the weights are checked, 0 and `total` among them."""
    return {round(total * check / CHECKS) for check in range(CHECKS + 1)}


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
    """

    def __init__(
        self, stacks: Sequence[TrainingStack], config: TrainingConfig, device: torch.device, precision: Precision
    ) -> None:
        self.scores: dict[int, float] = {}
        self.kept = 0
        self._state: dict[str, Any] = {}
        self._device, self._loss = device, config.loss
        self._precision: Precision = precision
        total = config.warmup_iterations + config.iterations
        batches = max(_LEAST_BATCHES, math.ceil(total / ITERATIONS_PER_BATCH))
        self._batches = [_hidden(stacks, config, number) for number in range(batches)]

    @torch.no_grad()
    def look(self, model: nn.Module, iteration: int) -> None:
        """Score a network, and remember its weights if it is the best so far."""
        score = float(np.mean([self._score(model, batch) for batch in self._batches]))
        if math.isfinite(score) and score < min(self.scores.values(), default=math.inf):
            self.kept, self._state = iteration, copy.deepcopy(model.state_dict())
        self.scores[iteration] = score

    def restore(self, model: nn.Module) -> None:
        """Give a network the best weights."""
        if self._state:
            model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes needs."""
        return {"scores": self.scores, "kept": self.kept, "weights": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.scores, self.kept, self._state = state["scores"], state["kept"], state["weights"]

    def _score(self, model: nn.Module, batch: tuple[Tensor, ...]) -> float:
        inputs = [value.to(self._device) for value in batch]
        with float32_products(self._precision), autocast(self._device, self._precision):
            return masked_loss(model, *inputs, loss=self._loss).item()


def _hidden(stacks: Sequence[TrainingStack], config: TrainingConfig, number: int) -> tuple[Tensor, ...]:
    """What :func:`restormer3d.objectives.masked_loss` needs of one of the batches, its held-out voxels replaced."""
    rng = np.random.default_rng([config.seed, 3, number])
    batch = random_patches(stacks, config.patch, config.batch_size, rng, config.held_out)
    inputs = hide(
        batch.noisy,
        batch.background,
        batch.stack_frames,
        masked_fraction=config.masked_fraction,
        extent=batch.blind_spot,
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        held_out=batch.held_out,
        score=True,
    )
    return (*inputs, batch.mixture)
