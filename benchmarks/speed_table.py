"""The speed tables as Markdown, from what `benchmarks.speed` measured."""

from __future__ import annotations

from statistics import median
from typing import Any

_WRITTEN = "begin (written by benchmarks.speed --write; edit nothing here by hand)"


def _marks(name: str) -> tuple[str, str]:
    """Return the lines of the page between which a table stands."""
    return f"<!-- {name}: {_WRITTEN} -->", f"<!-- {name}: end -->"


MARKS, JOB_MARKS = _marks("speed table"), _marks("whole job")
GPU_MARKS, GPU_JOB_MARKS = _marks("speed table of a GPU"), _marks("whole job on a GPU")
CHALLENGE_MARKS = _marks("challenge stack")

_MEMORY_ROWS = (
    ("saved_bytes_per_voxel", "saved for the backward pass, kB per voxel", 1e3),
    ("peak_bytes", "peak memory of a training step of batch 4, MB", 1e6),
)


def report(result: dict[str, Any], *, on_gpu: bool = False) -> dict[tuple[str, str], str]:
    """Return what stands between which marks, with the machine and the command that made it; empty if not measured."""
    return {
        GPU_MARKS if on_gpu else MARKS: _network(result) if "training" in result else "",
        GPU_JOB_MARKS if on_gpu else JOB_MARKS: _job(result["job"]) if "job" in result else "",
        CHALLENGE_MARKS: _job(result["challenge"]) if "challenge" in result else "",
    }


def _network(result: dict[str, Any]) -> str:
    parts = [
        f"`{result['command']}` on {result['machine']}.",
        f"The published network, {result['parameters']:,} parameters, float32. Gradients of ours and of stock differ "
        f"by {result['agreement']:.0e}. Times are medians (fastest to slowest) of {result['repeats']} alternating runs "
        "in one process; the ratio compares ours with the best stock variant.",
        "\n".join(_network_rows(result)),
        *(f"Left out: {name}: {why}" for name, why in result["skipped"].items()),
        _ceilings(result["ceilings"]),
        "\n".join(_depthwise_rows(result["depthwise"])),
        "\n".join(_operator_rows(result["operators"])),
    ]
    return "\n\n".join(parts)


def _network_rows(result: dict[str, Any]) -> list[str]:
    names = list(result["inference"]["seconds"])
    lines = ["| | " + " | ".join(names) + " | ratio |", "|---" * (len(names) + 2) + "|"]
    for voxels, seconds in result["training"].items():
        cells = [_spread(seconds[name], 1.0) if name in seconds else "" for name in names]
        lines.append(_row(f"training step, {int(voxels):,} voxels, s", cells, _ratio(seconds)))
    voxels, seconds = result["inference"]["voxels"], result["inference"]["seconds"]
    cells = [_spread([voxels / 1e3 / s for s in seconds[name]], 1.0, digits=0) for name in names]
    lines.append(_row("inference, thousand voxels/s", cells, _ratio(seconds)))
    for key, label, unit in _MEMORY_ROWS:
        found = result[key]
        cells = [f"{found[name] / unit:.1f}" if name in found else "" for name in names]
        lines.append(_row(label, cells, ""))
    return lines


def _ceilings(ceilings: dict[str, float]) -> str:
    copy, flop = ceilings["copy_bytes_per_s"], ceilings["flop_per_s"]
    return (
        f"Operators alone. The machine copies {copy / 1e9:.1f} GB/s (read and written together) and multiplies "
        f"matrices at {flop / 1e9:.0f} GFLOP/s."
    )


def _depthwise_rows(depthwise: dict[str, Any]) -> list[str]:
    """Each direction moves two tensors, as a copy of the input does: the copy is the unit."""
    lines = [
        f"Depth-wise convolution of {depthwise['shape']}; copying that takes {_spread(depthwise['copy'], 1e3)} ms.",
        "",
        "| depth-wise convolution | ours, ms | of a copy | reference, ms | of a copy |",
        "|---|---|---|---|---|",
    ]
    copy = median(depthwise["copy"])
    for name, seconds in depthwise["seconds"].items():
        cells = []
        for engine in ("ours", "reference"):
            cells += [_spread(seconds[engine], 1e3), f"{median(seconds[engine]) / copy:.1f}x"]
        lines.append(_row(name, cells))
    return lines


def _operator_rows(operators: list[dict[str, Any]]) -> list[str]:
    lines = ["| operator | input | copy of the input, ms | forward at both ceilings, ms | forward, ms | reference, ms "]
    lines[0] += "| forward + backward, ms | reference, ms |"
    lines.append("|---" * 8 + "|")
    for row in operators:
        order = ("ours forward", "reference forward", "ours both", "reference both")
        cells = [str(row["shape"]), f"{1e3 * median(row['seconds']['copy']):.2f}", f"{1e3 * row['floor']:.2f}"]
        lines.append(_row(row["operator"], cells + [_spread(row["seconds"][key], 1e3) for key in order]))
    return lines


def _job(job: dict[str, Any]) -> str:
    shape = " x ".join(str(size) for size in job["shape"])
    limit = "without a time limit" if job["limit"] is None else f"under --time-limit {job['limit']:g}"
    origin = f"`{job['command']}` on {job['machine']}."
    if job["method"] != "restormer3d":
        return f"{origin} Whole job, {shape} int16, {limit}: no network in that time ({job['method']})."
    seconds = job["seconds"]
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
    return (
        f"{origin} Whole job: `restormer3d denoise` with the {job['recipe']} recipe, TIFF to TIFF, {shape} int16, "
        f"{limit}: {took}, {job['iterations']} of {job['recipe_iterations']} iterations, overlap {job['overlap_t']:g} "
        f"in time and {job['overlap_xy']:g} in the plane, {job['engine']} operators on {job['device']}."
    )


def _row(label: str, cells: list[str], *more: str) -> str:
    return "| " + " | ".join([label, *cells, *more]) + " |"


def _spread(values: list[float], scale: float, digits: int | None = None) -> str:
    middle, least, most = (scale * value for value in (median(values), min(values), max(values)))
    places = (3 if scale == 1.0 else 2) if digits is None else digits
    return f"{middle:,.{places}f} ({least:,.{places}f} to {most:,.{places}f})"


def _ratio(seconds: dict[str, list[float]]) -> str:
    stock = min(median(values) for name, values in seconds.items() if name != "ours")
    return f"{stock / median(seconds['ours']):.1f}x"
