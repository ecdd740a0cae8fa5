"""Voxels without a value stay without one, and all others are denoised as if they had one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.stacks import StackError, WithoutMissing, check_stack, missing_again, open_stack, without_missing
from restormer3d.workflow import denoise_files

SHAPE = (48, 40, 44)


@pytest.fixture(scope="module")
def recording():
    clean = simulate_scene(SHAPE, seed=84)[:]
    return (300 + NoisyScene(clean, *noise_parameters(2), seed=1)[:]).astype(np.float32)


@pytest.fixture(scope="module")
def registered(recording):
    """Borders of up to three pixels are missing, two columns always, a frame, and a hole in some others."""
    stack = recording.copy()
    for frame, (y, x) in zip(stack, np.random.default_rng(3).integers(-3, 4, (len(stack), 2)), strict=True):
        frame[: max(y, 0)] = frame[len(frame) + min(y, 0) :] = np.nan
        frame[:, : max(x, 0)] = frame[:, frame.shape[1] + min(x, 0) :] = np.nan
    stack[:, :, -2:] = np.nan
    stack[20] = np.nan
    stack[5:9, 12:15, 20:24] = np.nan
    return stack


def filled(stack):
    return without_missing(stack, check_stack(stack, missing=True))


def test_what_is_missing_holds_what_other_frames_show(recording, registered):
    gone = np.isnan(registered)
    found = filled(registered)
    assert isinstance(found, WithoutMissing)
    assert found.count == gone.sum()
    out = found[:]
    np.testing.assert_array_equal(out[~gone], registered[~gone])
    assert np.isfinite(out).all()
    assert (out[20] == recording[~gone].min()).all()  # as blank frames do, it holds one value
    expected = np.nanmean(registered[:, 12:15, 20:24], 0)
    np.testing.assert_allclose(out[5, 12:15, 20:24], expected, rtol=1e-5)
    for index in (7, 20, slice(4, 40), (slice(None), slice(2, 9), slice(36, 44)), slice(0, 48, 3)):
        np.testing.assert_array_equal(found[index], out[index])
    np.testing.assert_array_equal(np.stack(list(missing_again(out, registered))), registered)
    assert filled(recording) is recording


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_others_are_denoised(recording, registered, method, dtype):
    chosen, said = settings(iterations=0), []
    out, record = array_and_record(registered.astype(dtype), chosen, method=method, say=said.append)
    gone = np.isnan(registered)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.isnan(out), gone)
    assert record["missing"] == gone.sum()
    assert record["idle_frames"] == 1
    assert record["constant_edges"] == [0, 0, 0, 2]
    assert any("hold no value" in text for text in said)
    whole, record = array_and_record(recording.astype(dtype), chosen, method=method)
    assert record["missing"] == 0
    apart = (out.astype(float) - whole)[~gone]
    assert np.abs(apart).mean() < 0.3 * np.abs(recording - whole.astype(float)).mean()


def test_files_keep_it(tmp_path, registered):
    source, target = tmp_path / "registered.tif", tmp_path / "denoised.tif"
    tifffile.imwrite(source, registered, compression="zlib")
    said = []
    assert not denoise_files([source], target, settings(iterations=0), say=said.append)
    assert any("hold no value" in text for text in said)
    np.testing.assert_array_equal(np.isnan(tifffile.imread(target)), np.isnan(registered))
    record = json.loads((tmp_path / "denoised.tif.json").read_text())
    assert record["missing"] == np.isnan(registered).sum()
    array, _ = array_and_record(registered, settings(iterations=0))
    np.testing.assert_allclose(tifffile.imread(target), array, rtol=1e-4)
    assert "hold no value" in describe(inspect(source))


def test_what_cannot_be_filled_is_refused(tmp_path, registered):
    with pytest.raises(StackError, match="voxels of NaN or infinity"):
        check_stack(registered)
    infinite = registered.copy()
    infinite[3, 2, 1] = np.inf
    with pytest.raises(StackError, match="voxels of NaN or infinity, the first in frame 0"):
        check_stack(infinite, missing=True)
    half = registered.copy()
    half[:, :20] = np.nan
    with pytest.raises(StackError, match="half of all or more"):
        check_stack(half, missing=True)
    path = tmp_path / "half.tif"
    tifffile.imwrite(path, half)
    with open_stack(path) as stack, pytest.raises(StackError, match=r"half\.tif: .* half of all"):
        check_stack(stack, missing=True)
