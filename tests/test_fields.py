"""Fields: changed one by one, blended to the whole, and no change where frames hold other noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from restormer3d.activity import fields
from restormer3d.activity.fields import change_fields, least_deviation, misfit, trust


def stacks(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(5, 2, shape)).float() for _ in range(3)]


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 5, 70), (6, 80, 131)])
def test_fields_add_up_to_one(shape):
    """A change that is the activity itself doubles it, wherever fields overlap, whatever the noise's deviation."""
    clear, noisy, noise = stacks(shape)
    deviation = 1 + torch.rand(shape[1:], generator=torch.Generator().manual_seed(1))
    out = change_fields(clear, noisy, noise, deviation, lambda some: some.denoised)
    torch.testing.assert_close(out, 2 * clear - clear.mean(0), atol=1e-4, rtol=0)


def test_what_a_change_is_given(monkeypatch):
    clear, noisy, noise = stacks((6, 70, 64))
    image, deviation, seen = torch.rand(70, 64), torch.full((70, 64), 2.0), []

    def change(some):
        seen.append(some)
        return torch.zeros_like(some.denoised)

    torch.testing.assert_close(change_fields(clear, noisy, noise, deviation, change), clear)
    (together,) = seen
    places = [slice(0, 64), slice(6, 70)]
    for name, of in (("denoised", clear), ("noisy", noisy), ("noise", noise)):
        expected = torch.stack([(of - of.mean(0))[:, rows] / 2 for rows in places])
        torch.testing.assert_close(getattr(together, name), expected)
    torch.testing.assert_close(together.cut(image), torch.stack([image[rows] for rows in places]))
    monkeypatch.setattr(fields, "_VOXELS", 1)
    change_fields(clear, noisy, noise, deviation, change)
    assert [len(each.denoised) for each in seen] == [2, 1, 1]
    torch.testing.assert_close(seen[2].denoised[0], together.denoised[1])


def test_deviations_of_pixels_without_noise():
    deviation = torch.ones(4, 4)
    deviation[0] = 0
    assert float(least_deviation(deviation).min()) == pytest.approx(0.075)


def test_where_frames_hold_other_noise_no_change_is_made():
    torch.testing.assert_close(trust(torch.tensor([0.5, 1.5, 2.25, 3.0, 50.0])), torch.tensor([1, 1, 0.5, 0, 0]))


def test_farther_than_noise():
    """Not up to the noise; beyond it relative to what was there, which events may have left far away already."""
    noisy = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    zero = torch.zeros(1, 4)
    assert float(misfit(noisy, noisy, zero)) == 1
    assert float(misfit(noisy, zero, noisy + 3)) == 9
    assert float(misfit(noisy, noisy + 6, noisy + 3)) == 0.25
