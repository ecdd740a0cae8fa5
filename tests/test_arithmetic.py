"""Engines and precisions: float32 is float32, the others are what was asked for or refused."""

from __future__ import annotations

import pytest
import torch

import restormer3d
from restormer3d import ops
from restormer3d.arithmetic import autocast, float32_products, forced_engine, torch_device, usable
from restormer3d.config import ModelConfig
from restormer3d.inference import denoise_frames
from restormer3d.model import Restormer3D
from restormer3d.patches import training_stack
from restormer3d.training import fit

from .conftest import TINY, background_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tf32_flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_off_unless_asked_for_and_flags_are_put_back():
    before = tf32_flags()
    with float32_products("tf32"):
        assert tf32_flags() == (True, True)
        with float32_products("fp32"):
            assert tf32_flags() == (False, False)
            assert torch.get_float32_matmul_precision() == "highest"
        assert tf32_flags() == (True, True)
    assert tf32_flags() == before


def test_the_flags_hold_in_training_and_inference(tiny_model, noisy_stack, quick_training, quick_inference):
    seen = []
    tiny_model.register_forward_hook(lambda *_: seen.append(tf32_flags()))
    source = training_stack(noisy_stack)
    for precision in ("fp32", "tf32"):
        fit(tiny_model, [source], quick_training, precision=precision)
        list(
            denoise_frames(
                tiny_model, noisy_stack, source.normalization, source.background, quick_inference, precision=precision
            )
        )
        assert set(seen) == {(precision == "tf32",) * 2}
        seen.clear()


@pytest.mark.parametrize(
    ("engine", "precision", "device", "expected"),
    [
        ("auto", "fp32", CPU, ("cpu", "fp32")),
        ("reference", "fp32", CPU, ("reference", "fp32")),
        ("auto", "tf32", CPU, ("cpu", "fp32")),  # there is no TF32 on a CPU
        ("reference", "tf32", CUDA, ("reference", "tf32")),
        ("reference", "bf16", CPU, ("reference", "bf16")),
        ("reference", "bf16", CUDA, ("reference", "bf16")),
    ],
)
def test_what_goes_together(engine, precision, device, expected):
    assert usable(engine, precision, device) == expected


@pytest.mark.parametrize(
    ("engine", "precision", "device", "reason"),
    [
        ("auto", "bf16", CPU, "--engine reference"),
        ("cpu", "fp32", CUDA, "tensors are on 'cuda'"),
        ("abacus", "fp32", CPU, "unknown engine"),
        ("auto", "fp16", CPU, "fp32, tf32 or bf16"),
    ],
)
def test_what_does_not_is_refused(engine, precision, device, reason):
    with pytest.raises(ValueError, match=reason):
        usable(engine, precision, device)


def test_auto_leaves_the_engine_to_what_is_around():
    with ops.use_engine("reference"), forced_engine("auto"):
        assert ops.engine_for(CPU) == "reference"


def test_bf16_trains_float32_weights_and_blends_in_float32(tiny_model, noisy_stack, quick_training, quick_inference):
    """Close to float32, but not the same: the products were rounded."""
    source = training_stack(noisy_stack)
    dtypes = []
    tiny_model.unet.refinement.register_forward_hook(lambda *arguments: dtypes.append(arguments[2].dtype))
    results = {}
    with ops.use_engine("reference"):
        for precision in ("fp32", "bf16"):
            frames = denoise_frames(
                tiny_model, noisy_stack, source.normalization, source.background, quick_inference, precision=precision
            )
            results[precision] = torch.stack([torch.from_numpy(frame) for frame in frames])
        history = fit(tiny_model, [source], quick_training, precision="bf16")
    assert set(dtypes[-len(history) :]) == {torch.bfloat16}
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}
    difference = (results["bf16"] - results["fp32"]).abs().mean() / results["fp32"].std()
    assert 0 < difference < 0.1


def test_filters_are_exact_where_the_network_computes_in_bfloat16():
    model = Restormer3D(ModelConfig(**TINY, start="filters"))  # whose network adds nothing yet
    x = torch.rand(1, 1, 16, 16, 16)
    background = background_of(x.mean(2, keepdim=True))
    with ops.use_engine("reference"), autocast(CPU, "bf16"):
        found = model(x, background)
    torch.testing.assert_close(found, model(x, background))


def test_every_step_sees_the_weights_of_the_one_before():
    """A cache of cast weights would keep those of the first step."""
    layer = torch.nn.Linear(1, 1, bias=False)
    outputs = []
    with autocast(CPU, "bf16"):
        for value in (1.0, 2.0):
            with torch.no_grad():
                layer.weight.fill_(value)
            outputs.append(layer(torch.ones(1, 1)).item())
    assert outputs == [1.0, 2.0]


def test_denoise_takes_engine_and_precision(noisy_stack):
    options = {"method": "gaussian", "engine": "reference", "precision": "tf32"}
    assert restormer3d.denoise(noisy_stack, **options).shape == noisy_stack.shape
    with pytest.raises(ValueError, match="bf16"):
        restormer3d.denoise(noisy_stack, device="cpu", precision="bf16")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or mps"):
        torch_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not available"):
            torch_device("cuda")
    assert torch_device("cpu").type == "cpu"
