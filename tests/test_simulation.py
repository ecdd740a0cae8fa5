"""What a user sees of simulated recordings: their statistics, their noise, their truth and their files."""

from __future__ import annotations

import csv
import json
import tracemalloc
from functools import cache

import numpy as np
import pytest
import tifffile

from restormer3d.simulation import (
    INDICATORS,
    NoisyScene,
    Scene,
    add_noise,
    noise_parameters,
    random_scene_parameters,
    simulate_scene,
    write_scene,
)
from restormer3d.simulation.activity import Indicator, indicator_response
from restormer3d.simulation.scene import shift_frame

SEEDS = (0, 1, 2, 3)


@cache
def default_scene(seed: int) -> tuple[Scene, np.ndarray]:
    scene = simulate_scene((300, 128, 128), seed=seed)
    return scene, scene[:]


def autocorrelation(stack: np.ndarray, lag: int) -> float:
    """Of the fluctuation around each pixel's temporal mean, pooled over all pixels (so weighted by variance)."""
    change = stack.astype(np.float64) - stack.mean(axis=0, dtype=np.float64)
    return float(np.mean(change[:-lag] * change[lag:]) / np.mean(change**2))


def st_snr(clean: np.ndarray, noisy: np.ndarray) -> float:
    energy, error = clean.astype(np.float64) ** 2, (noisy - clean.astype(np.float64)) ** 2
    ssnr = np.mean(10 * np.log10(energy.sum((1, 2)) / error.sum((1, 2))))
    tsnr = np.mean(10 * np.log10(energy.sum(0) / error.sum(0)))
    return float(ssnr + tsnr) / 2


def test_default_scene_has_the_clean_statistics_of_the_challenge() -> None:
    rows = []
    for seed in SEEDS:
        _, clean = default_scene(seed)
        p3, median, p97 = np.percentile(clean, [3, 50, 97])
        mean, rms = clean.mean(dtype=np.float64), np.sqrt(np.mean(clean.astype(np.float64) ** 2))
        bright_percent = 100 * np.mean(clean.mean(axis=0) > 5 * median)
        lags = [autocorrelation(clean, lag) for lag in (1, 10, 30)]
        assert clean.min() >= 0
        assert 160 <= mean <= 200
        assert 215 <= rms <= 245
        assert 240 <= p97 - p3 <= 380
        assert 0.3 <= bright_percent <= 0.9
        assert lags[0] == pytest.approx(0.995, abs=0.005)
        assert lags[1] == pytest.approx(0.917, abs=0.06)
        assert lags[2] == pytest.approx(0.665, abs=0.28)  # few cells in so small a field of view
        rows.append((p97 - p3, *lags))
    spread, lag1, lag10, lag30 = np.mean(rows, axis=0)
    assert spread == pytest.approx(310, rel=0.12)
    assert lag1 == pytest.approx(0.995, abs=0.005)
    assert lag10 == pytest.approx(0.917, abs=0.03)
    assert lag30 == pytest.approx(0.665, abs=0.12)  # 300 frames: removing the mean takes slow changes away


def test_autocorrelation_of_a_recording_of_challenge_length() -> None:
    clean = simulate_scene((1500, 96, 96), seed=5)[:]
    assert autocorrelation(clean, 1) == pytest.approx(0.995, abs=0.005)
    assert autocorrelation(clean, 10) == pytest.approx(0.917, abs=0.04)
    assert autocorrelation(clean, 30) == pytest.approx(0.665, abs=0.1)


@pytest.mark.parametrize(("level", "expected_db"), [(1, 7.3), (2, -0.8), (3, -6.6)])
def test_raw_snr_is_that_of_the_challenge(level: int, expected_db: float) -> None:
    gain, read_noise_variance = noise_parameters(level)
    for seed in SEEDS[:2]:
        scene, clean = default_scene(seed)
        noisy = NoisyScene(scene, gain, read_noise_variance, seed=seed)
        assert noisy.dtype == np.int16
        assert st_snr(clean[::2], noisy[:][::2]) == pytest.approx(expected_db, abs=0.5)


def test_noise_makes_negative_values_and_keeps_the_mean() -> None:
    scene, clean = default_scene(0)
    noisy = NoisyScene(scene, *noise_parameters(3), seed=1)[:60]
    assert noisy.dtype == np.int16
    assert noisy.min() < 0
    assert noisy.mean() == pytest.approx(clean[:60].mean(), rel=0.01)
    assert np.median(noisy) < noisy.mean()  # skewed: most pixels hold no photon


def test_unknown_level_names_the_choices() -> None:
    with pytest.raises(ValueError, match="1, 2 or 3"):
        noise_parameters(4)


@pytest.mark.parametrize("settings", [{}, {"motion_px": 0.8, "bleaching": 0.3}])
def test_any_slice_gives_the_same_values(settings: dict[str, float]) -> None:
    scene = simulate_scene((24, 40, 36), seed=3, **settings)
    noisy = NoisyScene(scene, 200.0, 1000.0, seed=4, correlation=(0.2, 0.1), line_noise=5.0, outlier_fraction=0.2)
    for stack in (scene, noisy):
        whole = stack[:]
        assert whole.shape == stack.shape == (24, 40, 36)
        assert whole.dtype == stack.dtype
        for block in (1, 5, 24):
            parts = [stack[start : start + block] for start in range(0, 24, block)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(stack[7], whole[7])
        np.testing.assert_array_equal(stack[-1], whole[-1])
        np.testing.assert_array_equal(stack[3:9, 10:20, 5:], whole[3:9, 10:20, 5:])


def test_slices_that_no_stack_has_are_refused() -> None:
    scene = simulate_scene((4, 16, 16), seed=0)
    for index in (4, (0, 1, 2), slice(None, None, 2)):
        with pytest.raises(IndexError):
            scene[index]


def test_the_seed_decides() -> None:
    first, again, other = (simulate_scene((20, 32, 32), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[:], again[:])
    np.testing.assert_array_equal(first.masks, again.masks)
    assert np.abs(first[:] - other[:]).max() > 10
    noise = [NoisyScene(first, 100.0, 100.0, seed=seed)[:] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(noise[0], noise[1])
    assert np.any(noise[0] != noise[2])


def test_a_longer_recording_has_the_same_cells() -> None:
    short, long = simulate_scene((10, 64, 64), seed=1), simulate_scene((50, 64, 64), seed=1)
    np.testing.assert_array_equal(short.masks, long.masks)


def test_masks_and_traces_describe_the_cells_in_the_stack() -> None:
    scene, clean = default_scene(1)
    assert scene.traces.shape == (scene.masks.max(), 300)
    assert set(np.unique(scene.masks)) == set(range(scene.masks.max() + 1))
    active = int(np.argmax(scene.traces.std(axis=1)))
    roi = scene.masks == active + 1
    measured = clean[:, roi].mean(axis=1)
    assert np.corrcoef(measured, scene.traces[active])[0, 1] > 0.95
    assert np.ptp(measured) == pytest.approx(np.ptp(scene.traces[active]), rel=0.3)


def test_cells_differ_in_activity_and_some_are_silent() -> None:
    traces = simulate_scene((900, 128, 128), seed=4).traces
    relative_range = np.ptp(traces, axis=1) / traces.min(axis=1)
    assert relative_range.max() > 1.0
    assert np.sum(relative_range < 0.2 * np.median(relative_range)) >= 1


@pytest.mark.parametrize("name", ["gcamp6s", "jgcamp8m"])
def test_a_single_spike_rises_and_decays_like_the_indicator(name: str) -> None:
    indicator, rate_hz = INDICATORS[name], 1000.0
    spikes = np.zeros((1, 4000))
    spikes[0, 10] = 1
    response = indicator_response(np.random.default_rng(0), spikes, indicator, rate_hz)[0]
    peak = int(np.argmax(response))
    assert response[:10].max() == pytest.approx(0, abs=1e-6)
    assert response[peak] == pytest.approx(indicator.response, rel=0.15)
    half_s = float(np.argmax(response[peak:] < response[peak] / 2)) / rate_hz
    assert half_s == pytest.approx(indicator.decay_s * np.log(2), rel=0.45)


def test_dense_bursts_saturate() -> None:
    indicator = Indicator(0.05, 0.5, response=0.2, saturation=10.0)
    spikes = np.zeros((1, 200))
    spikes[0, 5] = 1000
    response = indicator_response(np.random.default_rng(0), spikes, indicator, 100.0)
    assert 1.8 < response.max() < 2.0  # at most response x saturation


@pytest.mark.parametrize("correlation", [(0.0, 0.0), (0.25, 0.17)])
def test_noise_variance_is_gain_times_mean_plus_read_noise(correlation: tuple[float, float]) -> None:
    clean = np.full((200, 32, 32), 150.0, dtype=np.float32)
    noise = add_noise(clean, 50.0, 900.0, np.random.default_rng(0), correlation=correlation) - clean
    assert noise.mean() == pytest.approx(0, abs=1.0)
    assert noise.var() == pytest.approx(50.0 * 150.0 + 900.0, rel=0.02)
    for axis, expected in ((2, correlation[0]), (1, correlation[1])):
        for lag, wanted in ((1, expected), (2, 0.0)):
            shifted = np.roll(noise, lag, axis)
            assert np.mean(noise * shifted) / noise.var() == pytest.approx(wanted, abs=0.01)
    assert np.mean(noise[1:] * noise[:-1]) / noise.var() == pytest.approx(0, abs=0.01)


def test_line_noise_is_shared_by_a_row() -> None:
    clean = np.zeros((50, 40, 64), dtype=np.float32)
    noisy = add_noise(clean, 1.0, 0.0, np.random.default_rng(0), line_noise=7.0)
    assert np.ptp(noisy, axis=2).max() == 0
    assert noisy[..., 0].std() == pytest.approx(7.0, rel=0.05)


def test_outlier_frames_stand_out() -> None:
    scene = simulate_scene((200, 32, 32), seed=0)
    noisy = NoisyScene(scene, 5.0, 10.0, seed=0, outlier_fraction=0.05, dtype=np.dtype(np.float32))
    ratio = noisy[:].mean(axis=(1, 2)) / scene[:].mean(axis=(1, 2))
    outliers = np.abs(ratio - 1) > 0.15
    assert noisy.dtype == np.float32
    assert 2 <= outliers.sum() <= 20


def test_impossible_parameters_are_named() -> None:
    scene = simulate_scene((4, 16, 16), seed=0)
    with pytest.raises(ValueError, match="gain"):
        NoisyScene(scene, 0.0, 10.0, seed=0)
    with pytest.raises(ValueError, match="correlation"):
        NoisyScene(scene, 1.0, 10.0, seed=0, correlation=(0.6, 0.0))
    with pytest.raises(ValueError, match="indicator is 'gcamp5'"):
        simulate_scene((4, 16, 16), seed=0, indicator="gcamp5")
    with pytest.raises(ValueError, match="frame_rate_hz"):
        simulate_scene((4, 16, 16), seed=0, frame_rate_hz=0.0)
    with pytest.raises(ValueError, match="shape"):
        simulate_scene((0, 16, 16), seed=0)
    with pytest.raises(TypeError, match="zoom"):
        simulate_scene((4, 16, 16), seed=0, zoom=2)


def test_motion_shifts_frames_and_bleaching_dims_them() -> None:
    frame = np.random.default_rng(0).random((20, 20)).astype(np.float32)
    np.testing.assert_allclose(shift_frame(frame, np.array([2.0, -1.0]), 4, 12, 12), frame[2:14, 5:17])
    still = simulate_scene((60, 48, 48), seed=2)[:]
    moving = simulate_scene((60, 48, 48), seed=2, motion_px=1.0)[:]
    assert moving.std(axis=0).mean() > 1.3 * still.std(axis=0).mean()
    bleached = simulate_scene((60, 48, 48), seed=2, bleaching=0.4)[:]
    fade = bleached.mean(axis=(1, 2)) / bleached[0].mean() / (still.mean(axis=(1, 2)) / still[0].mean())
    assert fade[-1] == pytest.approx(0.6, abs=0.02)


def test_scenes_without_cells_and_of_one_pixel_can_be_drawn() -> None:
    empty = simulate_scene((5, 24, 24), seed=0, cell_density=0.0, neurite_density=0.0)
    assert empty.traces.shape == (0, 5)
    assert not empty.masks.any()
    assert np.all(np.isfinite(simulate_scene((1, 1, 1), seed=0)[:]))


@pytest.mark.parametrize("seed", [0, 1, 4])
@pytest.mark.parametrize("motion_px", [0.0, 1.0])
def test_the_field_has_the_brightness_that_was_asked_for(seed: int, motion_px: float) -> None:
    scene = simulate_scene((48, 64, 64), seed=seed, motion_px=motion_px)
    assert scene[:].mean() == pytest.approx(scene.parameters.mean_adu, rel=0.03)


def test_random_parameters_give_usable_recordings_of_many_kinds() -> None:
    rng = np.random.default_rng(0)
    gains, rates = [], []
    for seed in range(30):
        parameters = random_scene_parameters(rng)
        scene = simulate_scene((32, 48, 48), seed=seed, **parameters["scene"])
        noisy = NoisyScene(scene, seed=seed, **parameters["detector"])[:]
        assert np.all(np.isfinite(scene[:]))
        assert scene[:].mean() == pytest.approx(parameters["scene"]["mean_adu"], rel=0.15)
        assert noisy.std() > 0
        gains.append(parameters["detector"]["gain"])
        rates.append(parameters["scene"]["frame_rate_hz"])
    assert 10 <= min(gains) < 60
    assert 500 < max(gains) <= 2000
    assert 7 <= min(rates) < max(rates) <= 45


def test_a_long_scene_is_never_held_in_memory() -> None:
    shape = (1200, 96, 96)
    tracemalloc.start()
    scene = NoisyScene(simulate_scene(shape, seed=0), *noise_parameters(1), seed=0)
    for start in range(0, 64, 8):
        scene[start : start + 8]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * 4 * np.prod(shape)


def test_written_scene_can_be_opened_by_other_programs(tmp_path) -> None:
    scene = simulate_scene((20, 40, 48), seed=0)
    noisy = NoisyScene(scene, *noise_parameters(2), seed=9)
    paths = write_scene(tmp_path, 3, noisy, label="level2")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths.values())
    assert paths["noisy"].name == "scene3_noisy_level2.tif"
    assert paths["clean"].name == "scene3_clean.tif"
    stack, clean = tifffile.imread(paths["noisy"]), tifffile.imread(paths["clean"])
    assert stack.dtype == clean.dtype == np.int16
    np.testing.assert_array_equal(stack, noisy[:])
    np.testing.assert_array_equal(clean, np.rint(scene[:]))
    masks = tifffile.imread(paths["masks"])
    assert masks.dtype == np.uint16
    np.testing.assert_array_equal(np.squeeze(masks), scene.masks)
    with paths["traces"].open() as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["time_s", "roi1"]
    np.testing.assert_allclose(np.array(rows[1:], float)[:, 1:].T, scene.traces, atol=0.006)
    record = json.loads(paths["parameters"].read_text())
    again = simulate_scene(tuple(record["shape"]), seed=record["seed"], **record["scene"])
    np.testing.assert_array_equal(again[:], scene[:])
    assert record["detector"]["gain_adu_per_photon"] == 248.7


def test_existing_files_are_kept(tmp_path) -> None:
    noisy = NoisyScene(simulate_scene((4, 24, 24), seed=0), 100.0, 100.0, seed=0)
    write_scene(tmp_path, 0, noisy)
    with pytest.raises(FileExistsError, match="scene0_"):
        write_scene(tmp_path, 0, noisy)
    write_scene(tmp_path, 0, noisy, overwrite=True)
