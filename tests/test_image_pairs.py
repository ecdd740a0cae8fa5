"""What the network for the static image learns from: two noisy means of an image, the same by NumPy and by PyTorch."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from restormer3d.noise import NoiseEstimate
from restormer3d.simulation import random_texture
from restormer3d.simulation.images import draw_image, images_ahead
from restormer3d.small_networks import image_pairs
from restormer3d.small_networks.image_pairs import Pairs, draw_pairs, numbered_batch
from restormer3d.static_image import stabilized


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("POOL", 2), ("SIDE", 40), ("_PATCH", 32)):
        monkeypatch.setattr(image_pairs, name, value)
    image_pairs._image.cache_clear()
    yield
    image_pairs._image.cache_clear()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_numpy():
    return Pairs(
        *(torch.cat(part) for part in zip(*(numbered_batch(5, number, 4) for number in range(75)), strict=True))
    )


def by_torch():
    images = torch.stack([torch.from_numpy(image_pairs._image(5, number)) for number in range(76)])
    return draw_pairs(images, 900, generator())


@pytest.mark.parametrize("pairs_by", [by_numpy, by_torch])
def test_pairs_share_the_image_and_no_noise(pairs_by, monkeypatch):
    monkeypatch.setattr(image_pairs, "_UNUSUAL", 0.0)
    noisy, target, truth, correlation = pairs = pairs_by()
    count = len(noisy)
    assert noisy.shape == target.shape == truth.shape == (count, 1, 32, 32)
    assert correlation.shape == (count, 2)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in pairs)
    assert noisy.mean((1, 2, 3)).abs().max() < 1e-3
    own, other = noisy - truth, target - truth
    assert -0.04 < own.mean() < 0.01  # the root of few photons is on average too small
    assert own.var().item() == pytest.approx(1, rel=0.03)
    assert other.var().item() == pytest.approx(1 / 8, rel=0.03)  # eight recordings: less noise, but noise
    assert (own * other).mean().abs() < 0.01
    white = correlation.sum(1) == 0
    assert 0.5 < white.float().mean() < 0.7
    for axis, most in enumerate((0.2, 0.3)):
        neighbors = (own * own.roll(1, axis + 2)).narrow(axis + 2, 1, 31).mean((1, 2, 3))
        assert neighbors[white].mean().abs() < 0.01
        assert (neighbors - correlation[:, axis]).abs().mean() < 0.05
        assert 0.9 * most < correlation[:, axis].max() <= most


def test_numpy_and_torch_draw_alike(monkeypatch):
    monkeypatch.setattr(image_pairs, "_UNUSUAL", 0.0)
    one, other = by_numpy(), by_torch()
    for of in (lambda pairs: pairs.truth.std((1, 2, 3)).log(), lambda pairs: pairs.noisy.std((1, 2, 3)).log()):
        first, second = of(one), of(other)
        error = (first.var() / len(first) + second.var() / len(second)).sqrt()
        assert (first.mean() - second.mean()).abs() < 3 * error
        assert (first.std() / second.std()).log().abs() < 0.15


def test_unusual_patches_are_of_the_same_images(monkeypatch):
    monkeypatch.setattr(image_pairs, "_UNUSUAL", 1.0)
    pairs = by_torch()
    assert all(part.isfinite().all() for part in pairs)
    variance = (pairs.noisy - pairs.truth).var((1, 2, 3))
    assert variance.mean().item() == pytest.approx(1, rel=0.05)
    assert 0.25 < pairs.correlation[:, 0].max() <= 0.3
    clean = torch.rand(2, 8, 8, generator=generator(), dtype=torch.float64) + 3
    changed = image_pairs._varied(
        clean, torch.tensor([1.0, 1.5])[:, None, None], torch.tensor([1.0, 0.5])[:, None, None]
    )
    torch.testing.assert_close(changed.mean((1, 2)), clean.mean((1, 2)))
    assert changed[0].min() == 0
    assert torch.equal(changed.flatten(1).argsort(), clean.flatten(1).argsort())


def test_every_place_and_orientation():
    image = torch.arange(40.0 * 40).view(1, 40, 40)
    patches = image_pairs._random_patches(image, 4000, generator())
    known = [turned for k in range(4) for square in [torch.rot90(image[0], k)] for turned in (square, square.flip(1))]
    steps = {(float(patch[0, 1] - patch[0, 0]), float(patch[1, 0] - patch[0, 0])) for patch in patches}
    assert steps == {(float(each[0, 1] - each[0, 0]), float(each[1, 0] - each[0, 0])) for each in known}
    assert len({float(patch.min()) for patch in patches}) == 9 * 9


@pytest.mark.parametrize(("gain", "read"), [(10.0, 100.0), (2000.0, 3.0), (200.0, 60.0)])
def test_the_transform_is_that_of_the_static_image(gain, read):
    values = np.linspace(-300, 5000, 200)
    expected = stabilized(values, NoiseEstimate(gain, read**2, 0.0, None, {}, 0.0, 0.0))
    got = image_pairs._stabilized(torch.from_numpy(values), torch.tensor(gain).double(), torch.tensor(read).double())
    np.testing.assert_allclose(got.numpy(), expected)


def test_any_number_of_photons():
    clean = torch.logspace(-2, 8, 6, dtype=torch.float64)[:, None, None].expand(6, 64, 64)
    one, none = torch.ones(6, 1, 1, dtype=torch.float64), torch.zeros(6, 1, 1, dtype=torch.float64)
    error = image_pairs._error(clean, one, 0.1 * one, one, (none, none), generator())
    torch.testing.assert_close(error.var((1, 2)) / (clean[:, 0, 0] + 0.01), torch.ones(6).double(), atol=0.15, rtol=0)
    assert (error.mean((1, 2)) / (clean[:, 0, 0] + 0.01).sqrt()).abs().max() < 0.08


def test_images_are_drawn_ahead():
    with images_ahead(7, 3, 24, 2) as take:
        images = take(5)
    assert not multiprocessing.active_children()
    known = [draw_image(7, number, 24) for number in range(3, 60)]
    places = [next(place for place, image in enumerate(known) if np.array_equal(image, each)) for each in images]
    assert len(set(places)) == len(images) >= 5


def test_processes_that_die_are_not_waited_for():
    with images_ahead(7, 0, -1, 1) as take, pytest.raises(RuntimeError, match="have died"):
        take(1)


def test_textures_are_images():
    images = [random_texture(np.random.default_rng(seed), 48) for seed in range(5)]
    for image in images:
        assert image.shape == (48, 48)
        assert image.dtype == np.float32
        assert (image > 0).all()
        assert 60 <= image.mean() <= 600
    assert not np.array_equal(images[0], images[1])
