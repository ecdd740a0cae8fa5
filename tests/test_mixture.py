"""The mixture of filters: learned from pairs of noisy recordings, fitted to a stack from its noise alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from restormer3d.config import InferenceConfig, ModelConfig
from restormer3d.inference import denoise_frames
from restormer3d.mixture import adapted_mixture, fit_mixture
from restormer3d.model import Restormer3D
from restormer3d.patches import TrainingStack, training_stack

from .conftest import TINY, background_of, blinking_cells, photons

WINDOW = (48, 32, 32)


@pytest.fixture(scope="module")
def fitted() -> Restormer3D:
    """A mixture that was learned from pairs of small scenes."""
    model = Restormer3D(ModelConfig(**TINY, start="filters"))
    fit_mixture(model, (pair(seed) for seed in range(1, 9)), WINDOW)
    return model


def scene(seed: int) -> np.ndarray:
    """Small cells, or large ones at odd seeds."""
    if seed % 2 == 0:
        return blinking_cells(48, 32, 32, seed)
    return np.repeat(np.repeat(blinking_cells(48, 16, 16, seed), 2, axis=1), 2, axis=2)


def pair(seed: int) -> TrainingStack:
    clean = scene(seed)
    return training_stack(photons(clean, seed=seed), second=photons(clean, seed=seed + 100))


def denoised(model: Restormer3D, source: TrainingStack) -> np.ndarray:
    config = InferenceConfig(window=WINDOW)
    return np.stack(list(denoise_frames(model, source.stack, source.normalization, source.background, config)))


def adapted_to(source: TrainingStack, model: Restormer3D) -> tuple[Restormer3D, dict[str, float]]:
    """Return a copy of a model with its mixture fitted to a stack, and the record of that."""
    adapted = Restormer3D(model.config)
    adapted.load_state_dict(model.state_dict())
    adapted.filter_weights, record = adapted_mixture(model, source, WINDOW)
    return adapted, record


def test_windows_of_several_stacks_have_mixtures_of_their_own(fitted):
    windows = torch.rand(2, 1, 16, 16, 16)
    background = background_of(windows.mean(2, keepdim=True))
    mixtures = torch.stack([fitted.filter_weights, 0.5 * fitted.filter_weights])

    both = fitted(windows, background, mixtures)

    torch.testing.assert_close(both[:1], fitted(windows[:1], background[:1]))
    torch.testing.assert_close(both[1:], fitted(windows[1:], background[1:], mixtures[1:]))
    assert (both[1:] - fitted(windows[1:], background[1:])).abs().max() > 1e-3


def test_a_fitted_mixture_is_closer_to_the_truth_than_the_first_filter(fitted):
    clean = blinking_cells(48, 32, 32, seed=50)
    source = training_stack(photons(clean, seed=50))
    before = np.square(denoised(Restormer3D(fitted.config), source) - clean).mean()

    assert np.square(denoised(fitted, source) - clean).mean() < 0.8 * before


def test_fitting_to_a_stack_comes_closer_to_its_truth(fitted):
    clean = scene(61)
    source = training_stack(photons(clean, seed=61))
    before = np.square(denoised(fitted, source) - clean).mean()
    adapted, record = adapted_to(source, fitted)

    assert np.square(denoised(adapted, source) - clean).mean() < 0.93 * before
    assert record["windows"] == 1
    assert record["distance"] > 0


def test_noise_without_signal_is_not_taken_for_signal(fitted):
    noisy = np.random.default_rng(0).normal(150, 50, (48, 32, 32)).astype(np.float32)
    source = training_stack(noisy)
    adapted, _ = adapted_to(source, fitted)

    left, left_before = (denoised(model, source).std(0).mean() for model in (adapted, fitted))

    assert left < 0.9 * left_before  # the usual mixture expects signal


def test_a_border_without_signal_or_noise_does_no_harm(fitted):
    clean = blinking_cells(48, 32, 32, seed=70)
    noisy = photons(clean, seed=70)
    noisy[:, :10] = 0  # as motion correction leaves it
    source = training_stack(noisy)
    before = np.square(denoised(fitted, source) - clean)[:, 14:].mean()
    adapted, _ = adapted_to(source, fitted)

    assert np.square(denoised(adapted, source) - clean)[:, 14:].mean() < 1.05 * before


def test_correlated_noise_is_known_for_what_it_is(fitted):
    """Noise that neighbors share would pass for signal if its correlation were not taken into account."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 50, (48, 32, 33))
    noise = (noise[..., 1:] + 0.8 * noise[..., :-1]) / 1.64**0.5
    source = training_stack((150 + noise).astype(np.float32))
    left = {}
    for known in (True, False):
        correlation = ((1.0,), (1.0,), (1.0, 0.8 / 1.64))
        adapted, _ = adapted_to(replace(source, noise_correlation=correlation) if known else source, fitted)
        left[known] = denoised(adapted, source).std()

    assert left[True] < 0.9 * left[False]


def test_fitting_stops_when_its_time_is_over(fitted):
    source = training_stack(photons(blinking_cells(48, 64, 64)))

    assert adapted_mixture(fitted, source, WINDOW, seconds=0)[1]["windows"] == 1
    assert adapted_mixture(fitted, source, WINDOW, most_windows=3)[1]["windows"] == 3
    assert adapted_mixture(fitted, source, WINDOW)[1]["windows"] == 9


def test_scenes_without_a_second_recording_are_refused():
    model = Restormer3D(ModelConfig(**TINY, start="filters"))
    with pytest.raises(ValueError, match="no second recording"):
        fit_mixture(model, [training_stack(photons(blinking_cells(16, 16, 16)))], (16, 16, 16))
    with pytest.raises(ValueError, match="there are none"):
        fit_mixture(model, [], (16, 16, 16))
    assert torch.equal(model.mixture_modes, Restormer3D(model.config).mixture_modes)
