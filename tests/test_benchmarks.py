"""The quality benchmark: complete, resumable, plain about who wins. The speed table: complete and rewritable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from benchmarks import (
    artefacts,
    jobs,
    large_stacks,
    other_simulators,
    planes,
    precision,
    quality,
    speed,
    speed_table,
    training_choices,
)
from benchmarks.cells import truth_score
from benchmarks.movement import _moved_onto
from benchmarks.tables import markdown
from scipy.ndimage import gaussian_filter, shift

from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings

SCENE = ((10, 24, 24), 1, (2,))  # shape, scenes, levels


@pytest.fixture
def small_jobs():
    rows = jobs.rows(("raw", "temporal-mean"), jobs.Options())
    return [job for row in rows for job in jobs.scene_jobs(row, *SCENE)]


def cell(method: str, stsnr: float, number: int = 0) -> dict:
    return {
        "kind": "scene",
        "method": method,
        "label": method,
        "number": number,
        "level": 2,
        "shape": [10, 24, 24],
        "scores": {"stsnr": stsnr, "activity_snr": 1.0, "event_amplitude_bias": None, "trace_correlation": 0.5},
        "done": {"weights": None, "engine": "cpu", "device": "cpu", "threads": 1}
        | {"settings": {"training": {"warmup_iterations": 0, "iterations": 2, "patch": [8, 8, 8], "batch_size": 1}}},
        "seconds": 1.0,
        "peak_memory_mb": 100.0,
        "load_average": 0.5,
        "finished": "2025-01-01T00:00:00",
        "commit": "abc",
        "machine": "a machine",
    }


def test_the_table_is_complete_and_a_cell_that_exists_is_not_computed_again(small_jobs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{quality.BEGIN}\n\nold table\n\n{quality.END}\n\nafter\n")
    assert quality.fill_table(small_jobs, tmp_path / "cells", page) == 0
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old table" not in text
    assert "| raw | " in text
    assert "| temporal mean | " in text
    assert 1000 < (tmp_path / "page_level2.png").stat().st_size < 300_000
    assert {cell["method"] for cell in json.loads((tmp_path / "page.json").read_text())["cells"]} == {
        "raw",
        "temporal-mean",
    }

    first, second = (jobs.cell_file(tmp_path / "cells", job) for job in small_jobs)
    first.unlink()
    kept = second.stat().st_mtime_ns
    assert quality.fill_table(small_jobs, tmp_path / "cells", None) == 0
    assert first.exists()
    assert second.stat().st_mtime_ns == kept


def test_a_cell_that_fails_is_reported_and_left_out(small_jobs, tmp_path, capfd):
    broken = small_jobs[0] | {"level": 9}
    assert quality.fill_table([broken], tmp_path, None) == 1
    captured = capfd.readouterr()
    assert "expected 1, 2 or 3" in captured.err
    assert "No cell has been computed" in captured.out


def test_a_network_that_loses_is_marked_as_plainly_as_one_that_wins():
    cells = [cell("raw", -1.0), cell("gaussian-oracle", 22.0), cell("default", 23.5), cell("default-scratch", 20.5)]
    lines = markdown({"command": "c", "cells": cells}).splitlines()
    assert any("| default | 23.50 | +1.50 **wins** |" in line for line in lines)
    assert any("| default-scratch | 20.50 | -1.50 **loses** |" in line for line in lines)
    assert any("oracle by stSNR † | 22.00 | best filter |" in line for line in lines)


def test_differences_are_taken_scene_by_scene():
    cells = [cell("gaussian", 20.0, 0), cell("gaussian", 30.0, 1), cell("default", 21.0, 0), cell("default", 31.0, 1)]
    assert "| default | 26.00 ± 7.07 | +1.00 ± 0.00 **wins** |" in markdown({"command": "c", "cells": cells})


def test_the_oracle_chooses_by_the_scores_of_the_table(clean_stack, noisy_stack):
    scores = evaluate_stacks(clean_stack, noisy_stack)
    for name in ("stsnr", "activity_snr"):
        assert truth_score(clean_stack, name)(iter(noisy_stack)) == pytest.approx(scores[name])


def test_a_changed_setting_is_another_cell_and_a_moved_file_is_not(small_jobs):
    job = small_jobs[0]
    assert jobs.cell_file(Path(), job) == jobs.cell_file(Path(), job | {"arguments": {"weights": "elsewhere"}})
    assert jobs.cell_file(Path(), job) != jobs.cell_file(Path(), job | {"settings": {"iterations": 3}})


def test_recordings_are_named_with_their_crop(noisy_file, small_jobs):
    job = jobs.real_job(small_jobs[0], f"{noisy_file}:2:20:0:8:1:9")
    assert job["crop"] == [[2, 20], [0, 8], [1, 9]]
    assert jobs.real_job(small_jobs[0], str(noisy_file))["crop"] == []
    with pytest.raises(ValueError, match="expected a TIFF file"):
        jobs.real_job(small_jobs[0], f"{noisy_file}:2:20:0")


def test_rows_that_need_weights_are_left_out_without_them(capsys):
    found = jobs.rows(("default", "default-scratch"), jobs.Options(weights="none"))
    assert [row["method"] for row in found] == ["default-scratch"]
    assert "default: left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown method"):
        jobs.rows(("best",), jobs.Options())


def test_the_command_names_nobodys_folders():
    shown = jobs.without_folders(["--real", "/home/me/a.tif:0:9", "--write", "docs/quality.md", "../b.tif"])
    assert shown == "--real a.tif:0:9 --write docs/quality.md b.tif"


def test_pictures_need_no_roi():
    from benchmarks.cells import picture

    clean = np.random.default_rng(0).random((6, 5, 4))
    drawn = picture(clean, clean)
    assert drawn["traces"].shape == (3, 6)
    assert (drawn["frame"] == drawn["clean_frame"]).all()


@pytest.fixture(scope="module")
def speeds():
    """A tiny measurement, in which torch.compile fails for want of a compiler."""

    def no_compiler(*_, **__):
        def fail(_):
            raise RuntimeError("no C++ compiler\nand a long story")

        return fail

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.compile", no_compiler)
        patch.setattr(speed, "in_new_process", lambda function, *arguments: 2e6)
        return speed.measure(torch.device("cpu"), 2, quick=True, compiled=True)


def test_the_speed_table_has_every_row_and_says_what_was_left_out(speeds):
    done = {"iterations": 7, "recipe_iterations": 800, "overlap_t": 0.25, "overlap_xy": 0.0}
    origin = {"command": "python -m benchmarks.speed", "machine": "a machine"}
    job = {"shape": [500, 128, 128], "limit": 3.0, "seconds": 170.0, "method": "restormer3d", "engine": "cpu"} | origin
    whole = job | done | {"device": "cpu", "recipe": "default"}
    tables = speed_table.report(speeds | origin | {"job": whole, "challenge": whole | {"seconds": 70.0, "limit": None}})
    table = "\n".join(tables.values())
    for row in ("training step, 2,048 voxels", "training step, 8,192 voxels", "inference, thousand voxels/s"):
        assert row in table
    for row in ("saved for the backward pass", "peak memory", "input gradient", "weight gradient", "mdta", "gdfn"):
        assert row in table
    assert "Left out: stock, compiled: no C++ compiler\n" in table
    assert "under --time-limit 3: 2.8 minutes, 7 of 800 iterations, overlap 0.25 in time and 0 in the plane" in table
    assert "without a time limit: 70 seconds" in tables[speed_table.CHALLENGE_MARKS]
    assert speeds["agreement"] < 1e-4
    filtered = {"shape": [500, 128, 128], "limit": 0.1, "seconds": 3.0, "method": "gaussian"} | origin
    alone = speed_table.report({"job": filtered})
    assert "no network in that time" in alone[speed_table.JOB_MARKS]
    assert not alone[speed_table.MARKS]


@pytest.mark.parametrize(("name", "recipe", "overlap"), [("job", "default", 0.25), ("challenge", "published", 0.5)])
def test_a_whole_job_of_either_recipe_says_what_it_did(name, recipe, overlap):
    done = speed.time_job("cpu", None, recipe, quick=True)
    assert (done["iterations"], done["overlap_t"], done["overlap_xy"]) == (1, overlap, overlap)
    assert done["seconds"] > 0
    text = "".join(speed_table.report({name: done | {"command": "a command", "machine": "a machine"}}).values())
    assert f"with the {recipe} recipe, TIFF to TIFF, 16 x 16 x 16 int16" in text


def test_the_ratio_compares_with_the_best_of_stock():
    assert speed_table._ratio({"ours": [2.0, 1.0, 3.0], "stock": [9.0], "stock, channels_last_3d": [5.0]}) == "2.5x"


def test_a_new_speed_table_leaves_the_prose(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text((quality.ROOT / "docs/speed.md").read_text())
    speed.put_between(page, *speed_table.MARKS, "new table")
    text = page.read_text()
    assert "new table" in text
    assert "training step" not in text.split(speed_table.MARKS[1])[0]
    assert "## Precision and engine" in text
    for marks in speed_table.report({}) | speed_table.report({}, on_gpu=True):
        speed.put_between(page, *marks, "each has a place of its own")
    assert page.read_text().count("each has a place of its own") == 5
    page.write_text("no markers")
    with pytest.raises(ValueError, match="between which the table goes"):
        speed.put_between(page, *speed_table.MARKS, "new table")


def test_the_peak_memory_of_a_step_is_that_of_the_step():
    """Keeping 0.4 kB per voxel and some tensors of work: a few ten MB for a quarter of a million voxels."""
    config = speed._SMALL
    peak = speed.in_new_process(speed.peak_memory, "ours", config, (16, 64, 64), "cpu")
    assert 3e7 < peak < 1e9


def test_tf32_keeps_ten_bits_of_mantissa_and_what_is_not_finite():
    step = 2.0**-10
    values = torch.tensor([1.0, 1 + step, 1 + 0.4 * step, -1 - 0.6 * step, torch.inf, torch.nan])
    expected = torch.tensor([1.0, 1 + step, 1.0, -1 - step, torch.inf, torch.nan])
    torch.testing.assert_close(precision.rounded(values), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("without_gradients", [False, True])
def test_products_are_rounded_and_sums_are_not(without_gradients):
    a, x = torch.full((2, 2), 1 + 2.0**-12), torch.ones(1, 1, 2, 2, 2)
    with precision.RoundedProducts(), torch.inference_mode(without_gradients):
        assert torch.equal(a @ torch.eye(2), torch.ones(2, 2))
        assert torch.equal(torch.nn.functional.conv3d(x * a[0, 0], x), torch.full((1, 1, 1, 1, 1), 8.0))
        assert torch.equal(a + 0, a)


@pytest.mark.parametrize("name", artefacts.ARTEFACTS)
def test_an_artefact_leaves_noise_around_its_truth(name):
    clean, noisy = artefacts.recording(name, (32, 40, 40))
    assert clean.shape == noisy.shape == (32, 40, 40)
    assert noisy.dtype.kind in "iu"
    scored = np.isfinite(clean).all((1, 2))
    assert scored.sum() >= 31
    noise = (noisy - clean)[scored]
    assert noise.std() > 1
    assert abs(noise.mean()) < 0.4 * noise.std()  # cut at 0, noise has a mean


def test_other_simulators_are_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(other_simulators, "FILTERS", ("gaussian-oracle", "gaussian-activity-oracle"))
    document = tmp_path / "simulators.md"
    other_simulators.other_simulators(shape=(24, 40, 40), only=("mesoscope",), levels=(2,), write=document)
    (row,) = [line for line in document.read_text().splitlines() if line.startswith("| mesoscope | 2 |")]
    stsnr, activity_snr = (float(score) for score in row.split("|")[5].split("/"))
    assert stsnr > 0  # the default recipe is ahead of the best filter
    assert np.isfinite(activity_snr)


def test_parts_of_large_stacks_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(large_stacks, "SHAPES", ((50, 72, 64),))
    monkeypatch.setattr(large_stacks, "_FRAMES", (16,))
    monkeypatch.setattr(large_stacks, "_TILES", (64,))
    document = tmp_path / "large.md"
    assert large_stacks.large_stacks(levels=(2,), write=document) == 0
    rows = [line.split("|")[1:3] for line in document.read_text().splitlines() if " x " in line and "|" in line]
    assert [label.strip() for label, _ in rows] == [
        "**all of 50 x 72 x 64**",
        "50 x 64 x 64 of 50 x 72 x 64, 2 tiles",
        "16 x 72 x 64 of 50 x 72 x 64",
    ]
    stsnr = [float(text.split("/")[0]) for _, text in rows]
    assert abs(stsnr[1] - stsnr[0]) < 0.3
    assert stsnr[2] < stsnr[0] - 0.3


def test_artefacts_differ(tmp_path):
    plain, _ = artefacts.recording("none", (32, 40, 40))
    lit, _ = artefacts.recording("light, 300 ADU in 8 frames", (32, 40, 40))
    assert sorted(np.unique(np.rint(lit - plain))) == [0, 300]
    document = tmp_path / "artefacts.md"
    artefacts.artefacts(shape=(20, 16, 16), only=("vignetting",), write=document)
    row = next(line for line in document.read_text().splitlines() if line.startswith("| vignetting"))
    clean, noisy = artefacts.recording("vignetting", (20, 16, 16))
    filtered = evaluate_stacks(clean, array_and_record(noisy, settings(iterations=0), method="gaussian")[0])
    assert row.split("|")[2].strip() == f"{filtered['stsnr']:.2f} / {filtered['activity_snr']:.2f}"


def test_training_choices_are_compared_in_equal_time_and_resumed(tmp_path, monkeypatch):
    rows = ("**as published**", "LayerNorm that centers", "not down-sampled in time", "5 % masked")
    monkeypatch.setattr(training_choices, "ROWS", {row: training_choices.ROWS[row] for row in rows})
    monkeypatch.setattr(training_choices, "_ROUNDS", 1)
    page = tmp_path / "page.md"
    page.write_text(f"{training_choices.BEGIN}\n{training_choices.END}\n")
    tiny = {"shape": (32, 32, 32), "iterations": 2, "seeds": 1, "dim": 4, "folder": tmp_path / "cells", "write": page}
    assert training_choices.training_choices(**tiny) == 0
    text = page.read_text()
    assert all(f"| {row} | " in text for row in rows)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(kept) == 1 + len(rows)
    assert training_choices.training_choices(**tiny) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == kept


def test_the_changed_networks_of_the_training_choices_are_what_they_are_called():
    x, background = torch.randn(1, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8)
    choose = training_choices.Choice
    plain = training_choices._network(choose(), 8, 0)
    with training_choices._changed(choose(in_time=False)):
        flat = training_choices._network(choose(in_time=False), 8, 0)
    assert [flat.unet.features(torch.randn(1, 1, frames, 8, 8)).shape[2] for frames in (1, 8)] == [1, 8]
    block = plain.unet.encoder_level1[0][0]
    features = torch.randn(1, 8, 8, 8, 8)
    with training_choices._changed(choose(centered=True)):
        centered = block(features) - features
        shifted = block(features + 3) - (features + 3)
    torch.testing.assert_close(shifted, centered, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(block(features + 3) - (features + 3), block(features) - features, rtol=1e-3, atol=1e-4)
    for mean in ("given", "subtracted", "start"):
        network = training_choices._network(choose(mean=mean), 8, 0)
        assert network(x, background).shape == x.shape
        assert not torch.equal(network(x, background), network(x, background + 1))


def test_the_planes_table_holds_out_whole_turns(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).normal(200, 5, (49, 24, 24)).astype(np.float32)
    tifffile.imwrite(tmp_path / "one.tif", noise)
    noise[1::2, ::2] += 50
    tifffile.imwrite(tmp_path / "two.tif", noise)
    every = planes._rows(2, 0)
    assert len(every) == 9
    rows = {label: denoise for label, denoise in every.items() if label.startswith("Gaussian")}
    monkeypatch.setattr(planes, "_rows", lambda count, iterations: rows)
    page = tmp_path / "page.md"
    assert planes.planes(f"{tmp_path}/two.tif:0:48", write=page) == 0
    table = page.read_text()
    assert "Recording two.tif, frames 0–47: 2 planes in turns" in table
    errors = [float(line.split("|")[2]) for line in table.splitlines() if line.startswith("| Gaussian")]
    assert errors[1] < 2 < errors[0]  # of all frames, in the planes' alternation; of each plane
    with pytest.raises(ValueError, match="expected a recording of several planes"):
        planes.planes(f"{tmp_path}/one.tif")


def test_frames_are_moved_to_where_another_one_shows_the_field(clean_stack):
    frame = gaussian_filter(clean_stack[20], 1.0)
    seen = shift(frame, (1.3, -0.8), order=3, mode="mirror")
    noisy = seen + np.random.default_rng(0).normal(0, 5, seen.shape)
    inside = np.s_[8:-8, 8:-8]
    apart = [np.abs(x - seen)[inside].mean() for x in (_moved_onto(frame, noisy), frame)]
    assert apart[0] < 0.2 * apart[1]
