"""The blind spot is blind: at borders, around correlated neighbors, and through the temporal mean."""

from __future__ import annotations

import pytest
import torch

from restormer3d.objectives import blind_spot, blind_spot_loss, masked_loss, second_recording_loss, temporal_median_loss

from .conftest import background_of

STACK_FRAMES = 40.0


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("fraction", [0.015, 0.2])
def test_the_asked_share_of_voxels_is_masked_and_nothing_else_changes(generator, fraction, everywhere):
    noisy = torch.rand(3, 1, 10, 12, 14)
    masked, chosen = blind_spot(noisy, fraction, (0, 0, 0), generator, everywhere=everywhere)
    per_patch = chosen.flatten(1).sum(1)
    assert (per_patch == round(fraction * 10 * 12 * 14)).all()
    assert torch.equal(masked[~chosen], noisy[~chosen])
    assert (masked[chosen] != noisy[chosen]).all()


def test_a_replacement_is_a_visible_neighbor_within_radius_one(generator, everywhere):
    places = torch.arange(8 * 8 * 8, dtype=torch.float32).view(1, 1, 8, 8, 8)
    for _ in range(50):
        masked, chosen = blind_spot(places, 0.02, (0, 0, 0), generator, everywhere=everywhere)
        for target in chosen.flatten().nonzero().flatten().tolist():
            source = int(masked.flatten()[target])
            distance = [abs(target // s % 8 - source // s % 8) for s in (64, 8, 1)]
            assert max(distance) == 1
            assert not chosen.flatten()[source]


@pytest.fixture(params=[False, True], ids=["hidden", "everywhere"])
def everywhere(request) -> bool:
    """Both ways to draw replacements; the second is the one of CUDA."""
    return request.param


@pytest.mark.parametrize("extent", [(0, 0, 1), (1, 1, 1)])
def test_an_extended_blind_spot_hides_the_neighbors_too(generator, extent, everywhere):
    noisy = torch.rand(1, 1, 12, 20, 20)
    masked, chosen = blind_spot(noisy, 0.1, extent, generator, everywhere=everywhere)
    changed = masked != noisy
    for t, y, x in chosen[0, 0].nonzero().tolist():
        box = changed[0, 0][tuple(slice(max(0, p - r), p + r + 1) for p, r in zip((t, y, x), extent, strict=True))]
        assert box.all()
    assert 0.02 < changed.float().mean() < 0.1


@pytest.mark.parametrize("extent", [(0, 0, 0), (0, 0, 1), (1, 1, 1)])
def test_no_masked_voxel_reaches_the_prediction(tiny_model, generator, extent, everywhere):
    noisy = torch.rand(2, 1, 12, 13, 17).requires_grad_()
    # The temporal mean contains the noisy voxels, as that of a real stack does.
    background = torch.rand(2, 1, 1, 13, 17) + noisy.sum(2, keepdim=True) / STACK_FRAMES
    masked, chosen = blind_spot(noisy, 0.1, extent, generator, everywhere=everywhere)
    share = (masked - noisy).sum(2, keepdim=True) / STACK_FRAMES
    predicted = tiny_model(masked, background_of(background + share, STACK_FRAMES))[chosen].sum()
    (gradient,) = torch.autograd.grad(predicted, noisy)
    assert gradient.abs().max() > 0.1
    assert gradient[chosen].abs().max() < 1e-6 * gradient.abs().max()


def test_the_loss_passes_the_corrected_background_on(generator):
    seen = {}

    def model(noisy, background):
        seen.update(noisy=noisy, background=background)
        return noisy

    noisy = torch.rand(1, 1, 8, 8, 8)
    background = noisy.sum(2, keepdim=True) / STACK_FRAMES
    blind_spot_loss(
        model,
        noisy,
        background,
        torch.tensor([STACK_FRAMES]),
        masked_fraction=0.1,
        extent=(0, 0, 0),
        loss="mse",
        generator=generator,
    )
    torch.testing.assert_close(seen["background"], seen["noisy"].sum(2, keepdim=True) / STACK_FRAMES)


def test_masked_loss_of_pure_noise_is_not_below_its_variance(generator):
    """A loss below the noise floor always means a leak; predicting the mean reaches it exactly."""
    noisy = torch.randn(4, 1, 32, 32, 32)
    loss = blind_spot_loss(
        lambda masked, _: torch.zeros_like(masked),
        noisy,
        torch.zeros(4, 1, 1, 32, 32),
        torch.full((4,), 32.0),
        masked_fraction=0.1,
        extent=(0, 0, 0),
        loss="mse",
        generator=generator,
    )
    assert float(loss) == pytest.approx(1.0, abs=0.05)


def test_the_warm_up_compares_with_the_median():
    noisy = torch.zeros(1, 1, 4, 4, 4)
    image = torch.full((1, 1, 1, 4, 4), 2.0)
    assert float(temporal_median_loss(lambda x, _: x, noisy, image, image)) == 2.0


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 1, 9), (2, 2, 2)])
def test_thin_patches_are_masked_too(generator, shape, everywhere):
    noisy = torch.rand(1, 1, *shape)
    masked, chosen = blind_spot(noisy, 0.1, (0, 0, 0), generator, everywhere=everywhere)
    assert chosen.any()
    assert (masked[chosen] != noisy[chosen]).all()


def test_the_shapes_of_a_step_do_not_depend_on_the_draw(generator):
    """What a CUDA graph needs, and what reading nothing back needs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    noisy, background = torch.rand(2, 1, 8, 9, 10), torch.rand(2, 1, 1, 9, 10)
    with Note():
        masked, chosen = blind_spot(noisy, 0.05, (0, 0, 1), generator, everywhere=True)
        masked_loss(lambda x, _: x, masked, background, noisy, chosen, loss="mse")
    assert not called & {"nonzero", "_local_scalar_dense", "masked_select", "item"}


def test_the_loss_of_a_second_recording_counts_every_voxel_in_units_of_its_noise():
    torch.manual_seed(0)
    first, second = (3.0 * torch.randn(1, 1, 64, 24, 24) for _ in range(2))
    loss = second_recording_loss(lambda x, _: torch.zeros_like(x), first, torch.zeros(1, 3, 1, 24, 24), second)
    assert float(loss) == pytest.approx(1.0, abs=0.05)
