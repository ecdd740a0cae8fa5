"""Denoised frames stream out complete, seamless, and as a dense blend would give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from restormer3d import cuda_graph, inference
from restormer3d.config import InferenceConfig, recipe
from restormer3d.inference import count_windows, denoise_frames, window_size, windows_per_pass, within_memory
from restormer3d.normalization import Normalization
from restormer3d.tiling import gaussian_weights, hann_weights, mirror_indices, temporal_starts, window_starts

from .conftest import background_of

UNIT = Normalization(0.0, 1.0)


class Identity(torch.nn.Module):
    def forward(self, x, background=None):
        return x


class Wobble(torch.nn.Module):
    """Differs from window to window and inside each: what blending has to hide."""

    def forward(self, x, background=None):
        ramp = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1, 1)
        return x + ramp * x.mean((2, 3, 4), keepdim=True) + 0.1 * x.std((2, 3, 4), keepdim=True)


def run(model, stack, config, normalization=UNIT):
    background = np.zeros((3, *stack.shape[1:]), np.float32)
    background[1] = 1 / len(stack)
    return np.stack(list(denoise_frames(model, stack, normalization, background, config)))


@pytest.mark.parametrize("shape", [(50, 40, 33), (1, 8, 8), (3, 5, 9), (7, 64, 20), (33, 16, 16)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_the_identity_returns_its_input_exactly(shape, overlap):
    stack = np.random.default_rng(0).integers(-3000, 30000, shape).astype(np.int16)
    config = InferenceConfig(window=(16, 16, 16), overlap_t=overlap, overlap_xy=overlap, batch_size=3)
    frames = run(Identity(), stack, config, Normalization(-100.0, 2000.0))
    np.testing.assert_array_equal(np.rint(frames), stack)


def dense_blend(model, stack, config):
    """The same windows, added up in arrays of the whole stack's size."""
    depth, *window = (min(a, b) for a, b in zip(config.window, stack.shape, strict=True))
    total = np.zeros(stack.shape)
    weights = np.zeros(stack.shape)
    weight = hann_weights(depth)[:, None, None] * np.outer(*(gaussian_weights(size) for size in window))
    for t in temporal_starts(len(stack), depth, config.overlap_t):
        inside = (np.arange(t, t + depth) >= 0) & (np.arange(t, t + depth) < len(stack))
        for y in window_starts(stack.shape[1], window[0], config.overlap_xy):
            for x in window_starts(stack.shape[2], window[1], config.overlap_xy):
                crop = np.s_[y : y + window[0], x : x + window[1]]
                noisy = stack[mirror_indices(t, t + depth, len(stack))][:, *crop]
                frames = model(torch.from_numpy(noisy)[None, None])[0, 0].numpy()
                place = np.s_[max(0, t) : min(len(stack), t + depth), *crop]
                total[place] += (frames * weight)[inside]
                weights[place] += weight[inside]
    return total / weights


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_streaming_equals_a_dense_blend(overlap):
    stack = np.random.default_rng(1).normal(size=(70, 40, 33)).astype(np.float32)
    config = InferenceConfig(window=(16, 16, 16), overlap_t=overlap, overlap_xy=overlap)
    np.testing.assert_allclose(run(Wobble(), stack, config), dense_blend(Wobble(), stack, config), atol=1e-5)


def test_a_real_network_streams_as_it_blends_densely(tiny_model, quick_inference):
    stack = np.random.default_rng(2).normal(size=(30, 24, 20)).astype(np.float32)

    def with_background(x):
        with torch.no_grad():
            return tiny_model(x, background_of(torch.zeros(1, 1, 1, *x.shape[3:]), 30.0))

    streamed = run(tiny_model, stack, quick_inference)
    np.testing.assert_allclose(streamed, dense_blend(with_background, stack, quick_inference), atol=1e-4)


def test_no_seams_between_windows():
    """A step where a window ends would stand out among the differences of neighboring pixels."""
    stack = np.ones((64, 64, 64), np.float32)
    stack += np.linspace(0, 1, 64)[:, None, None] + np.linspace(0, 1, 64)[:, None] + np.linspace(0, 2, 64)
    config = InferenceConfig(window=(16, 16, 16))
    blended = run(Wobble(), stack.astype(np.float32), config)
    for axis in (1, 2):
        steps = np.abs(np.diff(blended, axis=axis)).mean(tuple(a for a in range(3) if a != axis))
        assert steps.max() < 3 * np.median(steps)


def test_no_period_of_the_window_in_time():
    """Windows that each drift would leave a saw tooth; non-overlapping ones do."""
    stack = np.ones((160, 16, 16), np.float32)

    def at_window_period(overlap):
        config = InferenceConfig(window=(16, 16, 16), overlap_t=overlap)
        trace = run(Wobble(), stack, config).mean((1, 2))
        return np.abs(np.fft.rfft(trace - trace.mean()))[10::10].max()

    assert at_window_period(0.0) > 10
    assert at_window_period(0.5) < 0.2 * at_window_period(0.0)


def test_memory_does_not_grow_with_the_stack():
    class Endless:
        """A stack that remembers how much of it was asked for at once."""

        shape, dtype, most = (2000, 16, 16), np.dtype(np.int16), 0

        def __getitem__(self, key):
            self.most = max(self.most, key.stop - key.start)
            return np.zeros((key.stop - key.start, 16, 16), np.int16)

    stack = Endless()
    count = 0
    config = InferenceConfig(window=(16, 16, 16))
    for frame in denoise_frames(Identity(), stack, UNIT, np.zeros((3, 16, 16), np.float32), config):
        count += 1
        assert frame.base is None or frame.base.shape[0] <= 16
    assert count == 2000
    assert stack.most <= 16


class Sideways(torch.nn.Module):
    """Tells every orientation from the others: adds a slope that stands still while the window turns."""

    def forward(self, x, background):
        rows, columns = x.shape[-2:]
        slope = torch.linspace(0, 3, rows)[:, None] + torch.linspace(0, 1, columns)
        return x * slope + 2 * background[:, :1]


def symmetries(array, count):
    """Flips (4), or flips and quarter turns (8), of the last two axes, each with the way back."""
    for turns in range(0, 4, 8 // count):
        for flip in (1, -1):
            yield (
                np.rot90(array, turns, (-2, -1))[..., ::flip],
                lambda out, turns=turns, flip=flip: np.rot90(out[..., ::flip], -turns, (-2, -1)),
            )


@pytest.mark.parametrize("count", [4, 8])
def test_windows_are_averaged_over_symmetries(count):
    rng = np.random.default_rng(3)
    stack = rng.normal(size=(16, 16, 16)).astype(np.float32)
    background = rng.normal(size=(3, 16, 16)).astype(np.float32)
    config = InferenceConfig(window=(16, 16, 16), symmetries=count)
    averaged = np.stack(list(denoise_frames(Sideways(), stack, UNIT, background, config)))
    single = config.model_copy(update={"symmetries": 1})
    turned = zip(symmetries(stack, count), symmetries(background, count), strict=True)
    expected = [
        back(np.stack(list(denoise_frames(Sideways(), one, UNIT, image, single)))) for (one, back), (image, _) in turned
    ]
    assert len({out.tobytes() for out in expected}) == count
    np.testing.assert_allclose(averaged, np.mean(expected, axis=0), atol=1e-5)


@pytest.mark.parametrize("count", [4, 8])
def test_symmetries_change_nothing_for_a_model_that_has_them(count):
    stack = np.random.default_rng(4).normal(size=(20, 40, 33)).astype(np.float32)
    config = InferenceConfig(window=(16, 16, 16), symmetries=count)
    single = config.model_copy(update={"symmetries": 1})
    np.testing.assert_allclose(run(Wobble(), stack, config), run(Wobble(), stack, single), atol=1e-5)


def test_windows_that_are_turned_are_square():
    stack = np.random.default_rng(0).random((20, 40, 12), np.float32)  # the windows shrink to its 12 columns
    config = InferenceConfig(window=(16, 16, 16), symmetries=8)
    assert window_size(stack.shape, config) == (16, 12, 12)
    np.testing.assert_allclose(run(Identity(), stack, config), stack, atol=1e-5)


def test_an_axis_that_is_little_longer_than_the_window_is_taken_as_a_whole():
    config = InferenceConfig(window=(16, 16, 16), stretch=1.5)
    assert window_size((23, 24, 25), config) == (24, 24, 20)  # an even number of frames; two windows instead of three
    assert window_size((32, 16, 9), config) == (16, 16, 9)
    stack = np.random.default_rng(0).random((23, 24, 25), np.float32)
    np.testing.assert_allclose(run(Identity(), stack, config), stack, atol=1e-5)


def test_windows_are_counted_as_they_are_computed():
    config = InferenceConfig(window=(16, 16, 16), batch_size=3)
    calls = []
    stack = np.zeros((37, 40, 20), np.float32)
    list(
        denoise_frames(
            Identity(), stack, UNIT, np.zeros((3, 40, 20), np.float32), config, progress=lambda *a: calls.append(a)
        )
    )
    assert calls[-1] == ("denoise", count_windows(stack.shape, config), count_windows(stack.shape, config))


@pytest.mark.parametrize("frames", [1, 7, 16, 17, 50])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_windows_may_begin_and_end_with_the_stack(frames, overlap):
    stack = np.random.default_rng(6).integers(-3000, 30000, (frames, 20, 18)).astype(np.int16)
    config = InferenceConfig(window=(16, 16, 16), overlap_t=overlap, mirror_t=False)
    np.testing.assert_array_equal(np.rint(run(Identity(), stack, config, Normalization(-100.0, 2000.0))), stack)
    beyond = count_windows(stack.shape, config.model_copy(update={"mirror_t": True}))
    assert count_windows(stack.shape, config) <= beyond
    assert overlap == 0 or count_windows(stack.shape, config) < beyond
    if frames <= 16:
        assert count_windows(stack.shape, config) == 4  # all in the plane


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Passes of many windows that are recorded and repeated; recording is stood in for, as in test_cuda_graph.py."""
    passes = []

    def recorded(function, _):
        result = torch.empty_like(function())

        def replay():
            passes.append(tuple(result.shape))
            return result.copy_(function())

        return replay

    monkeypatch.setattr(cuda_graph, "_recorded", recorded)
    monkeypatch.setattr(cuda_graph, "_aside", lambda function, _: function())
    monkeypatch.setattr(inference, "_is_recorded", lambda _: True)
    monkeypatch.setattr(inference, "_free_bytes", lambda _: 2**40)
    return passes


@pytest.mark.parametrize("count", [1, 8])
def test_recorded_passes_of_many_windows_give_the_same_frames(as_on_a_gpu, monkeypatch, count):
    rng = np.random.default_rng(7)
    stack = rng.normal(size=(37, 40, 50)).astype(np.float32)
    background = rng.normal(size=(3, 40, 50)).astype(np.float32)
    config = InferenceConfig(window=(16, 16, 16), symmetries=count)

    calls: list[tuple[str, int, int]] = []

    def frames():
        each = denoise_frames(Sideways(), stack, UNIT, background, config, progress=lambda *done: calls.append(done))
        return np.stack(list(each))

    monkeypatch.setattr(inference, "_PASS_VOXELS", 10 * 16**3)
    recorded = frames()
    assert set(as_on_a_gpu) == {(8, 16, 16, 16)}  # 24 windows in the plane: three passes of 8, not of 10, 10 and 4
    assert len(as_on_a_gpu) == 3 * 6 - 3  # the first three run as they are
    assert calls[-1] == ("denoise", count_windows(stack.shape, config), count_windows(stack.shape, config))
    monkeypatch.setattr(inference, "_is_recorded", lambda _: False)
    np.testing.assert_allclose(recorded, frames(), atol=1e-5)


def test_a_pass_that_is_not_full_is_filled_up(as_on_a_gpu, monkeypatch):
    stack = np.random.default_rng(8).normal(size=(37, 40, 40)).astype(np.float32)
    config = InferenceConfig(window=(16, 16, 16))
    monkeypatch.setattr(inference, "_PASS_VOXELS", 7 * 16**3)
    recorded = run(Wobble(), stack, config)
    assert set(as_on_a_gpu) == {(6, 16, 16, 16)}  # 16 windows
    monkeypatch.setattr(inference, "_is_recorded", lambda _: False)
    np.testing.assert_allclose(recorded, run(Wobble(), stack, config), atol=1e-5)


def test_windows_per_pass_are_those_that_fit(as_on_a_gpu, monkeypatch):
    cuda, shape = torch.device("cuda"), (1500, 490, 490)
    published, wide = InferenceConfig(), InferenceConfig(window=(256, 96, 96), batch_size=1)
    assert windows_per_pass(shape, published, cuda) == 15  # 225 of them: 15 passes
    assert windows_per_pass(shape, wide, cuda) == 1
    monkeypatch.setattr(inference, "_free_bytes", lambda _: 2**30)
    assert windows_per_pass(shape, published, cuda) == 2  # as configured
    monkeypatch.undo()
    assert windows_per_pass(shape, published, torch.device("cpu")) == 2


def test_frames_that_windows_share_are_read_once():
    class Counting:
        shape, dtype = (200, 16, 16), np.dtype(np.float32)

        def __init__(self):
            self.values = np.random.default_rng(9).random(self.shape, np.float32)
            self.read = 0

        def __getitem__(self, key):
            self.read += key.stop - key.start
            return self.values[key]

    stack = Counting()
    config = InferenceConfig(window=(16, 16, 16), overlap_t=0.5)
    frames = denoise_frames(Identity(), stack, UNIT, np.zeros((3, 16, 16), np.float32), config)
    np.testing.assert_allclose(np.stack(list(frames)), stack.values, atol=1e-5)
    assert stack.read <= 200 + 16  # beside those, the mirrored ones


def test_reading_ahead_changes_nothing_but_when():
    read = []

    def span(at):
        read.append(at)
        return torch.tensor(at)

    spans = [(start, start + 2) for start in range(0, 10, 2)]
    assert [tuple(value.tolist()) for value in inference._ahead(span, spans)] == spans
    assert read == spans
    with pytest.raises(ZeroDivisionError):
        list(inference._ahead(lambda at: torch.tensor(1 // at[0]), spans))


def test_windows_fit_into_the_memory_of_a_gpu(monkeypatch):
    shape, config, gpu = (300, 256, 256), recipe("default", pretrained=True)[2], torch.device("cuda")
    assert within_memory(shape, config, torch.device("cpu")) == (config, "")
    for gigabytes, window in ((64, (300, 104, 104)), (10, (256, 96, 96)), (6, (256, 48, 48)), (0.1, (256, 24, 24))):
        monkeypatch.setattr(inference, "_free_bytes", lambda _, free=gigabytes: int(free * 1e9))
        found, said = within_memory(shape, config, gpu)
        assert window_size(shape, found) == window
        assert bool(said) == (found != config) == (gigabytes < 64)
        assert found.overlap_xy == config.overlap_xy
