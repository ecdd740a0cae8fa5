"""Light that bands of rows share: found, taken away and put back, and not confused with activity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from restormer3d.artefacts.frames_around import Steadied
from restormer3d.artefacts.stimulus_light import (
    WithoutLight,
    put_back,
    steadied,
    stimulus_light,
    take_light_away,
    unlit_frames,
)
from restormer3d.denoising import array_and_record, start_denoising
from restormer3d.fitting import to_learn_from
from restormer3d.inspection import describe, inspect
from restormer3d.noise import estimate_noise
from restormer3d.patches import training_stack
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

from .conftest import blinking_cells, photons


@pytest.fixture(scope="module")
def plain():
    return blinking_cells(120, 48, 56)


def lit(clean, places, amount):
    light = np.zeros(clean.shape[:2])
    for frames, rows in places:
        light[frames, rows] = amount
    return clean + light[:, :, None], light


@pytest.mark.parametrize("amount", [60, 400, 5000])
@pytest.mark.parametrize(
    "places",
    [
        [(slice(30, 34), slice(None)), (slice(90, 91), slice(None))],
        [(slice(30, 31), slice(12, 40)), (slice(0, 2), slice(0, 15)), (slice(119, 120), slice(20, 48))],
    ],
)
def test_light_is_found_where_it_is(plain, places, amount):
    clean, light = lit(plain, places, amount)
    found = stimulus_light(photons(clean))
    off = np.abs(found - light)
    noise = np.sqrt(40 * (plain.mean() + amount) + 400)
    edges = (found > 0) != (light > 0)  # the last rows of a band may be missed
    assert edges.sum() <= 6 * len(places)
    assert off[~edges].max() < 0.2 * noise


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", [5, 6])
def test_activity_is_no_light(level, seed):
    assert (
        stimulus_light(NoisyScene(simulate_scene((150, 64, 64), seed=seed), *noise_parameters(level), seed=1)) is None
    )


@pytest.mark.parametrize("rows", [slice(10, 40), slice(None)])
def test_a_cell_that_fills_half_of_the_field_is_no_light(plain, rows):
    cell = plain.copy()
    cell[50:60, rows, :30] += 2000
    assert stimulus_light(photons(cell)) is None


def test_what_is_not_light(plain):
    bleaching = plain * np.exp(-np.arange(120) / 60)[:, None, None]
    flicker = plain * (1 + 0.05 * np.random.default_rng(0).standard_normal((120, 1, 1)))
    for clean in (plain, bleaching, flicker):
        assert stimulus_light(photons(clean)) is None
    assert stimulus_light(np.full((40, 20, 20), 7, np.uint8)) is None
    assert stimulus_light(photons(lit(plain[:15], [(slice(3, 4), slice(None))], 400)[0])) is None  # too few to compare


def test_darkness_after_it_is_found_as_well(plain):
    """As of a detector that follows changes alone."""
    recorded = photons(plain) + 2000
    level = np.zeros(plain.shape[:2])
    level[30] = 800
    level[31:38] = -300 * np.exp(-np.arange(7) / 4)[:, None]
    level[80, 10:40] = -250
    found = stimulus_light(recorded + np.rint(level)[:, :, None])
    edges = (found != 0) != (level != 0)
    assert edges.sum() <= 6
    assert np.abs(found - level)[~edges].max() < 30
    stack, light = take_light_away(recorded + np.rint(level)[:, :, None])
    assert np.abs(stack[:] - recorded).mean() < 10
    assert isinstance(steadied(stack, light), WithoutLight)  # there is no noise of light in the dark
    np.testing.assert_allclose(np.stack(list(put_back(iter(stack[:]), light))), stack.stack, atol=0.01)


def test_denoising_gains_where_the_level_falls():
    clean = simulate_scene((96, 64, 64), seed=78)[:].astype(np.float64)
    noisy, level = photons(clean, seed=3).astype(np.float64), np.zeros((96, 1, 1))
    level[40:43] = level[70:72] = -600
    chosen = settings(iterations=0)
    part = chosen.inference.model_copy(update={"stimulus_light": False})
    plain, record = array_and_record((noisy + level + 1000).astype(np.float32), chosen)
    assert -650 < record["stimulus_light"]["largest"] < -550
    left_in, _ = array_and_record((noisy + level + 1000).astype(np.float32), replace(chosen, inference=part))
    error = [np.square(x - (clean + level + 1000)).mean() for x in (plain, left_in)]
    assert error[0] < 0.7 * error[1]


def test_few_photons_are_no_light():
    """Medians of small integers jump by one."""
    counts = np.random.default_rng(3).poisson(np.full((120, 64, 64), 1.3)).astype(np.uint16)
    assert stimulus_light(counts) is None


def test_long_recordings_are_looked_at_in_blocks():
    rng = np.random.default_rng(1)
    drifting = 500 + 0.5 * np.arange(1100)[:, None, None] + 20 * rng.standard_normal((1100, 24, 20))
    places = [0, 455, 499, 500, 505, 999, 1000, 1099]
    clean, light = lit(drifting, [(t, slice(None)) for t in places], 300.0)
    found = stimulus_light(clean.astype(np.float32))
    assert np.flatnonzero(found.any(1)).tolist() == places
    assert np.abs(found - light).max() < 30  # at both ends the frames around are on one side


def test_a_short_last_block_has_as_many_frames_around():
    clean, light = lit(np.full((501, 24, 20), 500.0), [(slice(465, 501), slice(None))], 300.0)
    found = stimulus_light(clean + 20 * np.random.default_rng(1).standard_normal(clean.shape))
    assert np.abs(found - light).max() < 20


def test_slices_are_those_of_the_array(plain):
    recorded = np.clip(photons(plain), 0, None).astype(np.uint16)
    light = np.zeros(plain.shape[:2], np.float32)
    light[3:9, 5:] = 1000.5
    stack, dense = WithoutLight(recorded, light), recorded - light[:, :, None]
    assert (stack.shape, stack.dtype) == (recorded.shape, np.float32)
    for index in (5, slice(2, 7), (slice(0, 9, 2), slice(3, 8), slice(10, 4, -1)), (4, slice(1, 6)), np.array([8, 2])):
        part = stack[index]
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, dense[index])
    assert dense.min() < -500  # unsigned integers would have wrapped


def test_a_large_offset_costs_no_precision(plain):
    clean, light = lit(plain, [(slice(30, 34), slice(None))], 400)
    recorded = photons(clean)
    far = recorded.astype(np.int32) + 2_000_000_000
    np.testing.assert_array_equal(stimulus_light(far), stimulus_light(recorded))
    assert WithoutLight(far, light)[31].dtype == np.float64


def test_denoising_goes_around_the_light(monkeypatch):
    scene = simulate_scene((96, 64, 64), seed=78)
    clean = scene[:].astype(np.float64)
    bright, light = lit(clean, [(slice(40, 43), slice(None)), (slice(70, 71), slice(20, 50))], 2000)
    noisy = photons(bright, seed=3)
    chosen, said = settings(iterations=0), []

    def denoised(stack, **changes):
        changed = replace(chosen, inference=chosen.inference.model_copy(update=changes))
        result = start_denoising(stack, changed, "restormer3d", torch.device("cpu"), None, silent, said.append)
        return np.stack(list(result.frames)), result.record["stimulus_light"]

    def error(out, truth=bright):
        dark = ~light.any(1)
        return np.square(out - truth)[dark].mean()

    (out, record), (without, nothing) = denoised(noisy), denoised(noisy, stimulus_light=False)
    never_lit, none_found = denoised(photons(clean, seed=3))
    assert nothing is none_found is None
    assert record["frames"] == 4
    assert 1900 < record["largest"] < 2100
    assert any("4 frames are brighter or darker as a whole" in line for line in said)
    assert error(out) < 0.5 * error(without)
    assert error(out) < 2 * error(never_lit, clean)  # lit frames have more noise than the others
    assert abs((out - bright)[light > 0].mean()) < 20
    assert any("noise of that light is strong in 4 frames" in line for line in said)
    monkeypatch.setattr("restormer3d.denoising.steadied", lambda stack, light: stack)
    unsteady = denoised(noisy)[0]
    assert np.square(out - bright)[light > 0].mean() < 0.2 * np.square(unsteady - bright)[light > 0].mean()
    assert error(out) < error(unsteady)


def test_rows_under_strong_light_have_noise_as_usual(plain):
    clean, _ = lit(plain, [(slice(30, 33), slice(None)), (slice(80, 81), slice(10, 40))], 5000)
    away, light = take_light_away(photons(clean))
    steady = steadied(away, light)
    off = steady[:] - plain
    assert set(steady.kept) == {30, 31, 32, 80}
    assert np.abs(away[30] - plain[30]).mean() > 4 * np.abs(off[20]).mean()
    for t, rows in ((30, slice(None)), (80, slice(12, 38))):
        assert np.abs(off[t, rows]).mean() < 1.5 * np.abs(off[20]).mean()
        assert abs(off[t, rows].mean()) < np.abs(off[20]).mean()
    np.testing.assert_array_equal(steady[80, :8], away[80, :8])
    np.testing.assert_array_equal(steady[40:50], away[40:50])


@pytest.mark.parametrize("rows", [slice(0, 21), slice(12, 40), slice(25, 48), slice(17, 26)])
@pytest.mark.parametrize("added", [1500, -800])
def test_strong_light_begins_and_ends_where_it_does(plain, rows, added):
    bright = photons(plain) + 1000.0
    bright[[30, 31, 80], rows] += added
    expected = np.zeros(plain.shape[:2], bool)
    expected[[30, 31, 80], rows] = True
    np.testing.assert_array_equal(stimulus_light(bright) != 0, expected)


def test_light_that_is_not_the_same_in_all_rows_stays_so(plain):
    slope = np.linspace(1000, 3000, 48)[:, None]
    clean = plain.copy()
    clean[30:33] += slope
    away, light = take_light_away(photons(clean))
    steady = steadied(away, light)
    assert isinstance(steady, Steadied)
    left = steady[31] + light[31][:, None] - plain[31]
    assert np.abs(left.mean(1) - slope[:, 0])[4:-4].max() < 200


def test_activity_of_all_tissue_is_not_drawn_towards_frames_around(plain):
    clean = plain.copy()
    clean[[*range(30, 36), *range(80, 86)]] *= 6
    away, light = take_light_away(photons(clean))
    assert light is not None
    assert light[30:36].any(1).all()
    assert steadied(away, light) is away


def test_training_sees_no_frame_that_is_made_of_others(plain):
    stack = photons(lit(plain, [(slice(30, 33), slice(None))], 5000)[0])
    away, light = take_light_away(stack)
    steady = steadied(away, light)
    source, drawn = training_stack(steady), tuple(steady.kept)
    learned = to_learn_from(source, drawn)
    assert learned.stack.shape == (117, 48, 56)
    assert learned.normalization == source.normalization
    np.testing.assert_allclose(learned.mean, source.normalization.apply(learned.stack[:].mean(0)), atol=1e-5)
    other = stack.copy()
    other[29, 20, 20] += 500
    again = training_stack(steadied(take_light_away(other)[0], light))
    changed = to_learn_from(again, drawn).stack[:] != learned.stack[:]
    assert np.argwhere(changed).tolist() == [[29, 20, 20]]
    assert to_learn_from(source, ()) is source


def test_weak_light_and_light_that_leaves_too_little_change_nothing(plain):
    away, light = take_light_away(photons(lit(plain, [(slice(30, 33), slice(None))], 35)[0]))
    assert light is not None
    assert steadied(away, light) is away
    assert steadied(plain, np.ones(plain.shape[:2])) is plain


def test_slices_of_a_steadied_stack_are_those_of_the_array(plain):
    away, light = take_light_away(
        photons(lit(plain, [(slice(0, 3), slice(None)), (slice(119, 120), slice(None))], 5000)[0])
    )
    steady = steadied(away, light)
    dense = steady[:]
    assert (steady.shape, steady.dtype) == (away.shape, away.dtype)
    for index in (
        0,
        slice(1, 5),
        (slice(0, 6, 2), slice(30, 3, -1), slice(1, 40)),
        (119, slice(1, 30)),
        np.array([119, 2]),
        slice(None, None, -1),
        slice(5, 5),
    ):
        np.testing.assert_allclose(steady[index], dense[index], rtol=1e-5)


def test_the_filter_that_stands_in_for_the_network_keeps_the_light(plain):
    bright, _ = lit(plain[:40], [(slice(20, 22), slice(None))], 2000)
    cpu, said = torch.device("cpu"), []
    result = start_denoising(photons(bright), settings(iterations=0), "restormer3d", cpu, 1e-3, silent, said.append)
    assert result.record["method"] == "gaussian"
    assert result.record["stimulus_light"]["frames"] == 2
    assert np.stack(list(result.frames))[20].mean() == pytest.approx(bright[20].mean(), rel=0.02)


def test_light_comes_back_frame_by_frame():
    frames, light = np.arange(24.0).reshape(2, 3, 4), np.array([[0.0, 0, 0], [0, 5, 7]])
    out = list(put_back(iter(frames), light))
    np.testing.assert_array_equal(out, frames + light[:, :, None])


def test_noise_is_that_of_frames_without_light(plain):
    clean, light = lit(plain, [(slice(a, a + 2), slice(None)) for a in range(0, 120, 12)], 600)
    noise = estimate_noise(photons(clean), frames=unlit_frames(light))
    assert noise.gain == pytest.approx(40, rel=0.15)
    assert max(np.abs(noise.correlation["t"])) < 0.05
    assert unlit_frames(np.ones((120, 48))) is None


def test_inspect_says_so(plain, tmp_path):
    path = tmp_path / "lit.tif"
    tifffile.imwrite(path, photons(lit(plain, [(slice(30, 33), slice(None))], 400)[0]))
    facts = inspect(path)
    assert facts["lit_frames"] == 3
    assert "rows of 3 frames are brighter or darker as a whole" in describe(facts)
    tifffile.imwrite(path, photons(plain))
    unlit = inspect(path)
    assert unlit["lit_frames"] == 0
    assert "brighter or darker as a whole" not in describe(unlit)
    assert facts["normalization"]["high"] == pytest.approx(unlit["normalization"]["high"], rel=0.1)
    assert facts["percentiles"][99.5] > 1.2 * unlit["percentiles"][99.5]
