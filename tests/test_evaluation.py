"""Scores of files, with and without ground truth, through the commands a user gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from restormer3d.cli import app


def run(*arguments) -> int:
    return app([str(a) for a in arguments], exit_on_error=False, result_action="return_value")


@pytest.fixture
def scene(tmp_path):
    assert run("simulate", "-o", tmp_path, "--shape", 40, 32, 32, "--noise-level", 2, "--seed", 3) == 0
    return {path.name.split("_", 1)[1]: path for path in tmp_path.iterdir()}


def test_simulate_writes_recordings_with_their_truth(scene):
    assert set(scene) == {"noisy_level2.tif", "clean.tif", "masks.tif", "traces.csv", "parameters.json"}
    noisy, clean = (tifffile.imread(scene[name]) for name in ("noisy_level2.tif", "clean.tif"))
    assert noisy.shape == clean.shape == (40, 32, 32)
    assert noisy.dtype == clean.dtype == "int16"
    assert noisy.min() < 0


def test_simulate_repeats_under_a_seed_and_keeps_files(scene, tmp_path, capsys):
    other = tmp_path / "again"
    assert run("simulate", "-o", other, "--shape", 40, 32, 32, "--noise-level", 2, "--seed", 3) == 0
    assert (tifffile.imread(other / "scene0_noisy_level2.tif") == tifffile.imread(scene["noisy_level2.tif"])).all()
    assert run("simulate", "-o", other, "--shape", 40, 32, 32, "--noise-level", 2) == 1
    assert "exist" in capsys.readouterr().err


def test_a_denoised_file_is_scored_against_the_clean_one(scene, tmp_path, capsys):
    denoised, scores = tmp_path / "denoised.tif", tmp_path / "scores.json"
    assert run("denoise", scene["noisy_level2.tif"], "-o", denoised, "--method", "gaussian") == 0
    files = ["--clean", scene["clean.tif"], "--denoised", denoised, "--noisy", scene["noisy_level2.tif"]]
    assert run("evaluate", *files, "--masks", scene["masks.tif"], "--json", scores) == 0
    values = json.loads(scores.read_text())
    assert {"ssnr", "tsnr", "stsnr", "activity_snr", "ssim", "noisy_stsnr"} <= set(values)
    assert values["stsnr"] > values["noisy_stsnr"] + 5
    assert "stsnr:" in capsys.readouterr().out


def test_scores_take_the_place_of_no_file_unless_told(scene, tmp_path, capsys, monkeypatch):
    scores = tmp_path / "denoised.tif.json"
    scores.write_text("precious")
    command = ["evaluate", "--clean", scene["clean.tif"], "--denoised", scene["noisy_level2.tif"], "--json", scores]
    with monkeypatch.context() as patched:
        patched.setattr("restormer3d.evaluation.evaluate", None)  # nothing is computed first
        assert run(*command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert scores.read_text() == "precious"
    assert run(*command, "--overwrite") == 0
    assert "stsnr" in json.loads(scores.read_text())
    assert not list(tmp_path.glob(".*part*"))


@pytest.mark.parametrize("name", ["noisy_level2.tif", "clean.tif", "masks.tif"])
def test_scores_take_the_place_of_no_input(scene, name, capsys):
    before = scene[name].read_bytes()
    files = ["--clean", scene["clean.tif"], "--denoised", scene["noisy_level2.tif"], "--masks", scene["masks.tif"]]
    assert run("evaluate", *files, "--json", scene[name], "--overwrite") == 1
    assert "Choose another name" in capsys.readouterr().err
    assert run("evaluate", "--real", scene[name], "--json", scene[name], "--overwrite") == 1
    assert scene[name].read_bytes() == before


def test_different_shapes_are_refused(scene, noisy_file, capsys):
    assert run("evaluate", "--clean", scene["clean.tif"], "--denoised", noisy_file) == 1
    assert "expected the shape" in capsys.readouterr().err


def test_a_recording_is_scored_without_ground_truth(scene, tmp_path):
    scores = tmp_path / "real.json"
    methods = ["--methods", "temporal-mean", "gaussian"]
    assert run("evaluate", "--real", scene["noisy_level2.tif"], *methods, "--json", scores) == 0
    values = json.loads(scores.read_text())
    assert {"recording", "temporal-mean", "gaussian"} == set(values)
    # Held-out frames cost at least their own noise: far above 1 would be a bad filter, far below 1 a leak.
    assert 0.9 < values["gaussian"]["held_out"]["in_noise_variances"] < 1.3


def test_a_running_average_is_scored_by_frames_that_it_has_no_part_in(tmp_path, capsys):
    assert run("simulate", "-o", tmp_path, "--shape", 100, 32, 32, "--noise-level", 2, "--seed", 3) == 0
    frames = tifffile.imread(tmp_path / "scene0_noisy_level2.tif").astype(np.float32)
    for t in range(1, len(frames)):
        frames[t] = (frames[t - 1] + frames[t]) / 2
    frames[7, :, :3] = np.nan
    tifffile.imwrite(tmp_path / "averaged.tif", frames)
    scores = tmp_path / "real.json"
    assert run("evaluate", "--real", tmp_path / "averaged.tif", "--methods", "gaussian", "--json", scores) == 0
    assert 0.9 < json.loads(scores.read_text())["gaussian"]["held_out"]["in_noise_variances"] < 1.3
    assert "made white" in capsys.readouterr().err


def test_a_method_that_fails_takes_no_other_along(scene, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("restormer3d.fitting.svd_frames", broken)
    scores = tmp_path / "real.json"
    methods = ["--methods", "svd", "temporal-mean"]
    assert run("evaluate", "--real", scene["noisy_level2.tif"], *methods, "--json", scores) == 1
    values = json.loads(scores.read_text())
    assert values["svd"] == {"failed": "no room"}
    assert values["temporal-mean"]["held_out"]["mse"] > 0
    assert "svd failed: no room" in capsys.readouterr().err


def test_a_recording_that_cannot_be_denoised_is_refused_before_it_is_measured(scene, tmp_path, capsys):
    frames = tifffile.imread(scene["noisy_level2.tif"]).astype(np.float32)
    frames[3, 2, 1] = np.inf
    tifffile.imwrite(tmp_path / "infinite.tif", frames)
    assert run("evaluate", "--real", tmp_path / "infinite.tif") == 1
    assert "expected finite values" in capsys.readouterr().err


def test_evaluate_says_what_it_needs(capsys):
    assert run("evaluate") == 2
    assert run("evaluate", "--real") == 2
    assert "--clean" in capsys.readouterr().err
