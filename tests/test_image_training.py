"""Training for the static image: noisy pairs only, and a run that resumes to the same weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from restormer3d import image_training
from restormer3d.checkpoint import CheckpointError
from restormer3d.cli import app
from restormer3d.image_network import load_image_weights
from restormer3d.image_training import pretrain_image
from restormer3d.simulation import random_texture


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("_BATCH", 2), ("_POOL", 2), ("_PATCH", 32), ("_SIDE", 40), ("_VALIDATION", 1)):
        monkeypatch.setattr(image_training, name, value)
    for cached in (image_training._image, image_training._validation_batch):
        cached.cache_clear()
    yield
    for cached in (image_training._image, image_training._validation_batch):
        cached.cache_clear()


def test_pairs_share_the_image_and_no_noise():
    batches = [image_training._batch(5, number) for number in range(40)]
    noisy, target, truth, correlation = (torch.cat(part) for part in zip(*batches, strict=True))
    assert noisy.shape == target.shape == truth.shape == (80, 1, 32, 32)
    assert correlation.shape == (80, 2)
    own, other = noisy - truth, target - truth
    assert own.var().item() == pytest.approx(1, rel=0.05)
    assert other.var().item() == pytest.approx(1 / 8, rel=0.05)  # eight recordings: less noise, but noise
    assert (own * other).mean().abs() < 0.01
    white = correlation.sum(1) == 0
    assert 0 < white.sum() < 80
    neighbors = (own[..., 1:] * own[..., :-1]).mean((1, 2, 3))
    assert neighbors[white].mean().abs() < 0.02
    assert (neighbors - correlation[:, 1]).abs().mean() < 0.05


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = load_image_weights(pretrain_image(tmp_path / "whole", 4, save_every=2))

    def kill(_, done, __):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_image(tmp_path / "killed", 4, save_every=2, progress=kill)
    resumed = load_image_weights(pretrain_image(tmp_path / "killed", 4, save_every=2, resume=True))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    history = [json.loads(line) for line in (tmp_path / "killed" / "history.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in history] == [2, 4]
    assert history[-1]["error_of_noisy"] == pytest.approx(1, rel=0.2)


def test_it_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pretrain_image(tmp_path, 0)
    pretrain_image(tmp_path, 1)
    with pytest.raises(CheckpointError, match="go on with --resume"):
        pretrain_image(tmp_path, 1)
    with pytest.raises(CheckpointError, match="choose another folder"):
        pretrain_image(tmp_path, 2, resume=True)


def test_command(tmp_path, capsys):
    command = ["pretrain-image", "-o", str(tmp_path), "--iterations", "1"]
    assert app(command, exit_on_error=False, result_action="return_value") == 0
    assert (tmp_path / "static_image.safetensors").is_file()
    assert app(command, exit_on_error=False, result_action="return_value") == 2
    assert "go on with --resume" in capsys.readouterr().err


def test_textures_are_images():
    images = [random_texture(np.random.default_rng(seed), 48) for seed in range(5)]
    for image in images:
        assert image.shape == (48, 48)
        assert image.dtype == np.float32
        assert (image > 0).all()
        assert 60 <= image.mean() <= 600
    assert not np.array_equal(images[0], images[1])
