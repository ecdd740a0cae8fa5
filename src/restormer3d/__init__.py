"""restormer3d: denoise two-photon calcium imaging stacks from the noisy stack alone.

>>> import restormer3d
>>> denoised = restormer3d.denoise("recording.tif")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restormer3d.config import InferenceConfig, ModelConfig, TrainingConfig
    from restormer3d.inference import denoise_frames
    from restormer3d.model import Restormer3D
    from restormer3d.patches import training_stack
    from restormer3d.stacks import open_stack, write_stack
    from restormer3d.training import fit
    from restormer3d.workflow import denoise

__all__ = [
    "InferenceConfig",
    "ModelConfig",
    "Restormer3D",
    "TrainingConfig",
    "denoise",
    "denoise_frames",
    "fit",
    "open_stack",
    "training_stack",
    "write_stack",
]

_HOME = {
    "InferenceConfig": "config",
    "ModelConfig": "config",
    "Restormer3D": "model",
    "TrainingConfig": "config",
    "denoise": "workflow",
    "denoise_frames": "inference",
    "fit": "training",
    "open_stack": "stacks",
    "training_stack": "patches",
    "write_stack": "stacks",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: the command line's help needs none of them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
