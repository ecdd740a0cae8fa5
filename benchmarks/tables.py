"""The Markdown of the quality table: one table for each noise level, one for each recording, and what the networks did.

The best filter is the one with the highest mean, oracles included; every row shows its difference to it, scene by
scene, and rows of a network say in a word whether they win or lose.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import METHODS
from restormer3d.report import HeldOutScore

ORACLE = "†"
_HEAD = (
    "| method | stSNR (dB) | to the best filter | activity SNR (dB) | to the best filter | event amplitude bias "
    "| trace correlation | seconds | peak memory (MB) |"
)
_REAL_HEAD = (
    "| method | held-out error / noise variance | difference to the best filter, % of the noise variance "
    "| residual correlation x, y, t | residual with activity | photon-transfer gain | seconds |"
)
Cell = dict[str, Any]


def markdown(results: dict[str, Any]) -> str:
    """Write all tables of `results["cells"]`, and the command and the machine they come from."""
    cells = results["cells"]
    if not cells:
        return "No cell has been computed."
    scenes = [cell for cell in cells if cell["kind"] == "scene"]
    real = [cell for cell in cells if cell["kind"] == "real"]
    levels, recordings = sorted({cell["level"] for cell in scenes}), dict.fromkeys(map(recording_name, real))
    parts = [_origin(results)]
    parts += [_level_table(level, [cell for cell in scenes if cell["level"] == level]) for level in levels]
    if scenes:
        parts += [_SCENE_NOTES, _widths_table(scenes)]
    parts += [_real_table(name, [cell for cell in real if recording_name(cell) == name]) for name in recordings]
    if real:
        parts.append(_REAL_NOTES)
    if networks := [cell for cell in cells if METHODS[cell["method"]].kind == "network"]:
        parts.append(_network_table(networks))
    return "\n\n".join(parts)


def row_label(own: list[Cell], scenes: int) -> str:
    """Name of a row: what chose its widths, and how many of the scenes it has if it lacks some."""
    method = METHODS[own[0]["method"]]
    text = own[0]["label"]
    if method.oracle:
        goal = {"stsnr": "stSNR", "activity_snr": "activity SNR"}[method.oracle]
        text += f", oracle by {goal if own[0]['kind'] == 'scene' else 'held-out error'} {ORACLE}"
    return text + (f" ({len(own)} of {scenes} scenes)" if len(own) < scenes else "")


def _origin(results: dict[str, Any]) -> str:
    cells = results["cells"]
    dates = sorted(cell["finished"][:10] for cell in cells)
    loads = [cell["load_average"] for cell in cells]
    return (
        f"Computed by `{results['command']}` on {' to '.join(dict.fromkeys((dates[0], dates[-1])))} at commit "
        f"{_all(cell['commit'] for cell in cells)}, on {_all(cell['machine'] for cell in cells)}. "
        f"The machine's load average when a cell began was {min(loads):.1f} to {max(loads):.1f}: where that is more "
        "than the number of its cores, other work made the seconds longer."
    )


def _level_table(level: int, cells: list[Cell]) -> str:
    scores = {key: _by_method(cells, lambda cell, key=key: cell["scores"][key]) for key in ("stsnr", "activity_snr")}
    best = {key: _best(values) for key, values in scores.items()}
    frames, height, width = cells[0]["shape"]
    count = len({cell["number"] for cell in cells})
    lines = [f"### Level {level}: {count} scene{'s' * (count > 1)} of {frames} x {height} x {width}", "", _HEAD]
    lines.append("|---" * (_HEAD.count("|") - 1) + "|")
    for method in scores["stsnr"]:
        own = [cell for cell in cells if cell["method"] == method]
        columns = [row_label(own, count)]
        for key, values in scores.items():
            columns += [_spread(list(values[method].values()), "{:.2f}"), _difference(values, method, best[key])]
        columns += [
            _spread([cell["scores"]["event_amplitude_bias"] for cell in own], "{:+.1%}", 100),
            _spread([cell["scores"]["trace_correlation"] for cell in own], "{:.3f}"),
            _seconds(own),
            f"{max(cell['peak_memory_mb'] for cell in own):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _by_method(cells: list[Cell], value: Callable[[Cell], float | None]) -> dict[str, dict[int, float]]:
    """Return {method: {scene number: value}} in the order of the table."""
    found: dict[str, dict[int, float]] = {}
    for method in METHODS:
        own = {cell["number"]: _number(value(cell)) for cell in cells if cell["method"] == method}
        if own:
            found[method] = own
    return found


def _best(values: dict[str, dict[int, float]]) -> str | None:
    """The filter with the best mean over the scenes, of those that have all of them; None without filters."""
    most = max(map(len, values.values()), default=0)
    complete = {name: own for name, own in values.items() if _is_filter(name) and len(own) == most}
    means = {name: float(np.mean(list(own.values()))) for name, own in complete.items()}
    means = {name: mean for name, mean in means.items() if np.isfinite(mean)}
    return max(means, key=lambda name: means[name]) if means else None


def _difference(values: dict[str, dict[int, float]], method: str, best: str | None) -> str:
    """Mean over scenes of the difference to the best filter, and the verdict for a network."""
    if best is None or method == best:
        return "–" if best is None else "best filter"
    pairs = [own - values[best].get(number, np.nan) for number, own in values[method].items()]
    pairs = [pair for pair in pairs if np.isfinite(pair)]
    if not pairs:
        return "–"
    verdict = ""
    if not _is_filter(method):
        verdict = " **wins**" if np.mean(pairs) > 0 else " **loses**"
    return _spread([*pairs], "{:+.2f}") + verdict


_SCENE_NOTES = (
    f"Mean over scenes ± standard deviation over scenes. {ORACLE}: its widths were chosen with the truth, scene by "
    "scene: an upper bound that no user has. Differences are taken scene by scene; the best filter is the one with the "
    "best mean in its column, oracles included. Seconds of one run, training included, or of an oracle's whole grid."
)


def _widths_table(cells: list[Cell]) -> str:
    """What the filters chose, and what oracles could choose from: a choice at the grid's edge is no optimum."""
    levels = sorted({cell["level"] for cell in cells})
    lines = ["| widths (frames, pixels) | " + " | ".join(f"level {level}" for level in levels) + " | grid |"]
    lines.append("|---" * (len(levels) + 2) + "|")
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method and "sigma_t" in cell["done"]]
        if not own:
            continue
        columns = [row_label(own, 0)]
        for level in levels:
            chosen = (cell["done"] for cell in own if cell["level"] == level)
            columns.append(_all(f"({done['sigma_t']:g}, {done['sigma_xy']:g})" for done in chosen))
        columns.append(" x ".join("{" + _all(widths) + "}" for widths in own[0]["settings"].values()))
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _real_table(name: str, cells: list[Cell]) -> str:
    scores = {cell["method"]: HeldOutScore(**_held_out(cell)) for cell in cells}
    filters = [method for method in scores if _is_filter(method)]
    best = min(filters, key=lambda method: scores[method].mse) if filters else None
    lines = [f"### {name}", "", *[_noise_line(cell["noise"]) for cell in cells if "noise" in cell]]
    lines += ["", _REAL_HEAD, "|---" * (_REAL_HEAD.count("|") - 1) + "|"]
    for cell in sorted(cells, key=lambda cell: list(METHODS).index(cell["method"])):
        score, residual = scores[cell["method"]], cell.get("residual")
        columns = [
            row_label([cell], 1),
            f"{score.in_noise_variances:.4f}",
            _held_out_difference(cell["method"], scores, best),
            ", ".join(_maybe(residual[axis], "{:.3f}") for axis in "xyt") if residual else "–",
            _maybe(residual["activity"], "{:+.3f}") if residual else "–",
            _maybe(cell["photon_transfer"]["gain"], "{:.3g}") if "photon_transfer" in cell else "–",
            _seconds([cell]),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _held_out(cell: Cell) -> dict[str, Any]:
    values = {name: _number(cell["held_out"][name]) for name in ("mse", "standard_error", "noise_variance")}
    return values | {"per_frame": np.array(cell["held_out"]["per_frame"], dtype=float)}


def _held_out_difference(method: str, scores: dict[str, HeldOutScore], best: str | None) -> str:
    if best is None or method == best:
        return "–" if best is None else "best filter"
    difference, error = scores[method].minus(scores[best])
    percent = 100 / scores[best].noise_variance
    text = f"{difference * percent:+.2f} ± {error * percent:.2f}"
    if _is_filter(method):
        return text
    if abs(difference) < 2 * error:
        return f"{text} **no clear difference**"
    return f"{text} {'**wins**' if difference < 0 else '**loses**'}"


def _noise_line(noise: dict[str, Any]) -> str:
    correlation = ", ".join(f"{axis} {_maybe(noise['correlation'][axis], '{:.3f}')}" for axis in "xyt")
    return (
        f"Noise of the recording, from differences of frames: gain {noise['gain']:.3g}, read noise variance "
        f"{noise['read_noise_variance']:.3g}, correlation of neighbors {correlation}. A residual of noise alone would "
        "show the same correlation."
    )


_REAL_NOTES = (
    "Held-out error: the even frames are denoised alone and the odd ones, interpolated, compared with what was "
    "recorded; 1 would be a perfect prediction of frames whose signal does not change. Differences are taken frame by "
    "frame, ± their standard error; less is better; less than two standard errors is called no clear difference. "
    f"{ORACLE}: its widths were chosen by the held-out frames that it is scored on. Residual with activity: "
    "correlation of what was taken away with what was left, without each pixel's mean: positive where transients were "
    "taken away, negative where noise was left in. Photon-transfer gain: what shot noise is left in the denoised stack."
)


def _network_table(cells: list[Cell]) -> str:
    lines = ["### What the networks did", ""]
    lines += [
        "| row | iterations | patch | batch | weights at the start | engine, device |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method]
        if not own:
            continue
        done = [cell["done"] for cell in own]
        training = [entry["settings"]["training"] for entry in done]
        columns = [
            own[0]["label"],
            ", ".join(map(_iterations, done)),
            _all(" x ".join(map(str, entry["patch"])) for entry in training),
            _all(entry["batch_size"] for entry in training),
            _all(entry["weights"]["sha256"][:12] if entry["weights"] else "random" for entry in done),
            _all(f"{entry['engine']}, {entry['device']}, {entry['threads']} threads" for entry in done),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    note = "Iterations that were done on each stack; in brackets those whose weights the held-out voxels chose."
    return "\n".join([*lines, "", note])


def _iterations(done: dict[str, Any]) -> str:
    training = done["settings"]["training"]
    planned = training["warmup_iterations"] + training["iterations"]  # all that records of older commits hold
    kept = done.get("held_out", {}).get("kept_iteration")
    return str(done.get("iterations", planned)) + ("" if kept is None else f" ({kept})")


def recording_name(cell: Cell) -> str:
    spans = [f"{first}–{last - 1}" for first, last in cell["crop"]]
    parts = [f"{axis} {span}" for axis, span in zip(("frames", "rows", "columns"), spans, strict=False)]
    return ", ".join([f"Recording {cell['recording']}", *parts])


def _is_filter(method: str) -> bool:
    return METHODS[method].kind == "filter"


def _spread(values: list[float | None], form: str, scale: float = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    numbers = np.array([value for value in map(_number, values) if np.isfinite(value)])
    if not len(numbers):
        return "–"
    text = form.format(numbers.mean())
    plain = form.replace("+", "").replace("%", "f")
    return text if len(numbers) == 1 else f"{text} ± {plain.format(scale * numbers.std(ddof=1))}"


def _seconds(own: list[Cell]) -> str:
    mean = float(np.mean([cell["seconds"] for cell in own]))
    return f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _maybe(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _all(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def level_head(corner: str, levels: tuple[int, ...]) -> list[str]:
    """Return the first two lines of a table with a column for each noise level."""
    return [
        f"| {corner} | " + " | ".join(f"level {level}" for level in levels) + " |",
        "|---" * (1 + len(levels)) + "|",
    ]


def publish(document: Path | None, begin: str, end: str, *parts: str) -> None:
    """Print the parts of a table and put them into a document, if one is given."""
    print("\n\n".join(parts))
    if document is not None:
        put_between(document, begin, end, *parts)


def put_between(document: Path, begin: str, end: str, *parts: str) -> None:
    """Replace what stands between two lines of a Markdown file; what is around them stays."""
    text = document.read_text() if document.exists() else f"{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{document}: expected the lines {begin!r} and {end!r}, between which the table goes")
    before, after = text.split(begin)[0], text.split(end)[1]
    document.write_text("\n\n".join([before + begin, *parts, end + after]))
