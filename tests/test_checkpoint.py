"""A weights file rebuilds its model, and every other file is refused with advice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restormer3d.checkpoint import (
    COURSE_WEIGHTS,
    CheckpointError,
    load_state,
    load_weights,
    save_unet,
    save_weights,
    shipped_file,
    small_network,
    weights_notes,
)
from restormer3d.unets import CourseNetwork

from .conftest import background_of


def test_weights_come_back_with_their_configuration(tiny_model, tmp_path):
    path = save_weights(tmp_path / "weights.safetensors", tiny_model, {"seed": 3})
    loaded = load_weights(path)
    assert loaded.config == tiny_model.config
    assert weights_notes(path) == {"seed": 3}
    x = torch.rand(1, 1, 8, 8, 8)
    background = background_of(x.mean(2, keepdim=True))
    with torch.no_grad():
        assert torch.equal(loaded(x, background), tiny_model(x, background))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        load_weights(tmp_path / "absent.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load_weights(path)


def test_weights_of_another_program_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="another program"):
        load_weights(path)


def test_weights_of_another_architecture_are_refused(tiny_model, tmp_path):
    path = save_weights(tmp_path / "weights.safetensors", tiny_model)
    tensors = load_file(path)
    tensors.pop("unet.output.weight")
    save_file(tensors, path, metadata={"model_config": tiny_model.config.model_dump_json()})
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(path)


def test_a_broken_training_state_is_named(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"broken")
    with pytest.raises((CheckpointError, OSError)) as caught:
        load_state(path)
    assert "state.pt" in str(caught.value)


def test_a_network_s_file_is_read_again_when_it_has_changed(tmp_path):
    file = Path(shutil.copy(shipped_file(COURSE_WEIGHTS), tmp_path))
    first = small_network(CourseNetwork, tmp_path)
    assert small_network(CourseNetwork, tmp_path) is first
    changed = CourseNetwork((4, 8, 16))
    save_unet(file, changed, {})
    again = small_network(CourseNetwork, tmp_path)
    assert torch.equal(again.output.weight, changed.output.weight)
