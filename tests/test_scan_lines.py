"""Lines of a bidirectional scan that are displaced are aligned, denoised, and displaced again."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from restormer3d.artefacts import scan_lines
from restormer3d.artefacts.scan_lines import AlignedLines, line_shift, put_back
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (60, 72, 96)


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=91)[:]


@pytest.fixture(scope="module")
def noisy(clean):
    return NoisyScene(clean, *noise_parameters(1), seed=1)[:]


def displaced(stack, by):
    out = stack.copy()
    out[:, 1::2] = np.roll(stack[:, 1::2], by, 2)
    return out


@pytest.mark.parametrize("by", [-7, -2, -1, 0, 1, 3, 8])
def test_lines_are_found_where_they_are(noisy, by):
    stack = displaced(noisy, by)
    assert line_shift(stack) == by
    aligned = AlignedLines(stack, by)
    np.testing.assert_array_equal(aligned[:], noisy)
    np.testing.assert_array_equal(list(put_back(iter(noisy), by)), stack)
    for index in (7, slice(20, 40), (slice(None), slice(3, 9), slice(50, 56)), (7, slice(0, 3)), slice(0, 60, 3)):
        np.testing.assert_array_equal(aligned[index], noisy[index])


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", range(92, 96))
def test_lines_in_place_stay(level, seed):
    assert line_shift(NoisyScene(simulate_scene((40, 64, 64), seed=seed), *noise_parameters(level), seed=seed)[:]) == 0


def test_nothing_is_found_in_noise_and_patterns():
    rng = np.random.default_rng(0)
    noise = rng.poisson(4, SHAPE).astype(np.uint16)
    columns = np.arange(SHAPE[2])
    assert line_shift(noise) == 0
    assert line_shift(noise + rng.integers(0, 40, SHAPE[2])) == 0  # an offset of each column
    assert line_shift(noise + 10 * (np.arange(SHAPE[1]) % 2)[:, None]) == 0  # and of every other line
    assert line_shift(noise + 20 + 10 * np.sin(columns / 3)) == 0
    assert line_shift(np.zeros(SHAPE)) == 0
    assert line_shift(noise[:, :20]) == 0


def between(clean, by):
    """Truth and a noisy recording whose lines are displaced by splines: what aligns them knows nothing of these."""
    truth = clean.copy()
    truth[:, 1::2] = ndimage.shift(clean[:, 1::2], (0, 0, by), order=3, mode="mirror")
    return truth, NoisyScene(truth, *noise_parameters(1), seed=2)[:]


@pytest.mark.parametrize("by", [-0.6, -0.3, 0.5, 1.4, -3.3])
def test_fractions_are_found(clean, by):
    assert line_shift(between(clean, by)[1]) == pytest.approx(by, abs=0.1)


def test_fractions_are_moved_and_put_back(noisy):
    smooth = ndimage.gaussian_filter(noisy.astype(np.float32), (0, 0, 1.5))
    for by in (0.4, -1.7):
        moved = AlignedLines(smooth, by)
        assert moved.dtype == np.float32
        np.testing.assert_array_equal(moved[:, 0::2], smooth[:, 0::2])
        expected = ndimage.shift(smooth[:, 1::2], (0, 0, -by), order=5)
        apart = (moved[:, 1::2] - expected)[:, :, 6:-6]
        assert apart.std() < 0.01 * smooth.std()
        apart = np.stack(list(put_back(iter(moved[:]), by))) - smooth
        assert apart[:, :, 6:-6].std() < 0.01 * smooth.std()
        assert apart.std() < 0.03 * smooth.std()  # half of a pixel at the border is not there
        np.testing.assert_array_equal(moved[3:5, 2:9, 7:50], moved[3:5][:, 2:9, 7:50])


def test_noise_stays_white():
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    lines = AlignedLines(noise, 0.5)[:][:, 1::2, 4:-4]
    assert lines.var() == pytest.approx(noise.var(), rel=0.02)
    assert abs((lines[:, :, 1:] * lines[:, :, :-1]).mean()) < 0.01


def test_lines_between_pixels_are_denoised_better(clean):
    truth, stack = between(clean, 0.5)
    out, record = array_and_record(stack, settings(iterations=0))
    assert record["line_shift"] == pytest.approx(0.5, abs=0.1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scan_lines, "line_shift", lambda _: 0.0)
        left, other = array_and_record(stack, settings(iterations=0))
    assert other["line_shift"] == 0
    scores = [evaluate_stacks(truth, frames)["stsnr"] for frames in (out, left)]
    assert scores[0] > scores[1] + 0.5


def test_frames_that_move_are_left(noisy):
    rng = np.random.default_rng(0)
    moved = np.stack([np.roll(frame, rng.integers(-3, 4, 2), (0, 1)) for frame in noisy])
    assert line_shift(moved) == 0


def test_displaced_lines_are_denoised_as_well_as_others(clean, noisy):
    chosen, by = settings(iterations=0), 3
    said = []
    out, record = array_and_record(displaced(noisy, by), chosen, say=said.append)
    alike, other = array_and_record(noisy, chosen)
    assert (record["line_shift"], other["line_shift"]) == (by, 0)
    assert any("displaced by 3 pixels" in line for line in said)
    np.testing.assert_array_equal(out, displaced(alike, by))
    published = settings("published", iterations=0).inference
    assert set_aside(displaced(noisy, by), published).record["line_shift"] == 0
    truth = displaced(clean, by)
    scores = [evaluate_stacks(truth, stack)["stsnr"] for stack in (out, displaced(noisy, by))]
    assert scores[0] > scores[1] + 6


def test_it_is_said(tmp_path, noisy):
    stack = displaced(noisy, 2).astype(np.float32)
    tifffile.imwrite(tmp_path / "recorded.tif", stack)
    facts = inspect(tmp_path / "recorded.tif")
    assert facts["line_shift"] == 2
    assert "displaced by 2 pixels" in describe(facts)
    np.testing.assert_array_equal(set_aside(stack, settings().inference).stack[:], noisy.astype(np.float32))
