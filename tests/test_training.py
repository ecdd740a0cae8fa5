"""Training learns, resumes exactly, repeats under a seed, and stops when it diverges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from restormer3d.checkpoint import CheckpointError
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.model import Restormer3D
from restormer3d.patches import random_patches, training_stack
from restormer3d.training import DivergenceError, _drawn_ahead, _read_losses, fit, learning_rate

from .conftest import TINY


def fresh_model(start: str = "input") -> Restormer3D:
    torch.manual_seed(0)
    return Restormer3D(ModelConfig(**TINY, start=start))


def weights(model: Restormer3D) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_patches_are_normalized_pieces_of_the_stack(noisy_stack):
    source = training_stack(noisy_stack)
    batch = random_patches([source], (8, 16, 16), 5, np.random.default_rng(0))
    assert batch.noisy.shape == (5, 1, 8, 16, 16)
    assert batch.background.shape == (5, 3, 1, 16, 16)
    assert batch.median.shape == (5, 1, 1, 16, 16)
    raw = source.normalization.invert(batch.noisy.numpy())
    assert np.isin(np.rint(raw), noisy_stack).all()
    # A patch and its mean image were turned alike: they go together.
    for noisy, mean in zip(batch.noisy, batch.background[:, :1], strict=True):
        assert np.corrcoef(noisy.mean(1).flatten(), mean.flatten())[0, 1] > 0.5


def test_all_eight_symmetries_occur_and_correlated_noise_is_not_turned():
    stack = np.zeros((4, 8, 8), np.float32)
    stack[:, 0, 1] = 1.0
    stack[:, 3, 4] = 0.5

    def corners(blind_spot):
        source = training_stack(stack, blind_spot)
        draws = (random_patches([source], (4, 8, 8), 1, np.random.default_rng(i)) for i in range(200))
        return {int(draw.noisy[0, 0, 0].argmax()) for draw in draws}

    assert len(corners((0, 0, 0))) == 8
    assert len(corners((0, 0, 1))) == 4


def test_small_stacks_give_small_patches(noisy_stack):
    sources = [training_stack(noisy_stack), training_stack(noisy_stack[:5, :9, :12])]
    shapes = {random_patches(sources, (8, 16, 16), 2, np.random.default_rng(i)).noisy.shape[2:] for i in range(20)}
    assert shapes == {(8, 16, 16), (5, 9, 12)}


def test_learning_rate_is_one_cosine():
    config = TrainingConfig(warmup_iterations=20, iterations=80, learning_rate=1e-3, final_learning_rate=1e-5)
    rates = [learning_rate(config, i) for i in range(101)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[50] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[100] == pytest.approx(1e-5)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("start", ["input", "filters"])
def test_training_lowers_the_masked_loss(noisy_stack, start):
    model = fresh_model(start)
    config = TrainingConfig(
        patch=(16, 16, 16), iterations=60, learning_rate=3e-3, masked_fraction=0.1, warmup_iterations=5
    )
    history = fit(model, [training_stack(noisy_stack)], config)
    losses = [entry["loss"] for entry in history if entry["stage"] == "noise2void"]
    assert len(history) == 65
    assert np.mean(losses[-15:]) < 0.95 * np.mean(losses[:15])


def test_the_same_seed_gives_the_same_weights(noisy_stack, quick_training):
    source = training_stack(noisy_stack)
    results = []
    for seed in (1, 1, 2):
        model = fresh_model()
        fit(model, [source], quick_training.model_copy(update={"seed": seed}))
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_an_interrupted_training_ends_as_an_uninterrupted_one(noisy_stack, quick_training, tmp_path):
    source = training_stack(noisy_stack)
    config = quick_training.model_copy(update={"ema_decay": 0.9})
    whole = fresh_model()
    whole_history = fit(whole, [source], config)

    def interrupt(_, done, __):
        if done == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(fresh_model(), [source], config, state_file=state, save_every=2, progress=interrupt)
    resumed = fresh_model()
    history = fit(resumed, [source], config, state_file=state, save_every=2)
    assert torch.equal(weights(whole), weights(resumed))
    assert [e["loss"] for e in history] == [e["loss"] for e in whole_history]


def test_a_state_of_other_settings_is_refused(noisy_stack, quick_training, tmp_path):
    source = training_stack(noisy_stack)
    state = tmp_path / "state.pt"
    fit(fresh_model(), [source], quick_training, state_file=state)
    with pytest.raises(CheckpointError, match="other settings"):
        fit(fresh_model(), [source], quick_training.model_copy(update={"seed": 9}), state_file=state)


def test_the_running_average_of_the_weights_is_kept(noisy_stack, quick_training):
    source = training_stack(noisy_stack)
    last, averaged = fresh_model(), fresh_model()
    fit(last, [source], quick_training)
    fit(averaged, [source], quick_training.model_copy(update={"ema_decay": 0.9}))
    assert not torch.equal(weights(last), weights(averaged))


def test_a_diverging_training_stops_and_says_what_to_try(noisy_stack, quick_training):
    model = fresh_model()
    with torch.no_grad():
        model.unet.output.weight.fill_(float("inf"))
    with pytest.raises(DivergenceError, match="learning rate"):
        fit(model, [training_stack(noisy_stack)], quick_training)


def test_stacks_may_come_from_a_function_of_the_iteration(noisy_stack, quick_training):
    asked = []

    def stacks(iteration):
        asked.append(iteration)
        return [training_stack(noisy_stack)]

    fit(fresh_model(), stacks, quick_training)
    assert asked == list(range(8))


def test_patches_drawn_ahead_are_those_drawn_in_time(noisy_stack, quick_training):
    """As for a GPU: a thread draws the next patches while a step runs."""
    asked = []

    def draw(iteration):
        asked.append(iteration)
        return random_patches(
            [training_stack(noisy_stack)], (8, 8, 8), 1, np.random.default_rng([0, iteration])
        ), iteration

    for number, (batch, seed) in enumerate(_drawn_ahead(draw, range(3, 7)), start=3):
        assert seed == number
        assert torch.equal(batch.noisy, draw(number)[0].noisy)
    assert set(asked) == {3, 4, 5, 6}
    assert list(_drawn_ahead(draw, range(5, 5))) == []


def test_losses_read_late_are_those_of_their_iterations():
    history = [{"iteration": 1, "loss": 0.5}, {"iteration": 2, "loss": None}, {"iteration": 3, "loss": None}]
    unread = [torch.tensor(0.25), torch.tensor(0.125)]
    _read_losses(history, unread)
    assert [entry["loss"] for entry in history] == [0.5, 0.25, 0.125]
    assert unread == []
    history.append({"iteration": 4, "loss": None})
    with pytest.raises(DivergenceError, match="iteration 4"):
        _read_losses(history, [torch.tensor(float("nan"))])
