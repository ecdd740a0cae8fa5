"""Files in, files out: one stack or many, each with its sidecar."""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from restormer3d.arithmetic import forced_engine, torch_device
from restormer3d.checkpoint import replacing, save_weights
from restormer3d.config import Engine, Method, Precision, Recipe
from restormer3d.denoising import array_and_record, check_known, start_denoising
from restormer3d.progress import Progress, Say, silent
from restormer3d.settings import Pretrained, Settings, check_time_limit, settings
from restormer3d.sidecar import as_json, sidecar
from restormer3d.stacks import (
    TIFF_SUFFIXES,
    TiffStack,
    check_folder,
    check_output,
    check_stack,
    open_stack,
    too_coarse,
    without_missing,
    write_stack,
)

# What one stack may run into without taking the others along.
FAILURES = (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError, AttributeError)


def denoise(
    stack: np.ndarray | TiffStack | str | Path,
    *,
    recipe: Recipe = "default",
    method: Method = "restormer3d",
    weights: str | Path | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: tuple[int, int, int] | None = None,
    overlap: float | None = None,
    seed: int | None = None,
    blind_spot: str | None = None,
    symmetries: int | None = None,
    planes: int | Literal["auto"] | None = None,
    movement: Literal["none", "smooth", "all"] | None = None,
    device: str = "auto",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    time_limit: float | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> np.ndarray:
    """Denoise one stack from itself alone.

    Parameters
    ----------
    stack : numpy.ndarray, TiffStack or path
        Noisy intensities with shape (T, H, W), or the TIFF file that holds them; an open one stays open.
    recipe : {"default", "published"}
        Named settings; see :func:`restormer3d.config.recipe`.
    method : {"restormer3d", "gaussian", "temporal-mean", "svd"}
        The network, or one of the plain filters it has to beat.
    weights : path or "none", optional
        Where training starts: a weights file, or a folder as :func:`restormer3d.settings.settings` takes it. By default
        the weights in the package; with the published recipe "none", from scratch.
    iterations, batch_size, patch, overlap, seed, blind_spot, symmetries, planes, movement : optional
        Replace the recipe's; see :func:`restormer3d.settings.settings`.
    device : {"auto", "cpu", "cuda", "mps"}
        Where to compute.
    engine : {"auto", "reference", "cpu", "cuda"}
        What computes the slow operators; by default the one of the device. See :mod:`restormer3d.ops`.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic. "tf32" changes nothing but on NVIDIA GPUs, "bf16" is not for the CPU engine.
    time_limit : float, optional
        Minutes; iterations and overlap are reduced so that the work ends in time. Where no network would, the Gaussian
        filter stands in, with a warning.
    progress : function, optional
        Called with (stage, done, total).
    say : function, optional
        Called with one line of text for the user, such as `print`.

    Returns
    -------
    numpy.ndarray
        Denoised intensities: same shape, same dtype, rounded and clipped to the dtype's range.

    Warns
    -----
    UserWarning
        If the Gaussian filter stands in for the network.

    Raises
    ------
    StackError
        If the stack cannot be denoised: not (T, H, W), not numbers, constant, infinite, half NaN, unreadable.
    ValueError
        If a setting is out of range.
    TypeError
        If the stack is something else.
    """
    check_known("engine", engine, Engine)
    check_known("precision", precision, Precision)
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
        precision=precision,
        engine=engine,
    )
    with _opened(stack) as source:
        denoised, record = array_and_record(
            source, chosen, method=method, device=device, time_limit=time_limit, progress=progress, say=say
        )
    if "instead_of_the_network" in record:
        warnings.warn(f"{time_limit:g} minutes suffice for no network: the Gaussian filter stands in", stacklevel=2)
    return denoised


def _opened(stack: Any) -> AbstractContextManager[np.ndarray | TiffStack]:
    """Open a stack that is named by its path; whatever else is given stays open."""
    if isinstance(stack, (np.ndarray, TiffStack)):
        return nullcontext(stack)
    if isinstance(stack, (str, os.PathLike)):
        return open_stack(Path(stack))
    raise TypeError(
        f"expected an array (T, H, W), an open TiffStack or the path of a TIFF file, got {type(stack).__name__}. "
        "Make it an array first, with np.asarray."
    )


def denoise_files(
    stacks: list[Path],
    output: Path,
    chosen: Settings,
    *,
    method: Method = "restormer3d",
    device: str = "auto",
    time_limit: float | None = None,
    overwrite: bool = False,
    save_weights_to: Path | None = None,
    pretrained: Pretrained | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> dict[Path, Exception]:
    """Denoise TIFF files one by one; a bad one does not stop the others.

    Parameters
    ----------
    stacks : list of Path
        Noisy TIFF files.
    output : Path
        A file name if there is one stack and this is no folder; else the folder that gets a file of each input's name.
    chosen : Settings
        From :func:`restormer3d.settings.settings`.
    method, device
        As for :func:`denoise`.
    time_limit : float, optional
        Minutes for all stacks together, shared by their sizes. A stack for which they suffice for no network at all is
        denoised with the Gaussian filter.
    overwrite : bool
        Whether existing outputs are replaced.
    save_weights_to : Path, optional
        Where the weights trained on the (one) stack go.
    pretrained : Pretrained, optional
        The weights of `chosen`, if the caller has read them already.
    progress : function, optional
        Called with (stage, done, total).
    say : function, optional
        Called with one line of text for the user.

    Returns
    -------
    dict of Path to Exception
        The stacks that failed, and why; empty if all went well.
    """
    targets = output_files(stacks, output)
    on = torch_device(device)
    deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
    failures: dict[Path, Exception] = {}
    for number, (source, target) in enumerate(targets.items()):
        share = None
        if deadline is not None:
            share = share_of_time(list(targets)[number:], deadline)
        try:
            _denoise_file(
                source, target, chosen, method, on, share, overwrite, save_weights_to, pretrained, progress, say
            )
        except FAILURES as error:
            say(f"failed: {_reason(source, error)}")
            failures[source] = _without_frames(error)
    return failures


def _without_frames(error: Exception) -> Exception:
    """Let go of what the frames of an error's traceback hold: gigabytes of a stack, or a GPU's memory."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__, link = None, link.__cause__ or link.__context__
    return error


def share_of_time(stacks: list[Path], deadline: float) -> float:
    """Seconds for the first of some files, by their sizes, until all have to be done (by `time.monotonic`)."""
    sizes = [_file_size(path) for path in stacks]
    return (deadline - time.monotonic()) * max(1, sizes[0]) / max(1, sum(sizes))


def _file_size(path: Path) -> int:
    """Bytes of a file; 0 where they cannot be told, which is said when its turn comes."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def output_files(stacks: list[Path], output: Path) -> dict[Path, Path]:
    """Where each stack's result goes.

    Raises
    ------
    ValueError
        If no stack is given, two results would have one name, or many stacks would go into one file.
    """
    if not stacks:
        raise ValueError("no stack given: name at least one TIFF file")
    names_a_file = output.suffix.lower() in TIFF_SUFFIXES and not output.is_dir()
    if names_a_file and len(stacks) > 1:
        raise ValueError(f"{len(stacks)} stacks cannot go into one file: give a folder instead of -o {output}")
    targets = {path: output if names_a_file else output / path.name for path in stacks}
    if len(set(targets.values())) < len(stacks):
        raise ValueError("two stacks have the same file name and would overwrite each other: denoise them separately")
    return targets


def _denoise_file(
    source: Path,
    target: Path,
    chosen: Settings,
    method: Method,
    device: torch.device,
    seconds: float | None,
    overwrite: bool,
    save_weights_to: Path | None,
    pretrained: Pretrained | None,
    progress: Progress,
    say: Say,
) -> None:
    """Denoise one file: check everything first, compute, write, leave the sidecar."""
    started = time.monotonic()
    messages: list[str] = []

    def tell(text: str) -> None:
        messages.append(text)
        say(text)

    with open_stack(source) as stack, forced_engine(chosen.engine):
        check_output(target, stack.shape, stack.dtype, source=source, overwrite=overwrite)
        beside = target.with_name(target.name + ".json")
        check_file(beside, overwrite, (source, target))
        if save_weights_to is not None:
            check_file(save_weights_to, overwrite, (source, target, beside))
        tell(f"{source.name}: {_described(stack)}" + (f"; {stack.note}" if stack.note else ""))
        check = check_stack(stack, progress=lambda done: progress("check", done, stack.shape[0]), missing=True)
        given = without_missing(stack, check)
        remaining = None if seconds is None else seconds - (time.monotonic() - started)
        result = start_denoising(given, chosen, method, device, remaining, progress, tell, pretrained)
        written = write_stack(
            target, result.frames, shape=stack.shape, dtype=stack.dtype, like=stack, overwrite=overwrite
        )
        if coarse := too_coarse(written.rounding_share, stack.dtype):
            tell(f"{source.name}: {coarse}")
        record = sidecar(stack, check, target, asdict(written), result.record, messages, time.monotonic() - started)
    with replacing(beside) as part:
        part.write_text(json.dumps(as_json(record), indent=2, allow_nan=False) + "\n")
    if save_weights_to is not None and result.model is not None:
        save_weights(save_weights_to, result.model, {"fine_tuned_on": source.name, **result.record["settings"]})
    elif save_weights_to is not None:
        trained = "planes have networks of their own" if "each_plane" in result.record else "no network was trained"
        say(f"{trained}: {save_weights_to} is not written")
    clipped = f", {written.clipped_voxels} voxels clipped to the range of {stack.dtype}" * bool(written.clipped_voxels)
    say(f"{source.name}: written to {target} in {(time.monotonic() - started) / 60:.1f} min{clipped}")


def check_file(path: Path, overwrite: bool, others: tuple[Path, ...]) -> None:
    """Find out before an hour of work whether what goes beside a stack can be written, and overwrites nothing.

    Parameters
    ----------
    path : Path
        The file to write; the folders above it are made.
    overwrite : bool
        Whether an existing file may be replaced.
    others : tuple of Path
        Recordings and results, which it must not be.

    Raises
    ------
    ValueError
        If it is one of the others.
    OSError
        If it exists, or its folder can't be written to.
    """
    if path.resolve() in [other.resolve() for other in others]:
        raise ValueError(f"{path}: it is the recording or its result. Choose another name.")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: it is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: it exists. Choose another name, or replace it with --overwrite.")
    check_folder(path.parent)


def _reason(source: Path, error: Exception) -> str:
    """The error's own words, with the file's name and, where memory ran out, what to do."""
    text = str(error) or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        text = f"not enough memory ({text}); try --batch-size 1, a smaller --patch, or --device cpu"
    if not isinstance(error, (OSError, ValueError, RuntimeError, MemoryError)):
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {text}, in {where.filename}:{where.lineno}; please report it"
    return text if source.name in text else f"{source}: {text}"


def _described(stack: TiffStack) -> str:
    frames, height, width = stack.shape
    return f"{frames} frames of {height} x {width}, {stack.dtype}, {stack.nbytes / 1e6:.0f} MB"
