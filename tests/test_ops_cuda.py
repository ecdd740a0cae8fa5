"""The CUDA engine against the reference, in Triton's interpreter where there is no GPU, and the choice of it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from restormer3d import ops
from restormer3d.arithmetic import float32_products
from restormer3d.config import ModelConfig
from restormer3d.model import Restormer3D
from restormer3d.ops import reference
from tests.test_ops import arguments, relative_error, results

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DEVICE = "cuda" if ON_GPU else "cpu"  # conftest turns on Triton's interpreter where there is no GPU

CASES = [  # (B, C, T, H, W): odd sizes, every axis of length one, frames wider than a tile, several runs of frames
    ("depthwise_conv3d", (2, 2, 3, 5, 7)),
    ("depthwise_conv3d", (1, 1, 35, 2, 3)),
    ("depthwise_conv3d", (1, 1, 2, 9, 61)),
    ("depthwise_conv3d", (4, 1, 1, 1, 1)),
    ("pointwise", (3, 6, 3, 5, 7)),
    ("pointwise", (2, 8, 3, 19, 37)),
    ("pointwise", (1, 70, 1, 3, 5)),
    ("pointwise", (2, 130, 1, 2, 9)),
    ("conv3d_in", (2, 4, 3, 5, 7)),
    ("conv3d_out", (1, 4, 3, 1, 5)),
    ("gdfn", (2, 1, 3, 3, 5)),
    ("gdfn", (1, 2, 2, 1, 37)),
    ("gdfn", (1, 2, 1, 5, 1)),
    ("gdfn", (4, 1, 1, 2, 3)),
    ("gdfn", (1, 1, 3, 26, 29)),
    ("mdta", (2, 2, 2, 5, 7)),
    ("mdta", (1, 2, 3, 7, 1)),
    ("mdta", (1, 2, 1, 1, 9)),
    ("mdta", (4, 1, 1, 3, 3)),
]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """No TF32 in the reference either: PyTorch's convolutions on a GPU would use it without being asked."""
    with float32_products("fp32"):
        yield


def inexact(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Return the relative errors against the reference in float64, of output and all gradients, that are too large."""
    with ops.use_engine("reference"):
        exact = function(*(i.double() for i in inputs))
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    expected = results("reference", function, [i.double() for i in inputs], grad.double())
    found = results("cuda", function, [i.to(DEVICE) for i in inputs], grad.to(DEVICE))
    errors = [relative_error(a.cpu(), b) for a, b in zip(found, expected, strict=True)]
    names = ["output", *(f"gradient {number}" for number in range(len(inputs)))]
    return {name: error for name, error in zip(names, errors, strict=True) if not error < 1e-5}


@needs_triton
@pytest.mark.parametrize(("operator", "shape"), CASES, ids=str)
def test_cuda_engine_gives_the_references_output_and_gradients(operator: str, shape: tuple[int, ...]) -> None:
    assert inexact(*arguments(operator, shape)) == {}


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: long sums, for which the interpreter takes minutes")
@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("mdta", (2, 64, 16, 32, 32)),
        ("gdfn", (2, 64, 16, 32, 32)),
        ("mdta", (1, 256, 4, 16, 16)),
        ("conv3d_out", (1, 32, 16, 64, 64)),
    ],
    ids=str,
)
def test_long_sums_of_tensor_cores_are_as_exact(operator: str, shape: tuple[int, ...]) -> None:
    assert inexact(*arguments(operator, shape)) == {}


@needs_triton
@pytest.mark.parametrize(
    ("batch", "rows", "channels", "voxels"),
    [(2, 70, 34, 150), (1, 40, 70, 70), (2, 3, 1, 2100), (1, 100, 64, 5)],  # tiles cut short, chunks, many channels
    ids=str,
)
def test_a_product_with_layer_norm_gives_the_references_gradients(
    batch: int, rows: int, channels: int, voxels: int
) -> None:
    from restormer3d.ops.cuda import launch

    g = torch.Generator().manual_seed(0)
    matrix, norm, x, hidden_grad, residual = inputs = [
        torch.randn(shape, generator=g)
        for shape in (
            (rows, channels), (channels,), (batch, channels, voxels), (batch, rows, voxels), (batch, channels, voxels)
        )
    ]  # fmt: skip
    leaves = [i.double().requires_grad_() for i in inputs[:3]]
    normalized = reference.layer_norm(leaves[2][..., None, None], leaves[1]).flatten(2)
    expected = leaves[0] @ normalized
    wanted = torch.autograd.grad(expected, leaves, hidden_grad.double())
    matrix, norm, x, hidden_grad, residual = (i.to(DEVICE) for i in inputs)
    scale, hidden = launch.normalized_product(matrix, norm, x)
    x_grad, matrix_grad, norm_grad = launch.normalized_product_backward(x, scale, hidden_grad, matrix, norm, residual)
    found = [hidden, matrix_grad, norm_grad, x_grad - residual]
    assert all(relative_error(a.cpu(), b) < 1e-5 for a, b in zip(found, [expected.detach(), *wanted], strict=True))


@needs_triton
@pytest.mark.parametrize(
    ("batch", "channels", "hidden", "voxels"), [(2, 34, 70, 150), (1, 130, 20, 70), (2, 3, 1, 2100)], ids=str
)
def test_the_gate_gives_the_references_gradients(
    batch: int, channels: int, hidden: int, voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restormer3d.ops.cuda import launch

    monkeypatch.setattr(launch, "depthwise", lambda x, _: (x.clone(), x))  # convolutions have tests of their own
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, 2 * hidden, voxels, generator=g), torch.randn(channels, hidden, generator=g)]
    grad = torch.randn(batch, channels, voxels, generator=g)
    x, project_out = leaves = [i.double().requires_grad_() for i in inputs]
    gate, value = x.chunk(2, dim=1)
    wanted = torch.autograd.grad(project_out @ (torch.nn.functional.gelu(gate) * value), leaves, grad.double())
    x, project_out, grad = (i.to(DEVICE) for i in (*inputs, grad))
    found = launch.gated_depthwise_backward(x[..., None, None], x, project_out, grad)
    assert all(relative_error(a.cpu().view_as(b), b) < 1e-5 for a, b in zip(found, wanted, strict=True))


@needs_triton
def test_every_head_attends_to_its_own_channels() -> None:
    function, (x, norm, qkv, dwconv, _, project) = arguments("mdta", (2, 4, 1, 3, 5))
    inputs = [x, norm, qkv, dwconv, torch.tensor([0.7, 1.3]).view(2, 1, 1), project]
    assert inexact(function, inputs) == {}


@needs_triton
@pytest.mark.parametrize("operator", ["mdta", "gdfn"])
def test_same_input_gives_the_same_bits(operator: str) -> None:
    function, inputs = arguments(operator, (1, 1, 2, 3, 4))
    inputs = [i.to(DEVICE) for i in inputs]
    first, second = (results("cuda", function, inputs, torch.ones_like(inputs[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_input_in_another_layout_or_precision_works() -> None:
    function, inputs = arguments("depthwise_conv3d", (2, 2, 2, 3, 4))
    inputs = [i.to(DEVICE) for i in inputs]
    with ops.use_engine("cuda"):
        expected = function(*inputs)
        torch.testing.assert_close(function(inputs[0].to(memory_format=torch.channels_last_3d), inputs[1]), expected)
        assert function(*(i.double() for i in inputs)).dtype == torch.float64
        with torch.autocast(DEVICE, torch.bfloat16):
            assert function(*inputs).dtype == torch.bfloat16


@needs_triton
@pytest.mark.parametrize("operator", ["mdta", "gdfn", "depthwise_conv3d", "pointwise"])
def test_gradients_can_be_differentiated_again(operator: str) -> None:
    function, inputs = arguments(operator, (1, 2, 1, 2, 3))

    def curvature(engine: str, dtype: torch.dtype, device: str) -> Tensor:
        leaves = [i.to(device, dtype).requires_grad_() for i in inputs]
        with ops.use_engine(engine):
            (slope,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
            return torch.autograd.grad(slope.square().sum(), leaves[1])[0].cpu()

    assert relative_error(curvature("cuda", torch.float32, DEVICE), curvature("reference", torch.float64, "cpu")) < 1e-4


@needs_triton
def test_a_whole_network_gives_the_references_output_and_gradients() -> None:
    torch.manual_seed(0)
    blocks = (1, 1, 1, 1) if ON_GPU else (0, 0, 0, 1)  # the interpreter takes a minute for every level
    config = ModelConfig(
        dim=4, num_blocks=blocks, num_refinement_blocks=0, heads=(1, 1, 2, 2), ffn_expansion_factor=0.25,
        last_level_channels=4,
    )  # fmt: skip
    model = Restormer3D(config)
    x = torch.randn(1, 1, 7, 8, 5)
    found: list[list[Tensor]] = []
    for engine, device, dtype in [("cuda", DEVICE, torch.float32), ("reference", "cpu", torch.float64)]:
        model = model.to(device, dtype)
        model.zero_grad()
        with ops.use_engine(engine):
            y = model(x.to(device, dtype))
            y.square().mean().backward()
        found.append([y.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + len(list(model.parameters()))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*found, strict=True))


@needs_triton
def test_the_published_network_keeps_less_than_12_kilobytes_a_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    from restormer3d.ops import cuda
    from restormer3d.ops.cuda import launch

    def product(matrix: Tensor, x: Tensor, **_: object) -> Tensor:
        return x.new_zeros((len(x), matrix.shape[-2], x.shape[2]))

    def outer(a: Tensor, b: Tensor, heads: int) -> Tensor:
        return a.new_ones((len(a) * heads, a.shape[1] // heads, b.shape[1] // heads))

    # What is kept does not depend on the kernels' values, and the interpreter would take an hour for this network.
    monkeypatch.setattr(launch, "depthwise", lambda x, _, with_squares: (x.clone(), x.new_ones(x.shape[:2])))
    monkeypatch.setattr(launch, "gated_depthwise", lambda x, _: x.chunk(2, dim=1)[0].contiguous())
    monkeypatch.setattr(launch, "normalized_product", lambda matrix, _, x: (x[:, 0].clone(), product(matrix, x)))
    monkeypatch.setattr(cuda, "product", product)
    monkeypatch.setattr(cuda, "outer_products", outer)
    model, x = Restormer3D().to(DEVICE), torch.randn(1, 1, 16, 32, 32, device=DEVICE)
    weights = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # keeps the tensors, so that no two have the same address
    with (
        ops.use_engine("cuda"),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
    ):
        model(x)
    kept = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in weights)
    assert 1_000 < kept / x.numel() < 12_000


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from restormer3d.ops.cuda import attention, convolution, products
fixed = dict(SQUARES=True, ROWS=32, LANES=128, EPS=1e-5, CHANNELS=32, VOXELS=64, STEP=16, SUM_VOXELS=32, BLOCKS=2)
fixed |= dict(COLUMN_SCALE=True, VOXEL_SCALE=True, RESIDUAL=True, PRECISION="tf32x3", INNER=32, COLUMNS=32, COUNT=32)
pointers = {
    "x", "taps", "out", "squares", "grad", "x_grad", "tap_sums", "gated", "convolved", "matrix", "outer", "residual",
    "column_scale", "voxel_scale", "scale", "norm_weight", "a", "b", "sums", "products", "temperature", "project_out",
    "attention", "mixed", "query_key", "temperature_grad", "project_grad", "hidden_grad", "folded", "matrix_grad",
    "norm_grad",
}
kernels = [(convolution, name, {"ROWS": 2}) for name in ("depthwise", "depthwise_backward", "gated_depthwise")]
kernels += [
    (products, "product", {"ONE_STEP": step, "NORMALIZE": normalize})
    for step, normalize in ((True, True), (True, False), (False, False))
]
kernels += [(products, name, {}) for name in ("outer", "inverse_deviation", "normalize_backward", "gate_backward")]
kernels += [(products, name, {}) for name in ("hidden_backward", "scaled_matrix_backward")]
kernels += [(attention, name, {}) for name in ("attention_matrix", "attention_backward")]
def number(name):
    return "fp32" if name == "one" else "i32"

for module, name, more in kernels:
    kernel, values = getattr(module, name), fixed | more
    kinds = {a: "constexpr" if a in values else "*fp32" if a in pointers else number(a) for a in kernel.arg_names}
    source = ASTSource(kernel, kinds, {a: values[a] for a in kernel.arg_names if a in values})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
"""


@needs_triton
def test_kernels_compile_for_compute_capability_8_without_a_gpu(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An imagined GPU of compute capability 8.0, with Triton installed."""
    monkeypatch.delenv("RESTORMER3D_ENGINE", raising=False)
    monkeypatch.setattr(ops, "_why_not_triton", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    return monkeypatch


def test_a_recent_gpu_gets_the_cuda_engine(gpu: pytest.MonkeyPatch) -> None:
    assert ops.engine_for("cuda") == ops.engine_for(torch.device("cuda", 0)) == "cuda"
    assert ops.why_not_cuda("cuda") is None
    gpu.setenv("RESTORMER3D_ENGINE", "reference")
    assert ops.engine_for("cuda") == "reference"


def test_an_old_gpu_gets_the_reference_and_a_reason(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert ops.engine_for("cuda") == "reference"
    assert "7.5 is below the 8.0" in str(ops.why_not_cuda("cuda"))
    with ops.use_engine("cuda"), pytest.raises(ValueError, match=r"7\.5 is below.*use engine 'reference'"):
        ops.engine_for("cuda")


def test_without_triton_or_gpu_the_reference_computes(gpu: pytest.MonkeyPatch) -> None:
    assert ops.engine_for("mps") == "reference"
    assert "'mps'" in str(ops.why_not_cuda("mps"))
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.engine_for("cuda") == "reference"
    gpu.setattr(ops, "_why_not_triton", lambda: "Triton is not installed")
    assert ops.why_not_cuda("cuda") == "Triton is not installed"


def test_a_triton_that_cannot_compile_the_kernels_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.2.0"))
    monkeypatch.setattr(ops, "find_spec", lambda _: True)
    obstacle = ops._why_not_triton.__wrapped__()
    assert obstacle is not None
    assert "3.2.0 is older than the 3.3" in obstacle


def test_on_the_cpu_the_cuda_engine_needs_the_interpreter(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("TRITON_INTERPRET", "1")
    assert ops.engine_for("cpu") == "cpu"
    with ops.use_engine("cuda"):
        assert ops.engine_for("cpu") == "cuda"
        gpu.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="no Triton kernels for tensors on 'cpu': use engine 'cpu'"):
            ops.engine_for("cpu")
