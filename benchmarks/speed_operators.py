"""Operators alone, beside what the machine can do: copying and multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate
from restormer3d import ops

Run = Callable[[], object]


def ceilings(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Return the machine's copy bandwidth (bytes read and written) and matrix product rate, each per second."""
    size = 2**20 if quick else 2**26 if device.type == "cuda" else 2**24
    edge = 8192 if device.type == "cuda" else 1024
    a, b = torch.zeros(size, device=device), torch.ones(size, device=device)
    m, product = torch.ones(edge, edge, device=device), torch.empty(edge, edge, device=device)
    runs: dict[str, Run] = {"copy": lambda: a.copy_(b), "product": lambda: torch.mm(m, m, out=product)}
    seconds = alternate(runs, 9, device)
    return {
        "copy_bytes_per_s": 8 * size / min(seconds["copy"]),
        "flop_per_s": 2 * edge**3 / min(seconds["product"]),
    }


def depthwise(device: torch.device, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Time the depth-wise convolution's forward pass and both gradients, each alone, and a copy of its input.

    Forward pass and input gradient read and write one tensor, the weight gradient reads two: the bytes of a copy.
    """
    channels, size = (8, (4, 16, 16)) if quick else (128, (16, 64, 64))
    x, grad = (torch.randn(1, channels, *size, device=device) for _ in range(2))
    weight, target = torch.randn(channels, 1, 3, 3, 3, device=device), torch.empty_like(x)

    def forward(engine: str | None) -> Run:
        def run() -> None:
            with torch.no_grad(), ops.use_engine(engine):
                ops.depthwise_conv3d(x, weight)

        return run

    def gradient(engine: str | None, *, of_input: bool) -> Run:
        leaf = (x if of_input else weight).detach().requires_grad_()
        with ops.use_engine(engine):
            y = ops.depthwise_conv3d(leaf, weight) if of_input else ops.depthwise_conv3d(x, leaf)
        return lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)

    runs: dict[str, Run] = {"copy": lambda: target.copy_(x)}
    for label, engine in (("ours", None), ("reference", "reference")):
        runs[f"forward {label}"] = forward(engine)
        runs[f"input gradient {label}"] = gradient(engine, of_input=True)
        runs[f"weight gradient {label}"] = gradient(engine, of_input=False)
    seconds = alternate(runs, repeats, device)
    directions = ("forward", "input gradient", "weight gradient")
    return {
        "shape": list(x.shape),
        "copy": seconds["copy"],
        "seconds": {d: {label: seconds[f"{d} {label}"] for label in ("ours", "reference")} for d in directions},
    }


def operators(device: torch.device, repeats: int, limits: dict[str, float], *, quick: bool) -> list[dict[str, Any]]:
    """Time the two blocks at every level: forward, and forward with backward, by our engine and by the reference."""
    levels = [(32, (16, 64, 64)), (64, (8, 32, 32)), (128, (4, 16, 16)), (256, (2, 8, 8))]
    if quick:
        levels = [(8, (2, 8, 8))]
    return [_time(name, *level, device, repeats, limits) for level in levels for name in ("mdta", "gdfn")]


def _time(
    name: str, channels: int, size: tuple[int, ...], device: torch.device, repeats: int, limits: dict[str, float]
) -> dict[str, Any]:
    x = torch.randn(1, channels, *size, device=device, requires_grad=True)
    weights = [w.to(device).requires_grad_() for w in _weights(name, channels)]
    grad, target, source = torch.randn_like(x), torch.empty_like(x), x.detach()
    function = getattr(ops, name)

    def forward(engine: str | None) -> Run:
        def run() -> None:
            with torch.no_grad(), ops.use_engine(engine):
                function(x, *weights)

        return run

    def both(engine: str | None) -> Run:
        def run() -> None:
            with ops.use_engine(engine):
                torch.autograd.grad(function(x, *weights), [x, *weights], grad)

        return run

    runs: dict[str, Run] = {"ours forward": forward(None), "reference forward": forward("reference")}
    runs |= {"ours both": both(None), "reference both": both("reference"), "copy": lambda: target.copy_(source)}
    floor = _floor(name, channels, x, limits)
    return {"operator": name, "shape": list(x.shape), "floor": floor, "seconds": alternate(runs, repeats, device)}


def _floor(name: str, channels: int, x: Tensor, limits: dict[str, float]) -> float:
    """Return the seconds of a forward pass that only multiplies, or only reads its input and writes its output."""
    head = min(channels, 32)
    products = 4 * channels**2 + 81 * channels + 2 * channels * head  # qkv and output; depth-wise; attention
    if name == "gdfn":
        products = 6 * channels**2 + 108 * channels
    voxels = x.numel() // channels
    return max(2 * products * voxels / limits["flop_per_s"], 8 * x.numel() / limits["copy_bytes_per_s"])


def _weights(name: str, channels: int) -> list[Tensor]:
    wide = 3 * channels if name == "mdta" else 4 * channels
    first = [torch.ones(channels), torch.randn(wide, channels, 1, 1, 1) / channels**0.5, torch.randn(wide, 1, 3, 3, 3)]
    if name == "mdta":
        heads = torch.ones(max(1, channels // 32), 1, 1)
        return [*first, heads, torch.randn(channels, channels, 1, 1, 1) / channels**0.5]
    return [*first, torch.randn(channels, 2 * channels, 1, 1, 1) / channels**0.5]
