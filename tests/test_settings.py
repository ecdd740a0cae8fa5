"""Settings come from recipe, file and arguments in that order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from restormer3d.checkpoint import COURSE_WEIGHTS, FOOTPRINT_WEIGHTS, SHIPPED_WEIGHTS, network_file, shipped_file
from restormer3d.config import recipe
from restormer3d.settings import parse_blind_spot, pretraining_settings, settings


def test_the_published_recipe_is_the_page():
    model, training, inference = recipe("published", pretrained=True)
    assert (model.start, model.dim, model.num_blocks, model.heads) == ("input", 32, (2, 2, 2, 3), (1, 2, 4, 8))
    assert (training.patch, training.batch_size, training.iterations) == ((32, 64, 64), 2, 800)
    assert (training.learning_rate, training.weight_decay, training.loss) == (1e-4, 1e-4, "mse")
    assert (training.masked_fraction, training.blind_spot, training.warmup_iterations) == (0.015, (0, 0, 0), 0)
    assert (inference.window, inference.overlap_t, inference.overlap_xy) == ((32, 64, 64), 0.5, 0.5)
    scratch = recipe("published", pretrained=False)[1]
    assert (scratch.warmup_iterations, scratch.iterations, scratch.learning_rate) == (200, 3000, 3e-4)


def test_the_page_s_pretraining():
    training = pretraining_settings("published")[1]
    assert training.warmup_iterations + training.iterations == 50_000
    assert (training.batch_size, training.loss, training.gradient_clip) == (4, "l1", 1.0)


def test_arguments_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nseed = 4\nbatch_size = 3\n[inference]\noverlap_t = 0.25\n")
    chosen = settings("published", batch_size=1, config_file=file)
    assert (chosen.training.seed, chosen.training.batch_size) == (4, 1)
    assert (chosen.inference.overlap_t, chosen.inference.overlap_xy) == (0.25, 0.5)
    assert chosen.training.iterations == 3000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[training]\nspeed = 3\n", r"configuration file, \[training\] speed"),
        ("[training]\nlearnig_rate = 1\n", "did you mean learning_rate"),
        ("[colors]\na = 1\n", "colors"),
        ("not toml", "TOML"),
        ("training = 3\n", "expected tables"),
        ("[training]\niterations = 'many'\n", "iterations"),
        ("[model]\nheads = [3, 3, 3, 3]\n", "heads"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, reason):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        settings("published", config_file=file)


def test_an_argument_is_refused_by_its_own_name():
    with pytest.raises(ValueError, match=r"^overlap: .*got 0.95$"):
        settings(overlap=0.95)
    with pytest.raises(ValueError, match=r"^planes: Input should be greater than or equal to 1, got 0$"):
        settings(planes=0)


def test_a_folder_may_hold_weights_of_any_network(tmp_path):
    shutil.copy(shipped_file(COURSE_WEIGHTS), tmp_path)
    chosen = settings(weights=tmp_path)
    assert chosen.weights == shipped_file(SHIPPED_WEIGHTS)
    assert network_file(COURSE_WEIGHTS, chosen.networks) == tmp_path / COURSE_WEIGHTS
    assert network_file(FOOTPRINT_WEIGHTS, chosen.networks) == shipped_file(FOOTPRINT_WEIGHTS)
    with pytest.raises(ValueError, match="none of their steps"):
        settings("published", weights=tmp_path)
    with pytest.raises(ValueError, match=f"--weights {tmp_path}"):
        settings(weights=tmp_path / COURSE_WEIGHTS)
    shutil.copy(shipped_file(FOOTPRINT_WEIGHTS), tmp_path / COURSE_WEIGHTS)
    with pytest.raises(ValueError, match=r"courses.safetensors: expected weights that .*pretrain-activity"):
        settings(weights=tmp_path)
    (tmp_path / COURSE_WEIGHTS).unlink()
    with pytest.raises(ValueError, match="a folder with any of"):
        settings(weights=tmp_path)


def test_every_setting_has_its_line_in_the_docs():
    lines = (Path(__file__).parents[1] / "docs" / "config.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:4]] for line in lines if line.startswith("| `")]
    expected = []
    for default, published in zip(
        recipe("default", pretrained=True), recipe("published", pretrained=False), strict=True
    ):
        values = published.model_dump(mode="json")
        expected += [
            [key, json.dumps(value), json.dumps(values[key])] for key, value in default.model_dump(mode="json").items()
        ]
    assert rows == expected


def test_an_untrained_network_is_refused():
    with pytest.raises(ValueError, match="untrained"):
        settings(weights="none", iterations=0)


@pytest.mark.parametrize(
    ("text", "extent"), [("auto", "auto"), ("point", (0, 0, 0)), ("x3", (0, 0, 1)), ("x5y3t3", (1, 1, 2))]
)
def test_blind_spots_have_names(text, extent):
    assert parse_blind_spot(text) == extent


@pytest.mark.parametrize("text", ["x2", "z3", "x", "3x", ""])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"blind spot .*: expected auto, point, or axes"):
        parse_blind_spot(text)


@pytest.mark.parametrize("symmetries", [2, 16])
def test_other_numbers_of_symmetries_are_refused(symmetries):
    with pytest.raises(ValueError, match="symmetries"):
        settings("published", symmetries=symmetries)


def test_a_warm_up_alone_is_training():
    assert settings("published", "none", iterations=0).training.warmup_iterations > 0
