"""Weights on disk: one safetensors file that carries its own configuration, and the resumable state of a training.

A weights file needs no companion: the model's configuration and where the weights come from are in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from restormer3d.config import ModelConfig
from restormer3d.model import Restormer3D
from restormer3d.unets import CourseNetwork, FootprintNetwork, ImageNetwork, UNet

SHIPPED_WEIGHTS = "restormer3d.safetensors"
IMAGE_WEIGHTS = "static_image.safetensors"
FOOTPRINT_WEIGHTS = "footprints.safetensors"
COURSE_WEIGHTS = "courses.safetensors"
SMALL_NETWORKS: dict[str, type[UNet]] = {
    IMAGE_WEIGHTS: ImageNetwork,
    FOOTPRINT_WEIGHTS: FootprintNetwork,
    COURSE_WEIGHTS: CourseNetwork,
}
"""Kinds of networks that denoise a part of a recording, by the names of their files."""

AnyUNet = TypeVar("AnyUNet", bound=UNet)


class CheckpointError(ValueError):
    """A weights file or training state that cannot be used; the message names the file and what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; what is written then takes the place of `path` in one step, unless writing fails."""
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part-{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(path: str | Path, model: Restormer3D, notes: dict[str, Any] | None = None) -> Path:
    """Write a model's weights and configuration to one safetensors file.

    Parameters
    ----------
    path : path
        Written under a temporary name and renamed, so that no half-written file is left.
    model : Restormer3D
        Any device.
    notes : dict, optional
        JSON-serializable: data, seed, iterations, command.

    Returns
    -------
    Path
        The file written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    header = {"model_config": model.config.model_dump_json(), "notes": json.dumps(notes or {})}
    with replacing(path) as part:
        save_file(tensors, part, metadata=header)
        part.chmod(0o644)  # safetensors writes for the owner alone; weights are there to be shared
    return path


def load_weights(path: str | Path) -> Restormer3D:
    """Build the model that a weights file describes, on the CPU.

    Raises
    ------
    CheckpointError
        If the file is missing, is not a restormer3d weights file, or holds another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; give --weights FILE or --weights none")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file written by restormer3d, found something else ({error})"
        ) from error
    if "model_config" not in header:
        if path.name in SMALL_NETWORKS:
            raise CheckpointError(f"{path}: weights of a small network; give their folder: --weights {path.parent}")
        raise CheckpointError(
            f"{path}: a safetensors file, but of another program: its header has no model_config. "
            "Use weights that `restormer3d denoise --save-weights` or `restormer3d pretrain` wrote"
        )
    return _build(path, header["model_config"], tensors)


def weights_notes(path: str | Path) -> dict[str, Any]:
    """What a weights file says of its own making: the `notes` given to :func:`save_weights`."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("notes", "{}"))


def shipped_weights() -> Path | None:
    """Return the pretrained weights inside the package, None if this build has none."""
    path = shipped_file(SHIPPED_WEIGHTS)
    return path if path.is_file() else None


def save_unet(path: Path, network: UNet, notes: dict[str, Any]) -> None:
    """Write weights with notes on their making to a safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"notes": json.dumps(notes)})
        part.chmod(0o644)  # safetensors writes for the owner alone


def load_unet(path: Path, kind: Callable[[tuple[int, int, int]], AnyUNet]) -> AnyUNet:
    """Read what :func:`save_unet` wrote of a network of this kind; CheckpointError if it is something else."""
    try:
        tensors = load_file(path)
        fine, middle, coarse = (
            tensors[f"{level}.2.weight"].shape[0] for level in ("encoder_level1", "encoder_level2", "latent")
        )
        network = kind((fine, middle, coarse))
        network.load_state_dict(tensors)
    except (SafetensorError, OSError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: expected weights that `restormer3d pretrain-image` or `pretrain-activity` wrote, for the network "
            f"of that name, found something else ({reason})"
        ) from error
    return network


def shipped_file(name: str) -> Path:
    """Return the path of a file inside the package."""
    return Path(str(resources.files("restormer3d"))) / "data" / name


def network_file(name: str, folder: Path | None = None) -> Path:
    """Return where the weights of a small network are: in a folder if it has them, else in the package."""
    own = None if folder is None else folder / name
    return own if own is not None and own.is_file() else shipped_file(name)


def small_network(kind: type[AnyUNet], folder: Path | None = None) -> AnyUNet:
    """Return the network of a kind of :data:`SMALL_NETWORKS`, on the CPU.

    With the weights in a folder or in the package; read once, and again when the file has changed.
    """
    name = next(name for name, network in SMALL_NETWORKS.items() if network is kind)
    path = network_file(name, folder)
    return _read(path, path.stat().st_mtime_ns, kind)


@lru_cache(maxsize=len(SMALL_NETWORKS))
def _read(path: Path, _: int, kind: Callable[[tuple[int, int, int]], AnyUNet]) -> AnyUNet:
    return load_unet(path, kind)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write the state of a training (tensors and plain values), replacing the last one in one step."""
    with replacing(Path(path)) as part:
        torch.save(state, part)


def save_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write one line of JSON for every entry, replacing the last history in one step."""
    with replacing(path) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in history))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read the state that :func:`save_state` wrote; no code in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: not a readable training state ({error}); remove it to start this training anew"
        ) from error


def _build(path: Path, config: str, tensors: dict[str, torch.Tensor]) -> Restormer3D:
    try:
        model = Restormer3D(ModelConfig.model_validate_json(config))
        model.load_state_dict(tensors)
    except (ValidationError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: weights of another architecture than this version of restormer3d builds ({reason}). "
            "Use the version that wrote them, or --weights none to train from scratch"
        ) from error
    return model
