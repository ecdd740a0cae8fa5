"""What each part of the default recipe brings: `python -m benchmarks.ablation` leaves them out one by one.

On a simulated scene that is neither in training nor in the quality table. Each cell is kept as one JSON file: a run
that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
from cyclopts import App, Parameter
from torch import Tensor

from benchmarks.cells import write_json
from benchmarks.jobs import without_folders
from benchmarks.tables import level_head, publish
from restormer3d.checkpoint import file_sha256
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import Pretrained, Settings, build_model, settings
from restormer3d.sidecar import networks_record, weights_record
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

BEGIN = "<!-- ablation table: begin (written by benchmarks.ablation --write; edit nothing here by hand) -->"
END = "<!-- ablation table: end -->"
_SEED = 9_100_000
_Change = dict[str, dict[str, Any]]
_AS_THEY_ARE: _Change = {"training": {"iterations": 0}}
ROWS: dict[str, tuple[bool, _Change]] = {
    "**as they are: not fine-tuned**": (True, _AS_THEY_ARE),
    "the mixture of filters not fitted to the stack": (True, {"training": {"iterations": 0, "adapt_mixture": False}}),
    "the fitted mixture alone, without the network": (False, _AS_THEY_ARE),
    "without courses raised to the variance that they have": (True, _AS_THEY_ARE),
    "without courses denoised once more": (True, _AS_THEY_ARE | {"inference": {"courses": False}}),
    "without footprints denoised once more": (True, _AS_THEY_ARE | {"inference": {"footprints": False}}),
    "without footprints and courses denoised once more": (
        True,
        _AS_THEY_ARE | {"inference": {"courses": False, "footprints": False}},
    ),
    "without components, footprints and courses": (True, _AS_THEY_ARE | {"inference": {"components": False}}),
    "without the static image denoised once more": (True, _AS_THEY_ARE | {"inference": {"static_image": False}}),
    "without all four": (True, _AS_THEY_ARE | {"inference": {"components": False, "static_image": False}}),
    "without all four, windows mirrored at the ends of the stack": (
        True,
        _AS_THEY_ARE | {"inference": {"components": False, "static_image": False, "mirror_t": True}},
    ),
    "the usual mixture alone": (False, {"training": {"iterations": 0, "adapt_mixture": False}}),
    "averaged over eight symmetries": (True, _AS_THEY_ARE | {"inference": {"symmetries": 8}}),
    "windows that overlap by half": (True, _AS_THEY_ARE | {"inference": {"overlap_t": 0.5, "overlap_xy": 0.5}}),
    "windows of 256 x 96 x 96 at most": (True, _AS_THEY_ARE | {"inference": {"stretch": 1.0}}),
    "windows of 128 x 48 x 48": (True, _AS_THEY_ARE | {"inference": {"window": (128, 48, 48), "stretch": 1.0}}),
    "windows of 64 x 48 x 48": (True, _AS_THEY_ARE | {"inference": {"window": (64, 48, 48), "stretch": 1.0}}),
    "**fine-tuned**": (True, {}),
    "fine-tuned, mixture not fitted": (True, {"training": {"adapt_mixture": False}}),
    "fine-tuned to the last iteration": (True, {"training": {"stop_early": False}}),
    "fine-tuned to the last iteration, the last weights kept": (
        True,
        {"training": {"held_out": 0.0, "stop_early": False}},
    ),
    "fine-tuned, L1": (True, {"training": {"loss": "l1"}}),
    "fine-tuned, learning rate 3e-4": (True, {"training": {"learning_rate": 3e-4}}),
}
"""Whether the network has a part in it, and what differs from the default settings, by row."""
_NOT_RAISED = "without courses raised to the variance that they have"  # which no setting switches off

app = App(name="python -m benchmarks.ablation", help_format="plaintext")


@app.default
def ablation(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (200, 96, 96),
    levels: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (1, 2, 3),
    iterations: int = 100,
    without: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    folder: Path = Path("runs/ablation"),
    write: Path | None = None,
) -> int:
    """Fill the ablation table; resumes where it was stopped.

    Parameters
    ----------
    shape
        Frames, rows and columns of the simulated scene.
    levels
        Noise levels: 1, 2, 3.
    iterations
        Of the fine-tuned rows.
    without
        Rows to leave out: those with any of these words in their name.
    folder
        Where the cells are kept.
    write
        Markdown file whose table is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scene = simulate_scene(shape, seed=_SEED)
    lines = level_head(" x ".join(map(str, shape)), levels)
    for label, (network, change) in ROWS.items():
        if any(word in label for word in without):
            continue
        chosen = _settings(change, iterations)
        with patch("restormer3d.activity.courses.as_varied", _unchanged) if label == _NOT_RAISED else nullcontext():
            cells = [_cell(scene, level, chosen, network, label == _NOT_RAISED, folder) for level in levels]
        lines.append(f"| {label} | " + " | ".join(_text(cell) for cell in cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    command = f"python -m benchmarks.ablation {without_folders(sys.argv[1:])}"
    origin = f"Computed by `{command.strip()}`: stSNR / activity SNR in dB"
    tuned = f"fine-tuned rows: {iterations} iterations."
    publish(write, BEGIN, END, f"{origin}; the scene's seed is {_SEED}; {tuned}", "\n".join(lines))
    return 0


def _settings(change: _Change, iterations: int) -> Settings:
    base = settings(iterations=iterations)
    parts = {
        name: type(config).model_validate(config.model_dump() | change.get(name, {}))
        for name, config in (("training", base.training), ("inference", base.inference))
    }
    return replace(base, **parts)


def _unchanged(denoised: Tensor, *_: Tensor) -> Tensor:
    return denoised


def _cell(scene: Any, level: int, chosen: Settings, network: bool, not_raised: bool, folder: Path) -> dict[str, Any]:
    """Denoise the scene at a noise level and score it, unless that was done before."""
    assert chosen.weights is not None
    key = [scene.shape, level, network, not_raised, chosen.training.model_dump(), chosen.inference.model_dump()]
    text = json.dumps([*key, file_sha256(chosen.weights), networks_record(chosen)])
    path = folder / f"level{level}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if path.exists():
        return json.loads(path.read_text())
    noisy = NoisyScene(scene, *noise_parameters(level), seed=_SEED + level)[:]
    model = build_model(chosen)
    if not network:
        torch.nn.init.zeros_(model.unet.output.weight)
    started = time.monotonic()
    pretrained = Pretrained(model, weights_record(chosen))
    denoised = array_and_record(noisy, chosen, pretrained=pretrained)[0]
    scores = evaluate_stacks(scene[:], denoised)
    cell = {name: scores[name] for name in ("stsnr", "activity_snr")} | {"seconds": time.monotonic() - started}
    write_json(path, cell | {"settings": text, "load": os.getloadavg()[0]})
    return cell


def _text(cell: dict[str, Any]) -> str:
    return f"{cell['stsnr']:.2f} / {cell['activity_snr']:.2f}"


if __name__ == "__main__":
    app()
