"""The slow operators of Restormer3D behind one signature each, computed by the engine that fits the device.

``reference`` is plain PyTorch and runs anywhere; ``cpu`` is Numba and matrix products; ``cuda`` is Triton,
for NVIDIA GPUs of compute capability 8.0 and newer. The environment variable ``RESTORMER3D_ENGINE`` or
:func:`use_engine` forces one; otherwise the device of the tensors decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from restormer3d.ops import reference

ENGINES = ("reference", "cpu", "cuda")
"""The names of the engines that can be forced."""

_OLDEST_TRITON = (3, 3)  # 3.2, that of PyTorch 2.6, does not compile tuples of tensors

_forced: ContextVar[str | None] = ContextVar("restormer3d_engine", default=None)


def engine_for(device: torch.device | str) -> str:
    """Return the name of the engine that computes tensors on ``device``.

    Raises
    ------
    ValueError
        If the forced engine is unknown or cannot work on this device.
    """
    device = torch.device(device)
    name = _forced.get() or os.environ.get("RESTORMER3D_ENGINE") or _fastest(device)
    _check_name(name)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"engine 'cpu' was forced, but the tensors are on {device.type!r}: use engine 'reference' there"
        )
    if name == "cuda" and (obstacle := why_not_cuda(device)):
        raise ValueError(f"engine 'cuda' was forced, but {obstacle}: use engine {_fastest(device)!r} there")
    return name


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return "reference" if why_not_cuda(device) else "cuda"


def why_not_cuda(device: torch.device | str) -> str | None:
    """Say in one line why engine "cuda" cannot compute on ``device``; None if it can."""
    device = torch.device(device)
    if obstacle := _why_not_triton():
        return obstacle
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: slow, for tests
    if device.type != "cuda":
        return f"there are no Triton kernels for tensors on {device.type!r}"
    if torch.version.hip or not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below the 8.0 that Triton needs"
    return None


@cache
def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    from triton import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {__version__} is older than the 3.3 that the kernels need (PyTorch 2.7 comes with it)"
    return None


@contextmanager
def use_engine(name: str | None) -> Iterator[None]:
    """Force one engine within a ``with`` block and this thread; ``None`` lets the device decide.

    Raises
    ------
    ValueError
        If there is no engine of that name.
    """
    if name is not None:
        _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_name(name: str) -> None:
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: RESTORMER3D_ENGINE must be one of {', '.join(ENGINES)}")


def _engine(x: Tensor) -> ModuleType:
    name = engine_for(x.device)
    if name == "reference":
        return reference
    if name == "cuda":
        from restormer3d.ops import cuda  # Triton is imported only where its kernels run

        return cuda
    from restormer3d.ops import cpu  # and so is Numba

    return cpu


def mdta(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """Attention over channels with LayerNorm and residual; see :func:`restormer3d.ops.reference.mdta`."""
    return _engine(x).mdta(x, norm_weight, qkv_weight, dwconv_weight, temperature, project_out_weight)


def gdfn(
    x: Tensor,
    norm_weight: Tensor,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """Gated feed-forward network with LayerNorm and residual; see :func:`restormer3d.ops.reference.gdfn`."""
    return _engine(x).gdfn(x, norm_weight, project_in_weight, dwconv_weight, project_out_weight)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 1x1x1, ``weight`` (C_out, C_in, 1, 1, 1), no bias."""
    return _engine(x).pointwise(x, weight)


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 3x3x3 with zero padding 1, ``weight`` (C_out, C_in, 3, 3, 3), no bias."""
    return _engine(x).conv3d(x, weight)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve every channel with its own 3x3x3 kernel, zero padding 1, ``weight`` (C, 1, 3, 3, 3)."""
    return _engine(x).depthwise_conv3d(x, weight)
