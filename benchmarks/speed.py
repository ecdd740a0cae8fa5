"""The speed table: `python -m benchmarks.speed` times the package beside stock PyTorch, alternating in one process.

Stock is the same network written with `torch.nn` modules: contiguous, in channels_last_3d, and under torch.compile
where that works; the best of them counts. Machines differ and are shared: ratios within one run are what to look at.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tifffile
import torch
from cyclopts import App, Parameter
from torch import Tensor, nn

from benchmarks.jobs import without_folders
from benchmarks.memory import peak_resident_bytes
from benchmarks.speed_operators import ceilings, depthwise, operators
from benchmarks.speed_table import report
from benchmarks.stock import stock_copy
from benchmarks.tables import put_between
from benchmarks.timing import alternate
from restormer3d.arithmetic import float32_products
from restormer3d.config import ModelConfig, Recipe
from restormer3d.cuda_graph import GraphedStep
from restormer3d.model import Restormer3D
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

app = App(name="python -m benchmarks.speed", help_format="plaintext")

_SMALL = ModelConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2), last_level_channels=8)
_JOB_SEED = 9_300_000
_PATCH = (16, 64, 64)
_COMPILED = "stock, compiled"
_QUICK_NOTE = "**A check that the benchmark runs, with a tiny network: the numbers mean nothing.**"


@app.default
def speed(
    *,
    device: str = "cpu",
    repeats: int = 5,
    quick: Annotated[bool, Parameter(negative="")] = False,
    compiled: bool | None = None,
    parts: Literal["all", "network", "job", "challenge"] = "all",
    job_minutes: float | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    write: Path | None = None,
) -> None:
    """Time training, inference, operators and a whole job, ours and stock.

    Parameters
    ----------
    device
        Where to compute.
    repeats
        Rounds; every round runs each variant once.
    quick
        A tiny network and one round, to see that the benchmark works.
    compiled
        Time the stock network under torch.compile too, which takes minutes to compile. By default unless --quick.
    parts
        "network": steps, passes and operators. "job": `restormer3d denoise` on a simulated [500, 128, 128] int16 stack.
        "all" is both. "challenge": the published recipe's 800 iterations and its inference on [1500, 490, 490] int16,
        hours without a GPU.
    job_minutes
        Time limit of that job, for slow machines; by default it runs the whole recipe.
    json_file
        Where to write all timings.
    write
        Markdown file whose tables are replaced.
    """
    compiled = not quick if compiled is None else compiled
    origin = {"command": _command(), "machine": describe_machine(torch.device(device))}
    result: dict[str, Any] = {}
    if parts in ("all", "network"):
        with float32_products("fp32"):
            result = measure(torch.device(device), 1 if quick else repeats, quick=quick, compiled=compiled) | origin
    if parts in ("all", "job"):
        result["job"] = time_job(device, job_minutes, "default", quick=quick) | origin
    if parts == "challenge":
        result["challenge"] = time_job(device, job_minutes, "published", quick=quick) | origin
    on_gpu = torch.device(device).type == "cuda"  # its tables stand beside those of a CPU
    tables = {marks: text for marks, text in report(result, on_gpu=on_gpu).items() if text}
    print("\n\n".join([_QUICK_NOTE] * quick + list(tables.values())))
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    for marks, text in tables.items():
        if write:
            put_between(write, *marks, text)


def measure(device: torch.device, repeats: int, *, quick: bool, compiled: bool) -> dict[str, Any]:
    """Return all measurements."""
    config = _SMALL if quick else ModelConfig()
    patch = (8, 16, 16) if quick else _PATCH
    torch.manual_seed(0)
    skipped: dict[str, str] = {}
    variants = build_variants(config, device)
    if compiled:
        variants |= compiled_variant(variants["ours"], config, torch.zeros(1, 1, *patch, device=device), skipped)
    limits = ceilings(device, quick=quick)
    plain = {name: model for name, model in variants.items() if name != _COMPILED}
    x = torch.randn(1, 1, *patch, device=device)
    result: dict[str, Any] = {
        "repeats": repeats,
        "parameters": sum(p.numel() for p in variants["ours"].parameters()),
        "agreement": agreement(variants, patch, device),
        "skipped": skipped,
        "saved_bytes_per_voxel": {name: saved_bytes(model, x) / x.numel() for name, model in plain.items()},
        "training": {},
        "ceilings": limits,
        "depthwise": depthwise(device, repeats, quick=quick),
        "operators": operators(device, repeats, limits, quick=quick),
    }
    for batch in (1, 4):
        x = torch.randn(batch, 1, *patch, device=device)
        steps = {name: training_step(model, x, recorded=name == "ours") for name, model in variants.items()}
        result["training"][x.numel()] = alternate(steps, repeats, device)
    x = torch.randn(2, 1, *patch, device=device)
    passes = {name: inference_pass(model, x, recorded=name == "ours") for name, model in variants.items()}
    result["inference"] = {"voxels": x.numel(), "seconds": alternate(passes, repeats, device)}
    result["peak_bytes"] = {name: in_new_process(peak_memory, name, config, patch, str(device)) for name in plain}
    return result


def _command() -> str:
    return f"python -m benchmarks.speed {without_folders(sys.argv[1:])}".strip()


def build_variants(config: ModelConfig, device: torch.device) -> dict[str, nn.Module]:
    """Return the networks to compare, with equal parameters."""
    ours = Restormer3D(config).to(device)
    stock = stock_copy(ours, config).to(device)
    last = stock_copy(ours, config).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return {"ours": ours, "stock": stock, "stock, channels_last_3d": ChannelsLast(last)}


def compiled_variant(ours: nn.Module, config: ModelConfig, x: Tensor, skipped: dict[str, str]) -> dict[str, nn.Module]:
    """Return the stock network under torch.compile; nothing, and why in `skipped`, where that does not work."""
    model: Any = torch.compile(stock_copy(ours, config).to(x.device), dynamic=False)
    try:
        model(x).sum().backward()
    except Exception as error:  # whatever a compiler may raise: no compiler, no Python headers, an internal error
        skipped[_COMPILED] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return {}
    return {_COMPILED: model}


class ChannelsLast(nn.Module):
    """A network whose input is brought into channels_last_3d."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Apply the inner network."""
        return self.inner(x.to(memory_format=torch.channels_last_3d))


def training_step(model: nn.Module, x: Tensor, *, recorded: bool = False) -> Callable[[], object]:
    """Return a full step: forward, L1 loss, backward, AdamW; on CUDA as a graph if `recorded`, as `fit` does it."""
    recorded = recorded and x.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, capturable=recorded, fused=recorded or None)
    target = torch.zeros_like(x)

    def step(_: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.l1_loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return partial(GraphedStep(step) if recorded else step, None, x)


def inference_pass(model: nn.Module, x: Tensor, *, recorded: bool = False) -> Callable[[], object]:
    """Return a forward pass without gradients; on CUDA as a graph if `recorded`, as `denoise_frames` does it."""

    @torch.inference_mode()
    def infer(_: Any, x: Tensor) -> Tensor:
        return model(x)

    return torch.inference_mode()(partial(GraphedStep(infer) if recorded and x.is_cuda else infer, None, x))


def agreement(variants: dict[str, nn.Module], patch: tuple[int, ...], device: torch.device) -> float:
    """Return the largest relative difference from stock of the gradients of all parameters together, as one vector."""

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


def in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    """Run a function where nothing has used memory yet."""
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(function, arguments)


def peak_memory(name: str, config: ModelConfig, patch: tuple[int, ...], device: str) -> float:
    """Return by how many bytes two training steps of batch 4 raise the peak memory of the process, or of the GPU."""
    model = build_variants(config, torch.device(device))[name]
    x = torch.randn(4, 1, *patch, device=device)
    on_gpu = x.is_cuda
    training_step(model, x[:1, :, :8, :8, :8])()  # what is loaded and compiled once is not the step's
    before = torch.cuda.memory_allocated() if on_gpu else peak_resident_bytes()
    step = training_step(model, x)
    step()
    step()
    return (torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()) - before


def time_job(device: str, minutes: float | None, recipe: Recipe, *, quick: bool) -> dict[str, Any]:
    """Denoise one simulated stack, TIFF to TIFF, and say what was done in which time."""
    from restormer3d.settings import settings
    from restormer3d.workflow import denoise_files

    scene = (16, 16, 16) if quick else (500, 128, 128)
    shape = scene if quick or recipe == "default" else (1500, 490, 490)
    noisy = NoisyScene(simulate_scene(scene, seed=_JOB_SEED), *noise_parameters(2), seed=_JOB_SEED)[:]
    chosen = settings(recipe, None if recipe == "default" else "none", iterations=1 if quick else None)
    if recipe == "published":  # there are no published weights: as if there were, so that it takes the time it would
        tuning = chosen.training.model_copy(update={"warmup_iterations": 0, "iterations": 1 if quick else 800})
        chosen = replace(chosen, training=tuning)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "noisy.tif"), Path(folder, "denoised.tif")
        tifffile.imwrite(
            source, np.pad(noisy, [(0, full - part) for full, part in zip(shape, scene, strict=True)], "reflect")
        )
        start = time.perf_counter()
        failures = denoise_files([source], target, chosen, device=device, time_limit=minutes)
        seconds = time.perf_counter() - start
        if failures:
            raise RuntimeError(f"the whole job failed: {failures[source]}") from failures[source]
        record = json.loads(target.with_name("denoised.tif.json").read_text())
    done = {"shape": list(shape), "limit": minutes, "seconds": seconds, "method": record["method"], "recipe": recipe}
    if record["method"] != "restormer3d":
        return done
    inference = record["settings"]["inference"]
    return done | {
        "iterations": record["iterations"],
        "recipe_iterations": chosen.training.warmup_iterations + chosen.training.iterations,
        "overlap_t": inference["overlap_t"],
        "overlap_xy": inference["overlap_xy"],
        "engine": record["engine"],
        "device": record["device"],
        "losses": record["losses"],
    }


def describe_machine(device: torch.device) -> str:
    """Return processor or GPU, threads and versions."""
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads, {versions}"


if __name__ == "__main__":
    app()
