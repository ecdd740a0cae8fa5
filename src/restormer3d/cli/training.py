"""The commands that make weights: pretrain, pretrain-image, pretrain-activity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from restormer3d.cli.terminal import answering, app, files_named, progress_bars, say
from restormer3d.config import Engine, Precision
from restormer3d.threads import set_threads


@app.command
@answering
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
    engine: Engine = "auto",
    precision: Precision = "fp32",
    threads: int | None = None,
    workers: int = 0,
    save_every: int = 500,
    resume: Annotated[bool, Parameter(negative="")] = False,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
    config: Path | None = None,
) -> None:
    """Train weights on many noisy stacks, recorded or simulated; never on a clean target.

    By default as the algorithm's page says, by Noise2Void. The shipped weights learned from pairs of noisy recordings
    of simulated scenes instead, to which the mixture of filters is fitted as well: simulated_target =
    "second_recording" under [training] in the configuration file.

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
        A weights file to go on from; by default, as with "none", training starts anew.
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
            files_named(stacks or []),
            output,
            training,
            model,
            simulate=simulate,
            weights=None if weights in (None, Path("none")) else load_weights(weights),
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
@answering
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
    from restormer3d.small_networks.image_training import pretrain_image

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
@answering
def pretrain_activity(
    what: Literal["footprints", "courses"],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    iterations: int = 10_000,
    scenes: int = 1000,
    seed: int = 1,
    device: str = "cpu",
    precision: Precision = "fp32",
    widths: Annotated[tuple[int, int, int], Parameter(negative="")] = (32, 64, 128),
    batch_size: int = 8,
    workers: int = 0,
    seconds: float | None = None,
    threads: int | None = None,
    save_every: int = 500,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a small network that denoises activity, on simulated recordings that are denoised first.

    Parameters
    ----------
    what
        The network for footprints, or that for courses in time.
    output
        Folder of the run: scenes, weights, history, and the state to resume from.
    iterations
        Batches; with --seconds, at most.
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
        Scenes per iteration: four footprints, or all courses, of each.
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
    from restormer3d.small_networks.activity_training import pretrain_activity

    set_threads(threads)
    with progress_bars() as progress:
        path = pretrain_activity(
            what,
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
