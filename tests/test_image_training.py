"""Training for the static image: a run that resumes to the same weights, or ends in time."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from restormer3d.checkpoint import CheckpointError, load_unet
from restormer3d.cli import app
from restormer3d.small_networks import image_pairs, image_training
from restormer3d.small_networks.image_training import pretrain_image
from restormer3d.unets import ImageNetwork


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, name, value in (
        (image_pairs, "POOL", 2),
        (image_pairs, "SIDE", 40),
        (image_pairs, "_PATCH", 32),
        (image_pairs, "_FIRST", 2),
        (image_pairs, "_LARGE_POOL", 4),
        (image_pairs, "_TOGETHER", 2),
        (image_training, "_VALIDATION", 1),
        (image_training, "_VALIDATION_BATCH", 2),
    ):
        monkeypatch.setattr(module, name, value)
    for cached in (image_pairs._image, image_training._validation_batch):
        cached.cache_clear()
    yield
    for cached in (image_pairs._image, image_training._validation_batch):
        cached.cache_clear()


def history_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = load_unet(pretrain_image(tmp_path / "whole", 4, save_every=2, batch_size=2), ImageNetwork)

    def kill(_, done, __):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_image(tmp_path / "killed", 4, save_every=2, batch_size=2, progress=kill)
    assert history_of(tmp_path / "killed")[-1]["iteration"] == 2  # what there is at any time can be used
    load_unet(tmp_path / "killed" / "static_image.safetensors", ImageNetwork)
    resumed = load_unet(pretrain_image(tmp_path / "killed", 4, save_every=2, batch_size=2, resume=True), ImageNetwork)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    history = history_of(tmp_path / "killed")
    assert [entry["iteration"] for entry in history] == [2, 4]
    assert history[-1]["error_of_noisy"] == pytest.approx(1, rel=0.2)


def test_images_of_other_processes(tmp_path):
    """The way of a GPU, on the CPU; batches go on while no further image comes."""
    arguments = {"widths": (4, 6, 8), "batch_size": 2, "workers": 2}
    pretrain_image(tmp_path, 8, save_every=5, **arguments)
    history = history_of(tmp_path)
    assert [entry["iteration"] for entry in history] == [5, 8]
    assert history[-1]["error"] < 1.5 * history[-1]["error_of_noisy"]
    network = load_unet(tmp_path / "static_image.safetensors", ImageNetwork)
    assert network.latent[2].weight.shape[0] == 8
    assert pretrain_image(tmp_path, 8, save_every=5, resume=True, **arguments).is_file()
    assert not multiprocessing.active_children()


def test_time_ends_a_run(tmp_path):
    seen = []
    arguments = {"seconds": 1.5, "batch_size": 1, "save_every": 10**6}
    pretrain_image(tmp_path, 10**6, progress=lambda _, done, __: seen.append(done), **arguments)
    (last,) = history_of(tmp_path)
    assert 1 <= last["iteration"] == len(seen) < 10**4
    assert last["seconds"] >= 1.5
    assert seen == sorted(seen)
    assert seen[-1] == 10**6
    pretrain_image(tmp_path, 10**6, resume=True, **arguments)
    assert history_of(tmp_path) == [last]


def test_it_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match=r"at least 1, got .* 0, 500 and 16"):
        pretrain_image(tmp_path, 0)
    with pytest.raises(ValueError, match="seconds above 0, got 0 and -1"):
        pretrain_image(tmp_path, 1, seconds=-1)
    with pytest.raises(ValueError, match="device 'gpu' is unknown"):
        pretrain_image(tmp_path, 1, device="gpu")
    pretrain_image(tmp_path, 1, batch_size=1)
    with pytest.raises(CheckpointError, match="go on with --resume"):
        pretrain_image(tmp_path, 1)
    with pytest.raises(CheckpointError, match="choose another folder"):
        pretrain_image(tmp_path, 2, batch_size=1, resume=True)


def test_command(tmp_path, capsys):
    command = ["pretrain-image", "-o", str(tmp_path), "--iterations", "1"]
    command += ["--widths", "4", "6", "8", "--batch-size", "1", "--device", "cpu", "--workers", "0"]
    assert app(command, exit_on_error=False, result_action="return_value") == 0
    assert (tmp_path / "static_image.safetensors").is_file()
    assert app(command, exit_on_error=False, result_action="return_value") == 2
    assert "go on with --resume" in capsys.readouterr().err
