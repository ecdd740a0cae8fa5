"""Components that stand out of noise stay, with the height that the noisy stack shows; noise alone fades."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from restormer3d.activity import components
from restormer3d.activity.chunks import LEAST_FRAMES
from restormer3d.activity.components import AddedNoise, refine_by_components
from restormer3d.arithmetic import torch_device
from restormer3d.baselines import gaussian_frames
from restormer3d.denoising import start_denoising
from restormer3d.progress import silent
from restormer3d.settings import settings

from .conftest import blinking_cells, photons

SHAPE = (96, 40, 36)


def smooth(stack):
    return gaussian_frames(stack[: stack.shape[0]], 2.0, 1.0)


def unchanged(stack):
    return iter(stack[: stack.shape[0]])


def refined(added, denoiser=smooth):
    return np.stack(list(refine_by_components(denoiser(added.stack), denoiser(added), added)))


def activity(stack):
    return stack - stack.mean(0)


def error(stack, clean):
    return np.square(activity(stack) - activity(clean)).mean()


@pytest.fixture(scope="module")
def scene():
    """Clean cells, and the noisy stack with its noise."""
    clean = blinking_cells(*SHAPE)
    return clean, AddedNoise(photons(clean), 40.0 * clean.mean(0) + 400.0)


def test_refined_frames_are_closer_to_the_truth_than_those_of_the_filter(scene):
    clean, added = scene
    filtered = np.stack(list(smooth(added.stack)))
    out = refined(added)
    assert out.shape == SHAPE
    assert out.dtype == np.float32
    assert error(out, clean) < 0.5 * error(filtered, clean)
    # The static image is the filter's: nothing is said of it.
    np.testing.assert_allclose(out.mean(0), filtered.mean(0), rtol=0.02)


def test_height_that_the_filter_took_from_events_returns(scene):
    clean, added = scene
    t, y, x = np.unravel_index(activity(clean).argmax(), SHAPE)
    heights = [activity(stack)[t, y, x] for stack in (np.stack(list(smooth(added.stack))), refined(added), clean)]
    assert heights[0] < 0.8 * heights[2]
    assert 1.2 * heights[0] < heights[1] < 1.1 * heights[2]


def test_slow_activity_that_the_filter_left_out_returns(monkeypatch):
    """One height for the whole recording cannot repair a filter that keeps the activity of a part of it alone."""
    wave = 30 * np.sin(np.arange(SHAPE[0]) / 8)[:, None, None]
    cell = np.exp(-np.square(np.stack(np.meshgrid(*(np.linspace(-3, 3, n) for n in SHAPE[1:]), indexing="ij"))).sum(0))
    clean = 200 + wave * cell
    added = AddedNoise(photons(clean), 40.0 * clean.mean(0) + 400.0)

    def wide(stack):
        return gaussian_frames(stack[: stack.shape[0]], 5.0, 2.0)

    def forgetful(stack):
        out = np.stack(list(wide(stack)))
        out[48:] = 0.3 * out[48:] + 0.7 * out.mean(0)
        return iter(out)

    put_back = [error(refined(added, denoiser), clean) for denoiser in (wide, forgetful)]
    monkeypatch.setattr(components, "_SLOW_EXCESS", np.inf)
    left_out = [error(refined(added, denoiser), clean) for denoiser in (wide, forgetful)]
    assert put_back[1] < 0.75 * left_out[1]
    assert put_back[0] < 1.05 * left_out[0]  # and where nothing was left out, no noise comes back


def test_noise_alone_fades():
    rng = np.random.default_rng(3)
    still = 100 + 50 * rng.random(SHAPE[1:])
    added = AddedNoise((still + 20 * rng.normal(size=SHAPE)).astype(np.float32), np.full(SHAPE[1:], 400.0))
    filtered = np.stack(list(smooth(added.stack)))
    assert activity(refined(added)).var() < 0.25 * activity(filtered).var()


def test_noise_that_pixels_share_is_not_taken_for_signal():
    """Flicker of the whole field is in no pixel's own variance, and yet no signal."""
    rng = np.random.default_rng(7)
    flicker = 10 * rng.normal(size=(SHAPE[0], 1, 1))
    stack = (100 + flicker + 20 * rng.normal(size=SHAPE)).astype(np.float32)
    filtered = np.stack(list(smooth(stack)))
    out = refined(AddedNoise(stack, np.full(SHAPE[1:], 400.0)))
    assert activity(out).mean((1, 2)).var() < 0.5 * activity(filtered).mean((1, 2)).var()


def test_nothing_is_lost_where_there_is_next_to_no_noise():
    """Every component stands out: what a denoiser left as it was stays."""
    rng = np.random.default_rng(4)
    stack = (100 + 30 * rng.normal(size=SHAPE)).astype(np.float32)  # no two pixels alike
    added = AddedNoise(stack, np.full(SHAPE[1:], 0.01))
    np.testing.assert_allclose(refined(added, unchanged), stack, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_same(scene):
    _, added = scene
    arguments = [np.stack(list(smooth(each[: SHAPE[0]]))) for each in (added.stack, added)]
    on_cpu, on_gpu = (
        np.stack(list(refine_by_components(*map(iter, arguments), added, device))) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, atol=0.01 * activity(on_cpu).std())


@pytest.mark.parametrize("voxels", [30 * 8 * 20 * 8 * 3, 2**25])
def test_rows_of_blocks_may_be_refined_together(voxels):
    rng = np.random.default_rng(5)
    fields = [torch.from_numpy(rng.normal(size=(30, 37, 20)).astype(np.float32)) for _ in range(4)]
    one_by_one, together = torch.zeros_like(fields[0]), torch.zeros_like(fields[0])
    for size in (8, 16):
        components._add_refined(one_by_one, fields, size, 0)
        components._add_refined(together, fields, size, voxels)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)


@pytest.mark.parametrize("shape", [(LEAST_FRAMES, 5, 7), (33, 16, 3), (20, 1, 17), (400, 9, 9)])
def test_any_shape(shape):
    stack = np.random.default_rng(5).normal(100, 5, shape).astype(np.float32)
    out = refined(AddedNoise(stack, np.full(shape[1:], 25.0)))
    assert out.shape == shape
    assert np.isfinite(out).all()


def test_a_still_or_noiseless_stack_stays():
    stack = np.broadcast_to(np.arange(30.0, dtype=np.float32), (24, 20, 30))
    for variance in (0.0, 4.0):
        out = refined(AddedNoise(stack, np.full((20, 30), variance)), unchanged)
        np.testing.assert_allclose(out, stack, atol=1e-3)


def test_long_stacks_are_taken_in_chunks(scene):
    clean, added = scene
    whole = refined(added)
    read = []

    class Watched:
        shape, dtype = SHAPE, np.dtype(np.int16)

        def __getitem__(self, frames):
            read.append(frames.stop - frames.start)
            return added.stack[frames]

    depth = 40
    watched = AddedNoise(Watched(), added.variance)
    noisier = smooth(added)
    out = np.stack(list(refine_by_components(smooth(added.stack), noisier, watched, depth=depth)))
    assert max(read) == depth
    assert next(noisier, None) is None  # every frame was asked for, and no more
    assert error(out, clean) < 0.6 * error(np.stack(list(smooth(added.stack))), clean)
    assert np.square(out - whole).mean() < 0.2 * error(np.stack(list(smooth(added.stack))), clean)


def test_a_large_offset_costs_nothing(scene):
    _, added = scene
    far = AddedNoise(added.stack.astype(np.int32) + 2**28, added.variance)
    frames = [np.stack(list(smooth(each[: SHAPE[0]]))) for each in (added.stack, added[: SHAPE[0]])]
    near, out = (
        np.stack(list(refine_by_components(*(iter(each) for each in frames), noise))) for noise in (added, far)
    )
    np.testing.assert_allclose(out, near, rtol=1e-4)


def test_added_noise_is_like_that_of_the_stack():
    stack = np.zeros((200, 30, 40), np.int16)
    variance = np.linspace(1, 100, 30 * 40).reshape(30, 40)
    added = AddedNoise(stack, variance, ((1.0,), (1.0, 0.1), (1.0, 0.3, 0.1)))
    noise = added.noise(0, 200)
    np.testing.assert_allclose(noise.var(0).mean(), variance.mean(), rtol=0.02)
    white = noise / np.sqrt(variance)
    for axis, lag, expected in ((1, 1, 0.1), (2, 1, 0.3), (2, 2, 0.1), (0, 1, 0.0), (1, 2, 0.0)):
        near = np.moveaxis(white, axis, 0)
        assert (near[lag:] * near[:-lag]).mean() == pytest.approx(expected, abs=0.02)
    np.testing.assert_array_equal(added.noise(20, 30), noise[20:30])
    np.testing.assert_allclose(added[50:60] - stack[50:60], 0.25 * noise[50:60], rtol=1e-6)


def run(stack, **options):
    said = []
    chosen, device = settings(iterations=0, **options), torch_device("cpu")
    result = start_denoising(stack, chosen, "restormer3d", device, None, silent, said.append)
    frames = np.stack(list(result.frames))
    assert frames.shape == stack.shape
    return result.record["components"], " ".join(said)


def test_default_recipe_refines_what_it_can():
    noisy = photons(blinking_cells(40, 24, 24))
    assert run(noisy)[0]
    assert run(noisy, blind_spot="t3x3")[0]  # a wide blind spot does not say that noise has a memory
    done, said = run(noisy[: LEAST_FRAMES - 1])
    assert not done
    assert "15 frames are too few" in said
    rng = np.random.default_rng(0)
    white = rng.normal(size=(401, 24, 24))
    remembered = np.rint(500 + 20 * (white[1:] + 0.8 * white[:-1])).astype(np.int16)
    done, said = run(remembered[:47])  # of more frames, noise is made white
    assert not done
    assert "noise of consecutive frames is correlated" in said


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_any_unit(scene, unit):
    _, added = scene
    out = refined(added)
    other = AddedNoise((added.stack * unit).astype(np.float32), added.variance * unit**2)
    np.testing.assert_allclose(refined(other) / unit, out, rtol=1e-3, atol=0.02 * out.std())
