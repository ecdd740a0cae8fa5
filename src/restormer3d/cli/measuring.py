"""The commands behind the claims: evaluate, simulate, pretrain."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

from cyclopts import Parameter
from rich.console import Console

from restormer3d.cli.terminal import Engines, Methods, Precisions, app, progress_bars, refuse, say, set_threads

_Arguments = ParamSpec("_Arguments")


def _answering(command: Callable[_Arguments, None]) -> Callable[_Arguments, int]:
    """Let a command end with an exit status, and say what was wrong: 2 for bad arguments, 1 for other failures."""

    @wraps(command)
    def answer(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            return refuse(error)
        except (OSError, RuntimeError) as error:
            say(f"failed: {error}")
            return 1
        return 0

    return answer


@app.command
def evaluate(
    noisy_stack: Path | None = None,
    /,
    *,
    clean: Path | None = None,
    denoised: Path | None = None,
    noisy: Path | None = None,
    masks: Path | None = None,
    frame_rate_hz: float = 30.0,
    real: Annotated[bool, Parameter(negative="")] = False,
    methods: Annotated[list[Methods] | None, Parameter(negative="", consume_multiple=True)] = None,
    iterations: int | None = None,
    blind_spot: str | None = None,
    device: str = "auto",
    engine: Engines = "auto",
    precision: Precisions = "fp32",
    time_limit: float | None = None,
    json: Path | None = None,
) -> int:
    """Score a denoised stack against a clean one, or methods on a real recording by frames they never saw.

    `evaluate --clean C --denoised D` gives the challenge's metrics; `evaluate --real STACK` denoises the even frames
    with each method and predicts the odd ones, which needs no ground truth.

    Parameters
    ----------
    noisy_stack
        With --real: the recording.
    clean
        The clean stack.
    denoised
        The denoised stack.
    noisy
        The noisy stack: its scores are printed beside.
    masks
        TIFF image of labeled ROIs: adds amplitude, rise and decay of the ROIs' events.
    frame_rate_hz
        Frames per second, for the times of events.
    real
        Score without ground truth.
    methods
        With --real: what to compare; by default all.
    iterations
        With --real: Noise2Void iterations of the network.
    blind_spot
        With --real: auto, point, or axes and odd widths such as x3 or x3y3.
    device
        auto, cpu, cuda or mps.
    engine
        What computes the slow operators; by default the one of the device.
    precision
        Of the network's arithmetic.
    time_limit
        With --real: minutes for each denoising.
    json
        File for the scores.
    """
    from restormer3d.evaluation import evaluate, evaluate_real, write_json
    from restormer3d.settings import settings

    try:
        if real and noisy_stack is None:
            raise ValueError("--real needs the recording: evaluate --real STACK")
        if not real and (clean is None or denoised is None):
            raise ValueError("give --clean and --denoised, or --real and a recording")
        chosen = settings(iterations=iterations, blind_spot=blind_spot, engine=engine, precision=precision)
    except ValueError as error:
        return refuse(error)
    try:
        if noisy_stack is not None and real:
            with progress_bars() as progress:
                scores = evaluate_real(
                    noisy_stack,
                    chosen,
                    methods or ["temporal-mean", "gaussian", "svd", "restormer3d"],
                    device=device,
                    time_limit=time_limit,
                    progress=progress,
                    say=say,
                )
        else:
            assert clean is not None
            assert denoised is not None
            scores = evaluate(denoised, clean=clean, noisy=noisy, masks=masks, frame_rate_hz=frame_rate_hz)
    except (OSError, ValueError, RuntimeError) as error:
        say(f"failed: {error}")
        return 1
    if json is not None:
        write_json(json, scores)
    _print_scores(scores)
    return 0


@app.command
@_answering
def simulate(
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    scenes: int = 1,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (300, 128, 128),
    noise_level: Literal[1, 2, 3] = 2,
    gain: float | None = None,
    read_noise: float | None = None,
    seed: int = 0,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write simulated two-photon recordings with their truth: noisy and clean TIFF, ROI masks, traces.

    Parameters
    ----------
    output
        Folder for the files.
    scenes
        Number of recordings.
    shape
        Frames, rows and columns.
    noise_level
        1, 2 or 3: the noise of the calcium imaging challenge.
    gain
        ADU per photon, instead of the level's.
    read_noise
        Standard deviation of the read noise in ADU, instead of the level's.
    seed
        Of the first scene; the same seed gives the same files.
    overwrite
        Replace existing files.
    """
    from restormer3d.evaluation import simulate
    from restormer3d.simulation import noise_parameters

    level_gain, level_variance = noise_parameters(noise_level)
    named = f"level{noise_level}" if gain is None and read_noise is None else ""
    simulate(
        output,
        scenes=scenes,
        shape=shape,
        gain=level_gain if gain is None else gain,
        read_noise_variance=level_variance if read_noise is None else read_noise**2,
        label=named,
        seed=seed,
        overwrite=overwrite,
        say=say,
    )


@app.command
@_answering
def pretrain(
    stacks: Annotated[list[Path] | None, Parameter(negative="")] = None,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    simulate: int = 0,
    recipe: Literal["default", "published"] = "default",
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: Annotated[tuple[int, int, int] | None, Parameter(negative="")] = None,
    seed: int | None = None,
    weights: Path | None = None,
    device: str = "auto",
    engine: Engines = "auto",
    precision: Precisions = "fp32",
    threads: int | None = None,
    workers: int = 0,
    save_every: int = 500,
    resume: Annotated[bool, Parameter(negative="")] = False,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
    config: Path | None = None,
) -> None:
    """Train weights on many noisy stacks, recorded or simulated; never on a clean target.

    Several processes share the batch under torchrun: `torchrun --nproc-per-node 2 -m restormer3d.cli pretrain ...`.

    Parameters
    ----------
    stacks
        Noisy TIFF files, or folders of them.
    output
        Folder of the run: the last weights and those of the best validation, history, and the state to resume from.
    simulate
        Number of different simulated scenes to train on as well, over a wide range of noise and magnification.
    recipe
        Form of the network and settings to start from.
    iterations
        Noise2Void iterations.
    batch_size
        Patches per iteration, of all processes together.
    patch
        Frames, rows and columns of a patch.
    seed
        Of scenes, patches, masks and initial weights.
    weights
        A weights file to go on from.
    device
        auto, cpu, cuda or mps.
    engine
        What computes the slow operators; by default the one of the device.
    precision
        Of the network's arithmetic.
    threads
        CPU threads; by default all cores.
    workers
        Processes that prepare the simulated scenes to come: for a GPU, as many as there are cores.
    save_every
        Iterations between two savings, each with a validation.
    resume
        Go on with the run in the output folder: the result is that of an uninterrupted run.
    tensorboard
        Write losses and validations for TensorBoard, too, into the folder's "tensorboard".
    config
        TOML file with tables [model] and [training].
    """
    from restormer3d.arithmetic import forced_engine, torch_device, usable
    from restormer3d.checkpoint import load_weights
    from restormer3d.distributed import is_first, joined_processes
    from restormer3d.pretraining import pretrain
    from restormer3d.settings import pretraining_settings

    set_threads(threads)
    model, training = pretraining_settings(
        recipe, iterations=iterations, batch_size=batch_size, patch=patch, seed=seed, config_file=config
    )
    with forced_engine(engine), joined_processes(torch_device(device)) as place, progress_bars() as progress:
        _, usable_precision = usable(engine, precision, place)
        path = pretrain(
            stacks or [],
            output,
            training,
            model,
            simulate=simulate,
            weights=None if weights is None else load_weights(weights),
            device=place,
            precision=usable_precision,
            resume=resume,
            save_every=save_every,
            workers=workers,
            tensorboard=tensorboard,
            progress=progress if is_first() else None,
        )
        if is_first():
            say(f"weights: {path}, and those of the best validation in best.safetensors beside it")


@app.command
@_answering
def pretrain_image(
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    iterations: int = 5000,
    seed: int = 1,
    device: str = "cpu",
    widths: Annotated[tuple[int, int, int], Parameter(negative="")] = (32, 64, 128),
    batch_size: int = 16,
    workers: int = 0,
    seconds: float | None = None,
    threads: int | None = None,
    save_every: int = 500,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train the small network that denoises the static image, on noisy images of simulated scenes.

    Parameters
    ----------
    output
        Folder of the run: weights, history, and the state to resume from.
    iterations
        Batches of patches; with --seconds, at most.
    seed
        Of images, noise and initial weights.
    device
        cpu or cuda.
    widths
        Channels of the network's three levels.
    batch_size
        Patches per iteration.
    workers
        Processes that draw images, all but one core on a GPU machine; with 0, the process that trains draws them.
    seconds
        End by then: the learning rate falls with the time that has passed.
    threads
        CPU threads; by default all cores.
    save_every
        Iterations between two savings, each with a validation.
    resume
        Go on with the run in the output folder: on the CPU, without workers and --seconds, the result is that of an
        uninterrupted run.
    """
    from restormer3d.image_training import pretrain_image

    set_threads(threads)
    with progress_bars() as progress:
        path = pretrain_image(
            output,
            iterations,
            seed=seed,
            resume=resume,
            save_every=save_every,
            device=device,
            widths=widths,
            batch_size=batch_size,
            workers=workers,
            seconds=seconds,
            progress=progress,
        )
    say(f"weights: {path}")


@app.command
@_answering
def pretrain_footprints(
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    iterations: int = 10_000,
    scenes: int = 1000,
    seed: int = 1,
    device: str = "cpu",
    precision: Precisions = "fp32",
    widths: Annotated[tuple[int, int, int], Parameter(negative="")] = (32, 64, 128),
    batch_size: int = 32,
    workers: int = 0,
    seconds: float | None = None,
    threads: int | None = None,
    save_every: int = 500,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train the small network that denoises footprints of activity, on simulated recordings that are denoised first.

    Parameters
    ----------
    output
        Folder of the run: scenes, weights, history, and the state to resume from.
    iterations
        Batches of footprints; with --seconds, at most.
    scenes
        Simulated recordings, one in twenty of them for validation.
    seed
        Of scenes, batches and initial weights.
    device
        cpu or cuda, for the training; scenes are prepared on the CPU.
    precision
        Of the training's arithmetic: bf16 is faster on CPUs with matrix units.
    widths
        Channels of the network's three levels.
    batch_size
        Footprints per iteration.
    workers
        Processes that prepare the scenes; with 0, the process that trains prepares them.
    seconds
        End the training by then, scenes aside: the learning rate falls with the time that has passed.
    threads
        CPU threads; by default all cores.
    save_every
        Iterations between two savings, each with a validation.
    resume
        Go on with the run in the output folder: on the CPU and without --seconds, the result is that of an
        uninterrupted run.
    """
    from restormer3d.footprint_training import pretrain_footprints

    set_threads(threads)
    with progress_bars() as progress:
        path = pretrain_footprints(
            output,
            iterations,
            scenes=scenes,
            seed=seed,
            resume=resume,
            save_every=save_every,
            device=device,
            precision=precision,
            widths=widths,
            batch_size=batch_size,
            workers=workers,
            seconds=seconds,
            progress=progress,
        )
    say(f"weights: {path}")


def _print_scores(scores: dict[str, Any], indent: str = "") -> None:
    """Print nested scores, one a line."""
    out = Console(highlight=False, soft_wrap=True)
    for name, value in scores.items():
        if isinstance(value, dict):
            out.print(f"{indent}{name}", markup=False)
            _print_scores(value, indent + "  ")
        elif isinstance(value, (int, float)):
            out.print(f"{indent}{name}: {value:.4g}", markup=False)
