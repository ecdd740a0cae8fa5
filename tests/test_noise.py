"""Noise estimation on simulated recordings of known noise, and on the real recordings where they are present."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from restormer3d.local_noise import local_variance
from restormer3d.noise import NoiseEstimate, blind_spot_extent, estimate_noise

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def scene(frames: int = 240, side: int = 64, seed: int = 0) -> np.ndarray:
    """A vignetted field with cells that flash and decay over tens of frames; mean near 180, bright cells 1500."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    signal = np.full((frames, side, side), 40.0)
    signal += 260 * np.exp(-((y - side / 2) ** 2 + (x - side / 3) ** 2) / (0.3 * side) ** 2)
    for _ in range(side * side // 100):
        cell = np.exp(-((y - rng.uniform(0, side)) ** 2 + (x - rng.uniform(0, side)) ** 2) / 8)
        onsets = rng.random(frames) < 0.01
        trace = np.convolve(onsets, np.exp(-np.arange(frames) / 25))[:frames]
        signal += (120 + 900 * trace)[:, None, None] * cell
    return signal


def record(signal: np.ndarray, gain: float, read_variance: float, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return gain * rng.poisson(signal / gain) + rng.normal(0, np.sqrt(read_variance), signal.shape)


@pytest.mark.parametrize(("gain", "read_variance"), [(28.4, 2490), (248.7, 2700), (990.5, 3730)])
def test_gain_and_variance_of_skewed_noise_are_recovered(gain: float, read_variance: float):
    signal = scene()
    found = estimate_noise(np.rint(record(signal, gain, read_variance)).astype(np.int16))
    assert found.gain == pytest.approx(gain, rel=0.1)
    level = np.median(signal)
    assert found.variance(level) == pytest.approx(gain * level + read_variance, rel=0.1)
    assert found.photons_per_pixel == pytest.approx(np.median(signal.mean(0)) / gain, rel=0.25)
    assert blind_spot_extent(found) == (0, 0, 0)


def test_dark_offset_is_recovered():
    found = estimate_noise(record(scene(), 100, 0) + 400)
    assert found.gain == pytest.approx(100, rel=0.1)
    assert found.offset == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("offset", [-300, -2000, -30_000])
@pytest.mark.parametrize("read_variance", [100, 2490])
def test_zero_light_below_zero_is_no_read_noise(offset: int, read_variance: int):
    signal = scene()
    found = estimate_noise(np.rint(record(signal, 28.4, read_variance) + offset).astype(np.int16))
    assert found.gain == pytest.approx(28.4, rel=0.1)
    assert found.offset == pytest.approx(offset - read_variance / 28.4, abs=30)
    level = np.median(signal)
    assert found.variance(level + offset) == pytest.approx(28.4 * level + read_variance, rel=0.1)


def test_dark_pixels_around_zero_leave_the_offset_there():
    found = estimate_noise(record(scene() - 40, 28.4, 2490))
    assert found.offset == 0
    assert found.read_noise_variance == pytest.approx(2490, rel=0.2)


def test_without_the_mean_of_each_pixel_zero_light_lies_below_all():
    noisy = record(scene(), 100, 900)
    found = estimate_noise(noisy - noisy.mean(0))
    deviation = np.sqrt(np.median(np.square(np.diff(noisy, axis=0)).mean(0) / 2))
    assert found.gain == 0
    assert found.photons_per_pixel is None
    assert found.read_noise_variance == pytest.approx(deviation**2, rel=0.1)
    assert found.offset == pytest.approx(-0.5 * deviation, rel=0.1)
    for recorded in (noisy - 400, np.random.default_rng(0).poisson(0.05, noisy.shape)):
        assert estimate_noise(recorded).gain > 0


@pytest.mark.parametrize(("hertz", "amplitude"), [(1, 1.0), (3, 0.5), (10, 0.55)])
def test_breathing_and_hum_are_no_memory_of_the_noise(hertz: float, amplitude: float):
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(300) / 30)
    noise = np.random.default_rng(0).standard_normal((300, 48, 48))
    found = estimate_noise((1000 + 20 * (noise + wave[:, None, None])).astype(np.float32))
    assert max(map(abs, found.correlation["t"])) < 0.03
    assert blind_spot_extent(found) == (0, 0, 0)


def test_correlations_of_smooth_recordings_are_correlations():
    smooth = gaussian_filter(np.random.default_rng(0).standard_normal((200, 32, 32)), (5, 0, 0))
    assert all(-1 <= r <= 1 for r in estimate_noise(smooth.astype(np.float32)).correlation["t"])


def test_dark_pixels_clipped_at_zero_do_not_spoil_the_gain():
    clipped = np.maximum(record(scene(), 60, 4000), 0)
    found = estimate_noise(np.rint(clipped).astype(np.uint16))
    assert found.clipped_fraction > 0.05
    assert found.gain == pytest.approx(60, rel=0.15)


def test_jumps_of_the_field_are_left_out():
    signal = scene()
    for t in (30, 31, 90, 150):
        signal[t] = np.roll(signal[t], 5, axis=1)
    found = estimate_noise(record(signal, 28.4, 2490))
    assert found.gain == pytest.approx(28.4, rel=0.1)


def test_frames_averaged_in_pairs_show_their_memory_and_keep_their_gain():
    stack = record(scene(), 100, 2500)
    found = estimate_noise((stack[1:] + stack[:-1]) / 2)
    assert found.correlation["t"][0] == pytest.approx(0.5, abs=0.03)
    assert blind_spot_extent(found)[0] == 1
    assert found.gain == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize(("axis", "extent"), [(0, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1))])
def test_smearing_along_one_axis_is_found_and_covered(axis: int, extent: tuple[int, int, int]):
    signal = scene()
    noise = record(signal, 100, 2500) - signal
    smeared = signal + 0.83 * noise + 0.17 * np.roll(noise, 1, axis=axis)
    found = estimate_noise(smeared)
    assert found.correlation["tyx"[axis]][0] == pytest.approx(0.83 * 0.17 / (0.83**2 + 0.17**2), abs=0.03)
    assert blind_spot_extent(found) == extent


def test_two_correlated_neighbors_widen_the_blind_spot_by_two():
    signal = scene()
    noise = record(signal, 100, 2500) - signal
    smeared = signal + (noise + np.roll(noise, 1, axis=2) + np.roll(noise, 2, axis=2)) / 3
    found = estimate_noise(smeared)
    assert found.correlation["x"] == pytest.approx((2 / 3, 1 / 3, 0), abs=0.03)
    assert blind_spot_extent(found) == (0, 0, 2)
    assert found.gain * found.smoothing_factor == pytest.approx(100, rel=0.15)


def test_flicker_and_line_noise_are_not_taken_for_smeared_pixels():
    rng = np.random.default_rng(2)
    stack = record(scene(), 100, 2500) + rng.normal(0, 60, (240, 1, 1)) + rng.normal(0, 30, (240, 64, 1))
    found = estimate_noise(stack)
    assert blind_spot_extent(found) == (0, 0, 0)


def test_noise_that_does_not_grow_with_light_has_no_gain():
    y = np.linspace(100, 900, 48)
    stack = np.random.default_rng(3).normal(0, 20, (120, 48, 48)) + y[:, None]
    found = estimate_noise(stack)
    assert found.gain < 0.1
    assert found.variance(np.array(500.0)) == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("shape", [(2, 16, 16), (5, 3, 40), (13, 1, 9), (40, 4, 4)])
def test_tiny_stacks_give_an_estimate_and_a_point_blind_spot(shape: tuple[int, int, int]):
    found = estimate_noise(np.random.default_rng(4).poisson(5.0, shape).astype(np.uint8))
    assert isinstance(found, NoiseEstimate)
    assert found.gain >= 0
    assert blind_spot_extent(found) == (0, 0, 0)


def test_constant_stack_has_no_noise():
    found = estimate_noise(np.full((20, 12, 12), 9, dtype=np.int16))
    assert (found.gain, found.read_noise_variance, found.photons_per_pixel) == (0, 0, None)


def test_a_single_frame_is_refused():
    with pytest.raises(ValueError, match="got 1 frame"):
        estimate_noise(np.zeros((1, 8, 8)))


@pytest.mark.parametrize(
    ("name", "x", "y", "photons", "extent"),
    [
        ("fmi_mouse_gcamp_600x256x256.tif", 0.25, 0.04, (0.4, 1.0), (0, 0, 2)),
        ("optinist_mouse_1000x128x128.tif", 0.20, 0.17, (2.0, 4.5), (0, 2, 2)),
    ],
)
def test_real_recordings(name: str, x: float, y: float, photons: tuple[float, float], extent: tuple[int, int, int]):
    tifffile = pytest.importorskip("tifffile")
    if not (SHARED / name).exists():
        pytest.skip("the shared recordings are not here")
    found = estimate_noise(tifffile.imread(SHARED / name, key=range(400)))
    assert found.correlation["x"][0] == pytest.approx(x, abs=0.03)
    assert found.correlation["y"][0] == pytest.approx(y, abs=0.03)
    assert found.correlation["t"] == pytest.approx((0, 0), abs=0.02)
    assert found.photons_per_pixel is not None
    assert photons[0] < found.photons_per_pixel < photons[1]
    assert blind_spot_extent(found) == extent


@pytest.mark.parametrize("border", [0, 24, 48])  # 0, 67 and 84 % of the field are black
def test_a_black_border_tells_nothing(border: int):
    seen = np.rint(record(scene(), 100, 2000)).astype(np.int16)
    found = estimate_noise(np.pad(seen, ((0, 0), (border, border), (border, border))))
    assert found.gain == pytest.approx(100, rel=0.1)
    assert found.photons_per_pixel == pytest.approx(np.median(scene().mean(0)) / 100, rel=0.3)
    assert blind_spot_extent(found) == (0, 0, 0)


def test_the_variance_of_a_pixel_is_told_by_its_mean_where_it_can_be():
    signal = scene()
    recorded = record(signal, 100, 500)
    found = estimate_noise(recorded)
    variance, by_place = local_variance(recorded, found, recorded.mean(0))
    assert not by_place
    np.testing.assert_array_equal(variance, found.variance(recorded.mean(0)))


@pytest.mark.parametrize("frames", [None, np.arange(20, 220)])
def test_relative_changes_are_noisier_where_there_is_less_light(frames: np.ndarray | None):
    signal = scene()
    rest = np.quantile(signal, 0.2, axis=0)
    relative = (record(signal, 100, 500) - rest) / rest
    found = estimate_noise(relative)
    variance, by_place = local_variance(relative, found, relative.mean(0), frames)
    assert by_place
    expected = gaussian_filter((100 * signal.mean(0) + 500) / rest**2, 4)
    off = np.log(gaussian_filter(variance, 4) / expected)
    assert np.abs(off).max() < 0.3
    assert np.abs(np.log(found.variance(relative.mean(0)) / expected)).max() > 1


def test_pixels_that_never_change_tell_nothing_of_the_variance_around():
    recorded = record(scene(), 100, 500)
    recorded[:, :20] = 0
    found = estimate_noise(recorded)
    assert not local_variance(recorded, found, recorded.mean(0))[1]
    two = recorded[:2]
    assert local_variance(two, estimate_noise(two), two.mean(0))[0].shape == (64, 64)


@pytest.mark.parametrize("dark", [0.8, 0.95])
def test_a_dark_field_does_not_outvote_its_few_bright_pixels(dark: float):
    """Pixels without light, sorted by their own noise, would show a slope that is none."""
    signal = np.full((120, 128, 128), 1.0)
    signal[:, : int(128 * (1 - dark))] = 200 + 150 * np.sin(np.arange(128) / 5)
    found = estimate_noise(np.rint(record(signal, 100, 400) + 100).astype(np.int16))
    assert found.gain == pytest.approx(100, rel=0.15)


@pytest.mark.parametrize("frames", [7, 8, 9])
def test_few_frames_tell_nothing_of_noise_with_a_memory(frames: int):
    for seed in range(6):
        found = estimate_noise(np.random.default_rng(seed).normal(100, 10, (frames, 32, 32)).astype(np.float32))
        assert np.isnan(found.correlation["t"]).all()
        assert blind_spot_extent(found)[0] == 0
