"""The operators: the reference against its definition, the CPU engine against the reference, the choice of engines."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from restormer3d import ops
from restormer3d.ops import reference


@pytest.fixture(scope="module", autouse=True)
def _several_threads():
    """Which would write over one another's results where kernels do not keep them apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


SHAPES = [  # (B, C, T, H, W): odd sizes, every axis of length one, rows longer and shorter than a vector
    (1, 32, 4, 8, 16),
    (2, 32, 5, 7, 9),
    (1, 64, 3, 13, 33),
    (3, 6, 1, 5, 6),
    (1, 16, 6, 1, 7),
    (2, 16, 6, 5, 1),
    (4, 32, 1, 1, 1),
    (1, 128, 2, 4, 8),
    (2, 10, 3, 9, 35),
    (2, 32, 4, 12, 20),
    (2, 8, 3, 20, 48),
]
OPERATORS = ["mdta", "gdfn", "depthwise_conv3d", "pointwise", "conv3d_in", "conv3d_out"]


def weight(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) / max(1, shape[1]) ** 0.5


def arguments(operator: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the operator and its input and weights, all float32 leaves without gradients."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = 2 * torch.randn(shape, generator=g) + 1
    norm = torch.rand(channels, generator=g) + 0.5
    if operator == "mdta":
        heads = max(1, channels // 32)
        small = [weight(g, 3 * channels, channels, 1, 1, 1), weight(g, 3 * channels, 1, 3, 3, 3)]
        rest = [torch.rand(heads, 1, 1, generator=g) + 0.5, weight(g, channels, channels, 1, 1, 1)]
        return ops.mdta, [x, norm, *small, *rest]
    if operator == "gdfn":
        small = [weight(g, 4 * channels, channels, 1, 1, 1), weight(g, 4 * channels, 1, 3, 3, 3)]
        return ops.gdfn, [x, norm, *small, weight(g, channels, 2 * channels, 1, 1, 1)]
    if operator == "depthwise_conv3d":
        return ops.depthwise_conv3d, [x, weight(g, channels, 1, 3, 3, 3)]
    if operator == "pointwise":
        return ops.pointwise, [x, weight(g, 5, channels, 1, 1, 1)]
    if operator == "conv3d_in":
        return ops.conv3d, [x[:, :2].contiguous(), weight(g, channels, 2, 3, 3, 3)]
    return ops.conv3d, [x, weight(g, 3, channels, 3, 3, 3)]


def results(engine: str, function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    with ops.use_engine(engine):
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_engine_gives_the_references_output_and_gradients(operator: str, shape: tuple[int, ...]) -> None:
    function, inputs = arguments(operator, shape)
    with ops.use_engine("reference"):
        exact = function(*(i.double() for i in inputs))
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    expected = results("reference", function, [i.double() for i in inputs], grad.double())
    for name, found, wanted in zip(
        ["output", *map(str, range(9))], results("cpu", function, inputs, grad), expected, strict=False
    ):
        assert relative_error(found, wanted) < 1e-5, name
    with torch.no_grad(), ops.use_engine("cpu"):
        assert relative_error(function(*inputs), exact) < 1e-5


@pytest.mark.parametrize("operator", ["mdta", "gdfn"])
def test_reference_gradients_agree_with_finite_differences(operator: str) -> None:
    function, inputs = arguments(operator, (2, 4, 2, 2, 3))
    leaves = [i.double().requires_grad_() for i in inputs]
    with ops.use_engine("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_layer_norm_scales_by_the_standard_deviation_and_keeps_the_mean() -> None:
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1)  # mean 2, standard deviation 1
    y = reference.layer_norm(x, torch.tensor([1.0, 10.0])).flatten()
    torch.testing.assert_close(y, torch.tensor([1.0, 30.0]), rtol=1e-5, atol=0)


def test_attention_of_one_channel_per_head_passes_the_values_on() -> None:
    x = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    center = torch.zeros(6, 1, 3, 3, 3)
    center[:, :, 1, 1, 1] = 1
    identity = torch.eye(2).view(2, 2, 1, 1, 1)
    qkv = torch.cat([identity] * 3)
    norm = torch.ones(2)
    y = ops.mdta(x, norm, qkv, center, torch.ones(2, 1, 1), identity)
    torch.testing.assert_close(y, x + reference.layer_norm(x, norm))


@pytest.mark.parametrize("operator", OPERATORS)
def test_same_input_gives_the_same_bits(operator: str) -> None:
    function, inputs = arguments(operator, (2, 32, 3, 9, 10))
    grad = torch.ones_like(function(*inputs))
    first, second = (results("cpu", function, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("operator", ["mdta", "gdfn", "depthwise_conv3d"])
def test_not_a_number_reaches_the_output_and_does_not_linger(operator: str) -> None:
    function, inputs = arguments(operator, (1, 20, 3, 6, 7))
    clean = results("cpu", function, inputs, torch.ones_like(inputs[0]))
    spoilt = [torch.full_like(inputs[0], float("nan")), *inputs[1:]]
    assert results("cpu", function, spoilt, torch.ones_like(inputs[0]))[0].isnan().all()
    again = results("cpu", function, inputs, torch.ones_like(inputs[0]))
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("operator", ["mdta", "gdfn", "depthwise_conv3d", "pointwise", "conv3d_out"])
def test_input_in_another_layout_or_precision_works(operator: str) -> None:
    function, inputs = arguments(operator, (2, 8, 3, 4, 5))
    with ops.use_engine("cpu"):
        expected = function(*inputs)
        torch.testing.assert_close(function(inputs[0].to(memory_format=torch.channels_last_3d), *inputs[1:]), expected)
        in_double = function(*(i.double() for i in inputs))
    assert in_double.dtype == torch.float64
    assert relative_error(expected, in_double) < 1e-5


@pytest.mark.parametrize("operator", ["mdta", "gdfn", "depthwise_conv3d", "pointwise", "conv3d_out"])
def test_gradients_can_be_differentiated_again(operator: str) -> None:
    function, inputs = arguments(operator, (1, 4, 2, 3, 3))

    def curvature(engine: str, dtype: torch.dtype) -> Tensor:
        leaves = [i.to(dtype).requires_grad_() for i in inputs]
        with ops.use_engine(engine):
            (slope,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
            return torch.autograd.grad(slope.square().sum(), leaves[1])[0]

    assert relative_error(curvature("cpu", torch.float32), curvature("reference", torch.float64)) < 1e-4


def test_results_keep_their_values_while_they_are_in_use() -> None:
    function, inputs = arguments("gdfn", (1, 32, 4, 32, 32))  # large enough for memory that is kept and used again
    with torch.no_grad(), ops.use_engine("cpu"):
        part = function(*inputs)[:, 3:5]  # a view keeps the memory of the whole
        before = part.clone()
        others = [function(torch.full_like(inputs[0], float(i)), *inputs[1:]) for i in range(3)]
        assert torch.equal(part, before)
        assert len({o.data_ptr() for o in others}) == 3
        pointers = {o.data_ptr() for o in others}
        del others
        assert function(*inputs).data_ptr() in pointers


def test_threads_of_a_program_may_call_at_the_same_time() -> None:
    function, inputs = arguments("mdta", (1, 32, 3, 9, 10))
    grad = torch.ones_like(inputs[0])
    expected = results("cpu", function, inputs, grad)
    found: list[list[Tensor]] = []
    workers = [threading.Thread(target=lambda: found.append(results("cpu", function, inputs, grad))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(found) == 4
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))


def test_number_of_threads_of_pytorch_is_kept() -> None:
    function, inputs = arguments("gdfn", (1, 8, 2, 9, 10))
    before = torch.get_num_threads()
    several = function(*inputs)
    try:
        torch.set_num_threads(1)
        one = function(*inputs)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(one, several)


def test_a_block_keeps_little_more_than_its_inputs_for_the_backward_pass() -> None:
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    shape = (1, 32, 4, 32, 32)
    with ops.use_engine("cpu"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        for operator in ("mdta", "gdfn"):
            function, inputs = arguments(operator, shape)
            function(*(i.requires_grad_() for i in inputs))
    voxels = 4 * 32 * 32
    weights = 200_000  # bytes
    assert sum(saved.values()) <= 3 * 32 * 4 * voxels + weights  # two inputs and the values of the attention


def test_device_decides_unless_an_engine_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESTORMER3D_ENGINE", raising=False)
    assert ops.engine_for("cpu") == "cpu"
    assert ops.engine_for("mps") == "reference"
    with ops.use_engine("reference"):
        assert ops.engine_for("cpu") == "reference"
        with ops.use_engine(None):
            assert ops.engine_for("cpu") == "cpu"
    monkeypatch.setenv("RESTORMER3D_ENGINE", "reference")
    assert ops.engine_for("cpu") == "reference"


def test_impossible_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown engine 'fpga'"), ops.use_engine("fpga"):
        pass
    with ops.use_engine("cpu"), pytest.raises(ValueError, match="tensors are on 'cuda'"):
        ops.engine_for("cuda")
    monkeypatch.setenv("RESTORMER3D_ENGINE", "abacus")
    with pytest.raises(ValueError, match="RESTORMER3D_ENGINE"):
        ops.engine_for("cpu")
