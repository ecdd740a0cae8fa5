"""A processor of its own that is a CPU in truth: its tensors refuse those of the host, as a GPU's do.

Most tests run where there is no GPU. Here whatever forgets to move a tensor, or asks a device for double precision that
has none (Apple's GPUs), fails as it would there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPIES = {"_to_copy", "copy_"}  # between devices
_INDEXING = {"index", "index_put_", "_index_put_impl_"}  # a device's tensor takes indices from the host
_NAME = "emulated"


@contextmanager
def emulated_device(float64: bool) -> Iterator[torch.device]:
    """Give a device to compute on within the block, with or without double precision."""
    if not _is_known():
        pytest.skip("this PyTorch knows no devices that are written in Python")
    with _Redirected(), _Dispatched(float64):
        yield torch.device(_NAME, 0)


class _OnDevice(Tensor):
    """A tensor that says it is on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(_NAME, 0),
        )
        wrapped.held = held
        return wrapped

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {_NAME}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        return _computed(function, args, kwargs or {}, float64=True)  # refused when the values were made


class _Dispatched(TorchDispatchMode):
    def __init__(self, float64: bool):
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        return _computed(function, args, kwargs or {}, self.float64)


class _Redirected(TorchFunctionMode):
    """What PyTorch makes from lists, and gives back as lists, goes past the dispatcher."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if function is Tensor.tolist:
            return args[0].cpu().detach().numpy().tolist()
        return function(*args, **kwargs)


def _computed(function: Any, args: Any, kwargs: dict[str, Any], float64: bool) -> Any:
    """Compute on the host what was asked of the device; refuse tensors of both."""
    name = function.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, _OnDevice)]
    _refuse_mixed(name, args, tensors, here)
    on_device = bool(here)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == _NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_host, args), **tree_map(_host, kwargs))
    if name == "_local_scalar_dense":
        return result
    known = {id(x.held): x for x in here}  # operators in place return what they were given

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (on_device or id(x) in known):
            return x
        if x.dtype == torch.float64 and not float64:
            raise TypeError(f"{function}: this device has no double precision")
        return known[id(x)] if id(x) in known else _OnDevice(x)

    with torch.inference_mode(False):  # a wrapper knows no tensors for inference only
        return tree_map(wrapped, result)


def _refuse_mixed(name: str, args: Any, tensors: list[Tensor], here: list[_OnDevice]) -> None:
    if not here or name in _COPIES:
        return
    if name in _INDEXING and isinstance(args[0], _OnDevice):
        tensors = [x for x in tree_leaves(args[2:]) if isinstance(x, Tensor)]
    if any(x.dim() and not isinstance(x, _OnDevice) for x in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def _host(x: Any) -> Any:
    return x.held if isinstance(x, _OnDevice) else x


def make_known() -> None:
    """Make the device known to PyTorch: before the first gradient, which counts the devices that there are."""
    register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is not None and not _is_known():
        register(_NAME, _module())


def _is_known() -> bool:
    return hasattr(torch, _NAME)


def _module() -> Any:
    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    return Module()
