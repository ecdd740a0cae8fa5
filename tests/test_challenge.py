"""The container's entry, met as the platform meets it: folders, protocols, limits, and what goes wrong there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import restormer3d
from restormer3d import fitting
from restormer3d.challenge import __main__ as door
from restormer3d.challenge import job
from restormer3d.challenge.server import InvokeServer
from restormer3d.checkpoint import SHIPPED_WEIGHTS, SMALL_NETWORKS, save_weights, shipped_file
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.model import Restormer3D
from restormer3d.planning import Calibration

from .conftest import TINY

IN_SOCKET = "images/stacked-neuron-images-with-noise"
OUT_SOCKET = "images/stacked-neuron-images-with-reduced-noise"
CONTAINER = Path(__file__).parents[1] / "container"

QUICK = """
[training]
patch = [16, 16, 16]
iterations = 2

[inference]
window = [16, 16, 16]
batch_size = 4
"""


@pytest.fixture(autouse=True)
def plain_engine(monkeypatch):
    """Nothing to compile, here or in a subprocess; and the test session's age is not the job's."""
    monkeypatch.setenv("RESTORMER3D_ENGINE", "reference")
    monkeypatch.delenv(door.API_VARIABLE, raising=False)
    monkeypatch.setattr(door, "_seconds_running", lambda: 0.0)


class Platform:
    """The folders that the platform lends a container, and a tiny network in the place of the model."""

    def __init__(self, root: Path) -> None:
        self.input, self.output, self.model = root / "input", root / "output", root / "model"
        self.config = root / "quick.toml"
        self.config.write_text(QUICK)
        (self.input / IN_SOCKET).mkdir(parents=True)
        self.output.mkdir()
        torch.manual_seed(0)
        save_weights(self.model / "tarball" / "tiny.safetensors", Restormer3D(ModelConfig(**TINY, start="filters")))

    def give(self, name: str, stack: np.ndarray, **tags) -> None:
        tifffile.imwrite(self.input / IN_SOCKET / name, stack, photometric="minisblack", **tags)

    def list_sockets(self, entries) -> None:
        (self.input / "inputs.json").write_text(json.dumps(entries))

    def run(self, **changes) -> int:
        folders = {"input": self.input, "output": self.output, "model": self.model, "config": self.config}
        return door.challenge(**(folders | changes))

    def load(self):
        return job.load(self.model, None, self.config, str, str)

    def result(self, name: str) -> Path:
        return self.output / OUT_SOCKET / name

    def record(self, name: str) -> dict:
        return json.loads((self.output / "restormer3d" / f"{name}.json").read_text())


@pytest.fixture
def platform(tmp_path):
    return Platform(tmp_path)


@pytest.fixture
def stack(noisy_stack):
    return noisy_stack[:20, :18, :20]


def assert_the_platform_takes_it(path: Path, like: np.ndarray) -> None:
    """What the platform asks of a TIFF file: gray, with a size in inches or centimeters; and what users ask of ours."""
    with tifffile.TiffFile(path) as tif:
        for page in tif.pages:
            assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
            assert page.tags["ResolutionUnit"].value in (2, 3)
            for tag in ("XResolution", "YResolution"):
                assert min(page.tags[tag].value) > 0
        image = tif.asarray()
    assert (image.shape, image.dtype) == (like.shape, like.dtype)
    assert not np.array_equal(image, like)


# --- the job --------------------------------------------------------------------------------------------------


def test_every_stack_of_the_socket_gets_a_file_of_its_name(platform, stack):
    platform.give("level_1.tif", stack, imagej=True, metadata={"axes": "TYX"})
    with tifffile.TiffWriter(platform.input / IN_SOCKET / "b.tiff", bigtiff=True, byteorder=">") as writer:
        writer.write(stack, photometric="minisblack", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    platform.give("unit_missing.tif", stack, bigtiff=True, resolution=(3, 2), resolutionunit="NONE")
    assert platform.run() == 0
    assert sorted(path.name for path in platform.result(".").iterdir()) == ["b.tiff", "level_1.tif", "unit_missing.tif"]
    assert_the_platform_takes_it(platform.result("level_1.tif"), stack)
    assert_the_platform_takes_it(platform.result("b.tiff"), stack)
    assert_the_platform_takes_it(platform.result("unit_missing.tif"), stack)
    for name, resolution in (("b.tiff", (20000, 1)), ("unit_missing.tif", (3, 1))):
        with tifffile.TiffFile(platform.result(name)) as tif:
            assert tif.pages[0].tags["XResolution"].value == resolution
    assert platform.record("b.tiff")["output"]["file"] == str(platform.result("b.tiff"))
    assert platform.record("level_1.tif")["weights"]["file"] == "tiny.safetensors"


@pytest.mark.parametrize("word", ["socket", "interface"])
def test_inputs_json_says_where_the_stacks_lie(platform, stack, word):
    (platform.input / IN_SOCKET).rename(platform.input / "images" / "moved")
    described = {"slug": "stacked-neuron-images-with-noise", "relative_path": "images/moved"}
    platform.list_sockets([{word: {"slug": "metadata"}}, {word: described, "image": {"name": "a.tif"}}])
    assert job.socket_folder(platform.input) == platform.input / "images" / "moved"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [([{"socket": {"slug": "brain-mri"}}], "brain-mri"), ({"socket": 1}, "inputs.json"), ([3], "inputs.json")],
)
def test_another_interface_is_refused(platform, stack, entries, reason, capsys):
    platform.give("a.tif", stack)
    platform.list_sockets(entries)
    assert platform.run() == 1
    assert reason in one_reason(capsys)


def one_reason(capsys) -> str:
    """The last line of standard error, which the platform shows to its user."""
    lines = capsys.readouterr().err.splitlines()
    assert sum("failed" in line for line in lines) == 1
    return lines[-1]


def test_a_missing_socket_is_one_line_of_reason(platform, capsys):
    (platform.input / IN_SOCKET).rename(platform.input / "images" / "something-else")
    assert platform.run() == 1
    reason = one_reason(capsys)
    assert IN_SOCKET in reason
    assert "something-else" in reason


@pytest.mark.parametrize("name", ["photo.png", None])
def test_a_socket_without_stacks_is_one_line_of_reason(platform, name, capsys):
    if name:
        (platform.input / IN_SOCKET / name).write_bytes(b"\x89PNG")
    assert platform.run() == 1
    reason = one_reason(capsys)
    assert "*.tif" in reason
    assert (name or "empty") in reason


def test_one_bad_stack_does_not_lose_the_others(platform, stack, capsys):
    platform.give("a.tif", stack)
    (platform.input / IN_SOCKET / "broken.tif").write_text("no TIFF")
    platform.give("constant.tif", np.full_like(stack, 7))
    platform.give("z.tif", stack)
    assert platform.run() == 1
    assert sorted(path.name for path in platform.result(".").iterdir()) == ["a.tif", "z.tif"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines if " failed: " in line] == ["broken.tif", "constant.tif"]


def test_mha_goes_in_and_out_with_its_geometry(platform, stack):
    itk = pytest.importorskip("SimpleITK")
    image = itk.GetImageFromArray(stack)
    image.SetSpacing((0.7, 0.8, 0.1))
    itk.WriteImage(image, str(platform.input / IN_SOCKET / "a.mha"), useCompression=True)
    assert platform.run() == 0
    assert [path.name for path in platform.result(".").iterdir()] == ["a.mha"]
    denoised = itk.ReadImage(str(platform.result("a.mha")))
    assert denoised.GetSpacing() == image.GetSpacing()
    voxels = itk.GetArrayFromImage(denoised)
    assert (voxels.shape, voxels.dtype) == (stack.shape, stack.dtype)
    assert not np.array_equal(voxels, stack)
    platform.give("a.tif", stack)
    platform.run()
    assert np.array_equal(tifffile.imread(platform.result("a.tif")), voxels)
    assert platform.record("a.mha")["original"]["output"] == str(platform.result("a.mha"))


def test_mha_in_capitals_keeps_its_name(platform, stack):
    itk = pytest.importorskip("SimpleITK")
    itk.WriteImage(itk.GetImageFromArray(stack), str(platform.input / IN_SOCKET / "small.mha"))
    (platform.input / IN_SOCKET / "small.mha").rename(platform.input / IN_SOCKET / "LARGE.MHA")
    assert platform.run(iterations=0) == 0
    assert [path.name for path in platform.result(".").iterdir()] == ["LARGE.MHA"]
    denoised = itk.ReadImage(str(platform.result("LARGE.MHA")), imageIO="MetaImageIO")
    assert itk.GetArrayFromImage(denoised).shape == stack.shape


def test_an_mha_that_is_no_stack_is_refused(platform, stack, capsys):
    itk = pytest.importorskip("SimpleITK")
    itk.WriteImage(itk.GetImageFromArray(stack[0]), str(platform.input / IN_SOCKET / "flat.mha"))
    (platform.input / IN_SOCKET / "no.mha").write_text("nothing")
    assert platform.run() == 1
    errors = capsys.readouterr().err
    assert "flat.mha: expected a MetaImage of 3 axes" in errors
    assert "no.mha: expected a MetaImage file" in errors


# --- weights --------------------------------------------------------------------------------------------------


def test_the_first_weights_by_name_are_taken(platform):
    again = platform.model / "z" / "d.safetensors"
    again.parent.mkdir()
    shutil.copy(platform.model / "tarball" / "tiny.safetensors", again)
    (platform.model / "._d.safetensors").write_bytes(b"what some archivers leave")
    for small in SMALL_NETWORKS:
        (again.parent / small).write_bytes(b"of the package")
    assert job.find_weights(platform.model) == again


def test_weights_that_cannot_be_read_are_one_line_of_reason(platform, stack, capsys):
    platform.give("a.tif", stack)
    (platform.model / "tarball" / "tiny.safetensors").write_bytes(b"half a file")
    assert platform.run() == 1
    assert "tiny.safetensors" in one_reason(capsys)


def test_without_a_model_it_says_what_it_starts_from(platform, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "settings", lambda **kwargs: pytest.fail("stop here"))
    for there, reason in ((None, "from scratch"), (tmp_path, "in the package")):
        monkeypatch.setattr(job, "shipped_weights", lambda there=there: there)
        said: list[str] = []
        with pytest.raises(pytest.fail.Exception):
            job.load(tmp_path / "absent", None, None, said.append, said.append)
        assert "absent" in said[0]
        assert reason in said[0]


# --- time -----------------------------------------------------------------------------------------------------


def test_a_slow_machine_does_fewer_iterations(platform, stack, monkeypatch, capsys):
    platform.give("a.tif", stack)
    monkeypatch.setattr(fitting, "calibrate", lambda *_: Calibration(30.0, 1e-7))
    assert platform.run(time_limit=1.0, iterations=5) == 0
    assert platform.record("a.tif")["settings"]["training"]["iterations"] == 1
    assert "1 of 5 iterations" in capsys.readouterr().out


def test_a_machine_too_slow_for_any_network_still_gives_a_result(platform, stack, monkeypatch, capsys):
    platform.give("a.tif", stack)
    monkeypatch.setattr(fitting, "calibrate", lambda *_: Calibration(1e4, 1e4))
    assert platform.run() == 0
    assert_the_platform_takes_it(platform.result("a.tif"), stack)
    assert platform.record("a.tif")["method"] == "gaussian"
    assert "Gaussian" in capsys.readouterr().out


class SlowAt:
    """Stands in for `job.watch`: gives up at a stage, and remembers the time that each try was given."""

    def __init__(self, stage: str, prepared: float = 0.0) -> None:
        self.stage, self.prepared, self.seconds = stage, prepared, []

    def __call__(self, seconds, training, say):
        self.seconds.append(seconds)

        def progress(stage, done, total):
            if stage == self.stage:
                raise job.TooSlowError(f"try {len(self.seconds)} is behind the plan", self.prepared)

        return progress


def test_where_training_is_too_slow_the_network_is_taken_as_it_is(platform, stack, monkeypatch, capsys):
    platform.give("a.tif", stack)
    monkeypatch.setattr(job, "watch", slow := SlowAt("train"))
    assert platform.run() == 0
    assert_the_platform_takes_it(platform.result("a.tif"), stack)
    record = platform.record("a.tif")
    assert (record["method"], record["iterations"]) == ("restormer3d", 0)
    assert record["instead_of_training"] == "try 1 is behind the plan"
    assert "instead_of_the_network" not in record
    assert "without training" in capsys.readouterr().out
    assert slow.seconds[1] < slow.seconds[0] <= 3000  # the clock goes on


def test_a_machine_that_becomes_slow_still_gives_a_result(platform, stack, monkeypatch, capsys):
    platform.give("a.tif", stack)
    monkeypatch.setattr(job, "watch", SlowAt("denoise"))
    assert platform.run() == 0
    assert_the_platform_takes_it(platform.result("a.tif"), stack)
    record = platform.record("a.tif")
    assert record["method"] == "gaussian"
    assert record["instead_of_training"] == "try 1 is behind the plan"
    assert record["instead_of_the_network"] == "try 2 is behind the plan"
    assert "Gaussian" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "second_try", "prepared"),
    [(None, 0.05, 0.0), (Path("tiny.safetensors"), 1.0, 0.0), (Path("tiny.safetensors"), 0.05, 270.0)],
)
def test_without_weights_or_time_there_is_no_second_try(platform, stack, monkeypatch, weights, second_try, prepared):
    platform.give("a.tif", stack)
    monkeypatch.setattr(job, "watch", slow := SlowAt("train", prepared))
    monkeypatch.setattr(job, "_SECOND_TRY", second_try)
    loaded = platform.load()
    loaded = replace(loaded, chosen=replace(loaded.chosen, weights=weights))
    assert not job.run_job(loaded, platform.input, platform.output, 9.0, job.time.monotonic(), str, str)
    assert len(slow.seconds) == 1
    assert platform.record("a.tif")["instead_of_the_network"] == "try 1 is behind the plan"
    assert "instead_of_training" not in platform.record("a.tif")


def test_a_stack_whose_time_is_over_is_filtered(platform, stack):
    platform.give("a.tif", stack)
    job.run_job(platform.load(), platform.input, platform.output, 1.0, job.time.monotonic() - 61, str, str)
    assert_the_platform_takes_it(platform.result("a.tif"), stack)
    assert platform.record("a.tif")["method"] == "gaussian"
    assert "no time" in platform.record("a.tif")["instead_of_the_network"]


def test_the_network_is_given_up_only_when_it_falls_far_behind(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[0])
    to_the_end = TrainingConfig()
    progress = job.watch(1000, to_the_end, str)
    for done in range(1, 101):
        clock[0] += 10  # ends at 1000 s, as planned
        progress("train", done, 100)
    progress = job.watch(1000, to_the_end, str)
    progress("train", 1, 100)
    clock[0] += 19  # the whole would take 1881 s, but this is little evidence
    progress("train", 2, 100)
    clock[0] += 19
    with pytest.raises(job.TooSlowError):
        progress("train", 3, 100)


def test_what_is_done_before_says_nothing_of_the_networks_speed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[0])
    progress = job.watch(1000, TrainingConfig(), str)
    for stage in ("check", "movement", "move, plane 1 of 2"):
        progress(stage, 1, 100)
        clock[0] += 100  # the whole would take ten times as long as there is
        progress(stage, 2, 100)
    progress("train", 1, 100)
    clock[0] += 30
    with pytest.raises(job.TooSlowError) as slow:
        progress("train", 2, 100)
    assert slow.value.prepared == 300


@pytest.mark.parametrize("stage", ["train", "train, plane 1 of 2"])
def test_a_training_that_may_end_early_is_foreseen_to_its_next_check(monkeypatch, stage):
    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[0])
    early = TrainingConfig(stop_early=True, held_out=0.02)
    progress = job.watch(1000, early, str)
    clock[0] += 2
    for done in range(1, 101):
        clock[0] += 5  # all 800 would take 4000 s; it may end after 25, 50, 100, 200
        progress(stage, done, 800)
    clock[0] += 5
    progress(stage, 101, 800)  # at 200 after 1000 s
    clock[0] += 300
    with pytest.raises(job.TooSlowError) as slow:
        progress(stage, 102, 800)
    assert slow.value.prepared == 7
    progress = job.watch(1000, early, str)
    progress("denoise", 1, 100)
    clock[0] += 50
    with pytest.raises(job.TooSlowError):
        progress("denoise", 2, 100)  # it has no checks


def test_the_time_is_shared_by_size(platform, stack, monkeypatch):
    platform.give("a.tif", stack)
    platform.give("b.tif", np.concatenate([stack] * 3))
    shares = {}
    monkeypatch.setattr(job, "denoise_one", lambda _, source, __, seconds, ___: shares.update({source.name: seconds}))
    job.run_job(platform.load(), platform.input, platform.output, 10.0, job.time.monotonic() - 60, str, str)
    assert shares["a.tif"] == pytest.approx(540 / 4, rel=0.05)  # a minute of the ten was over
    assert shares["b.tif"] == pytest.approx(540, rel=0.05)  # the first took none of it


# --- the invoke protocol --------------------------------------------------------------------------------------


def ask(server: InvokeServer, method: str, path: str, body: bytes | None = None) -> tuple[int, dict]:
    url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    request = urllib.request.Request(url, method=method, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture
def serving():
    """Start servers and stop them at the end."""
    servers = []

    def start(load, work) -> InvokeServer:
        server = InvokeServer(load, work, 0, str, str)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
        server.worker.shutdown()


def test_health_says_when_the_model_is_loaded_and_goes_on_during_a_job(serving):
    loaded, working, go_on = threading.Event(), threading.Event(), threading.Event()

    def work(_):
        working.set()
        go_on.wait(30)
        return {}

    server = serving(lambda: loaded.wait(30), work)
    assert ask(server, "GET", "/health")[0] == 503
    loaded.set()
    server.loaded.result()
    assert ask(server, "GET", "/health")[0] == 200
    answers = []
    client = threading.Thread(target=lambda: answers.append(ask(server, "POST", "/invoke")))
    client.start()
    assert working.wait(30)
    assert ask(server, "GET", "/health")[0] == 200
    go_on.set()
    client.join()
    assert answers == [(201, {"failed": {}})]


def test_a_failed_job_says_why_and_the_next_one_is_done(serving):
    outcomes = iter([{"a.tif": "constant"}, TypeError("never seen\nbefore"), {}])

    def work(_):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    server = serving(lambda: None, work)
    assert ask(server, "POST", "/invoke", b'{"any": "body"}') == (500, {"failed": {"a.tif": "constant"}})
    assert ask(server, "POST", "/invoke") == (500, {"failed": {"the job": "never seen before"}})
    assert ask(server, "POST", "/invoke")[0] == 201


def test_jobs_are_done_one_at_a_time(serving):
    active, most = [0], [0]

    def work(_):
        active[0] += 1
        most[0] = max(most[0], active[0])
        threading.Event().wait(0.05)
        active[0] -= 1
        return {}

    server = serving(lambda: None, work)
    clients = [threading.Thread(target=ask, args=(server, "POST", "/invoke")) for _ in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert most == [1]


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/health"), ("GET", "/invoke"), ("POST", "/x")])
def test_other_requests_are_not_found(serving, method, path):
    assert ask(serving(lambda: None, lambda _: {}), method, path)[0] == 404


@pytest.mark.parametrize(
    "request_line",
    ["POST /invoke HTTP/1.1\r\nContent-Length: x", "POST /invoke HTTP/1.1\r\nContent-Length: -1", "What?"],
)
def test_a_malformed_request_is_answered(serving, request_line, capfd):
    server = serving(lambda: None, lambda _: pytest.fail("no job was asked for"))
    with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        connection.sendall(f"{request_line}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))  # up to where the connection is closed
    assert b" 400 " in answer.splitlines()[0] or b"Error code: 400" in answer
    assert "Traceback" not in capfd.readouterr().err
    assert ask(server, "GET", "/health")[0] == 200


def test_every_job_starts_again_from_weights_that_are_read_once(platform, stack, serving):
    platform.give("a.tif", stack)
    server = serving(
        platform.load,
        lambda loaded: job.run_job(loaded, platform.input, platform.output, 9.0, job.time.monotonic(), str, str),
    )
    server.loaded.result()
    shutil.rmtree(platform.model)
    results = []
    for _ in range(2):
        assert ask(server, "POST", "/invoke") == (201, {"failed": {}})
        results.append(platform.result("a.tif").read_bytes())
    assert results[0] == results[1]


# --- arguments ------------------------------------------------------------------------------------------------


def test_the_variable_or_the_option_chooses_the_protocol(platform, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("restormer3d.challenge.server.serve", lambda *arguments: served.append(arguments[2]) or 0)
    monkeypatch.setenv(door.API_VARIABLE, "invoke")
    assert platform.run() == 0
    assert served == [4743]
    assert platform.run(api="exec") == 1  # there is nothing in the socket
    monkeypatch.setenv(door.API_VARIABLE, "batch")
    assert platform.run() == 2
    assert "batch" in capsys.readouterr().err
    assert platform.run(api="exec", time_limit=0.0) == 2


def test_bad_arguments_are_refused_before_a_job_begins(platform, stack, tmp_path, capsys):
    platform.give("a.tif", stack)
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[training]\nspeed = 3\n")
    bad = ({"config": wrong}, {"config": tmp_path / "none.toml"}, {"iterations": -1}, {"port": 70_000})
    for changes in (*bad, {"time_limit": float("nan")}):
        assert platform.run(**changes) == 2
        assert capsys.readouterr().err.startswith("bad arguments: ")


def test_no_iterations_are_allowed_where_there_are_weights(platform, stack, tmp_path):
    platform.give("a.tif", stack)
    none = tmp_path / "none.toml"
    none.write_text(QUICK.replace("iterations = 2", "iterations = 0"))
    for changes in ({"iterations": 0}, {"config": none}):
        assert platform.run(**changes) == 0
        assert platform.record("a.tif")["iterations"] == 0


def test_no_iterations_without_weights_are_refused(platform, stack, monkeypatch, capsys):
    platform.give("a.tif", stack)
    shutil.rmtree(platform.model)
    monkeypatch.setattr("restormer3d.settings.shipped_weights", lambda: None)
    assert platform.run(iterations=0) == 1
    assert "untrained" in one_reason(capsys)


@pytest.mark.parametrize("line", ["[model]\nnum_refinement_blocks = 2", "[training]\niterations = -1"])
def test_a_configuration_that_does_not_fit_the_weights_is_one_line_of_reason(platform, stack, tmp_path, line, capsys):
    platform.give("a.tif", stack)
    other = tmp_path / "other.toml"
    other.write_text(line)
    assert platform.run(config=other) == 1
    assert line.split("\n")[0] in one_reason(capsys)


@pytest.mark.parametrize("api", ["exec", "invoke"])
def test_it_ends_when_it_is_told_to_in_the_middle_of_a_job(platform, stack, api):
    platform.give("a.tif", stack)
    code = "import os, signal, sys, threading, time, urllib.request\nfrom restormer3d.challenge import __main__, job\n"
    code += "def run(*_): os.kill(os.getpid(), signal.SIGTERM); time.sleep(100)\njob.run_job = run\n"
    code += "say = __main__.say\n"
    code += "def listen(text):\n say(text)\n if 'listening' in text:\n  port = text.split()[-1]\n"
    code += "  ask = urllib.request.Request(f'http://127.0.0.1:{port}/invoke', method='POST')\n"
    code += "  threading.Thread(target=urllib.request.urlopen, args=(ask,), daemon=True).start()\n"
    code += "__main__.say = listen\n__main__.main()"
    folders = (f"--{name}={getattr(platform, name)}" for name in ("input", "output", "model", "config"))
    command = [sys.executable, "-c", code, *folders, "--api", api, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130
    assert "interrupted" in done.stderr


def test_help_does_not_import_torch():
    code = "import sys; sys.argv=['challenge','--help']\nfrom restormer3d.challenge.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("/opt/ml/model", "--time-limit", "50", "4743"):
        assert word in done.stdout


# --- as the platform runs it: namespaces without network, with read-only folders, an empty /tmp, another user --------

MOUNTS = """
set -e
mount -t tmpfs none /mnt
mkdir /mnt/input /mnt/output /mnt/model /mnt/config
for folder in input output model config; do mount --bind "$ROOT/$folder" /mnt/$folder; done
for folder in input model config; do mount -o remount,bind,ro /mnt/$folder; done
if [ -n "$SMALL" ]; then mount -t tmpfs -o size=$SMALL none /mnt/output; fi
if [ -n "$EMPTY_TMP" ]; then mount -t tmpfs none /tmp; fi
cd /
"""
AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
COMMAND = [sys.executable, "-m", "restormer3d.challenge", "--config", "/mnt/config/quick.toml"]
COMMAND += [part for folder in ("input", "output", "model") for part in (f"--{folder}", f"/mnt/{folder}")]

# A client inside of the namespace: brings up its loopback, starts the server as another user, and acts as the platform.
CLIENT = """
import fcntl, json, shutil, socket, struct, subprocess, sys, time, urllib.error, urllib.request
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14s", b"lo", 1, b""))
server = subprocess.Popen(sys.argv[1:] + ["--api", "invoke"])
def ask(method, path):
    try:
        url = "http://127.0.0.1:4743" + path
        return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=100).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
seen = {ask("GET", "/health")}
while 200 not in seen and server.poll() is None:
    time.sleep(0.1)
    seen.add(ask("GET", "/health"))
statuses = []
try:
    for name in ("first", "second"):
        statuses.append(ask("POST", "/invoke"))
        shutil.move("/mnt/output/images", "/mnt/output/" + name)
finally:
    server.terminate()
print(json.dumps({"health": sorted(seen), "invoke": statuses, "exit": server.wait(30)}))
"""


def namespaces_work() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-r", "-m", "-n", "sh", "-c", f"mount -t tmpfs none /mnt && {' '.join(AS_USER)} true"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def in_the_container(platform: Platform, command: list[str], small: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command with the platform's folders under /mnt and no network."""
    root = platform.config.parent
    (root / "config").mkdir()
    platform.config.rename(root / "config" / "quick.toml")
    installed = (Path(sys.prefix).resolve(), Path(restormer3d.__file__).resolve())
    hidden = any(path.is_relative_to("/tmp") for path in installed)  # then /tmp has to stay
    environment = os.environ | {"ROOT": str(root), "SMALL": small, "EMPTY_TMP": "" if hidden else "yes", "HOME": "/tmp"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
    script = MOUNTS + 'exec "$@"'
    return subprocess.run(
        ["unshare", "-r", "-m", "-n", "sh", "-c", script, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


needs_namespaces = pytest.mark.skipif(not namespaces_work(), reason="no user, mount and network namespaces here")


@needs_namespaces
def test_exec_without_network_as_another_user_with_read_only_input(platform, stack):
    platform.give("scene.tif", stack)
    platform.list_sockets([{"socket": {"slug": "stacked-neuron-images-with-noise", "relative_path": IN_SOCKET}}])
    before = (platform.input / IN_SOCKET / "scene.tif").read_bytes()
    done = in_the_container(platform, [*AS_USER, *COMMAND])
    assert (done.returncode, done.stderr) == (0, "")
    assert_the_platform_takes_it(platform.result("scene.tif"), stack)
    assert [path.name for path in platform.result(".").iterdir()] == ["scene.tif"]
    assert (platform.input / IN_SOCKET / "scene.tif").read_bytes() == before


@needs_namespaces
def test_invoke_twice_without_network_gives_the_same(platform, stack):
    platform.give("scene.tif", stack)
    done = in_the_container(platform, [sys.executable, "-c", CLIENT, *AS_USER, *COMMAND])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["invoke"] == [201, 201]
    assert set(said["health"]) <= {0, 503, 200}
    results = [platform.output / name / Path(OUT_SOCKET).name / "scene.tif" for name in ("first", "second")]
    assert_the_platform_takes_it(results[0], stack)
    assert results[0].read_bytes() == results[1].read_bytes()


@needs_namespaces
def test_a_full_disk_is_one_line_of_reason(platform, stack):
    platform.give("scene.tif", stack)
    done = in_the_container(platform, [*AS_USER, *COMMAND], small="8k")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr.splitlines()[-1]


# --- the image's recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["build.sh", "test.sh", "save.sh"])
def test_the_scripts_are_valid_shell(name):
    done = subprocess.run(["bash", "-n", str(CONTAINER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Stands in for a container engine: notes what it is asked, and answers as if both jobs went well, if not the same.
ENGINE = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
    "image inspect"*) [[ -n "$LABEL" ]] && echo "$LABEL" ;;
    *sha256sum*) wc -l "$LOG" ;;
    *"GET /health"*) echo 200 ;;
    *"POST /invoke"*) echo 201 ;;
    save*) echo image ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Run one of the scripts from another folder, with an engine that only notes what it is asked."""
    engine, log = tmp_path / "engine", tmp_path / "log"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    for temporary in ("tmp", "elsewhere"):
        (tmp_path / temporary).mkdir()

    def run(name: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        environment = os.environ | {"ENGINE": str(engine), "LOG": str(log), "TMPDIR": str(tmp_path / "tmp")}
        environment |= {"LABEL": arguments[0] if arguments else "exec", "GPUS": ""} | variables
        done = subprocess.run(
            [str(CONTAINER / name), *arguments],
            cwd=tmp_path / "elsewhere",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not list((tmp_path / "tmp").iterdir())
        return done, log.read_text().splitlines()

    return run


@pytest.mark.parametrize("name", ["test.sh", "save.sh"])
@pytest.mark.parametrize("arguments", [("mine.tif",), ("mine.tif", "exec"), ("exec", "mine.tif", "yours.tif")])
def test_the_scripts_refuse_arguments_in_the_wrong_order(script, name, arguments):
    done, asked = script(name, *arguments)
    assert (done.returncode, asked) == (2, [])
    assert done.stderr.startswith(f"usage: container/{name} [exec|invoke]")


def test_save_packs_the_weights_that_are_named(script, tmp_path):
    (tmp_path / "elsewhere" / "mine.safetensors").write_text("weights")
    done, asked = script("save.sh", "invoke", "mine.safetensors", OUTPUT="here")
    assert (done.returncode, asked) == (0, ["save restormer3d:invoke"]), done.stderr
    written = tmp_path / "elsewhere" / "here"
    assert sorted(path.name for path in written.iterdir()) == ["model.tar.gz", "restormer3d-invoke.tar.gz"]
    with tarfile.open(written / "model.tar.gz") as tar:
        assert tar.getnames() == ["mine.safetensors"]


@pytest.mark.parametrize("label", ["", "invoke"])
def test_an_image_that_is_not_there_or_another_is_not_run(script, label):
    done, asked = script("test.sh", "exec", LABEL=label)
    assert done.returncode == 1
    assert [line.split()[0] for line in asked] == ["image"]


def test_the_test_of_an_image_pulls_none(script, tmp_path):
    (tmp_path / "elsewhere" / "mine.tif").write_text("a stack")
    (tmp_path / "elsewhere" / "mine").mkdir()
    done, asked = script("test.sh", "exec", "mine.tif", MODEL="mine")
    assert done.returncode == 0, done.stderr
    runs = [line for line in asked if line.startswith("run ")]
    assert len(runs) == 3  # the job, its check, and the cleaning up
    assert all("--pull never" in line for line in runs)
    assert runs[0].endswith("restormer3d:exec --time-limit 10")
    assert "/mine.tif" in runs[1]


def test_two_jobs_are_to_give_the_same_but_on_a_gpu(script):
    done, asked = script("test.sh", "invoke")
    assert done.returncode == 1
    assert "another result" in done.stderr
    served = next(line for line in asked if "--detach" in line)
    assert served.endswith("restormer3d:invoke --time-limit 10 --iterations 25")
    assert all("--pull never" in line for line in asked if line.startswith("run "))
    done, _ = script("test.sh", "invoke", GPUS="--gpus all")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ")


def test_the_image_holds_all_weights_but_those_that_the_model_brings():
    removed = re.findall(r"find src -name '(.+)' -delete", (CONTAINER / "Dockerfile").read_text())
    files = [path.name for path in shipped_file("").glob("*.safetensors")]
    left = {name for name in files if not any(fnmatch(name, pattern) for pattern in removed)}
    assert left == set(SMALL_NETWORKS)
    assert set(files) - left == {SHIPPED_WEIGHTS}
    assert "data/restormer3d.safetensors" in (CONTAINER / "test.sh").read_text()


def test_the_image_is_labeled_and_runs_as_another_user():
    lines = (CONTAINER / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("USER ") and not line.endswith("root") for line in lines)
    assert any("org.grand-challenge.api-method" in line for line in lines)
    assert 'ENTRYPOINT ["python", "-m", "restormer3d.challenge"]' in lines
