"""The commands of every day: denoise, inspect, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from restormer3d.cli.terminal import answering, app, files_named, progress_bars, refuse, say
from restormer3d.config import Engine, Method, Precision
from restormer3d.threads import set_threads


@app.command
def denoise(
    stacks: list[Path],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    recipe: Literal["default", "published"] = "default",
    method: Method = "restormer3d",
    weights: str | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: Annotated[tuple[int, int, int] | None, Parameter(negative="")] = None,
    overlap: float | None = None,
    seed: int | None = None,
    blind_spot: str | None = None,
    symmetries: Literal[1, 4, 8] | None = None,
    planes: Literal["auto"] | int | None = None,
    movement: Literal["none", "smooth", "all"] | None = None,
    sigma: Annotated[tuple[float, float] | None, Parameter(negative="")] = None,
    device: str = "auto",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    threads: int | None = None,
    time_limit: float | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    save_weights: Path | None = None,
    config: Path | None = None,
) -> int:
    """Denoise TIFF stacks: same shape, same dtype, each from itself alone.

    Parameters
    ----------
    stacks
        Noisy TIFF files, each with axes (T, H, W).
    output
        A folder that receives a file of each input's name; with one stack it may be a file name.
    recipe
        "default" measured best; "published" is the published algorithm to the letter, which needs a GPU and weights
        that were trained for long to be worth it.
    method
        The network, or one of the plain filters it has to beat (seconds instead of minutes), which take no notice of
        the network's options.
    weights
        A weights file to start from, or "none" to train from scratch; or a folder with weights of any of the networks
        under the names that they have in the package (such as courses.safetensors). By default the pretrained weights;
        with --recipe published none.
    iterations
        Most Noise2Void iterations on each stack; the default recipe ends where held-out voxels gain no more.
    batch_size
        Patches per iteration.
    patch
        Frames, rows and columns of training patches and inference windows.
    overlap
        Share of a window that the next one covers again, 0 to 0.9: less is faster and worse.
    seed
        Of patches, masks and initial weights: the same seed on one device gives the same result.
    blind_spot
        "auto" measures how far the noise is correlated; "point", or axes and odd widths such as x3 or x3y3.
    symmetries
        Windows averaged over so many flips (4) or flips and quarter turns (8); inference takes as many times longer.
    planes
        Planes, or channels, that a stack shows in turns, frame by frame, are denoised apart; by default ("auto") it is
        found out how many there are, and 1 takes all frames as of one.
    movement
        Movement of the field that denoising follows, to put it back: by default what goes on over several frames
        ("smooth"), "all" also what jitters from one frame to the next; "none" takes every pixel for the same tissue all
        along.
    sigma
        Widths of the Gaussian filter in frames and pixels; by default chosen by held-out frames.
    device
        auto, cpu, cuda or mps.
    engine
        What computes the slow operators: by default the one made for the device; "reference" is plain PyTorch.
    precision
        Of the network's arithmetic. "tf32" is faster on NVIDIA GPUs and changes nothing elsewhere; "bf16" is not for
        the CPU engine. docs/speed.md has what they cost in quality. The small networks compute in float32 in any case.
    threads
        CPU threads; by default all cores.
    time_limit
        Minutes for all stacks together: iterations and overlap are reduced to end in time. A stack for which they
        suffice for no network is denoised with the Gaussian filter, which is said. Filters take no notice of it.
    overwrite
        Replace existing outputs, sidecars and weights.
    save_weights
        Keep the weights trained on the stack (one stack only).
    config
        TOML file with tables [model], [training], [inference]; their keys are listed in docs/config.md.
    """
    try:
        from restormer3d.arithmetic import torch_device, usable
        from restormer3d.settings import check_time_limit, settings
        from restormer3d.workflow import denoise_files, output_files

        set_threads(threads)
        stacks = files_named(stacks)
        on = torch_device(device)
        output_files(stacks, output)
        if save_weights is not None and method != "restormer3d":
            raise ValueError(f"--save-weights: --method {method} is a filter, which has none")
        if save_weights is not None and len(stacks) > 1:
            raise ValueError("--save-weights keeps the weights of one stack: give one stack")
        stands_in = method == "restormer3d" and time_limit is not None
        if sigma is not None and method != "gaussian" and not stands_in:
            raise ValueError(f"--sigma sets the widths of the Gaussian filter: --method {method} has none")
        check_time_limit(time_limit)
        chosen = settings(
            recipe,
            weights,
            iterations=iterations,
            batch_size=batch_size,
            patch=patch,
            overlap=overlap,
            seed=seed,
            blind_spot=blind_spot,
            symmetries=symmetries,
            planes=planes,
            movement=movement,
            sigma=sigma,
            precision=precision,
            engine=engine,
            config_file=config,
        )
        usable(engine, precision, on)
    except (OSError, ValueError) as error:
        return refuse(error)
    with progress_bars() as progress:
        failures = denoise_files(
            stacks,
            output,
            chosen,
            method=method,
            device=device,
            time_limit=time_limit,
            overwrite=overwrite,
            save_weights_to=save_weights,
            progress=progress,
            say=say,
        )
    if failures:
        say(f"{len(failures)} of {len(stacks)} stacks failed")
    return 1 if failures else 0


@app.command
def inspect(stack: Path) -> int:
    """Print what a stack is, how noisy it is, and what `denoise` would do with it.

    Parameters
    ----------
    stack
        A TIFF file.
    """
    from restormer3d.inspection import describe, inspect

    try:
        facts = inspect(stack)
    except (OSError, ValueError, RuntimeError) as error:
        say(f"failed: {error}")
        return 1
    Console(highlight=False, soft_wrap=True).print(describe(facts), markup=False)
    return 0


@app.command
@answering
def demo(*, output: Annotated[Path, Parameter(alias="-o")] = Path("demo"), minutes: float = 4.0) -> None:
    """Denoise a small real recording that ships with the package, and draw it before and after.

    Parameters
    ----------
    output
        Folder for the denoised TIFF and the picture.
    minutes
        Time limit of the denoising.
    """
    from restormer3d.demo import demo

    with progress_bars() as progress:
        demo(output, minutes=minutes, progress=progress, say=say)
