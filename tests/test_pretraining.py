"""Pretraining learns from noisy stacks alone, leaves usable weights, and resumes to the same ones."""

from __future__ import annotations

import json

import pytest
import torch

from restormer3d.checkpoint import CheckpointError, load_weights
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.pretraining import pretrain, stack_files

from .conftest import TINY

SCENE = (24, 24, 24)


@pytest.fixture
def training() -> TrainingConfig:
    return TrainingConfig(
        patch=(16, 16, 16), batch_size=2, warmup_iterations=1, iterations=5, blind_spot="auto", ema_decay=0.9
    )


@pytest.fixture(autouse=True)
def small_validation(monkeypatch):
    monkeypatch.setattr("restormer3d.pretraining._VALIDATION_SHAPE", (16, 16, 16))


def run(folder, training, stacks=(), **options):
    model = ModelConfig(**TINY, start="filters")
    return pretrain(stacks, folder, training, model, simulate=50, scene_shape=SCENE, save_every=2, **options)


def test_a_run_leaves_weights_history_and_state(noisy_file, training, tmp_path):
    path = run(tmp_path / "run", training, [noisy_file])
    assert load_weights(path).config.start == "filters"
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in history] == ["warmup"] + 5 * ["noise2void"]
    assert set(history[-1]["validation"]) == {"stsnr_level1", "stsnr_level2", "stsnr_level3"}


def test_a_killed_run_resumes_to_the_same_weights(noisy_file, training, tmp_path):
    whole = load_weights(run(tmp_path / "whole", training, [noisy_file]))

    def kill(_, done, __):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", training, [noisy_file], progress=kill)
    with pytest.raises(CheckpointError, match="--resume"):
        run(tmp_path / "killed", training, [noisy_file])
    resumed = load_weights(run(tmp_path / "killed", training, [noisy_file], resume=True))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_folders_are_searched_for_tiff(noisy_file, tmp_path):
    assert stack_files([tmp_path]) == [noisy_file]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="without TIFF"):
        stack_files([empty])


def test_nothing_to_train_on_is_said(training, tmp_path):
    with pytest.raises(ValueError, match="--simulate"):
        pretrain([], tmp_path, training, ModelConfig(**TINY))
