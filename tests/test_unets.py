"""The network for the static image: any shape, strips like the whole, weights that come back from disk."""

from __future__ import annotations

import pytest
import torch

from restormer3d import unets
from restormer3d.arithmetic import float32_products
from restormer3d.checkpoint import load_unet, replacing, save_unet, small_network
from restormer3d.unets import ImageNetwork, denoise_image

WHITE = (0.0, 0.0)


def noisy(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 30, width, dtype=torch.float64).expand(height, width)
    return ramp, ramp + torch.randn(height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (5, 9), (37, 50)])
def test_any_shape(shape):
    _, image = noisy(*shape)
    out = denoise_image(small_network(ImageNetwork), image, WHITE)
    assert out.shape == shape
    assert out.dtype == torch.float64
    assert out.isfinite().all()


def test_noise_falls_and_an_offset_changes_nothing():
    clean, image = noisy(64, 64)
    out = denoise_image(small_network(ImageNetwork), image, WHITE)
    assert (out - clean).square().mean() < 0.2
    torch.testing.assert_close(
        denoise_image(small_network(ImageNetwork), image + 1e4, WHITE) - 1e4, out, atol=2e-3, rtol=0
    )


def test_strips_give_what_the_whole_image_gives(monkeypatch):
    _, image = noisy(203, 30)
    whole = denoise_image(small_network(ImageNetwork), image, (0.1, 0.2))
    monkeypatch.setattr(unets, "_STRIP_PIXELS", 1)
    strips = denoise_image(small_network(ImageNetwork), image, (0.1, 0.2))
    torch.testing.assert_close(strips, whole, atol=1e-4, rtol=0)


def test_products_are_not_rounded():
    """A GPU would round those of convolutions to TF32 by itself."""
    network = ImageNetwork((4, 6, 8))
    seen = []
    network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with float32_products("tf32"):
        denoise_image(network, noisy(8, 8)[1], WHITE)
    assert seen == [False] * 4


def test_correlated_noise_is_told_from_structure():
    clean, _ = noisy(64, 64)
    white = torch.randn(64, 65, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = clean + (white[:, 1:] + 0.3 * white[:, :-1]) / 1.09**0.5
    told, not_told = (denoise_image(small_network(ImageNetwork), image, known) for known in ((0, 0.3 / 1.09), WHITE))
    assert (told - clean).square().mean() < 0.9 * (not_told - clean).square().mean()


def test_weights_come_back_from_disk(tmp_path):
    torch.manual_seed(0)
    network = ImageNetwork((4, 6, 8))
    save_unet(tmp_path / "image.safetensors", network, {"seed": 0})
    _, image = noisy(12, 16)
    restored = load_unet(tmp_path / "image.safetensors", ImageNetwork)
    torch.testing.assert_close(denoise_image(restored, image, WHITE), denoise_image(network, image, WHITE))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "image.safetensors"
    save_unet(path, ImageNetwork((4, 6, 8)), {})
    written = path.read_bytes()

    def fail():
        with replacing(path) as part:
            part.write_bytes(written[:100])
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]
