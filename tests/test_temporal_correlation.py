"""Noise that goes on from frame to frame is made white, and denoised frames are averaged as recorded ones were."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter1d, uniform_filter1d
from scipy.signal import lfilter

from restormer3d.artefacts import set_aside, temporal_correlation
from restormer3d.artefacts.temporal_correlation import Whitened, put_back
from restormer3d.artefacts.uneven_noise import uneven_noise
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (160, 64, 72)
AVERAGES = {
    "of two": lambda x: uniform_filter1d(x, 2, axis=0),
    "of three": lambda x: uniform_filter1d(x, 3, axis=0),
    "of eight": lambda x: uniform_filter1d(x, 8, axis=0),
    "Gaussian": lambda x: gaussian_filter1d(x, 1.0, axis=0),
    "recursive": lambda x: lfilter([0.5], [1, -0.5], x - x[:1], axis=0) + x[:1],
    "slow": lambda x: lfilter([0.15], [1, -0.85], x - x[:1], axis=0) + x[:1],
}


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(1).standard_normal(SHAPE)


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=72)[:]


def recorded(clean, level=1, seed=1):
    return NoisyScene(clean, *noise_parameters(level), seed=seed)[:].astype(np.float32)


def correlation(noise, lag):
    return float((noise[lag:] * noise[:-lag]).mean() / np.square(noise).mean())


@pytest.mark.parametrize("kind", AVERAGES)
def test_noise_is_white_afterwards(kind, noise):
    averaged = AVERAGES[kind](100 * noise)
    recording = np.rint(averaged + 500).astype(np.int16)
    found = temporal_correlation.temporal_correlation(recording)
    assert found.largest == pytest.approx(correlation(averaged, 1), abs=0.03)
    assert found.whitening.sum() == pytest.approx(1)
    white = Whitened(recording, found.whitening)[:]
    late = white[40:] - white[40:].mean()  # the first frames have none before
    assert max(abs(correlation(late, lag)) for lag in range(1, 9)) < 0.1
    assert white.mean() == pytest.approx(500, abs=10)


@pytest.mark.parametrize("kind", AVERAGES)
def test_recursion_gives_every_frame_back(kind, noise):
    recording = AVERAGES[kind](100 * noise) + 30_000
    found = temporal_correlation.temporal_correlation(recording)
    for dtype, most in ((np.float64, 1e-7), (np.float32, 0.01)):
        white = Whitened(recording.astype(dtype), found.whitening)
        frames = np.stack(list(put_back(iter(white[:]), found.whitening)))
        assert frames.dtype == dtype
        np.testing.assert_allclose(frames, recording, rtol=0, atol=most)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_it_is_sliced_as_the_stack(kind, noise):
    stack = np.clip(100 + 30 * AVERAGES["of three"](noise), 0, 255).astype(kind)
    white = Whitened(stack, temporal_correlation.temporal_correlation(stack).whitening)
    assert white.shape == stack.shape
    assert white[:].dtype == white.dtype
    for index in (
        0,
        77,
        slice(20, 40),
        slice(5, 5),
        slice(0, 160, 3),
        (slice(None), slice(3, 9), slice(50, 56)),
        (7, slice(0, 3)),
    ):
        assert white[index].shape == stack[index].shape
        np.testing.assert_allclose(white[index], white[:][index], rtol=0, atol=0.01)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_there_is_none_in_a_recording(level, clean):
    assert temporal_correlation.temporal_correlation(recorded(clean, level)) is None


def test_there_is_none_where_the_image_moves_and_fades(clean):
    frames = 50 * clean * np.linspace(1, 0.3, len(clean))[:, None, None]  # with light enough to see it
    shifts = np.rint(3 * np.sin(np.arange(len(clean)) / 9)).astype(int)
    moved = np.stack([np.roll(frame, by, 0) for frame, by in zip(frames, shifts, strict=True)])
    assert temporal_correlation.temporal_correlation(recorded(moved)) is None


def test_there_is_none_where_nothing_changes():
    assert temporal_correlation.temporal_correlation(np.zeros(SHAPE, np.int16)) is None


def test_small_stacks_are_left_alone(noise):
    averaged = AVERAGES["of three"](noise)
    assert temporal_correlation.temporal_correlation(averaged[:48]) is not None
    assert temporal_correlation.temporal_correlation(averaged[:47]) is None
    assert temporal_correlation.temporal_correlation(averaged[:, :15]) is None


def test_noise_of_short_recordings_is_not_taken_for_uneven(noise):
    averaged = AVERAGES["of three"](100 * noise)[:40]  # differences over two frames are twice those over one
    assert uneven_noise((averaged + 1000).astype(np.float32)) is None


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_denoising_gains_by_it(method, clean, monkeypatch):
    truth, noisy = (AVERAGES["of three"](x).astype(np.float32) for x in (clean, recorded(clean)))
    chosen, said = settings(iterations=0), []
    white, record = array_and_record(noisy, chosen, method=method, say=said.append)
    assert record["temporal_correlation"] == pytest.approx(2 / 3, abs=0.05)
    assert any("correlated along time" in text for text in said)
    assert not any("step is left out" in text for text in said)
    assert array_and_record(recorded(clean), chosen, method="gaussian")[1]["temporal_correlation"] == 0
    monkeypatch.setattr(temporal_correlation, "temporal_correlation", lambda _: None)
    as_it_is, _ = array_and_record(noisy, chosen, method=method)
    scores = [evaluate_stacks(truth, x)["activity_snr"] for x in (as_it_is, white)]
    assert scores[1] > scores[0] + 2.5


def test_without_room_it_is_computed_as_it_is_read(clean, monkeypatch):
    noisy, chosen = AVERAGES["recursive"](recorded(clean)).astype(np.float32), settings(iterations=0)
    held, _ = array_and_record(noisy, chosen, method="gaussian")
    monkeypatch.setattr(set_aside, "held", lambda _: None)
    read, _ = array_and_record(noisy, chosen, method="gaussian")
    np.testing.assert_allclose(read, held, rtol=0, atol=1e-3 * held.std())


def test_it_is_told_beforehand(tmp_path, clean):
    path = tmp_path / "averaged.tif"
    tifffile.imwrite(path, AVERAGES["recursive"](recorded(clean)).astype(np.float32))
    facts = inspect(path)
    assert facts["temporal_correlation"] == pytest.approx(0.5, abs=0.05)
    assert abs(facts["noise"]["correlation"]["t"][0]) < 0.08  # of what is denoised
    assert "goes on along time" in describe(facts)
    tifffile.imwrite(path, recorded(clean))
    assert inspect(path)["temporal_correlation"] == 0
    assert "goes on along time" not in describe(inspect(path))


def test_only_where_it_is_asked_for(clean):
    noisy = AVERAGES["recursive"](recorded(clean)).astype(np.float32)
    _, record = array_and_record(noisy, settings("published", iterations=0), method="gaussian")
    assert record["temporal_correlation"] == 0
