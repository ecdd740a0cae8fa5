"""The speed table: `python -m benchmarks.speed` times the package beside stock PyTorch, alternating in one process.

Stock is the same network written with `torch.nn` modules, contiguous and in channels_last_3d; the better of the two
counts. Machines differ and are shared, so ratios within one run are what to look at.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App
from torch import Tensor, nn

from benchmarks.memory import peak_resident_bytes
from benchmarks.stock import stock_copy
from restormer3d import ops
from restormer3d.config import ModelConfig
from restormer3d.model import Restormer3D

app = App(name="python -m benchmarks.speed", help_format="plaintext")

_SMALL = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2), last_level_channels=8)
_PATCH = (16, 64, 64)
_MEMORY_ROWS = (
    ("saved_bytes_per_voxel", "saved for the backward pass, kB per voxel", 1e3),
    ("peak_bytes", "peak memory of a training step of batch 4, GB", 1e9),
)


@app.default
def speed(
    *,
    device: str = "cpu",
    repeats: int = 5,
    quick: bool = False,
    compiled: bool = False,
    job: bool = False,
    json_file: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Time training, inference and operators, ours and stock.

    Parameters
    ----------
    device
        Where to compute.
    repeats
        Rounds; every round runs each variant once.
    quick
        A tiny network and one round, to see that the benchmark works.
    compiled
        Also time the stock network under torch.compile, which takes minutes to compile.
    job
        Also time `restormer3d.denoise` on a simulated [500, 128, 128] int16 stack.
    json_file
        Where to write all timings.
    markdown
        Where to write the table.
    """
    result = measure(torch.device(device), 1 if quick else repeats, quick=quick, compiled=compiled)
    if job:
        result["job"] = time_job(device, quick=quick)
    table = report(result)
    print(table)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1))
    if markdown:
        markdown.write_text(table)


def measure(device: torch.device, repeats: int, *, quick: bool, compiled: bool) -> dict[str, Any]:
    """Return all measurements."""
    config = _SMALL if quick else ModelConfig()
    patch = (8, 16, 16) if quick else _PATCH
    torch.manual_seed(0)
    variants = build_variants(config, device, compiled=compiled)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "parameters": sum(p.numel() for p in variants["ours"].parameters()),
        "agreement": agreement(variants, patch, device),
        "training": {},
        "ceilings": ceilings(device, quick=quick),
    }
    for batch in (1, 4):
        x = torch.randn(batch, 1, *patch, device=device)
        steps = {name: training_step(model, x) for name, model in variants.items()}
        result["training"][x.numel()] = alternate(steps, repeats, device)
    x = torch.randn(2, 1, *patch, device=device)
    passes = {name: inference_pass(model, x) for name, model in variants.items()}
    result["inference"] = {"voxels": x.numel(), "seconds": alternate(passes, repeats, device)}
    x = torch.randn(1, 1, *patch, device=device)
    result["saved_bytes_per_voxel"] = {name: saved_bytes(model, x) / x.numel() for name, model in variants.items()}
    result["operators"] = operators(device, repeats, quick=quick)
    if device.type == "cpu":
        names = [name for name in variants if name != "stock, compiled"]
        result["peak_bytes"] = {name: in_new_process(peak_memory, name, config, patch) for name in names}
    return result


def build_variants(config: ModelConfig, device: torch.device, *, compiled: bool) -> dict[str, nn.Module]:
    """Return the networks to compare, with equal parameters."""
    ours = Restormer3D(config).to(device)
    stock = stock_copy(ours, config).to(device)
    last = stock_copy(ours, config).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    variants: dict[str, nn.Module] = {"ours": ours, "stock": stock, "stock, channels_last_3d": ChannelsLast(last)}
    if compiled:
        variants["stock, compiled"] = torch.compile(stock_copy(ours, config).to(device))  # type: ignore[assignment]
    return variants


class ChannelsLast(nn.Module):
    """A network whose input is brought into channels_last_3d."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Apply the inner network."""
        return self.inner(x.to(memory_format=torch.channels_last_3d))


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a full step: forward, L1 loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    target = torch.zeros_like(x)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.l1_loss(model(x), target).backward()
        optimizer.step()

    return step


def inference_pass(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def alternate(variants: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of every repeat; each round runs every variant once, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def agreement(variants: dict[str, nn.Module], patch: tuple[int, ...], device: torch.device) -> float:
    """Return the largest relative difference of all parameter gradients from those of stock."""

    def gradients(model: nn.Module) -> Tensor:
        model.zero_grad()
        x = torch.linspace(-1, 1, math.prod(patch), device=device).sin().view(1, 1, *patch)
        model(x).square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    stock = gradients(variants["stock"])
    return float((gradients(variants["ours"]) - stock).norm() / stock.norm())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes kept from the forward to the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters and t.numel() > 10_000:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)  # an address is counted once only while it is taken
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return sum(kept.values())


def ceilings(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Return the machine's copy bandwidth (bytes read and written) and matrix product rate, each per second."""
    size = 2**20 if quick else 2**24
    a, b = torch.zeros(size, device=device), torch.ones(size, device=device)
    m = torch.ones(1024, 1024, device=device)
    copies, products = (
        alternate({"x": run}, 9, device)["x"] for run in (lambda: a.copy_(b), lambda: torch.mm(m, m))
    )  # fmt: skip
    return {"copy_bytes_per_s": 8 * size / min(copies), "flop_per_s": 2 * 1024**3 / min(products)}


def operators(device: torch.device, repeats: int, *, quick: bool) -> list[dict[str, Any]]:
    """Time operators alone: forward, and forward with backward, by the engine of the device and by the reference."""
    levels = [(32, (16, 64, 64)), (64, (8, 32, 32)), (128, (4, 16, 16)), (256, (2, 8, 8))]
    if quick:
        levels = [(8, (2, 8, 8))]
    cases = [(name, *level) for level in levels for name in ("mdta", "gdfn")]
    cases.append(("depthwise_conv3d", 4 * levels[0][0], levels[0][1]))
    return [time_operator(*case, device, repeats) for case in cases]


def time_operator(
    name: str, channels: int, size: tuple[int, ...], device: torch.device, repeats: int
) -> dict[str, Any]:  # fmt: skip
    """Return one operator's seconds, and those of copying its input once."""
    x = torch.randn(1, channels, *size, device=device, requires_grad=True)
    weights = [w.to(device).requires_grad_() for w in operator_weights(name, channels)]
    grad, target = torch.randn_like(x), torch.empty_like(x)
    function = getattr(ops, name)

    def forward(engine: str | None) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), ops.use_engine(engine):
                function(x, *weights)

        return run

    def both(engine: str | None) -> Callable[[], None]:
        def run() -> None:
            with ops.use_engine(engine):
                torch.autograd.grad(function(x, *weights), [x, *weights], grad)

        return run

    def copy() -> None:
        target.copy_(x.detach())

    runs = {"ours forward": forward(None), "reference forward": forward("reference"), "copy": copy}
    runs |= {"ours both": both(None), "reference both": both("reference")}
    return {"operator": name, "shape": list(x.shape), "seconds": alternate(runs, repeats, device)}


def operator_weights(name: str, channels: int) -> list[Tensor]:
    """Return random weights of the right shapes."""
    if name == "depthwise_conv3d":
        return [torch.randn(channels, 1, 3, 3, 3)]
    wide = 3 * channels if name == "mdta" else 4 * channels
    first = [torch.ones(channels), torch.randn(wide, channels, 1, 1, 1) / channels**0.5, torch.randn(wide, 1, 3, 3, 3)]
    if name == "mdta":
        return [
            *first,
            torch.ones(max(1, channels // 32), 1, 1),
            torch.randn(channels, channels, 1, 1, 1) / channels**0.5,
        ]
    return [*first, torch.randn(channels, 2 * channels, 1, 1, 1) / channels**0.5]


def in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    """Run a function where nothing has used memory yet."""
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(function, arguments)


def peak_memory(name: str, config: ModelConfig, patch: tuple[int, ...]) -> float:
    """Return by how many bytes two training steps of batch 4 raise the process's peak memory."""
    model = build_variants(config, torch.device("cpu"), compiled=False)[name]
    x = torch.randn(4, 1, *patch)
    with torch.no_grad():
        model(x[:1, :, :8, :8, :8])
    before = peak_resident_bytes()
    step = training_step(model, x)
    step()
    step()
    return peak_resident_bytes() - before


def time_job(device: str, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of denoising one simulated stack by the default recipe."""
    from restormer3d.workflow import denoise

    shape = (16, 16, 16) if quick else (500, 128, 128)
    rng = np.random.default_rng(0)
    signal = 200 + 100 * np.sin(np.linspace(0, 20, shape[0]))[:, None, None] * np.ones(shape)
    stack = (rng.poisson(signal / 20) * 20).astype(np.int16)
    start = time.perf_counter()
    denoise(stack, device=device, iterations=1 if quick else None)
    return {"shape": list(shape), "seconds": time.perf_counter() - start}


def describe_machine(device: torch.device) -> str:
    """Return processor or GPU, threads and versions."""
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads, {versions}"


def report(result: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = ["# Speed", "", f"`{result['command']}` on {result['machine']}.", ""]
    lines += [
        f"The published network, {result['parameters']:,} parameters, float32. Gradients of ours and of stock differ "
        f"by {result['agreement']:.0e}. Seconds are medians with (fastest to slowest) of alternating runs in one "
        "process; the last column compares ours with the better stock layout.",
        "",
    ]
    names = list(result["inference"]["seconds"])
    lines += ["| | " + " | ".join(names) + " | ratio |", "|---" * (len(names) + 2) + "|"]
    for voxels, seconds in result["training"].items():
        lines.append(_row(f"training step, {int(voxels):,} voxels, s", seconds))
    voxels, seconds = result["inference"]["voxels"], result["inference"]["seconds"]
    lines.append(_row(f"inference, {voxels:,} voxels, s", seconds))
    rates = [f"{voxels / statistics.median(s) / 1e3:,.0f}" for s in seconds.values()]
    lines.append("| inference, thousand voxels/s | " + " | ".join(rates) + " | |")
    for key, label, unit in _MEMORY_ROWS:
        if key in result:
            cells = [f"{result[key][name] / unit:.1f}" if name in result[key] else "" for name in names]
            lines.append(f"| {label} | " + " | ".join(cells) + " | |")
    copy, flop = result["ceilings"]["copy_bytes_per_s"], result["ceilings"]["flop_per_s"]
    lines += ["", f"Operators alone, ms. The machine copies {copy / 1e9:.0f} GB/s (read and written together) and"]
    lines += [f"multiplies matrices at {flop / 1e9:.0f} GFLOP/s.", ""]
    lines += ["| operator | input | copying the input | forward | reference | forward + backward | reference |"]
    lines += ["|---" * 7 + "|"]
    for row in result["operators"]:
        order = ("copy", "ours forward", "reference forward", "ours both", "reference both")
        cells = [f"{1e3 * statistics.median(row['seconds'][key]):.2f}" for key in order]
        lines.append(f"| {row['operator']} | {row['shape']} | " + " | ".join(cells) + " |")
    if "job" in result:
        j = result["job"]
        lines += [
            "",
            f"Default recipe on [{j['frames']}, {j['rows']}, {j['columns']}]: {j['seconds'] / 60:.1f} minutes.",
        ]
    return "\n".join(lines) + "\n"


def _row(label: str, seconds: dict[str, list[float]]) -> str:
    cells = [f"{statistics.median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in seconds.values()]
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ratio = min(value for name, value in medians.items() if name != "ours") / medians["ours"]
    return f"| {label} | " + " | ".join(cells) + f" | {ratio:.1f}x |"


if __name__ == "__main__":
    app()
