"""Held-out voxels: never trained on, hidden when they judge, and the weights that predict them best are kept."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from restormer3d import selection
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.model import Restormer3D
from restormer3d.objectives import hide
from restormer3d.patches import random_patches, training_stack
from restormer3d.selection import BestWeights, batches_of, check_iterations
from restormer3d.training import fit

from .conftest import TINY

CONFIG = TrainingConfig(patch=(16, 16, 16), iterations=8, held_out=0.05, learning_rate=1e-3, blind_spot=(0, 0, 1))


def test_held_out_voxels_are_the_same_wherever_a_patch_lies(noisy_stack):
    numbered = np.arange(noisy_stack.size, dtype=np.int64).reshape(noisy_stack.shape)
    source = training_stack(numbered)
    seen: dict[int, bool] = {}
    for seed in range(6):
        batch = random_patches([source], (24, 24, 24), 2, np.random.default_rng(seed), 0.05)
        numbers = source.normalization.invert(batch.noisy.numpy()).round().astype(int).ravel()
        for number, held_out in zip(numbers.tolist(), batch.held_out.flatten().tolist(), strict=True):
            assert seen.setdefault(number, held_out) == held_out
    assert np.mean(list(seen.values())) == pytest.approx(0.05, abs=0.01)


def test_held_out_voxels_are_trained_on_never_and_judge_unseen(noisy_stack):
    batch = random_patches([training_stack(noisy_stack)], (16, 16, 16), 2, np.random.default_rng(0), 0.05)
    options = {"masked_fraction": 0.2, "extent": (0, 0, 0), "held_out": batch.held_out}
    arguments = batch.noisy, batch.background, batch.stack_frames
    trained = hide(*arguments, **options, generator=torch.Generator().manual_seed(0))
    judged = hide(*arguments, **options, generator=torch.Generator().manual_seed(0), score=True)

    assert trained[3].any()
    assert not (trained[3] & batch.held_out).any()
    assert torch.equal(judged[3], batch.held_out)
    assert (judged[0] != batch.noisy)[batch.held_out].float().mean() > 0.9
    assert torch.equal(judged[0][~batch.held_out], batch.noisy[~batch.held_out])


@pytest.mark.parametrize("extent", [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 3)])
def test_a_check_hides_no_more_than_training(noisy_stack, extent):
    source = training_stack(noisy_stack, extent)
    config = CONFIG.model_copy(update={"masked_fraction": 0.05})
    batch = selection._hidden([source], config, 0)
    hidden = (batch[0] != batch[2]).float().mean()
    assert 0 < hidden < 1.5 * 0.05


def test_of_a_long_training_a_check_looks_at_few_patches():
    assert batches_of(800) == 16
    assert batches_of(50_000) == batches_of(100_000) < 100


def test_the_best_weights_are_kept(noisy_stack, tiny_model):
    source = training_stack(noisy_stack)
    best = BestWeights([source], CONFIG, torch.device("cpu"), "fp32")
    good = Restormer3D(ModelConfig(**TINY, start=tiny_model.config.start))  # not trained: better than noise for weights
    best.look(tiny_model, 0)
    best.look(good, 4)
    best.look(tiny_model, 8)
    best.restore(tiny_model)

    assert best.kept == 4
    assert best.scores[0] == best.scores[8] > best.scores[4]
    for name, value in tiny_model.state_dict().items():
        torch.testing.assert_close(value, good.state_dict()[name])


def test_training_that_makes_it_worse_is_undone(noisy_stack, tiny_model):
    before = copy.deepcopy(tiny_model.state_dict())
    wild = CONFIG.model_copy(update={"learning_rate": 0.1, "loss": "mse"})

    history = fit(tiny_model, [training_stack(noisy_stack)], wild)

    assert set(history[-1]["held_out"]) == check_iterations(8) == {0, 8}
    if history[-1]["kept_iteration"] == 0:
        for name, value in tiny_model.state_dict().items():
            torch.testing.assert_close(value, before[name])
    best = min(history[-1]["held_out"].values())
    assert history[-1]["held_out"][history[-1]["kept_iteration"]] == best


def test_looks_are_sparse_and_begin_early():
    assert check_iterations(800) == {0, 25, 50, 100, 200, 400, 800}
    assert check_iterations(38) == {0, 25, 38}
    assert check_iterations(0) == {0}


def test_training_ends_where_nothing_is_gained_and_stays_ended(noisy_stack, tiny_model, tmp_path):
    idle = CONFIG.model_copy(update={"iterations": 104, "stop_early": True, "learning_rate": 1e-12})
    options = {"state_file": tmp_path / "state", "save_every": 10}
    history = fit(tiny_model, [training_stack(noisy_stack)], idle, **options)
    assert [entry["iteration"] for entry in history] == list(range(1, 26))
    assert set(history[-1]["held_out"]) == {0, 25}
    resumed = fit(copy.deepcopy(tiny_model), [training_stack(noisy_stack)], idle, **options)
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in history]


def test_training_goes_on_as_long_as_it_helps(noisy_stack, tiny_model):
    training = CONFIG.model_copy(update={"iterations": 52, "stop_early": True, "loss": "mse"})
    history = fit(tiny_model, [training_stack(noisy_stack)], training)
    scores = history[-1]["held_out"]
    assert scores[25] < 0.9 * scores[0]
    assert len(history) == 52


def test_stacks_that_change_cannot_hold_out_voxels(noisy_stack, tiny_model):
    with pytest.raises(ValueError, match="held_out"):
        fit(tiny_model, lambda _: [training_stack(noisy_stack)], CONFIG)
