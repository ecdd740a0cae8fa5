"""Electrical ripple is found, and taken away; what is like it, but of the tissue, is not."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from restormer3d.artefacts import set_aside
from restormer3d.artefacts.planes import find_planes
from restormer3d.artefacts.ripple import WithoutRipple, electrical_ripple
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

SHAPE = (120, 64, 72)
NOISE = 100.0
ROWS = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE[0], SHAPE[1], 1)  # scanned so far
COLUMNS = np.arange(SHAPE[2])


def pure(cycles: float, share: float = 0.7) -> np.ndarray:
    """A wave of some cycles in a frame, of which the line takes a share."""
    return np.sin(2 * np.pi * cycles / SHAPE[1] * (ROWS + share * COLUMNS / SHAPE[2]))


def chirp(cycles: float) -> np.ndarray:
    """The same seen by a mirror that slows down at both ends of the line."""
    late = np.arcsin(0.95 * (2 * COLUMNS / SHAPE[2] - 1)) / np.arcsin(0.95)
    return np.sin(2 * np.pi * cycles / SHAPE[1] * (ROWS + 0.35 * late))


WAVES = {
    "hum": pure(1.7),
    "fast": pure(617.3),
    "chirp": chirp(617.3),
    "two": (pure(5.2) + pure(617.3)) / 2**0.5,
    "not always": pure(617.3) * (np.arange(SHAPE[0]) < 0.8 * SHAPE[0])[:, None, None],
}


@pytest.fixture(scope="module")
def noise():
    return (NOISE * np.random.default_rng(1).standard_normal(SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def clean():
    return simulate_scene(SHAPE, seed=71)[:]


def recorded(clean, level=1, seed=1):
    return NoisyScene(clean, *noise_parameters(level), seed=seed)[:].astype(np.float32)


@pytest.mark.parametrize("name", WAVES)
def test_waves_are_taken_away(name, noise):
    added = (0.3 * NOISE * WAVES[name]).astype(np.float32)
    found = electrical_ripple(noise + added)
    left = WithoutRipple(noise + added, found)[:] - noise
    assert np.square(left).mean() < 0.1 * np.square(added).mean()
    assert found.deviation == pytest.approx(added.std(), rel=0.15)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_it_is_sliced_as_the_stack(kind, noise):
    stack = np.clip(100 + 30 * (noise / NOISE + 0.5 * WAVES["two"]), 0, 255).astype(kind)
    without = WithoutRipple(stack, electrical_ripple(stack))
    assert without.shape == stack.shape
    assert without[:].dtype == without.dtype
    for index in (7, slice(20, 40), (slice(None), slice(3, 9), slice(50, 56)), (7, slice(0, 3)), slice(0, 60, 3)):
        np.testing.assert_allclose(without[index], without[:][index], rtol=0, atol=1e-3)


def test_there_is_none_in_noise(noise):
    assert electrical_ripple(noise) is None
    assert electrical_ripple(np.zeros(SHAPE, np.int16)) is None


@pytest.mark.parametrize("level", [1, 2, 3])
def test_there_is_none_in_a_recording(level, clean):
    assert electrical_ripple(recorded(clean, level)) is None


def test_there_is_none_where_single_frames_differ(noise):
    outlier = noise.copy()
    outlier[40] += 50 * NOISE * WAVES["fast"][0]
    assert electrical_ripple(outlier) is None


def test_tissue_that_waxes_and_wanes_is_none(noise):
    course = np.sin(0.8 * np.arange(SHAPE[0]))[:, None, None]  # in one place of the field and in the next alike
    stripes = np.sin(2 * np.pi * 1.5 * np.arange(SHAPE[1]) / SHAPE[1])[:, None]
    assert electrical_ripple((noise + 0.5 * NOISE * course * stripes).astype(np.float32)) is None


def test_stripes_of_the_image_stay(noise):
    image = 5 * NOISE * WAVES["fast"][0]
    found = electrical_ripple((noise + image + 0.3 * NOISE * WAVES["fast"]).astype(np.float32))
    assert np.abs(np.mean([found.added(t) for t in range(SHAPE[0])], axis=0)).max() < 0.02 * NOISE


@pytest.mark.parametrize("shape", [(40, 64, 72), (120, 24, 72), (120, 64, 24)])
def test_small_stacks_are_left_alone(shape, noise):
    frames, height, width = shape
    assert electrical_ripple((noise + NOISE * WAVES["fast"])[:frames, :height, :width]) is None


@pytest.mark.parametrize(("method", "gain"), [("restormer3d", 3.0), ("gaussian", 0.5)])
def test_denoising_gains_by_it(method, gain, clean, monkeypatch):
    noisy = recorded(clean)
    deviation = float(np.diff(noisy, axis=0).std() / 2**0.5)
    rippled = (noisy + 0.3 * deviation * WAVES["hum"]).astype(np.float32)
    chosen, said = settings(iterations=0), []
    without, record = array_and_record(rippled, chosen, method=method, say=said.append)
    assert record["ripple"] == pytest.approx(0.3 * deviation / 2**0.5, rel=0.15)
    assert any("electrical ripple" in text for text in said)
    plain, record = array_and_record(noisy, chosen, method=method)
    assert record["ripple"] == 0
    monkeypatch.setattr(set_aside, "electrical_ripple", lambda _: None)
    left_in, _ = array_and_record(rippled, chosen, method=method)
    scores = [evaluate_stacks(clean, x)["activity_snr"] for x in (left_in, without, plain)]
    assert scores[1] > scores[0] + gain
    assert scores[1] > scores[2] - 0.2


def test_a_wave_that_comes_back_is_no_plane(clean):
    noisy = (recorded(clean) + 40 * pure(1.7)).astype(np.float32)  # after ten frames
    assert find_planes(noisy) is None


def test_planes_of_the_same_activity_keep_their_images(clean):
    ground = clean.mean(0)
    truth = clean + 0.5 * np.stack([np.roll(ground, 9, 0) - ground, 0 * ground])[np.arange(SHAPE[0]) % 2]
    noisy = recorded(truth)
    both = [
        array_and_record(x.astype(np.float32), settings(iterations=0), method="gaussian")
        for x in (noisy, noisy + 20 * WAVES["fast"])
    ]
    assert [record["ripple"] > 0 for _, record in both] == [False, True]
    assert [record["planes"] for _, record in both] == [{"count": 2, "shared": True}] * 2
    scores = [evaluate_stacks(truth, x)["stsnr"] for x, _ in both]
    assert scores[1] > scores[0] - 0.3


def test_it_is_told_beforehand(tmp_path, clean):
    path = tmp_path / "rippled.tif"
    noisy = recorded(clean)
    tifffile.imwrite(path, (noisy + 0.5 * noisy.std() * WAVES["hum"]).astype(np.float32))
    facts = inspect(path)
    assert facts["ripple"] > 0
    assert "electrical waves of" in describe(facts)
    tifffile.imwrite(path, noisy)
    assert inspect(path)["ripple"] == 0
    assert "electrical" not in describe(inspect(path))


def test_only_where_it_is_asked_for(clean):
    noisy = recorded(clean)
    rippled = noisy + 0.5 * noisy.std() * WAVES["hum"]
    _, record = array_and_record(rippled, settings("published", iterations=0), method="gaussian")
    assert record["ripple"] == 0
