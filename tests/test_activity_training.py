"""Training for activity: scenes that are prepared once, a run that resumes, networks that learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from restormer3d.checkpoint import (
    CheckpointError,
    load_unet,
    save_state,
    small_network,
)
from restormer3d.cli import app
from restormer3d.small_networks import activity_scenes
from restormer3d.small_networks.activity_scenes import (
    CourseScene,
    FootprintScene,
    load_scene,
    prepare_scenes,
    simulated_courses,
    simulated_footprints,
)
from restormer3d.small_networks.activity_training import (
    draw_batch,
    pretrain_activity,
    validate_activity,
    with_other_noise,
)
from restormer3d.unets import CourseNetwork, FootprintNetwork

CPU = torch.device("cpu")


def made_up_footprints(seed, side=16, count=6):
    """Blobs, the noise that was left in them, and the noisy ones."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    places = rng.uniform(3, side - 3, (count, 2))
    blobs = np.stack([8 * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 8) for a, b in places])
    noise = rng.standard_normal(blobs.shape)
    images = [torch.from_numpy(image).half() for image in (blobs + noise, blobs + 0.5 * noise, blobs)]
    static = torch.from_numpy(blobs.sum(0) / blobs.sum(0).std())
    return FootprintScene(
        *images, (static - static.mean()).half(), images[1].float().norm(dim=0).half(), torch.zeros(2)
    )


def made_up_courses(seed, frames=101, count=6):
    """Events that decay, smoothed, and noisy."""
    rng = np.random.default_rng(seed)
    time = np.arange(frames)
    onsets = rng.uniform(0, frames, (count, 1))
    events = np.where(time >= onsets, 8 * np.exp(-np.clip(time - onsets, 0, None) / 10), 0)
    noisy = events + rng.standard_normal(events.shape)
    smooth = np.stack([np.convolve(x, np.ones(7) / 7, "same") for x in noisy])
    noisy, smooth, events = (torch.from_numpy(x).float() for x in (noisy, smooth, events))
    return CourseScene(noisy, smooth, events, smooth.norm(dim=0).expand_as(smooth).contiguous())


MADE_UP = {"footprints": made_up_footprints, "courses": made_up_courses}
NETWORKS = {"footprints": FootprintNetwork, "courses": CourseNetwork}
ARGUMENTS = {"scenes": 6, "widths": (4, 6, 8), "batch_size": 2, "save_every": 2}


@pytest.fixture(params=["footprints", "courses"])
def what(request):
    return request.param


@pytest.fixture
def folder(tmp_path, what):
    (tmp_path / "scenes").mkdir()
    for number in range(5):
        save_state(tmp_path / "scenes" / f"{number:06d}.pt", MADE_UP[what](number)._asdict())
    save_state(tmp_path / "scenes" / "000005.pt", {})  # one that was of no use
    return tmp_path


def history_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_weights(what, folder):
    whole = load_unet(pretrain_activity(what, folder, 4, **ARGUMENTS), NETWORKS[what])
    for name in ("state.pt", "history.jsonl"):
        (folder / name).unlink()

    def kill(stage, done, _):
        if (stage, done) == ("train", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_activity(what, folder, 4, progress=kill, **ARGUMENTS)
    resumed = load_unet(pretrain_activity(what, folder, 4, resume=True, **ARGUMENTS), NETWORKS[what])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert [entry["iteration"] for entry in history_of(folder)] == [2, 4]


def test_it_learns(what, folder):
    pretrain_activity(what, folder, 150, **ARGUMENTS | {"save_every": 150, "batch_size": 4})
    assert history_of(folder)[-1]["gain_db"] > 1


def test_bfloat16(what, folder):
    path = pretrain_activity(what, folder, 2, precision="bf16", **ARGUMENTS)
    assert path == folder / f"{what}.safetensors"
    network = load_unet(path, NETWORKS[what])
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in network.state_dict().values())


def test_the_target_is_noisy():
    scenes = [made_up_footprints(1)]
    batch = draw_batch(scenes, 1, 0, 16)
    again, other = draw_batch(scenes, 1, 0, 16), draw_batch(scenes, 1, 1, 16)
    assert torch.equal(batch.target, again.target)
    assert not torch.equal(batch.target, other.target)
    assert [x.shape for x in (*batch.inputs[:4], batch.target)] == [(64, 1, 16, 16)] * 5
    smooth = torch.nn.functional.avg_pool2d(batch.target, 3, 1, 1)
    rough = (batch.target - smooth)[..., 1:-1, 1:-1].square().mean()
    assert rough > 0.5 / 64


def test_flips_and_rotations_keep_what_belongs_together():
    scene = made_up_footprints(2)._replace(correlation=torch.tensor([0.1, 0.2]))
    quiet = scene._replace(noisy=scene.truth, denoised=scene.truth)
    batch = draw_batch([quiet], 3, 0, 50)
    noisy, denoised, *_, correlation = batch.inputs
    torch.testing.assert_close(noisy, denoised)
    noise = batch.target - noisy
    assert float(noise.std()) == pytest.approx(1 / 8, rel=0.05)
    known = {tuple(round(value, 3) for value in pair) for pair in correlation.tolist()}
    assert known == {(0.1, 0.2), (0.2, 0.1)}


def test_courses_are_cut_alike():
    scenes = [made_up_courses(number, frames) for number, frames in enumerate((50, 61, 170))]
    quiet = [scene._replace(noisy=scene.truth, denoised=scene.truth) for scene in scenes]
    lengths = set()
    for number in range(20):
        batch = draw_batch(quiet, 3, number, 4)
        noisy, denoised, strength, weights = batch.inputs
        assert noisy.shape == denoised.shape == strength.shape == batch.target.shape
        assert weights.shape == (4, 6, 6)
        torch.testing.assert_close(noisy, denoised)
        assert float((batch.target - noisy).std()) == pytest.approx(1 / 8, rel=0.1)
        lengths.add(noisy.shape[2])
    assert lengths == {48, 96, 160}
    short = [scene._replace(**{name: x[:, :30] for name, x in scene._asdict().items()}) for scene in quiet]
    assert draw_batch(short, 3, 0, 4).target.shape == (4, 6, 28)


def test_other_noise_is_passed_on_as_the_noise_was():
    scene = made_up_courses(3, 400)
    other = with_other_noise(scene, np.random.default_rng(1))
    assert torch.equal(other.truth, scene.truth)
    noise, before = other.noisy - scene.truth, scene.noisy - scene.truth
    assert abs(float((noise * before).mean())) < 0.1
    assert float(noise.std()) == pytest.approx(float(before.std()), rel=0.05)
    mean = torch.nn.functional.avg_pool1d(noise - before, 7, 1)  # as the denoised ones of this scene were made
    apart = (other.denoised - scene.denoised)[:, 3:-3] - mean
    assert float(apart.std()) < 0.3 * float(mean.std())


def test_validation_of_a_network_that_changes_nothing(what):
    scenes = [MADE_UP[what](1), MADE_UP[what](2, 18)]
    scores = validate_activity(lambda noisy, denoised, *_: denoised, scenes, CPU)
    assert scores == {"gain_db": 0, "lowest_gain_db": 0, "highest_gain_db": 0}


def test_scenes_are_prepared_once(tmp_path, monkeypatch):
    monkeypatch.setattr(activity_scenes, "_FOOTPRINT_FRAMES", (50, 50))
    assert list(prepare_scenes(simulated_footprints, tmp_path, 1, 1)) == [0, 1]
    before = (tmp_path / "000000.pt").read_bytes()
    assert list(prepare_scenes(simulated_footprints, tmp_path, 1, 2, workers=1)) == [1, 2]
    assert list(prepare_scenes(simulated_footprints, tmp_path, 1, 2)) == [2]
    scene = load_scene(FootprintScene, tmp_path, 1)
    assert scene is not None
    assert before == (tmp_path / "000000.pt").read_bytes()
    assert scene.noisy.shape == scene.truth.shape == (24, 64, 64)
    noise = float((scene.noisy.float() - scene.truth.float()).square().mean())
    assert 0.8 < noise < 1.25


@pytest.mark.parametrize(
    ("simulated", "network", "gain"),
    [(simulated_footprints, FootprintNetwork, 0.3), (simulated_courses, CourseNetwork, 0.1)],
)
def test_shipped_weights_denoise_scenes_of_another_seed(monkeypatch, simulated, network, gain):
    for name in ("_FOOTPRINT_FRAMES", "_COURSE_FRAMES"):
        monkeypatch.setattr(activity_scenes, name, (60, 60))
    monkeypatch.setattr(activity_scenes, "_USUAL", 1.0)
    scenes = [simulated(4321, number) for number in (2, 3)]
    assert all(scenes)
    assert validate_activity(small_network(network), scenes, CPU)["gain_db"] > gain


def test_it_refuses_what_it_cannot_do(what, folder):
    with pytest.raises(ValueError, match="expected at least 2 scenes, got 1"):
        pretrain_activity(what, folder, 1, **ARGUMENTS | {"scenes": 1})
    with pytest.raises(ValueError, match="at least 1, got"):
        pretrain_activity(what, folder, 0, **ARGUMENTS)
    save_state(folder / "scenes" / "000000.pt", {})
    with pytest.raises(ValueError, match="of 6 scenes too few are of use"):
        pretrain_activity(what, folder, 1, **ARGUMENTS)
    other = "courses" if what == "footprints" else "footprints"
    save_state(folder / "scenes" / "000000.pt", MADE_UP[other](0)._asdict())
    with pytest.raises(CheckpointError, match=r"000000\.pt: expected a .*Scene, found something else"):
        pretrain_activity(what, folder, 1, **ARGUMENTS)
    save_state(folder / "scenes" / "000000.pt", MADE_UP[what](0)._asdict())
    pretrain_activity(what, folder, 1, **ARGUMENTS)
    with pytest.raises(CheckpointError, match="go on with --resume"):
        pretrain_activity(what, folder, 1, **ARGUMENTS)


def test_command(what, folder, capsys):
    command = ["pretrain-activity", what, "-o", str(folder), "--iterations", "1", "--scenes", "6"]
    command += ["--widths", "4", "6", "8", "--batch-size", "2"]
    assert app(command, exit_on_error=False, result_action="return_value") == 0
    assert (folder / f"{what}.safetensors").is_file()
    assert app(command, exit_on_error=False, result_action="return_value") == 2
    assert "go on with --resume" in capsys.readouterr().err
