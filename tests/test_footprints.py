"""Footprints: taken apart and put together again, closer to the truth, and left alone where frames hold other noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from restormer3d.activity.fields import FIELD_FRAMES
from restormer3d.activity.footprints import denoise_footprints, lag_one, noise_excess, take_apart
from restormer3d.arithmetic import float32_products
from restormer3d.baselines import gaussian_frames
from restormer3d.checkpoint import small_network
from restormer3d.denoising import start_denoising
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.unets import FootprintNetwork

from .conftest import blinking_cells

WHITE = ((1.0,), (1.0,), (1.0,))


def tensors(shape=(60, 64, 64), seed=0):
    """Truth, the noisy stack smoothed in time and a little in the plane, and the noisy one, whose noise is 1."""
    clean = blinking_cells(*shape, seed=seed) / 40
    noisy = clean + np.random.default_rng(seed).standard_normal(shape)
    smooth = np.stack(list(gaussian_frames(noisy, 3.0, 2.0)))
    return [torch.from_numpy(x).float() for x in (clean, smooth, noisy)]


def refined(denoised, noisy, network=None, static=None, noise=None):
    noise = torch.from_numpy(np.random.default_rng(9).standard_normal(noisy.shape)).float() if noise is None else noise
    ones = torch.ones(noisy.shape[1:])
    static = noisy.mean(0) if static is None else static
    return denoise_footprints(denoised, noisy, noise, ones, static, WHITE, network or small_network(FootprintNetwork))


def error(x, truth):
    return float(((x - x.mean(0)) - (truth - truth.mean(0))).square().mean())


def test_courses_and_footprints_make_up_the_activity():
    clean, _, noisy = tensors()
    clear, recorded = (x - x.mean(0) for x in (clean, noisy))
    courses, denoised, of_noisy = (x[0] for x in take_apart(clear[None], recorded[None]))
    again = torch.einsum("tk,khw->thw", courses, denoised)
    torch.testing.assert_close(again, clear, atol=1e-3, rtol=0)
    strong = courses[:, -3:]  # as many as there are cells
    torch.testing.assert_close(strong.mT @ strong, torch.eye(3), atol=1e-4, rtol=0)
    left = of_noisy[-3:] - torch.einsum("tk,thw->khw", strong, recorded)
    assert float(left.abs().max()) < 1e-3


def test_the_sign_of_activity_makes_no_difference():
    _, denoised, noisy = tensors()
    static = noisy.mean(0)
    out, of_negative = (refined(s * denoised, s * noisy, static=static) for s in (1, -1))
    torch.testing.assert_close(of_negative, -out, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(3, 3, 4), (50, 1, 1), (50, 5, 70), (50, 33, 18), (60, 90, 131)])
def test_any_plane(shape):
    rng = np.random.default_rng(1)
    noisy = torch.from_numpy(rng.normal(size=shape)).float()
    out = refined(0.1 * noisy, noisy)
    assert out.shape == shape
    assert out.isfinite().all()


def test_a_network_that_changes_nothing_changes_no_frame():
    _, denoised, noisy = tensors((50, 80, 100))
    still = refined(denoised, noisy, network=lambda noisy, denoised, *_: denoised)
    torch.testing.assert_close(still, denoised, atol=1e-5, rtol=0)


def test_products_are_not_rounded():
    """A GPU would round those of convolutions to TF32 by itself."""
    _, denoised, noisy = tensors((50, 20, 20))
    seen = []

    def network(noisy, denoised, *_):
        seen.append(torch.backends.cudnn.allow_tf32)
        return denoised

    with float32_products("tf32"):
        refined(denoised, noisy, network=network)
    assert seen == [False]


def test_pixels_without_noise_or_signal_do_no_harm():
    clean, denoised, noisy = tensors()
    for x in (clean, denoised, noisy):
        x[:, :, :10] = 3
    deviation = torch.ones(64, 64)
    deviation[:, :10] = 0
    noise = torch.from_numpy(np.random.default_rng(9).standard_normal(noisy.shape)).float() * deviation
    out = denoise_footprints(denoised, noisy, noise, deviation, noisy.mean(0), WHITE, small_network(FootprintNetwork))
    assert error(out[:, :, 10:], clean[:, :, 10:]) < error(denoised[:, :, 10:], clean[:, :, 10:])
    assert float((out - 3)[:, :, :10].abs().max()) < 0.3


def test_noise_that_single_pixels_do_not_tell_of():
    rng = np.random.default_rng(2)
    noise, drawn = (torch.from_numpy(rng.normal(size=(1, 400, 30))).float() for _ in range(2))
    pattern = torch.ones(1, 1, 30)
    flicker = torch.from_numpy(rng.normal(size=(1, 400, 1))).float() * pattern
    slow = 3 * torch.sin(torch.arange(400) / 30)[:, None] * pattern
    assert 0.6 < float(noise_excess(pattern, noise, drawn)) < 1.4
    assert 0.6 < float(noise_excess(pattern, noise + slow, drawn)) < 1.5
    assert 20 < float(noise_excess(pattern, noise + flicker, drawn)) < 45
    across = pattern * (torch.arange(30) % 2 * 2 - 1)
    assert float(noise_excess(across, noise + flicker, drawn)) < 1.5


def test_jitter_is_not_taken_for_activity():
    """Patterns that every frame has of its own stay as they were denoised, whatever the network makes of them."""
    rng = np.random.default_rng(3)
    _, denoised, noisy = tensors()
    edge = torch.from_numpy(np.linspace(-1, 1, 64) ** 3).float().expand(64, 64)
    jitter = torch.from_numpy(rng.normal(size=(60, 1, 1))).float() * edge

    def eager(noisy, denoised, *_):
        return denoised + 0.5 * (noisy - denoised).mul(edge).mean((2, 3), keepdim=True) * edge

    changes = [float((refined(denoised, x, network=eager) - denoised).square().mean()) for x in (noisy, noisy + jitter)]
    along = float((0.5 * jitter).square().mean())  # what the network wanted to put back is of this size
    assert changes[1] < 0.05 * along


def test_the_light_of_a_stimulus_stays():
    """Far beyond any activity, a small error of the network, relative to the light, would be larger than all noise."""
    _, denoised, noisy = tensors()
    light = torch.zeros(60, 1, 1)
    light[20:24] = 500
    change = refined(denoised + light, noisy + light, lambda _, denoised, *__: 0.95 * denoised) - (denoised + light)
    assert float(change[20:24].abs().mean()) < 0.1


def test_correlation_stays_in_the_range_of_the_training():
    assert lag_one(((1.0, 0.9), (1.0,), (1.0, 0.2, 0.1))) == (0.0, 0.2)
    assert lag_one(((1.0,), (1.0, -0.1), (1.0, 0.6))) == (0.0, 0.3)


def test_denoising_uses_them(monkeypatch):
    scene = simulate_scene((64, 64, 64), seed=77)
    noisy, clean = NoisyScene(scene, *noise_parameters(1), seed=4)[:], scene[:]
    chosen = settings(iterations=0)

    def denoised(frames=None, **changes):
        inference = chosen.inference.model_copy(update=changes)
        changed = replace(chosen, inference=inference)
        result = start_denoising(noisy[:frames], changed, "restormer3d", torch.device("cpu"), None, silent, silent)
        return np.stack(list(result.frames)), result.record

    (out, record), (without, record_without) = denoised(), denoised(footprints=False)
    assert record["footprints"]["file"] == "footprints.safetensors"
    assert record_without["footprints"] is None
    errors = [np.square((x - x.mean(0)) - (clean - clean.mean(0))).mean() for x in (out, without)]
    assert errors[0] < 0.97 * errors[1]
    np.testing.assert_allclose(out.mean(0), without.mean(0), rtol=1e-3)  # of the static image nothing is said
    short, record = denoised(FIELD_FRAMES - 1)
    assert record["footprints"] is None
    assert len(short) == FIELD_FRAMES - 1
