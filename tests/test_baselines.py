"""The filters: agreement with scipy, streaming, the choice of widths, and what the SVD keeps and drops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from restormer3d import baselines
from restormer3d.baselines import choose_gaussian, gaussian_frames, svd_frames, temporal_mean_frames
from restormer3d.simulation import NOISE_LEVELS, add_noise, simulate_scene


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return simulate_scene((160, 48, 48), seed=3)[0:160]


def noisy_at(clean: np.ndarray, level: int) -> np.ndarray:
    return np.rint(add_noise(clean, *NOISE_LEVELS[level], np.random.default_rng(level))).astype(np.int16)


def decibels(clean: np.ndarray, denoised: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(clean**2) / np.sum((clean - denoised) ** 2)))


class ReadOnce:
    """A stack that notes which frames were asked for."""

    def __init__(self, frames: np.ndarray):
        self.frames, self.shape, self.dtype, self.read = frames, frames.shape, frames.dtype, list[int]()

    def __getitem__(self, t: int) -> np.ndarray:
        self.read.append(t)
        return self.frames[t]


def test_temporal_mean_repeats_the_mean_image():
    stack = np.random.default_rng(0).integers(-100, 100, (7, 4, 5)).astype(np.int16)
    frames = list(temporal_mean_frames(stack))
    assert len(frames) == 7
    np.testing.assert_allclose(frames[3], stack.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 9, 50])
@pytest.mark.parametrize(("sigma_t", "sigma_xy"), [(0, 0), (0, 1.3), (1.5, 0), (3, 0.8), (20, 4)])
def test_gaussian_agrees_with_scipy(frames: int, sigma_t: float, sigma_xy: float):
    stack = np.random.default_rng(1).normal(100, 30, (frames, 11, 13)).astype(np.float32)
    found = np.stack(list(gaussian_frames(stack, sigma_t, sigma_xy)))
    expected = gaussian_filter(stack.astype(float), (sigma_t, sigma_xy, sigma_xy))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_gaussian_reads_every_frame_once_and_no_further_than_it_needs():
    stack = ReadOnce(np.zeros((200, 4, 4), dtype=np.uint16))
    frames = gaussian_frames(stack, 2.0, 0.5)
    next(frames)
    assert max(stack.read) < 32
    assert len(list(frames)) == 199
    assert stack.read == list(range(200))


def test_gaussian_around_the_mean_keeps_still_detail_sharp():
    image = np.random.default_rng(2).normal(100, 30, (12, 12))
    stack = np.repeat(image[None], 20, axis=0)
    blurred = np.stack(list(gaussian_frames(stack, 2.0, 1.0)))
    kept = np.stack(list(gaussian_frames(stack, 2.0, 1.0, around_mean=True)))
    assert np.abs(blurred - stack).max() > 10
    np.testing.assert_allclose(kept, stack, atol=1e-3)


def test_a_negative_width_is_refused():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        next(gaussian_frames(np.zeros((3, 4, 4)), -1, 0))


@pytest.mark.parametrize(("level", "around_mean"), [(1, False), (2, True), (3, False)])
def test_chosen_widths_come_close_to_the_best_known_from_the_truth(clean: np.ndarray, level: int, around_mean: bool):
    noisy = noisy_at(clean, level)

    def score(widths: tuple[float, float]) -> float:
        return decibels(clean, np.stack(list(gaussian_frames(noisy, *widths, around_mean=around_mean))))

    best = max(score((t, xy)) for t in (4.5, 10, 20) for xy in (0.5, 1))
    assert score(choose_gaussian(noisy, around_mean=around_mean)) > best - 1


def test_widths_follow_the_signal():
    rng = np.random.default_rng(4)
    still = np.repeat(rng.normal(0, 100, (1, 40, 40)), 100, axis=0)
    noise = rng.normal(0, 30, still.shape)
    assert choose_gaussian(still + noise) == (30.0, 0.0)
    flashing = np.repeat(rng.normal(0, 100, (50, 1, 1)), 2, axis=0) * np.ones((1, 40, 40))
    sigma_t, sigma_xy = choose_gaussian(flashing + noise)
    assert sigma_t <= 1
    assert sigma_xy == 3.0


def test_widths_cannot_be_chosen_from_one_frame():
    with pytest.raises(ValueError, match="1 frame, need 2"):
        choose_gaussian(np.zeros((1, 8, 8)))


def test_svd_beats_the_chosen_gaussian_where_light_is_plenty(clean: np.ndarray):
    noisy = noisy_at(clean, 1)
    gaussian = np.stack(list(gaussian_frames(noisy, *choose_gaussian(noisy))))
    svd = np.stack(list(svd_frames(noisy)))
    assert svd.dtype == np.float32
    assert decibels(clean, svd) > decibels(clean, gaussian) + 1


def test_svd_follows_activity_that_the_mean_does_not(clean: np.ndarray):
    noisy = noisy_at(clean, 1)
    svd = np.stack(list(svd_frames(noisy, sigma_t=0, sigma_xy=0)))
    activity = clean - clean.mean(axis=0)
    assert decibels(activity, svd - svd.mean(axis=0)) > 6


@pytest.mark.parametrize("smear", [0.0, 0.3])
def test_svd_of_noise_is_the_mean_image(clean: np.ndarray, smear: float):
    still = np.repeat(clean.mean(axis=0, keepdims=True), 160, axis=0)
    noise = noisy_at(still, 1) - still
    noise = (1 - smear) * noise + smear * np.roll(noise, 1, axis=2)
    svd = np.stack(list(svd_frames(still + noise, sigma_t=0, sigma_xy=0)))
    residue = np.var(svd - (still + noise).mean(axis=0)) / np.var(noise)
    assert residue < 0.004


def test_svd_in_temporal_blocks_has_no_seams(clean: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    noisy = noisy_at(clean, 1)
    whole = np.stack(list(svd_frames(noisy)))
    monkeypatch.setattr(baselines, "_SVD_FRAMES", 70)
    calls: list[tuple[str, int, int]] = []
    parts = np.stack(list(svd_frames(noisy, progress=lambda *call: calls.append(call))))
    assert parts.shape == whole.shape
    assert decibels(clean, parts) > decibels(clean, whole) - 1.5
    jumps = np.square(np.diff(parts, axis=0)).mean(axis=(1, 2))
    assert jumps.max() < 2 * np.square(np.diff(whole, axis=0)).mean(axis=(1, 2)).max()
    assert calls[-1][0] == "svd"
    assert calls[-1][1] == calls[-1][2] == len(calls)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 20, 3), (3, 1, 1), (40, 5, 33), (300, 6, 6)])
def test_svd_takes_any_shape(shape: tuple[int, int, int]):
    stack = np.random.default_rng(5).poisson(4.0, shape).astype(np.uint16)
    svd = np.stack(list(svd_frames(stack)))
    assert svd.shape == shape
    np.testing.assert_allclose(svd.mean(), stack.mean(), rtol=1e-3)


def test_a_still_stack_passes_unchanged():
    stack = np.repeat(np.arange(100.0).reshape(1, 10, 10), 30, axis=0)
    np.testing.assert_allclose(np.stack(list(svd_frames(stack))), stack, rtol=1e-5, atol=1e-4)
