"""What `--precision` costs in quality: `python -m benchmarks.precision` denoises a simulated scene in each arithmetic.

On a GPU as it computes; on a CPU bfloat16 as it computes, and TF32 with the factors of all products rounded as an
NVIDIA GPU rounds them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import App, Parameter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.jobs import without_folders
from benchmarks.tables import level_head, publish
from restormer3d.config import Precision
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

BEGIN = "<!-- precision table: begin (written by benchmarks.precision --write; edit nothing here by hand) -->"
END = "<!-- precision table: end -->"
_SEED = 9_200_000
_DROPPED_BITS = 13  # of float32's 23 bits of mantissa; TF32 keeps 10
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "convolution_backward", "conv3d"}

app = App(name="python -m benchmarks.precision", help_format="plaintext")


class RoundedProducts(TorchDispatchMode):
    """Within it, products of float32 tensors are computed of factors rounded to TF32, and summed in float32."""

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Round the factors of products; leave everything else alone."""
        if func.overloadpacket.__name__ in _PRODUCTS:
            args = tree_map(rounded, tuple(args))
        return func(*args, **(kwargs or {}))


def rounded(value: Any) -> Any:
    """Round a float32 tensor to 10 bits of mantissa, to the nearest; anything else comes back as it is."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    half = 1 << (_DROPPED_BITS - 1)
    nearest = ((bits + half) >> _DROPPED_BITS) << _DROPPED_BITS
    return torch.where(value.isfinite(), nearest.view(torch.float32), value)


@app.default
def precision(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (128, 64, 64),
    levels: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (1, 2, 3),
    iterations: int = 20,
    device: str = "cpu",
    write: Path | None = None,
) -> int:
    """Denoise a scene in float32, TF32 and bfloat16, with plain PyTorch operators, from the weights in the package.

    Parameters
    ----------
    shape
        Frames, rows and columns of the simulated scene.
    levels
        Noise levels: 1, 2, 3.
    iterations
        Of fine-tuning, in the same arithmetic.
    device
        Where to compute.
    write
        Markdown file whose table is replaced.
    """
    scene = simulate_scene(shape, seed=_SEED)
    clean = scene[:]
    noisy = {level: NoisyScene(scene, *noise_parameters(level), seed=_SEED + level)[:] for level in levels}
    lines = level_head("precision", levels)
    exact: dict[int, dict[str, float]] = {}
    for name in ("fp32", "tf32", "bf16"):
        cells = []
        for level in levels:
            found = evaluate_stacks(clean, denoised(noisy[level], name, iterations, device))
            reference = exact.setdefault(level, found)
            cells.append(
                " / ".join(f"{found[k]:.2f} ({found[k] - reference[k]:+.3f})" for k in ("stsnr", "activity_snr"))
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    emulated = "; TF32 is computed by rounding the factors of all products" * (device == "cpu")
    command = f"python -m benchmarks.precision {without_folders(sys.argv[1:])}".strip()
    origin = (
        f"Computed by `{command}` on {device}{emulated}: stSNR / activity SNR in dB (difference to fp32) of a scene "
        f"of {' x '.join(map(str, shape))} with seed {_SEED}, after {iterations} iterations of fine-tuning."
    )
    publish(write, BEGIN, END, origin, "\n".join(lines))
    return 0


def denoised(noisy: np.ndarray, name: Precision, iterations: int, device: str) -> np.ndarray:
    """Denoise a stack with the default recipe in the given arithmetic."""
    chosen = settings(iterations=iterations, precision=name, engine="reference")
    with RoundedProducts() if name == "tf32" and device == "cpu" else nullcontext():
        return array_and_record(noisy, chosen, device=device)[0]


if __name__ == "__main__":
    sys.exit(app())
