"""A time limit reduces settings just enough."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from restormer3d.inference import count_windows, window_size
from restormer3d.patches import training_stack
from restormer3d.planning import Calibration, calibrate, estimate, fit_to_time
from restormer3d.settings import build_model, settings

SHAPE = (300, 128, 128)


def of_windows(chosen, seconds_per_iteration, seconds_per_window, shape=SHAPE):
    voxels = math.prod(window_size(shape, chosen.inference))
    return Calibration(seconds_per_iteration, seconds_per_window / voxels)


def test_enough_time_changes_nothing():
    chosen = settings("published")
    assert fit_to_time(chosen, SHAPE, Calibration(0.1, 1e-6), 1e6) == (chosen, "")


@pytest.mark.parametrize("seconds", [30.0, 100.0, 300.0, 600.0])
def test_less_time_gives_fewer_iterations_and_ends_in_time(seconds):
    chosen = settings("published")
    speed = of_windows(chosen, 1.0, 0.2)
    planned, note = fit_to_time(chosen, SHAPE, speed, seconds)
    total = planned.training.warmup_iterations + planned.training.iterations
    assert total < 3200
    assert f"{total} of 3200" in note
    cost = total * speed.seconds_per_iteration + count_windows(SHAPE, planned.inference) * 0.2
    assert cost <= seconds
    # A plan that wastes the time it has would be no plan.
    assert cost > 0.5 * seconds or planned.inference == chosen.inference


def test_overlap_stays_where_held_out_voxels_decide_how_long_training_is_worth_it():
    chosen = settings()
    speed = of_windows(chosen, 1.0, 50.0)
    inference = estimate(chosen, SHAPE, of_windows(chosen, 0.0, 50.0), torch.device("cpu"))[0]
    seconds = 1.5 * inference
    planned = fit_to_time(chosen, SHAPE, speed, seconds)[0]
    assert planned.inference == chosen.inference
    assert 25 <= planned.training.iterations < 800
    to_the_end = replace(chosen, training=chosen.training.model_copy(update={"stop_early": False}))
    assert fit_to_time(to_the_end, SHAPE, speed, seconds)[0].inference.overlap_xy < chosen.inference.overlap_xy


def test_symmetries_are_part_of_the_time():
    once, eight = (settings("published", symmetries=count) for count in (1, 8))
    seconds = [estimate(each, SHAPE, Calibration(0.0, 1e-6), torch.device("cpu"))[0] for each in (once, eight)]
    assert seconds[1] == pytest.approx(8 * seconds[0])


@pytest.mark.parametrize("part", ["footprints", "courses"])
def test_activity_is_part_of_the_time_of_each_chunk(part):
    chosen = settings()
    without = replace(chosen, inference=chosen.inference.model_copy(update={part: False}))

    def seconds(frames, side=512, tiles=True):
        shape, speed, cpu = (frames, side, side), Calibration(0.0, 1e-6), torch.device("cpu")
        both = (
            replace(each, inference=each.inference.model_copy(update={"tiles": tiles})) for each in (chosen, without)
        )
        with_it, without_it = (estimate(each, shape, speed, cpu)[0] for each in both)
        return with_it - without_it

    assert seconds(40) == 0
    assert seconds(200, 1300, tiles=False) == 0  # of so large frames fewer than needed are looked at together
    assert seconds(200, 1300) > 0
    assert 0 < seconds(200) < seconds(2000)


def test_courses_of_a_long_recording_need_memory_however_small_the_field_is():
    chosen = settings()
    without = replace(chosen, inference=chosen.inference.model_copy(update={"courses": False}))

    def more(frames):
        speed, cpu = Calibration(0.0, 1e-6), torch.device("cpu")
        return estimate(chosen, (frames, 32, 32), speed, cpu)[1] - estimate(without, (frames, 32, 32), speed, cpu)[1]

    assert 1.2e9 < more(16_000) < 1.6e9
    assert more(300) < 2e7


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_what_brings_least_is_left_out_before_the_network_is(count):
    chosen, shape, speed, cpu = settings(), (1200, 512, 512), Calibration(0.6, 1e-6), torch.device("cpu")
    without = ["footprints", "courses", "components"][:count]
    bare = chosen.inference.model_copy(update=dict.fromkeys(without, False) | {"overlap_t": 0.0, "overlap_xy": 0.0})
    untrained = chosen.training.model_copy(update={"iterations": 0})
    seconds = 1.2 * estimate(replace(chosen, inference=bare, training=untrained), shape, speed, cpu)[0]

    planned, note = fit_to_time(chosen, shape, speed, seconds)

    assert [part for part in ("footprints", "courses", "components") if not getattr(planned.inference, part)] == without
    assert note.endswith(f"without {' and '.join(without)}" if without else "in the plane")
    assert estimate(planned, shape, speed, cpu)[0] < seconds


@pytest.mark.parametrize("seconds", [400.0, 800.0, 1600.0, 3200.0])
def test_no_time_is_left_that_more_overlap_would_fit_in(seconds):
    """Without the steps that are left out there may be room for overlap again."""
    chosen, shape, speed, cpu = settings(iterations=0), (1500, 490, 490), Calibration(0.0, 1.5e-6), torch.device("cpu")
    planned = fit_to_time(chosen, shape, speed, seconds)[0]
    if planned.inference.overlap_xy < chosen.inference.overlap_xy:
        overlaps = {"overlap_t": chosen.inference.overlap_t, "overlap_xy": chosen.inference.overlap_xy}
        fuller = replace(planned, inference=planned.inference.model_copy(update=overlaps))
        assert estimate(fuller, shape, speed, cpu)[0] > 0.9 * seconds


def test_other_overlaps_have_windows_of_other_sizes():
    chosen, shape, speed, cpu = settings(iterations=0), (1500, 490, 490), Calibration(0.0, 1e-6), torch.device("cpu")
    bare = {"components": False, "footprints": False, "courses": False, "static_image": False}
    voxels = []
    for overlap in (0.25, 0.0):
        inference = chosen.inference.model_copy(update=bare | {"overlap_t": overlap, "overlap_xy": overlap})
        voxels.append(count_windows(shape, inference) * math.prod(window_size(shape, inference)))
        assert estimate(replace(chosen, inference=inference), shape, speed, cpu)[0] == pytest.approx(1e-6 * voxels[-1])
    assert voxels[1] < voxels[0]


def test_too_little_time_is_said():
    planned, note = fit_to_time(settings("published"), SHAPE, Calibration(1.0, 1e-3), 10.0)
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
    assert speed.seconds_per_voxel > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert np.isfinite([p.sum().item() for p in model.parameters()]).all()


def test_an_overlap_that_was_asked_for_stays_where_there_is_time():
    chosen = settings("published", overlap=0.8)
    assert fit_to_time(chosen, SHAPE, Calibration(0.1, 1e-6), 1e6) == (chosen, "")


def test_iterations_of_the_warm_up_are_timed_too(noisy_stack, tmp_path):
    config = tmp_path / "small.toml"
    config.write_text(
        "[model]\ndim = 8\nnum_blocks = [1, 1, 1, 1]\nheads = [1, 1, 2, 2]\nlast_level_channels = 8\n"
        "[training]\npatch = [8, 16, 16]\nbatch_size = 1\n[inference]\nwindow = [8, 16, 16]\n"
    )
    chosen = settings("published", weights="none", iterations=0, config_file=config)
    assert chosen.training.warmup_iterations > 0
    source = training_stack(noisy_stack)
    assert calibrate(build_model(chosen), source, chosen, torch.device("cpu")).seconds_per_iteration > 0
