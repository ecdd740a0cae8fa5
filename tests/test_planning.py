"""Settings come from recipe, file and arguments in that order; a time limit reduces them just enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from restormer3d.arithmetic import torch_device
from restormer3d.config import recipe
from restormer3d.inference import count_windows
from restormer3d.patches import training_stack
from restormer3d.planning import (
    Calibration,
    build_model,
    calibrate,
    estimate,
    fit_to_time,
    parse_blind_spot,
    pretraining_settings,
    settings,
)

SHAPE = (300, 128, 128)


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
        ("[training]\nspeed = 3\n", "speed"),
        ("[colors]\na = 1\n", "colors"),
        ("not toml", "TOML"),
        ("[training]\niterations = 'many'\n", "iterations"),
        ("[model]\nheads = [3, 3, 3, 3]\n", "heads"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, reason):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        settings("published", config_file=file)


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
    if text == "":
        assert parse_blind_spot(text) == (0, 0, 0)
        return
    with pytest.raises(ValueError, match="blind spot"):
        parse_blind_spot(text)


def test_enough_time_changes_nothing():
    chosen = settings("published")
    assert fit_to_time(chosen, SHAPE, Calibration(0.1, 0.1), 1e6) == (chosen, "")


@pytest.mark.parametrize("seconds", [30.0, 100.0, 300.0, 600.0])
def test_less_time_gives_fewer_iterations_and_ends_in_time(seconds):
    chosen, speed = settings("published"), Calibration(1.0, 0.2)
    planned, note = fit_to_time(chosen, SHAPE, speed, seconds)
    total = planned.training.warmup_iterations + planned.training.iterations
    assert total < 3200
    assert f"{total} of 3200" in note
    cost = total * speed.seconds_per_iteration + count_windows(SHAPE, planned.inference) * speed.seconds_per_window
    assert cost <= seconds
    # A plan that wastes the time it has would be no plan.
    assert cost > 0.5 * seconds or planned.inference == chosen.inference


def test_overlap_stays_where_held_out_voxels_decide_how_long_training_is_worth_it():
    chosen, speed = settings(), Calibration(1.0, 50.0)
    inference = estimate(chosen, SHAPE, Calibration(0.0, 50.0), torch.device("cpu"))[0]
    seconds = 1.5 * inference
    planned = fit_to_time(chosen, SHAPE, speed, seconds)[0]
    assert planned.inference == chosen.inference
    assert 25 <= planned.training.iterations < 800
    to_the_end = replace(chosen, training=chosen.training.model_copy(update={"stop_early": False}))
    assert fit_to_time(to_the_end, SHAPE, speed, seconds)[0].inference.overlap_xy < chosen.inference.overlap_xy


def test_symmetries_are_part_of_the_time():
    once, eight = (settings("published", symmetries=count) for count in (1, 8))
    seconds = [estimate(each, SHAPE, Calibration(0.0, 0.2), torch.device("cpu"))[0] for each in (once, eight)]
    assert seconds[1] == pytest.approx(8 * seconds[0])


@pytest.mark.parametrize("symmetries", [2, 16])
def test_other_numbers_of_symmetries_are_refused(symmetries):
    with pytest.raises(ValueError, match="symmetries"):
        settings("published", symmetries=symmetries)


def test_too_little_time_is_said():
    planned, note = fit_to_time(settings("published"), SHAPE, Calibration(1.0, 100.0), 10.0)
    assert "not suffice" in note
    assert planned.inference.overlap_t == 0
    assert planned.training.iterations == 0


def test_calibration_leaves_the_model_as_it_was(noisy_stack, tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(
        "[model]\ndim = 8\nnum_blocks = [1, 1, 1, 1]\nnum_refinement_blocks = 1\n"
        "heads = [1, 1, 2, 2]\nlast_level_channels = 8\n"
    )
    chosen = settings(weights="none", patch=(16, 16, 16), config_file=file)
    model = build_model(chosen)
    before = [p.clone() for p in model.parameters()]
    speed = calibrate(model, training_stack(noisy_stack), chosen, torch.device("cpu"))
    assert speed.seconds_per_iteration > 0
    assert speed.seconds_per_window > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert np.isfinite([p.sum().item() for p in model.parameters()]).all()


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or mps"):
        torch_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not available"):
            torch_device("cuda")
    assert torch_device("cpu").type == "cpu"
