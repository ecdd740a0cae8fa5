"""Courses: turned until events are apart, denoised closer to the truth, and left alone where frames flicker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from restormer3d.activity.courses import (
    apply_network,
    as_varied,
    course_noise,
    denoise_courses,
    independent_noise,
    sparse_footprints,
    strength_of,
    weights_of_others,
    what_is_left_out,
)
from restormer3d.activity.fields import FIELD_FRAMES
from restormer3d.activity.principal import leading_components
from restormer3d.activity.smoothing import smoothed
from restormer3d.arithmetic import float32_products
from restormer3d.baselines import gaussian_frames
from restormer3d.checkpoint import small_network
from restormer3d.denoising import start_denoising
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.unets import CourseNetwork

from .conftest import blinking_cells


def tensors(shape=(120, 64, 64), seed=0):
    """Truth, the noisy stack smoothed along time and in the plane, and the noisy one, whose noise is 1."""
    clean = blinking_cells(*shape, seed=seed) / 40
    noisy = clean + np.random.default_rng(seed).standard_normal(shape)
    smooth = np.stack(list(gaussian_frames(noisy, 4.0, 2.0)))
    return [torch.from_numpy(x).float() for x in (clean, smooth, noisy)]


def drawn(shape, seed=9):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def refined(denoised, noisy, network=None):
    ones = torch.ones(noisy.shape[1:])
    return denoise_courses(denoised, noisy, drawn(noisy.shape), ones, network or small_network(CourseNetwork))


def error(x, truth):
    return float(((x - x.mean(0)) - (truth - truth.mean(0))).square().mean())


def onsets(x):
    """How much the field brightens within two frames at most: smoothed events do so slowly."""
    return float((x[2:] - x[:-2]).mean((1, 2)).max())


def test_onsets_come_back():
    clean, denoised, noisy = tensors()
    out = refined(denoised, noisy)
    assert error(out, clean) < 0.8 * error(denoised, clean)
    assert 1.2 * onsets(clean) > onsets(out) > 1.3 * onsets(denoised)


def test_cells_are_told_apart():
    """Two cells and a glow that brighten together: principal components mix all three."""
    events = torch.zeros(3, 80)
    events[0, 10:40], events[1, 30:70], events[2] = 1, 0.9, torch.sin(torch.arange(80) / 9)
    cells = torch.zeros(2, 32, 32)
    cells[0, 3:6, 3:6], cells[1, 20:24, 20:23] = 10, 10
    parts = torch.cat([cells, torch.full((1, 32, 32), 4.0)])
    stack = torch.einsum("kt,khw->thw", events - events.mean(1, keepdim=True), parts) + 0.1 * drawn((80, 32, 32))
    principal, footprints = leading_components(stack[None].flatten(2), 24)[1][0], sparse_footprints(stack[None])[0]
    torch.testing.assert_close(footprints.mT @ footprints, torch.eye(24), atol=0.03, rtol=0)
    alone = cells.flatten(1) / cells.flatten(1).norm(dim=1, keepdim=True)
    assert float((alone @ footprints).amax(1).min()) > 0.97  # each cell has one, and it is positive
    assert float((alone @ principal).abs().amax(1).min()) < 0.9


@pytest.mark.parametrize("shape", [(2, 3, 4), (50, 1, 1), (51, 5, 70), (53, 33, 18)])
def test_any_shape(shape):
    noisy = drawn(shape, 1)
    out = refined(0.1 * noisy, noisy)
    assert out.shape == shape
    assert out.isfinite().all()


def test_the_mean_over_time_stays():
    _, denoised, noisy = tensors()
    torch.testing.assert_close(refined(denoised, noisy).mean(0), denoised.mean(0), atol=1e-3, rtol=0)


def test_a_network_that_changes_nothing_changes_no_frame():
    """Unless frames vary less than what is in them: here they vary more."""
    _, _, noisy = tensors((50, 40, 40))
    denoised = 1.02 * noisy
    still = refined(denoised, noisy, network=lambda noisy, denoised, *_: denoised)
    torch.testing.assert_close(still, denoised, atol=1e-5, rtol=0)


def test_fast_changes_vary_as_much_as_the_noisy_ones_say():
    """What events have lost comes back; noise alone, and a slow course, stay as they are."""
    events, slow = torch.zeros(2, 3, 600)
    events[0, 20::30], events[0, 21::30] = 3, 3
    slow[1] = 5 * torch.sin(torch.arange(600) / 60)
    noisy = (events + slow).mT[None] + drawn((1, 600, 3), 1)
    denoised = (0.8 * events + slow).mT[None]
    varied = as_varied(denoised, noisy)
    height = float((varied - denoised)[0, 20::30, 0].mean() / 3 + 0.8)
    assert 0.93 < height < 1.07
    torch.testing.assert_close(varied[..., 1:], denoised[..., 1:], atol=0.2, rtol=0)
    none = as_varied(denoised, noisy, torch.zeros(1, 1, 1))
    torch.testing.assert_close(none, denoised, atol=0, rtol=0)
    assert float((as_varied(0 * denoised, noisy)).abs().max()) == 0
    light = torch.zeros(1, 600, 3)
    light[:, 300:308] = 500
    beyond = as_varied(denoised + 0.95 * light, noisy + light) - (denoised + 0.95 * light)
    assert float(beyond.abs().max()) <= 1


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


def test_noise_of_courses():
    """Flicker counts as noise; an event, which few frames show, does not."""
    noise, other, clear = drawn((1, 400, 2), 1), drawn((1, 400, 2), 2), torch.zeros(1, 400, 2)
    event, flicker = torch.zeros(1, 400, 2), torch.zeros(1, 400, 2)
    event[:, 100:110, 0], flicker[..., 0] = 20, 3 * drawn((1, 400), 3)
    for added, lowest, highest in ((0, 0.7, 1.3), (event, 0.7, 1.3), (flicker, 8, 13)):
        deviation, excess = course_noise(clear, noise + added, other)
        assert lowest < float(excess[0, 0, 0]) < highest
        assert 0.7 < float(excess[0, 0, 1]) < 1.3
        assert float(deviation.square().min()) >= 0.99 * float(other.square().mean(1).min())


def test_courses_that_share_events_tell_of_one_another():
    events = torch.zeros(300)
    events[[50, 51, 120, 121, 200, 201]] = 5
    slow = torch.sin(torch.arange(300) / 40) * 8
    quiet = 0.05 * drawn((300,), 1)
    weights = weights_of_others(torch.stack([events, 0.5 * events + slow, slow, quiet], 1)[None])[0]
    assert weights.shape == (4, 4)
    assert float(weights[0, 1]) > 0.3
    assert float(weights.diagonal().abs().max()) == 0
    assert float(weights[2:, :2].abs().max()) < 0.1  # what is slow, or is noise, tells of nothing


@torch.no_grad()
def test_a_course_is_denoised_better_beside_one_with_the_same_events():
    """A cell that shines in two footprints: what noise hides in one course, the other one shows."""
    events = np.zeros((8, 240))
    random = np.random.default_rng(2)
    for line in events:
        line[random.integers(0, 240, 6)] = random.uniform(2, 4, 6)
    decay = np.exp(-np.arange(60) / 15)
    weak = np.stack([np.convolve(line, decay)[:240] for line in events])
    strong = 2 * weak

    def denoised(clean):
        noisy = clean + random.standard_normal(clean.shape)
        return noisy, np.stack([np.convolve(np.pad(x, 5, "edge"), np.ones(11) / 11, "valid") for x in noisy])

    parts = [np.stack(pair) for pair in zip(denoised(weak), denoised(strong), strict=True)]  # noisy, smooth
    same = [torch.from_numpy(x.transpose(1, 2, 0)).float() for x in parts]  # (fields, T, two courses)
    other = [torch.cat([x[..., :1], x.roll(1, 0)[..., 1:]], 2) for x in same]
    truth = torch.from_numpy(weak).float()
    errors = []
    for noisy, smooth in (same, other):
        better = apply_network(
            small_network(CourseNetwork), noisy, smooth, strength_of(smooth), weights_of_others(smooth)
        )
        errors.append(float((better[..., 0] - truth).square().mean()))
    assert errors[0] < 0.95 * errors[1]


def test_flicker_is_not_taken_for_activity():
    _, denoised, noisy = tensors()
    flicker = drawn((120, 1, 1), 3) * torch.from_numpy(blinking_cells(2, 64, 64)[0] * 0.3 / 40).float()

    def eager(noisy, *_):
        return noisy

    plain, of_flicker = (refined(denoised, x, eager) - denoised for x in (noisy, noisy + flicker))
    put_back = ((of_flicker - plain) * flicker).mean() / flicker.square().mean()
    assert abs(float(put_back)) < 0.1


def test_noise_that_courses_share():
    own = drawn((2, 200, 24), 1)
    own[1] += 0.7 * torch.sin(0.813 * torch.arange(200))[:, None]  # electrical ripple
    share = independent_noise(own)
    assert share.shape == (2, 1, 1)
    assert share.flatten().tolist() == [1, 0]
    event = torch.zeros(1, 200, 24)
    event[:, 50:80, :4] = 3  # that denoising has missed
    assert float(independent_noise(own[:1] + event)) == 1
    edges = torch.zeros(1, 200, 24)
    edges[:, [50, 51, 110, 111]] = torch.tensor([8.0, -8.0, -8.0, 8.0])[:, None]  # of light that lasts
    assert float(independent_noise(own[:1] + edges)) == 1


@torch.no_grad()
def test_the_order_of_courses_has_no_meaning():
    lines = [drawn((2, 50, 5), seed) for seed in range(3)]
    weights = weights_of_others(lines[1])
    order = torch.tensor([3, 1, 4, 0, 2])
    network = small_network(CourseNetwork)
    plain = apply_network(network, *lines, weights=weights)[..., order]
    ordered = apply_network(network, *(x[..., order] for x in lines), weights=weights[:, order][:, :, order])
    torch.testing.assert_close(ordered, plain, atol=1e-4, rtol=1e-4)


def test_what_flickers_tells_nothing_of_others():
    _, denoised, noisy = tensors()
    flicker = drawn((120, 1, 1), 3) * torch.from_numpy(blinking_cells(2, 64, 64)[0] * 0.6 / 40).float()
    seen = []

    def network(noisy, denoised, _, weights):
        seen.append(weights)
        return denoised

    refined(denoised, noisy, network)
    refined(denoised, noisy + flicker, network)
    before, after = (weights.abs().amax(1)[0] for weights in seen)  # of each course, the most that it tells of another
    assert int((after == 0).sum()) > int((before == 0).sum())
    assert float(before.max()) > 0.1


def test_the_light_of_a_stimulus_stays():
    """Far beyond any activity, a small error of the network, relative to the light, would be larger than all noise."""
    _, denoised, noisy = tensors()
    light = torch.zeros(120, 1, 1)
    light[40:44] = 500

    def not_quite(noisy, denoised, *_):
        return 0.95 * denoised

    change = refined(denoised + light, noisy + light, not_quite) - (denoised + light)
    assert float(change[40:44].abs().mean()) < 0.1


def test_denoising_uses_them():
    scene = simulate_scene((128, 64, 64), seed=77)
    noisy, clean = NoisyScene(scene, *noise_parameters(1), seed=4)[:], scene[:]
    chosen = settings(iterations=0)

    def denoised(frames=None, **changes):
        changed = replace(chosen, inference=chosen.inference.model_copy(update=changes))
        result = start_denoising(noisy[:frames], changed, "restormer3d", torch.device("cpu"), None, silent, silent)
        return np.stack(list(result.frames)), result.record

    (out, record), (without, record_without) = denoised(), denoised(courses=False)
    assert record["courses"]["file"] == "courses.safetensors"
    assert record_without["courses"] is None
    assert record_without["footprints"] is not None
    errors = [np.square((x - x.mean(0)) - (clean - clean.mean(0))).mean() for x in (out, without)]
    assert errors[0] < 0.99 * errors[1]
    _, record = denoised(footprints=False)
    assert record["courses"] is not None
    _, record = denoised(FIELD_FRAMES - 1)
    assert record["courses"] is None
    _, record = denoised(chunk_voxels=(FIELD_FRAMES - 1) * 64 * 64)  # so large are frames
    assert record["courses"] is record["footprints"] is None


def strong_and_smoothed(frames=400):
    """Courses (1, T, 2) far stronger than noise: recorded, and smoothed until what is lost exceeds noise by far."""
    events = torch.zeros(1, frames, 2)
    events[:, 20::40] = 60
    decay = torch.exp(-torch.arange(60) / 12.0)
    clean = torch.from_numpy(np.stack([np.convolve(x, decay)[:frames] for x in events[0].mT.numpy()], 1)).float()[None]
    return clean, clean + drawn((1, frames, 2), 1), smoothed(clean, 3.0)


def test_of_strong_courses_what_smoothing_lost_is_no_noise_but_flicker_is():
    _, noisy, denoised = strong_and_smoothed()
    flicker = torch.zeros_like(noisy)
    flicker[..., 0] = 3 * drawn((1, 400), 3)
    _, excess = course_noise(denoised, noisy, drawn((1, 400, 2), 2))
    assert float(excess.max()) < 1.6
    _, excess = course_noise(denoised, noisy + flicker, drawn((1, 400, 2), 2))
    assert float(excess[0, 0, 0]) > 4  # of 10: `trust` refuses 3
    weak = 0.02 * denoised  # as weak as directions of the noise itself may be: their slow rest counts
    slow = 8 * smoothed(drawn((1, 400, 2), 4), 1.0)
    _, excess = course_noise(weak, weak + slow, drawn((1, 400, 2), 2))
    assert float(excess.min()) > 2


def test_what_strong_courses_have_lost_is_put_back():
    clean, noisy, denoised = strong_and_smoothed()
    ones = torch.ones_like(noisy)
    back = denoised + what_is_left_out(noisy - denoised, denoised, ones)
    assert float((back - clean).square().mean()) < 0.2 * float((denoised - clean).square().mean())
    of_noise = what_is_left_out(noisy - clean, clean, ones)
    assert float(of_noise.square().mean()) < 0.02
    brighter = ones.clone()
    brighter[:, 200:300] = 9  # noise of each pixel is three times as strong there, and so is that of the courses
    noise = (noisy - clean) * brighter.sqrt()
    assert float(what_is_left_out(noise, clean, brighter).square().mean()) < 0.05
    assert float(what_is_left_out(noise, clean, ones).square().mean()) > 0.5
    assert float(what_is_left_out(noisy - 0.02 * denoised, 0.02 * denoised, ones).abs().max()) == 0


def test_frames_of_many_photons_keep_fast_events():
    """Of a hundred times the light, filters along time leave more of the events than there is noise."""
    clean, _, noisy = tensors()
    strong = 100 * clean
    noisy = noisy - clean + strong
    denoised = torch.from_numpy(np.stack(list(gaussian_frames(noisy.double().numpy(), 2.0, 1.0)))).float()

    def useless(noisy, denoised, *_):
        return denoised

    out = refined(denoised, noisy, useless)
    assert error(out, strong) < 0.5 * error(denoised, strong)
