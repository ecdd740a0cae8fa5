"""One job of the platform: every stack of the input socket is denoised into the output socket.

Whatever happens to one stack, the others' results are handed over; whatever the machine's speed, each stack gets a
result before its share of the time is over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from restormer3d.arithmetic import torch_device
from restormer3d.challenge.images import denoised_mha, set_resolution_unit
from restormer3d.checkpoint import SMALL_NETWORKS, shipped_weights
from restormer3d.config import TrainingConfig
from restormer3d.progress import Say
from restormer3d.selection import check_iterations
from restormer3d.settings import Pretrained, Settings, build_model, settings
from restormer3d.sidecar import weights_record
from restormer3d.workflow import FAILURES, denoise_files, share_of_time

Watch = Callable[[str, int, int], None]

INPUT_SOCKET = "stacked-neuron-images-with-noise"
OUTPUT_SOCKET = "stacked-neuron-images-with-reduced-noise"
SUFFIXES = (".tif", ".tiff", ".mha")
RECORDS = "restormer3d"  # folder in the output folder; a socket's own folder may hold nothing but images

_TARDINESS = 0.1  # share of a time limit by which the network may end late before it is given up
_BEFORE_THE_NETWORK = {"check", "movement", "move"}  # stages that say nothing of its speed
_EVIDENCE = 0.02  # share of a time limit after which the pace of a stage counts
_SECOND_TRY = 0.05  # share of a time limit that has to be left for the network without training


class JobError(ValueError):
    """An input folder that is not as the platform lays it out; the message says what was found."""


class TooSlowError(RuntimeError):
    """The network falls behind its plan: it would end after the time limit.

    Attributes
    ----------
    prepared : float
        Seconds that it took before its first step.
    """

    def __init__(self, message: str, prepared: float = 0.0) -> None:
        super().__init__(message)
        self.prepared = prepared


@dataclass(frozen=True)
class Loaded:
    """What is read once for all jobs of a process.

    Attributes
    ----------
    chosen : Settings
        Of every stack.
    pretrained : Pretrained
        The weights that every stack starts from.
    device : torch.device
        Where to compute.
    """

    chosen: Settings
    pretrained: Pretrained
    device: torch.device


def load(model: Path, iterations: int | None, config: Path | None, say: Say, warn: Say) -> Loaded:
    """Read the weights: of the model folder if it has any, else of the package; else training starts from scratch.

    Raises
    ------
    ValueError
        If the weights or a setting cannot be used; the message names them.
    """
    weights = find_weights(model)
    if weights is None:
        found = f"{model} holds no weights of Restormer3D" if model.is_dir() else f"there is no folder {model}"
        rest = "the weights in the package are used" if shipped_weights() else "training starts from scratch"
        warn(f"{found}: {rest}")
    chosen = settings(weights=weights, iterations=iterations, config_file=config)
    device = torch_device("auto")
    loaded = Loaded(chosen, Pretrained(build_model(chosen), weights_record(chosen)), device)
    say(f"ready on {device}, weights: {chosen.weights or 'none'}")
    return loaded


def find_weights(model: Path) -> Path | None:
    """Return the first weights file by name in a folder or below it, where the platform unpacks the model's tarball.

    Those of the small networks are in the package, and left aside here.
    """
    files = (path for path in model.rglob("*.safetensors") if path.is_file() and not path.name.startswith("."))
    found = (path for path in files if path.name not in SMALL_NETWORKS)
    return min(found, key=lambda path: (path.name, path), default=None)


def run_job(
    loaded: Loaded, input_folder: Path, output_folder: Path, minutes: float, started: float, say: Say, warn: Say
) -> dict[str, str]:
    """Denoise every stack of the input socket.

    Parameters
    ----------
    loaded : Loaded
        From :func:`load`; left as it is.
    input_folder, output_folder : Path
        Of the platform: /input and /output.
    minutes : float
        Time limit of the job, shared by the stacks' sizes.
    started : float
        When the time began, by `time.monotonic`.
    say, warn : function
        Called with a line of log, and with a line that somebody should see.

    Returns
    -------
    dict of str to str
        Names of the stacks that failed, and one line of reason for each; empty if all went well.

    Raises
    ------
    JobError
        If there is no stack to denoise.
    """
    failures: dict[str, str] = {}
    sources = input_files(input_folder, warn)
    deadline = started + 60 * minutes
    for number, source in enumerate(sources):
        try:
            seconds = share_of_time(sources[number:], deadline)
            denoise_one(loaded, source, output_folder, seconds, say)
        except FAILURES as error:
            failures[source.name] = one_line(error)
    return failures


def input_files(folder: Path, warn: Say) -> list[Path]:
    """Return the stacks of the input socket, in the order of their names.

    Raises
    ------
    JobError
        If there are none.
    """
    place = socket_folder(folder)
    if not place.exists():
        beside = ", ".join(sorted(path.name for path in place.parent.glob("*"))) or "nothing"
        raise JobError(f"{place}: no such folder: the socket {INPUT_SOCKET} is missing, found {beside} in its place")
    entries = [place] if place.is_file() else sorted(place.iterdir())
    visible = [path for path in entries if not path.name.startswith(".")]
    stacks = [path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file()]
    others = ", ".join(path.name for path in visible if path not in stacks)
    if not stacks:
        raise JobError(f"{place}: expected *.tif, *.tiff or *.mha files, found {others or 'an empty folder'}")
    if others:
        warn(f"left out, being neither *.tif nor *.tiff nor *.mha: {others}")
    return stacks


def socket_folder(folder: Path) -> Path:
    """Return the folder of the input socket: what inputs.json says if it is there, else the usual one.

    Raises
    ------
    JobError
        If inputs.json can't be understood, or the socket is not among those it lists.
    """
    usual, inputs = f"images/{INPUT_SOCKET}", folder / "inputs.json"
    if not inputs.exists():
        return folder / usual
    try:
        entries = json.loads(inputs.read_text())
        # The platform calls it a socket now; it was called an interface.
        slugs = [(entry.get("socket") or entry["interface"])["slug"] for entry in entries]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise JobError(f"{inputs}: expected a JSON list of sockets with their slugs ({one_line(error)})") from error
    if INPUT_SOCKET not in slugs:
        raise JobError(f"{inputs}: expected the socket {INPUT_SOCKET}, found {', '.join(map(str, slugs)) or 'none'}")
    entry = entries[slugs.index(INPUT_SOCKET)]
    described = entry.get("socket") or entry["interface"]
    return folder / str(entry.get("relative_path") or described.get("relative_path") or usual).lstrip("/")


def denoise_one(loaded: Loaded, source: Path, output_folder: Path, seconds: float, say: Say) -> None:
    """Denoise one stack to the file of the same name in the output socket, with its sidecar outside of the socket."""
    target = output_folder / "images" / OUTPUT_SOCKET / source.name
    if source.suffix.lower() == ".mha":
        with denoised_mha(source, target) as (noisy, denoised):
            record = _denoise_tiff(loaded, noisy, denoised, seconds, say)
            record |= {"original": {"input": str(source), "output": str(target)}}
    else:
        record = _denoise_tiff(loaded, source, target, seconds, say)
        set_resolution_unit(target)
    records = output_folder / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    (records / f"{source.name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _denoise_tiff(loaded: Loaded, source: Path, target: Path, seconds: float, say: Say) -> dict[str, Any]:
    """Denoise one TIFF file and return the sidecar.

    If the network turns out to be too slow, it is tried once more without training, if it has weights, in the time that
    is left; then the Gaussian filter takes over. The sidecar gives the reasons.
    """
    started = time.monotonic()
    reasons: dict[str, str] = {}
    failure = _by_network(loaded, loaded.chosen, source, target, seconds, say)
    left = seconds - (time.monotonic() - started)
    if isinstance(failure, TooSlowError) and loaded.chosen.weights and left > _least_time(seconds, failure.prepared):
        reasons["instead_of_training"] = str(failure)
        say(f"{source.name}: too slow ({failure}): the network as it is, without training, in {left / 60:.1f} min")
        failure = _by_network(loaded, _untrained(loaded.chosen), source, target, left, say)
    if isinstance(failure, TooSlowError):
        reasons["instead_of_the_network"] = str(failure)
        say(f"{source.name}: too slow for the network ({failure}): denoised with the Gaussian filter instead")
        failed = denoise_files([source], target, _at_rest(loaded.chosen), method="gaussian", overwrite=True, say=say)
        failure = failed.get(source)
    if failure is not None:
        raise failure
    sidecar = target.with_name(target.name + ".json")
    record = json.loads(sidecar.read_text())
    sidecar.unlink()
    return record | reasons


def _by_network(
    loaded: Loaded, chosen: Settings, source: Path, target: Path, seconds: float, say: Say
) -> Exception | None:
    """Denoise one TIFF file by the network, and return what went wrong."""
    if seconds <= 0:
        return TooSlowError("no time was left for it")
    failures = denoise_files(
        [source],
        target,
        chosen,
        device=str(loaded.device),
        time_limit=seconds / 60,
        overwrite=True,
        pretrained=loaded.pretrained,
        progress=watch(seconds, chosen.training, say),
        say=say,
    )
    return failures.get(source)


def _least_time(seconds: float, prepared: float) -> float:
    """Of a limit of `seconds`, what has to be left for a second try; the machine may prepare it at half the speed."""
    return max(0.0, _SECOND_TRY * seconds, 2 * prepared)


def _untrained(chosen: Settings) -> Settings:
    """The same settings, but for the weights to be taken as they are."""
    return replace(chosen, training=chosen.training.model_copy(update={"warmup_iterations": 0, "iterations": 0}))


def _at_rest(chosen: Settings) -> Settings:
    """The same settings, but for movement, which takes time to follow."""
    return replace(chosen, inference=chosen.inference.model_copy(update={"movement": "none"}))


def watch(seconds: float, training: TrainingConfig, say: Say) -> Watch:
    """Make a progress function that logs every tenth of a stage, and gives up a network that is too slow.

    The plan of a job comes from a calibration of a few seconds. If the machine gets slower after it, the network would
    run into the platform's wall, and there would be no result at all. A training that stops early may do so at its next
    check, and is foreseen as far as that.
    """
    stops_early = training.stop_early and training.held_out > 0
    started = time.monotonic()
    first: dict[str, tuple[float, int]] = {}  # time and steps of a stage when it was first heard of
    last: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage.partition(",")[0] in _BEFORE_THE_NETWORK:
            return
        now = time.monotonic()
        since, before = first.setdefault(stage, (now, done))
        if 10 * done // total > 10 * last.get(stage, 0) // total:
            say(f"{stage}: {done} of {total}, {now - started:.0f} s")
        last[stage] = done
        if done == before or now - since < _EVIDENCE * seconds:
            return
        foreseen = _next_check(done, total) if stops_early and stage.startswith("train") else total
        end = now - started + (now - since) / (done - before) * (foreseen - done)
        if end > seconds * (1 + _TARDINESS):
            prepared = next(iter(first.values()))[0] - started
            raise TooSlowError(f"{stage}: {done} of {total}: the network would end after {end / 60:.1f} min", prepared)

    return progress


def _next_check(done: int, total: int) -> int:
    """Iterations after which a training next looks whether to end."""
    return min((check for check in check_iterations(total) if check > done), default=total)


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
