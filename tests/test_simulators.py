"""The benchmark's own simulators: movies as they promise, and a detector whose noise is what it says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from benchmarks import simulators
from benchmarks.simulators import SIMULATORS, Movie, recorded
from benchmarks.simulators.movie import labeled

SHAPE = (24, 48, 48)
every_simulator = pytest.mark.parametrize("name", SIMULATORS)


@cache
def movie(name: str) -> Movie:
    return SIMULATORS[name](1, SHAPE)


@every_simulator
def test_a_movie_is_positive_light_of_one_photon_per_voxel(name):
    clean = movie(name).clean
    assert clean.shape == SHAPE
    assert clean.dtype == np.float32
    assert clean.min() > 0
    assert clean.mean(dtype=np.float64) == pytest.approx(1, abs=1e-5)


@every_simulator
def test_every_roi_changes_with_time(name):
    clean, masks, frame_rate_hz = movie(name)
    assert masks.shape == SHAPE[1:]
    assert np.issubdtype(masks.dtype, np.integer)
    assert masks.max() >= 1
    assert frame_rate_hz == {"neuropil": 30, "mesoscope": 8, "spines": 60}[name]
    for number in range(1, masks.max() + 1):
        trace = clean[:, masks == number].mean(1)
        assert trace.std() > 1e-3 * trace.mean()


@every_simulator
def test_rois_are_brighter_than_what_is_around_them(name):
    clean, masks, _ = movie(name)
    mean = clean.mean(0)
    assert mean[masks > 0].mean() > 1.1 * mean[masks == 0].mean()


@every_simulator
def test_the_seed_alone_decides(name):
    again, other = SIMULATORS[name](1, SHAPE), SIMULATORS[name](2, SHAPE)
    assert np.array_equal(again.clean, movie(name).clean)
    assert np.array_equal(again.masks, movie(name).masks)
    assert not np.array_equal(other.clean, again.clean)


def test_where_footprints_overlap_the_relatively_brighter_one_wins():
    faint, bright = np.array([[1.0, 0.9, 0.4, 0.0]]), np.array([[4.0, 6.0, 10.0, 5.0]])
    assert labeled(np.stack([faint, bright])).tolist() == [[1, 1, 2, 0]]
    assert labeled(np.empty((0, 1, 4))).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("level", [0.5, 20.0])
def test_recorded_noise_has_no_bias_and_the_variance_of_photons_pulses_and_electronics(level):
    photons = np.linspace(0.5, 1.5, 64 * 64).reshape(1, 64, 64).repeat(60, 0)
    noisy, clean = recorded(photons, level, seed=3)
    assert (noisy.dtype, clean.dtype) == (np.int16, np.float32)
    np.testing.assert_allclose(clean, 50 * level * photons + 200, rtol=1e-6)
    error = noisy - clean.astype(np.float64)
    variance = 50**2 * (level * photons * (1 + 0.45**2) + 0.3**2) + 1 / 12
    assert abs(error.mean()) < 4 * np.sqrt(variance.mean() / error.size)
    for dim_or_bright in np.split(np.arange(64), 4):
        rows = np.s_[:, dim_or_bright]
        assert error[rows].var() == pytest.approx(variance[rows].mean(), rel=0.03)


def test_recorded_noise_follows_its_seed_and_stays_within_int16():
    photons = np.ones((2, 8, 8))
    assert np.array_equal(recorded(photons, 5, seed=1)[0], recorded(photons, 5, seed=1)[0])
    assert not np.array_equal(recorded(photons, 5, seed=1)[0], recorded(photons, 5, seed=2)[0])
    assert (recorded(photons, 1000, seed=1)[0] == np.iinfo(np.int16).max).all()


def test_they_share_nothing_with_the_simulator_that_makes_training_data():
    files = list(Path(simulators.__file__).parent.glob("*.py"))
    assert len(files) > 3
    assert not [file.name for file in files if "restormer3d" in file.read_text()]
