"""Pretraining learns from noisy stacks alone, leaves usable weights, and resumes to the same ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from restormer3d import pretraining, scenes
from restormer3d import training as training_module
from restormer3d.checkpoint import CheckpointError, load_weights, weights_notes
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.pretraining import pretrain, stack_files
from restormer3d.stacks import StackError

from .conftest import TINY

SCENE = (24, 24, 24)


SETTINGS = TrainingConfig(
    patch=(16, 16, 16), batch_size=2, warmup_iterations=1, iterations=5, blind_spot="auto", ema_decay=0.9
)


@pytest.fixture
def training() -> TrainingConfig:
    return SETTINGS


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_validation(monkeypatch):
    monkeypatch.setattr("restormer3d.pretraining._VALIDATION_SHAPE", (16, 16, 16))


def run(folder, training, stacks=(), *, simulate=50, **options):
    model = ModelConfig(**TINY, start="filters")
    return pretrain(stacks, folder, training, model, simulate=simulate, scene_shape=SCENE, save_every=2, **options)


def test_a_run_leaves_weights_history_and_state(noisy_file, training, tmp_path):
    path = run(tmp_path / "run", training, [noisy_file])
    assert load_weights(path).config.start == "filters"
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in history] == ["warmup"] + 5 * ["noise2void"]
    scores = {f"{name}_level{level}" for name in ("stsnr", "activity_snr") for level in (1, 2, 3)}
    assert set(history[-1]["validation"]) == scores


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


def run_and_die(folder: str, stack: str, moment: str) -> None:
    """In a process of its own, which the moment ends."""
    torch.set_num_threads(1)
    pretraining._VALIDATION_SHAPE = (16, 16, 16)
    save_state = training_module.save_state

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def save(path, state):
        if len(state["history"]) == 4:  # weights and history of iteration 4 are written, the state is that of 2
            die()
        save_state(path, state)

    if moment == "saving":
        training_module.save_state = save
    run(Path(folder), SETTINGS, [Path(stack)], progress=die_at_five(die) if moment == "training" else None)


def die_at_five(die):
    return lambda _, done, __: die() if done == 5 else None


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_no_kill_changes_the_weights(noisy_file, tmp_path, moment, one_thread):
    run(tmp_path / "whole", SETTINGS, [noisy_file])
    code = "import sys; from tests.test_pretraining import run_and_die; run_and_die(*sys.argv[1:])"
    arguments = [str(tmp_path / "killed"), str(noisy_file), moment]
    repository = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], check=False, cwd=repository)
    assert killed.returncode == -signal.SIGKILL
    run(tmp_path / "killed", SETTINGS, [noisy_file], resume=True)
    histories = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        histories.append([{k: v for k, v in entry.items() if k != "seconds"} for entry in entries])
    assert histories[0] == histories[1]
    for name in ("weights.safetensors", "best.safetensors"):
        models = [load_weights(tmp_path / folder / name) for folder in ("whole", "killed")]
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(a, b)


def test_scenes_of_other_processes_are_the_same(training, tmp_path, one_thread):
    """More scenes than the row has, so that it repeats; a run that resumes starts its processes anew."""
    longer = training.model_copy(update={"iterations": 10})
    here = load_weights(run(tmp_path / "here", longer, simulate=3))

    def kill(_, done, __):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "elsewhere", longer, simulate=3, workers=2, progress=kill)
    elsewhere = load_weights(run(tmp_path / "elsewhere", longer, simulate=3, workers=2, resume=True))
    for a, b in zip(here.parameters(), elsewhere.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not multiprocessing.active_children()


def test_a_scene_is_prepared_once_while_iterations_draw_from_it(training, monkeypatch):
    prepared = []

    class Pool:
        def submit(self, _, number):
            prepared.append(number)
            done = Future()
            done.set_result(number)
            return done

    monkeypatch.setattr(scenes, "process_pool", lambda *_: nullcontext(Pool()))
    row = scenes.Scenes(1, 1000, (16, 16, 16), 0, (16, 16, 16))
    with scenes.scenes_ahead(torch.nn.Identity(), row, workers=2) as scene:
        for iteration in range(400):
            assert [scene(number) for number in row.pool(iteration)] == row.pool(iteration)
    assert sorted(prepared) == list(range(len(prepared)))
    assert len(prepared) < 100


def die(_: int) -> None:
    os._exit(1)


def test_processes_that_die_are_no_riddle(training, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "_prepare", die)
    with pytest.raises(RuntimeError, match="try fewer workers"):
        run(tmp_path, training, workers=1)
    with pytest.raises(ValueError, match="workers"):
        run(tmp_path / "other", training, workers=-1)


def test_the_best_validation_is_kept(training, tmp_path, monkeypatch):
    scores = iter([(1.0, 2.0, 3.0), (3.0, 3.0, 3.0), (4.0, 4.0, 0.0)])
    levels = ("stsnr_level1", "stsnr_level2", "stsnr_level3")
    monkeypatch.setattr(pretraining, "validate", lambda *_: dict(zip(levels, next(scores), strict=True)))
    last = run(tmp_path, training)
    assert weights_notes(last)["iteration"] == 6
    assert weights_notes(tmp_path / "best.safetensors")["iteration"] == 4


def test_thinning_is_an_augmentation_of_recorded_stacks(noisy_file, training, tmp_path):
    thinned = training.model_copy(update={"thinning": 0.05})

    def losses(name, config, **sources):
        run(tmp_path / name, config, **sources)
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    recorded = {"stacks": [noisy_file], "simulate": 0}
    first = losses("first", thinned, **recorded)
    assert first == losses("again", thinned, **recorded)
    assert first != losses("as recorded", training, **recorded)
    assert losses("simulated", training) == losses("simulated, too", thinned)


def test_tensorboard_gets_every_iteration_once(training, tmp_path, monkeypatch):
    written, folders = [], set()

    class Writer:
        def __init__(self, folder, purge_step):
            folders.add(folder)
            self.first = purge_step

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, name, value, step, walltime):
            assert step >= self.first
            written.append((name, step))

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run(tmp_path, training, tensorboard=True)
    assert folders == {str(tmp_path / "tensorboard")}
    expected = [(name, step) for step in range(1, 7) for name in ("loss", "learning_rate")]
    names = [f"validation/{name}_level{level}" for name in ("stsnr", "activity_snr") for level in (1, 2, 3)]
    expected += [(name, step) for step in (2, 4, 6) for name in names]
    assert sorted(written) == sorted(expected)


def test_missing_tensorboard_is_said(training, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'restormer3d\[tensorboard\]'"):
        run(tmp_path, training, tensorboard=True)


def test_folders_are_searched_for_tiff(noisy_file, tmp_path):
    assert stack_files([tmp_path]) == [noisy_file]
    for name in ("._shadow.tif", "notes.txt", "large.btf"):
        (tmp_path / name).touch()
    assert stack_files([tmp_path]) == sorted([noisy_file, tmp_path / "large.btf"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="without TIFF"):
        stack_files([empty])


def test_nothing_to_train_on_is_said(training, tmp_path):
    with pytest.raises(ValueError, match="--simulate"):
        pretrain([], tmp_path, training, ModelConfig(**TINY))


def test_a_recording_that_cannot_be_used_is_named_at_once(noisy_stack, training, tmp_path):
    broken = noisy_stack.astype(np.float32)
    broken[3, 2, 1] = np.nan
    tifffile.imwrite(tmp_path / "broken.tif", broken)
    with pytest.raises(StackError, match=r"broken\.tif: expected finite values"):
        run(tmp_path / "run", training, [tmp_path / "broken.tif"])


def test_a_run_does_not_go_on_with_other_data(noisy_file, training, tmp_path):
    run(tmp_path / "run", training, [noisy_file])
    with pytest.raises(CheckpointError, match="simulated_scenes = 50, asked for is 7"):
        run(tmp_path / "run", training, [noisy_file], simulate=7, resume=True)
    with pytest.raises(CheckpointError, match="of another network"):
        pretrain([noisy_file], tmp_path / "run", training, ModelConfig(**TINY), simulate=50, resume=True)
