"""How the network computes: on which device, by which engine, and how exactly.

Float32; TF32 products on NVIDIA GPUs; or bfloat16 by autocast over float32 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from restormer3d import ops
from restormer3d.config import Engine, Precision


def forced_engine(engine: Engine) -> AbstractContextManager[None]:
    """Return the context in which the chosen engine computes; "auto" leaves the choice to what is around it."""
    return nullcontext() if engine == "auto" else ops.use_engine(engine)


def usable(engine: Engine, precision: Precision, device: torch.device) -> tuple[str, Precision]:
    """Return the engine and the precision that a device will compute with.

    TF32 allows products to be less exact; where there is none, float32 satisfies that.

    Parameters
    ----------
    engine : {"auto", "reference", "cpu", "cuda"}
        What was asked to compute the slow operators.
    precision : {"fp32", "tf32", "bf16"}
        What was asked of the arithmetic.
    device : torch.device
        Where the network runs.

    Raises
    ------
    ValueError
        If they do not go together; the message says what does.
    """
    if precision not in ("fp32", "tf32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown: expected fp32, tf32 or bf16")
    with forced_engine(engine):
        name = ops.engine_for(device)
    if precision == "bf16" and name == "cpu":
        raise ValueError(
            "precision 'bf16' is not for the CPU engine, whose kernels take float32 only: use --precision fp32, "
            "or --engine reference for bf16 in plain PyTorch, which is slower"
        )
    return name, "fp32" if precision == "tf32" and device.type != "cuda" else precision


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Let float32 products round to TF32 within the block if `precision` says so, and else forbid it.

    PyTorch's own default allows TF32 in convolutions: 10 bits of mantissa, without being asked.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context that a forward pass runs in; only "bf16" changes anything."""
    # Without the cache of cast weights: it would keep them over an update, and a CUDA graph cannot record it.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def torch_device(name: str) -> torch.device:
    """The device to compute on; "auto" takes a GPU if there is one.

    Raises
    ------
    ValueError
        If the name is unknown or the device is not on this machine.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if name.split(":")[0] not in present:
        raise ValueError(f"device {name!r} is unknown: expected auto, cpu, cuda or mps")
    if not present[name.split(":")[0]]:
        raise ValueError(f"device {name!r} is not available on this machine: use --device auto or --device cpu")
    return torch.device(name)


def float64_device(device: str | torch.device) -> torch.device:
    """Where double precision is computed: what has none, as MPS, leaves it to the CPU."""
    return torch.device(device if torch.device(device).type in ("cpu", "cuda") else "cpu")
