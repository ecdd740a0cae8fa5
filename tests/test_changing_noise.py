"""Noise that changes along time is found, made steady, and put back."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d import denoising
from restormer3d.artefacts.changing_noise import SteadyNoise, changing_noise, put_back
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (120, 40, 48)
LEFT = np.exp(-1.6 * np.linspace(0, 1, SHAPE[0], dtype=np.float32))[:, None, None]  # of the indicator


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=72)[:]


def recorded(clean, level=2):
    return NoisyScene(clean, *noise_parameters(level), seed=1)[:].astype(np.float32)


def made_up_for(clean):
    return clean + 500, recorded(clean * LEFT) / LEFT + 500


def test_its_deviation_is_that_of_the_noise(clean):
    truth, noisy = made_up_for(clean)
    found = changing_noise(noisy)
    expected = (noisy - truth).std((1, 2))
    expected /= np.median(expected)
    assert found.deviation == pytest.approx(expected, rel=0.25)
    assert found.ratio == pytest.approx(expected.max() / expected.min(), rel=0.3)
    assert 450 < found.level < truth.mean()
    steady = SteadyNoise(noisy, found)
    assert changing_noise(steady) is None
    np.testing.assert_allclose(list(put_back(iter(steady[:]), found)), noisy, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_it_is_sliced_as_the_stack(clean, kind):
    _, noisy = made_up_for(clean)
    steady = SteadyNoise(np.clip(100 * noisy / noisy.std() + 100, 0, 255).astype(kind), changing_noise(noisy))
    assert steady.shape == SHAPE
    assert steady[:].dtype == steady.dtype == np.result_type(kind, np.float32)
    for index in (7, slice(20, 40), (slice(None), slice(3, 9), slice(30, 36)), (7, slice(0, 3)), slice(0, 60, 3)):
        np.testing.assert_array_equal(steady[index], steady[:][index])


@pytest.mark.parametrize(("bleached", "gain"), [(False, 0.7), (True, 0.1)])
def test_denoising_gains_by_it(clean, bleached, gain, monkeypatch):
    truth, noisy = (clean * LEFT, recorded(clean * LEFT)) if bleached else made_up_for(clean)
    said: list[str] = []
    denoised, record = array_and_record(noisy, settings(iterations=0), say=said.append)
    assert record["changing_noise"] > 1.2
    assert sum("at some times" in text for text in said) == 1
    monkeypatch.setattr(denoising.changing, "changing_noise", lambda *_: None)
    without, record = array_and_record(noisy, settings(iterations=0))
    assert record["changing_noise"] is None
    scores = [evaluate_stacks(truth.astype(np.float32), output) for output in (denoised, without)]
    assert scores[0]["stsnr"] > scores[1]["stsnr"] + gain
    assert scores[0]["activity_snr"] > scores[1]["activity_snr"]


def test_steady_noise_is_left(clean):
    assert changing_noise(recorded(clean)) is None
    assert changing_noise(recorded(clean, level=1)[:60]) is None
    assert changing_noise(np.full(SHAPE, 7, np.uint16)) is None
    noisy = made_up_for(clean)[1]
    assert changing_noise(noisy[:71]) is None  # too short to tell
    burst = recorded(clean)
    burst[50:56] += 3 * (recorded(clean, level=3)[50:56] - clean[50:56])  # a few frames are no trend
    assert changing_noise(burst) is None


def test_only_some_frames_tell_of_it(clean):
    noisy = recorded(clean)
    noisy[60:] = clean[60:] + 3 * (noisy[60:] - clean[60:])
    assert changing_noise(noisy) is not None
    assert changing_noise(np.concatenate([noisy[:60], noisy[:60]])) is None
    assert changing_noise(noisy, np.r_[:60]) is None


def test_it_is_left_where_nothing_is_to_be_mended(clean):
    chosen = settings(iterations=0)
    chosen = chosen.__class__(**{**vars(chosen), "inference": chosen.inference.model_copy(update={"mend": False})})
    assert array_and_record(made_up_for(clean)[1], chosen)[1]["changing_noise"] is None


def test_inspect_says_so(clean, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.rint(made_up_for(clean)[1]).astype(np.int16))
    facts = inspect(tmp_path / "a.tif")
    assert facts["changing_noise"] > 1.5
    assert "at some times" in describe(facts)
    tifffile.imwrite(tmp_path / "b.tif", np.rint(recorded(clean)).astype(np.int16))
    facts = inspect(tmp_path / "b.tif")
    assert facts["changing_noise"] is None
    assert "at some times" not in describe(facts)
