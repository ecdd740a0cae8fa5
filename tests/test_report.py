"""Scores without ground truth, checked where the truth is known, and the before/after picture."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from restormer3d.baselines import gaussian_frames, temporal_mean_frames
from restormer3d.report import (
    held_out_frame_error,
    photon_transfer,
    residual_whiteness,
    trace_picture,
)


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    """Two cells over a gradient that swell slowly, (160, 32, 40)."""
    t = np.arange(160)[:, None, None]
    y, x = np.mgrid[:32, :40]
    signal = 50.0 + 3 * x + np.zeros((160, 1, 1))
    for center_y, center_x, phase in ((10, 12, 0), (22, 28, 2)):
        cell = np.exp(-((y - center_y) ** 2 + (x - center_x) ** 2) / 12)
        signal = signal + 200 * (1 + np.sin(t / 15 + phase)) * cell
    return signal


@pytest.fixture(scope="module")
def noisy(clean: np.ndarray) -> np.ndarray:
    return 20.0 * np.random.default_rng(1).poisson(clean / 20.0)


def test_the_truth_scores_the_noise_itself(clean: np.ndarray, noisy: np.ndarray):
    score = held_out_frame_error(noisy, lambda _: clean[::2])
    assert score.noise_variance == pytest.approx(20 * clean.mean(), rel=0.03)
    assert score.in_noise_variances == pytest.approx(1, abs=0.03)
    assert len(score.per_frame) == 79  # the last odd frame has nothing after it
    assert 0 < score.standard_error < 0.02 * score.mse


def test_the_error_of_a_method_is_what_exceeds_the_noise(clean: np.ndarray, noisy: np.ndarray):
    score = held_out_frame_error(noisy, lambda stack: gaussian_frames(stack, 2.0, 0.5))
    even = np.stack(list(gaussian_frames(noisy[::2], 2.0, 0.5)))
    true_error = np.square((even[1:] + even[:-1]) / 2 - clean[1:-1:2]).mean()
    noise = np.square(noisy[1:-1:2] - clean[1:-1:2]).mean()
    assert score.mse == pytest.approx(noise + true_error, rel=0.03)


def test_methods_are_compared_frame_by_frame(noisy: np.ndarray):
    good = held_out_frame_error(noisy, lambda stack: gaussian_frames(stack, 3.0, 0.7))
    poor = held_out_frame_error(noisy, temporal_mean_frames)
    difference, error = good.minus(poor)
    assert difference == pytest.approx(good.mse - poor.mse)
    assert difference < -3 * error
    assert good.minus(good) == (0, 0)


def test_scores_of_other_stacks_and_wrong_frame_counts_are_refused(noisy: np.ndarray):
    score = held_out_frame_error(noisy, lambda stack: stack)
    with pytest.raises(ValueError, match="79 and 9 frames"):
        score.minus(held_out_frame_error(noisy[:20], lambda stack: stack))
    with pytest.raises(ValueError, match="given 80 frames and gave back 79"):
        held_out_frame_error(noisy, lambda stack: stack[1:])
    with pytest.raises(ValueError, match="3 frames or more, got 2"):
        held_out_frame_error(noisy[:2], lambda stack: stack)


def test_the_residual_of_the_truth_is_white(clean: np.ndarray, noisy: np.ndarray):
    found = residual_whiteness(noisy, clean)
    assert set(found) == {"x", "y", "t", "signal", "activity"}
    assert np.abs(list(found.values())).max() < 0.02


def test_signal_in_the_residual_is_seen(clean: np.ndarray, noisy: np.ndarray):
    shrunk = clean.mean(axis=0) + 0.5 * (clean - clean.mean(axis=0))
    found = residual_whiteness(noisy, shrunk)
    assert found["activity"] > 0.2
    assert min(found["x"], found["y"], found["t"]) > 0.03


def test_noise_left_in_is_seen(clean: np.ndarray, noisy: np.ndarray):
    assert residual_whiteness(noisy, clean - 0.5 * (noisy - clean))["activity"] < -0.2


def test_residual_correlations_agree_with_numpy():
    rng = np.random.default_rng(2)
    before, after = rng.normal(100, 5, (12, 7, 9)), rng.normal(100, 3, (12, 7, 9))
    found = residual_whiteness(before, after)
    residual = before - after
    assert found["signal"] == pytest.approx(np.corrcoef(residual.ravel(), after.ravel())[0, 1])
    parts = [a - a.mean(axis=0) for a in (residual, after)]
    assert found["activity"] == pytest.approx(np.corrcoef(parts[0].ravel(), parts[1].ravel())[0, 1])


def test_stacks_of_different_shape_are_refused(noisy: np.ndarray):
    with pytest.raises(ValueError, match="differ in shape"):
        residual_whiteness(noisy, noisy[:, 1:])


def test_the_photon_transfer_line_flattens_when_the_noise_is_gone(noisy: np.ndarray):
    before = photon_transfer(noisy)
    after = photon_transfer(np.stack(list(gaussian_frames(noisy, 4.0, 1.0))))
    assert before["gain"] == pytest.approx(20, rel=0.1)
    assert before["intensity"] == sorted(before["intensity"])
    assert np.polyfit(before["intensity"], before["variance"], 1)[0] == pytest.approx(20, rel=0.2)
    assert np.median(after["variance"]) < 0.01 * np.median(before["variance"])


def test_the_picture_is_a_thousand_pixels_wide(clean: np.ndarray, noisy: np.ndarray, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "before_after.png"
    trace_picture(noisy, clean, path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1000, 800)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    genuine = builtins.__import__

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'restormer3d\[plots\]'"):
        trace_picture(np.zeros((3, 8, 8)), np.zeros((3, 8, 8)), tmp_path / "p.png")


def test_planes_in_turns_are_held_out_turn_by_turn(clean: np.ndarray):
    """The truth, a plane of twice the light included, scores the noise alone; blended planes do not."""
    both = clean.copy()
    both[1::2] *= 2
    recorded = 20.0 * np.random.default_rng(1).poisson(both / 20.0)
    kept = np.flatnonzero(np.arange(160) // 2 % 2 == 0)
    score = held_out_frame_error(recorded, lambda _: both[kept], planes=2)
    assert score.in_noise_variances == pytest.approx(1, abs=0.03)
    assert len(score.per_frame) == 78
    assert held_out_frame_error(recorded, temporal_mean_frames, planes=2).in_noise_variances > 1.5
    with pytest.raises(ValueError, match="gave back 79"):
        held_out_frame_error(recorded, lambda _: both[kept][1:], planes=2)
    with pytest.raises(ValueError, match="5 frames or more, got 4"):
        held_out_frame_error(recorded[:4], lambda stack: stack, planes=2)
