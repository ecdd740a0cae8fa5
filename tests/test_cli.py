"""The command line as a user meets it: exit status, messages, help without torch."""

from __future__ import annotations

import gc
import json
import os
import pty
import subprocess
import sys
import weakref
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import tifffile

import restormer3d
from restormer3d.cli import app
from restormer3d.denoising import Denoised
from restormer3d.settings import settings
from restormer3d.stacks import StackError
from restormer3d.workflow import denoise_files

QUICK = """
[model]
dim = 8
num_blocks = [1, 1, 1, 1]
num_refinement_blocks = 1
heads = [1, 1, 2, 2]
last_level_channels = 8

[training]
iterations = 3
warmup_iterations = 1
"""


@pytest.fixture
def quick(tmp_path):
    """Options that make the network and its training tiny."""
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return ["--weights", "none", "--config", str(path), "--patch", "16", "16", "16", "--device", "cpu"]


def run(*arguments) -> int:
    """The command's exit status; cyclopts hands it back instead of leaving."""
    return app([str(a) for a in arguments], exit_on_error=False, result_action="return_value")


def test_help_does_not_import_torch():
    code = "import sys; sys.argv=['restormer3d','denoise','--help']\nfrom restormer3d.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--time-limit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["denoise"], "requires"),
        (["denoise", "a.tif"], "output"),
        (["denoise", "a.tif", "-o", "x", "--recipe", "best"], "recipe"),
        (["denoise", "a.tif", "-o", "x", "--device", "tpu"], "tpu"),
        (["denoise", "a.tif", "-o", "x", "--overlap", "1.5"], "overlap"),
        (["denoise", "a.tif", "-o", "x", "--patch", "4", "64", "64"], "patch"),
        (["denoise", "a.tif", "-o", "x", "--weights", "absent.safetensors"], "absent.safetensors"),
        (["denoise", "a.tif", "-o", "x", "--time-limit", "0"], "time-limit"),
        (["denoise", "a.tif", "-o", "x", "--time-limit", "nan"], "time-limit"),
        (["denoise", "a.tif", "-o", "x", "--time-limit", "inf"], "time-limit"),
        (["denoise", "a.tif", "-o", "x", "--sigma", "5", "1"], "--method restormer3d has none"),
        (["denoise", "a.tif", "-o", "x", "--method", "gaussian", "--sigma", "-1", "1"], "at least 0"),
        (["denoise", "a.tif", "-o", "x" * 300 + ".tif"], "name too long"),
        (["evaluate", "--real", "a.tif", "--device", "tpu"], "tpu"),
        (["evaluate", "--real", "a.tif", "--device", "cpu", "--precision", "bf16"], "--engine reference"),
        (["denoise", "a.tif", "-o", "x", "--blind-spot", "z3"], "z3"),
        (["denoise", "a.tif", "-o", "x", "--precision", "fp16"], "precision"),
        (["denoise", "a.tif", "-o", "x", "--device", "cpu", "--precision", "bf16"], "--engine reference"),
        (["denoise", "a.tif", "-o", "x", "--engine", "abacus"], "engine"),
        (["denoise", "a.tif", "-o", "x", "--method", "svd", "--sigma", "2", "1"], "--method svd has none"),
        (["evaluate", "--real", "a.tif", "--clean", "b.tif"], "no clean stack"),
        (["evaluate", "--clean", "a.tif", "--denoised", "b.tif", "--iterations", "9"], "belong to --real"),
        (["evaluate", "--real", "a.tif", "--blind-spot", "z3"], "z3"),
        (["evaluate", "--real", "a.tif", "--precision", "fp16"], "precision"),
        (["pretrain", "-o", "x", "--simulate", "1", "--device", "cpu", "--precision", "bf16"], "--engine reference"),
        (["denoise", "a/x.tif", "b/x.tif", "-o", "x"], "same file name"),
        (["denoise", "a.tif", "b.tif", "-o", "x.tif"], "one file"),
        (["demo", "-o", "x.tif"], "expected a folder"),
        (["demo", "--minutes", "-1"], "above 0"),
        (["simulate", "-o", "x", "--read-noise", "-1"], "read-noise"),
    ],
)
def test_bad_arguments_exit_with_2_and_a_reason(arguments, reason):
    code = "from restormer3d.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_that_was_not_installed_costs_no_result(noisy_file, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("restormer3d.sidecar.version", missing)
    output = tmp_path / "denoised.tif"
    assert run("denoise", noisy_file, "-o", output, "--method", "gaussian") == 0
    assert json.loads(output.with_name("denoised.tif.json").read_text())["versions"]["torch"] == "not installed"


def test_denoise_writes_a_drop_in_and_a_sidecar(noisy_file, noisy_stack, quick, tmp_path):
    output = tmp_path / "out" / "denoised.tif"
    assert run("denoise", noisy_file, "-o", output, *quick) == 0
    denoised = tifffile.imread(output)
    assert (denoised.shape, denoised.dtype) == (noisy_stack.shape, noisy_stack.dtype)
    sidecar = json.loads(output.with_name("denoised.tif.json").read_text())
    assert sidecar["input"]["shape"] == list(noisy_stack.shape)
    assert len(sidecar["losses"]) == 4
    assert sidecar["settings"]["training"]["patch"] == [16, 16, 16]
    assert sidecar["seed"] == 0
    assert sidecar["weights"] is None
    assert {"torch", "numpy", "restormer3d"} <= set(sidecar["versions"])
    assert sidecar["mixture"]["windows"] > 0
    scores = sidecar["held_out"]["held_out"]
    assert scores[str(sidecar["held_out"]["kept_iteration"])] == min(scores.values())
    assert sorted(p.name for p in output.parent.iterdir()) == ["denoised.tif", "denoised.tif.json"]


@pytest.mark.parametrize(
    ("options", "engine", "precision", "said"),
    [
        ([], "cpu", "fp32", "cpu operators, fp32"),
        (["--engine", "reference"], "reference", "fp32", "reference operators"),
        (["--precision", "tf32"], "cpu", "fp32", "TF32 is a mode of NVIDIA GPUs"),
        (["--precision", "bf16", "--engine", "reference"], "reference", "bf16", "bf16"),
    ],
)
def test_engine_and_precision_are_said_and_kept(
    noisy_file, quick, tmp_path, capsys, monkeypatch, options, engine, precision, said
):
    monkeypatch.delenv("RESTORMER3D_ENGINE", raising=False)
    assert run("denoise", noisy_file, "-o", tmp_path / "out.tif", *options, *quick) == 0
    record = json.loads((tmp_path / "out.tif.json").read_text())
    assert (record["engine"], record["precision"]) == (engine, precision)
    assert said in capsys.readouterr().err


def test_patterns_name_files_where_the_shell_leaves_them(noisy_stack, tmp_path):
    for name in ("b.tif", "a.tif", "c[1].tif", "a.png"):
        tifffile.imwrite(tmp_path / name, noisy_stack)
    output = ["-o", tmp_path / "out", "--method", "temporal-mean"]
    assert run("denoise", tmp_path / "?.tif", tmp_path / "c[1].tif", *output) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["a.tif", "b.tif", "c[1].tif"]
    assert run("denoise", tmp_path / "none*.tif", *output) == 1


def test_a_path_out_of_reach_does_not_stop_the_others(noisy_file, tmp_path):
    output = ["-o", tmp_path / "out", "--method", "temporal-mean", "--time-limit", 1]
    assert run("denoise", tmp_path / f"{'x' * 300}.tif", noisy_file, *output) == 1
    assert (tmp_path / "out" / noisy_file.name).exists()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_session_that_ends_leaves_no_half_written_file(noisy_file, tmp_path, name):
    code = "import os, signal\nfrom restormer3d import cli, workflow\n"
    code += f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # under nohup the tests themselves ignore it
    code += f"def end(*_, **__): os.kill(os.getpid(), signal.{name}); yield\n"
    code += "start = workflow.start_denoising\nimport dataclasses\n"
    code += "workflow.start_denoising = lambda *a: dataclasses.replace(start(*a), frames=end())\ncli.main()"
    arguments = ["denoise", noisy_file, "-o", tmp_path / "out.tif", "--method", "temporal-mean"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert "no half-written file is left" in done.stderr
    assert not list(tmp_path.glob("*out.tif*"))
    assert not list(tmp_path.glob(".*part*"))


def test_the_same_seed_gives_the_same_file(noisy_file, quick, tmp_path):
    for name in ("a.tif", "b.tif"):
        assert run("denoise", noisy_file, "-o", tmp_path / name, "--seed", 5, *quick) == 0
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), tifffile.imread(tmp_path / "b.tif"))


@pytest.mark.parametrize("listener", ["pipe", "terminal"])
def test_work_goes_on_when_nobody_listens_any_more(noisy_file, tmp_path, listener):
    theirs, ours = os.pipe() if listener == "pipe" else pty.openpty()
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as under nohup
    code += "from restormer3d.cli import main\nmain()"
    command = ["denoise", tmp_path / "none.tif", noisy_file, "-o", tmp_path / "out", "--method", "temporal-mean"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=ours, start_new_session=True)
    os.close(ours)
    os.close(theirs)
    assert process.wait() == 1  # for the file that is not there
    assert (tmp_path / "out" / noisy_file.name).exists()


@pytest.mark.parametrize("name", ["mine.tif", "mine"])
def test_the_demonstration_takes_the_place_of_no_file(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"precious")
    assert run("demo", "-o", tmp_path / name) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"precious"


def test_one_bad_stack_does_not_stop_the_others(noisy_file, quick, tmp_path, capsys):
    bad = tmp_path / "bad.tif"
    bad.write_text("no TIFF")
    assert run("denoise", bad, noisy_file, "-o", tmp_path / "out", *quick) == 1
    assert (tmp_path / "out" / noisy_file.name).exists()
    assert "bad.tif" in capsys.readouterr().err


def test_an_existing_output_is_kept_unless_told(noisy_file, quick, tmp_path, capsys):
    output = tmp_path / "kept.tif"
    output.write_bytes(b"precious")
    assert run("denoise", noisy_file, "-o", output, *quick) == 1
    assert output.read_bytes() == b"precious"
    assert "--overwrite" in capsys.readouterr().err
    assert run("denoise", noisy_file, "-o", output, "--overwrite", *quick) == 0
    assert tifffile.imread(output).ndim == 3


@pytest.mark.parametrize("name", ["out.tif.json", "mouse.safetensors"])
def test_what_lies_beside_an_output_is_kept_unless_told(noisy_file, quick, tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    command = [
        "denoise",
        noisy_file,
        "-o",
        tmp_path / "out.tif",
        "--save-weights",
        tmp_path / "mouse.safetensors",
        *quick,
    ]
    assert run(*command) == 1
    assert (tmp_path / name).read_bytes() == b"precious"
    assert not (tmp_path / "out.tif").exists()
    assert run(*command, "--overwrite") == 0
    assert (tmp_path / name).read_bytes() != b"precious"


def test_what_was_said_stands_in_the_sidecar(noisy_file, quick, tmp_path, capsys):
    assert run("denoise", noisy_file, "-o", tmp_path / "out.tif", *quick) == 0
    messages = json.loads((tmp_path / "out.tif.json").read_text())["messages"]
    assert any("need 48 frames" in text for text in messages)
    said = capsys.readouterr().err
    assert all(text in said for text in messages)


def test_a_filter_has_no_weights_to_save(noisy_file, tmp_path, capsys):
    weights = tmp_path / "a.safetensors"
    assert run("denoise", noisy_file, "-o", tmp_path / "out.tif", "--method", "svd", "--save-weights", weights) == 2
    assert "--save-weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.tif", "out.tif.json", "noisy"])
def test_weights_take_the_place_of_no_recording(noisy_file, quick, tmp_path, name, capsys):
    weights = noisy_file if name == "noisy" else tmp_path / name
    before = noisy_file.read_bytes()
    options = ["--save-weights", weights, "--overwrite", *quick]
    assert run("denoise", noisy_file, "-o", tmp_path / "out.tif", *options) == 1
    assert noisy_file.read_bytes() == before
    assert "the recording or its result" in capsys.readouterr().err


def test_weights_are_saved_and_start_the_next_stack(noisy_file, quick, tmp_path):
    weights = tmp_path / "mouse.safetensors"
    assert run("denoise", noisy_file, "-o", tmp_path / "a.tif", "--save-weights", weights, *quick) == 0
    again = ["--patch", 16, 16, 16, "--iterations", 0, "--device", "cpu"]
    assert run("denoise", noisy_file, "-o", tmp_path / "b.tif", "--weights", weights, *again) == 0
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), tifffile.imread(tmp_path / "b.tif"))


@pytest.mark.parametrize("method", ["gaussian", "temporal-mean", "svd"])
def test_the_filters_write_files_too(noisy_file, noisy_stack, clean_stack, tmp_path, method):
    output = tmp_path / f"{method}.tif"
    assert run("denoise", noisy_file, "-o", output, "--method", method) == 0
    denoised = tifffile.imread(output).astype(float)
    assert denoised.shape == noisy_stack.shape
    assert ((denoised - clean_stack) ** 2).mean() < ((noisy_stack - clean_stack) ** 2).mean()


def test_inspect_says_what_the_stack_is(noisy_file, capsys):
    assert run("inspect", noisy_file) == 0
    text = capsys.readouterr().out
    for word in ("40 frames", "int16", "TYX", "gain", "read noise", "iterations"):
        assert word in text


def test_inspect_of_a_bad_file_exits_with_1(tmp_path, capsys):
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, np.zeros((9, 9), np.uint8))
    assert run("inspect", path) == 1
    assert "photo.tif" in capsys.readouterr().err


def test_a_failure_names_its_file_and_leaves_nothing(noisy_file, quick, tmp_path, capsys, monkeypatch):
    """What goes wrong deep inside still tells the user which stack it was."""

    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("restormer3d.fitting.fit", out_of_memory)
    assert run("denoise", noisy_file, "-o", tmp_path / "out", *quick) == 1
    message = capsys.readouterr().err
    assert noisy_file.name in message
    assert "--batch-size 1" in message
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_leaves_no_half_written_file(noisy_file, quick, tmp_path):
    """The signal comes while frames are being written."""
    slow = "import restormer3d.inference as i, os, signal\nold = i._blend\n"
    slow += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with it ignored
    slow += (
        "def blend(*a):\n    os.kill(os.getpid(), signal.SIGINT) if blend.calls > 2 else None\n    blend.calls += 1\n"
    )
    slow += "    return old(*a)\nblend.calls = 0\ni._blend = blend\nfrom restormer3d.cli import main\nmain()"
    command = [sys.executable, "-c", slow, "denoise", noisy_file, "-o", tmp_path / "out", *quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_array_that_the_filter_stood_in_for_comes_with_a_warning(noisy_stack, monkeypatch):
    monkeypatch.setattr("restormer3d.fitting.ends_in_time", lambda *_: False)
    with pytest.warns(UserWarning, match="Gaussian filter stands in"):
        denoised = restormer3d.denoise(noisy_stack, time_limit=5, device="cpu", patch=(16, 16, 16))
    assert denoised.shape == noisy_stack.shape


def test_a_time_limit_is_kept_and_said(noisy_file, quick, tmp_path, capsys):
    output = tmp_path / "timed.tif"
    options = [*quick, "--iterations", 100_000, "--time-limit", 0.1]
    assert run("denoise", noisy_file, "-o", output, *options) == 0
    assert "to end within" in capsys.readouterr().err
    record = json.loads(output.with_name("timed.tif.json").read_text())
    # On a machine too slow for any network in that time, the filter takes over.
    assert record["method"] == "gaussian" or record["settings"]["training"]["iterations"] < 100_000


def test_a_sidecar_is_json_even_where_a_number_is_undefined(noisy_stack, quick, tmp_path):
    """Five frames say nothing of the correlation of noise along time."""
    short = tmp_path / "short.tif"
    tifffile.imwrite(short, noisy_stack[:5])
    assert run("denoise", short, "-o", tmp_path / "out.tif", *quick) == 0

    def refused(word):
        raise AssertionError(word)

    sidecar = json.loads((tmp_path / "out.tif.json").read_text(), parse_constant=refused)
    assert sidecar["noise"]["correlation"]["t"] == [None, None]


def test_a_failed_stack_is_not_kept_in_memory(noisy_file, tmp_path, monkeypatch):
    seen = []

    def fails(stack, *_):
        seen.append(weakref.ref(stack))
        raise RuntimeError("out of memory")

    monkeypatch.setattr("restormer3d.workflow.start_denoising", fails)
    failures = denoise_files([noisy_file], tmp_path / "out", settings(iterations=0))
    assert str(failures[noisy_file]) == "out of memory"
    gc.collect()
    assert seen[0]() is None


def test_an_array_that_comes_out_undefined_is_refused(noisy_stack, monkeypatch):
    def broken(stack, *_):
        return Denoised(iter(np.full(stack.shape, np.nan, np.float32)), {})

    monkeypatch.setattr("restormer3d.denoising.start_denoising", broken)
    with pytest.raises(RuntimeError, match="frame 0 of the output has values that are not finite"):
        restormer3d.denoise(noisy_stack)


def test_a_file_that_cannot_be_denoised_is_named(tmp_path):
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, np.full((8, 16, 16), 7, np.uint16), compression="zlib")
    with pytest.raises(StackError, match=r"flat\.tif: every voxel is 7"):
        restormer3d.denoise(path)
