"""Two-photon calcium recordings with known truth: clean scenes, rendered where they are sliced, and their noise."""

from restormer3d.simulation.activity import INDICATORS
from restormer3d.simulation.detector import NOISE_LEVELS, NoisyScene, add_noise, noise_parameters
from restormer3d.simulation.files import write_scene
from restormer3d.simulation.generation import simulate_scene
from restormer3d.simulation.parameters import SceneParameters, random_scene_parameters
from restormer3d.simulation.scene import Scene
from restormer3d.simulation.textures import random_texture

__all__ = [
    "INDICATORS",
    "NOISE_LEVELS",
    "NoisyScene",
    "Scene",
    "SceneParameters",
    "add_noise",
    "noise_parameters",
    "random_scene_parameters",
    "random_texture",
    "simulate_scene",
    "write_scene",
]
