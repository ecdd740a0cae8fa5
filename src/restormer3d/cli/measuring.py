"""The commands behind the claims: evaluate, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from restormer3d.cli.terminal import answering, app, progress_bars, refuse, say
from restormer3d.config import Engine, Method, Precision
from restormer3d.threads import set_threads


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
    methods: Annotated[list[Method] | None, Parameter(negative="", consume_multiple=True)] = None,
    iterations: int | None = None,
    blind_spot: str | None = None,
    device: str = "auto",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    threads: int | None = None,
    time_limit: float | None = None,
    json: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
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
    threads
        CPU threads; by default all cores.
    time_limit
        With --real: minutes for each denoising.
    json
        File for the scores.
    overwrite
        Replace an existing file of scores.
    """
    from restormer3d.arithmetic import torch_device, usable
    from restormer3d.evaluation import evaluate, evaluate_real, write_json
    from restormer3d.settings import check_time_limit, settings
    from restormer3d.workflow import check_file

    try:
        set_threads(threads)
        if real and noisy_stack is None:
            raise ValueError("--real needs the recording: evaluate --real STACK")
        if noisy_stack is not None and not real:
            raise ValueError(f"{noisy_stack}: give it as --noisy, or --real for a recording without a clean stack")
        if not real and (clean is None or denoised is None):
            raise ValueError("give --clean and --denoised, or --real and a recording")
        if real and any(path is not None for path in (clean, denoised, noisy, masks)):
            raise ValueError("--real scores a recording that has no clean stack: leave out what belongs to one")
        if not real and any(value is not None for value in (methods, iterations, blind_spot, time_limit)):
            raise ValueError("--methods, --iterations, --blind-spot and --time-limit belong to --real")
        check_time_limit(time_limit)
        chosen = settings(iterations=iterations, blind_spot=blind_spot, engine=engine, precision=precision)
        usable(engine, precision, torch_device(device))
    except ValueError as error:
        return refuse(error)
    inputs = tuple(path for path in (noisy_stack, clean, denoised, noisy, masks) if path is not None)
    try:
        if json is not None:
            check_file(json, overwrite, inputs)
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
        if json is not None:
            write_json(json, scores)
        _print_scores(scores)  # last: whoever reads along may go away
        if any(isinstance(score, dict) and "failed" in score for score in scores.values()):
            return 1
    except (OSError, ValueError, RuntimeError) as error:
        say(f"failed: {error}")
        return 1
    return 0


@app.command
@answering
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

    if read_noise is not None and not 0 <= read_noise < float("inf"):
        raise ValueError(f"read-noise: expected a standard deviation of at least 0, got {read_noise:g}")
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


def _print_scores(scores: dict[str, Any], indent: str = "") -> None:
    """Print nested scores, one a line."""
    out = Console(highlight=False, soft_wrap=True)
    for name, value in scores.items():
        if isinstance(value, dict):
            out.print(f"{indent}{name}", markup=False)
            _print_scores(value, indent + "  ")
        elif isinstance(value, str):
            out.print(f"{indent}{name}: {value}", markup=False)
        elif isinstance(value, (int, float)):
            out.print(f"{indent}{name}: {value:.4g}", markup=False)
