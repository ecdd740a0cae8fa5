"""One stack from noisy to denoised, whatever its intensities are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

import restormer3d
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.settings import settings
from restormer3d.stacks import open_stack
from restormer3d.workflow import denoise_files, output_files


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float64", ">i4"])
@pytest.mark.parametrize("method", ["restormer3d", "gaussian", "svd"])
def test_a_large_offset_costs_no_precision(method, dtype):
    noise = np.random.default_rng(0).poisson(200, (24, 32, 32))
    near, record = array_and_record(noise.astype(dtype), settings(iterations=0), method=method)
    assert record["level"] == 0
    far, record = array_and_record((noise + 2_000_000_000).astype(dtype), settings(iterations=0), method=method)
    assert 2_000_000_000 < record["level"] < 2_000_000_200
    assert far.dtype == np.dtype(dtype)
    assert near.std() > 0
    np.testing.assert_allclose(far.astype(float) - 2e9, near.astype(float), atol=1.01)


def test_an_unknown_method_is_refused(noisy_stack):
    with pytest.raises(ValueError, match=r"method: expected one of restormer3d, gaussian, .*, got 'n2v'"):
        restormer3d.denoise(noisy_stack, method="n2v")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["restormer3d", "gaussian"])
def test_an_unknown_engine_or_precision_is_refused_whatever_the_method(noisy_stack, method):
    with pytest.raises(ValueError, match="engine: expected one of auto, reference, cpu, cuda, got 'abacus'"):
        restormer3d.denoise(noisy_stack, method=method, engine="abacus")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="precision: expected one of fp32, tf32, bf16, got 'fp16'"):
        restormer3d.denoise(noisy_stack, method=method, precision="fp16")  # pyright: ignore[reportArgumentType]


def test_an_open_stack_is_denoised_and_stays_open(noisy_file, noisy_stack):
    with open_stack(noisy_file) as stack:
        denoised = restormer3d.denoise(stack, method="temporal-mean")
        np.testing.assert_array_equal(stack[:], noisy_stack)
    np.testing.assert_array_equal(denoised, restormer3d.denoise(str(noisy_file), method="temporal-mean"))


def test_what_is_no_stack_is_refused_by_its_type(noisy_stack):
    with pytest.raises(TypeError, match=r"an open TiffStack or the path of a TIFF file, got list.*np\.asarray"):
        restormer3d.denoise(noisy_stack.tolist(), method="gaussian")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("dtype", "photons", "said"), [("uint16", 0.2, True), ("float32", 0.2, False), ("u2", 90, False)]
)
def test_counts_of_few_photons_are_said_to_need_finer_steps(tmp_path, dtype, photons, said):
    rng = np.random.default_rng(0)
    flashes = 1 + 2 * (np.sin(np.arange(60) / 4) > 0.9)[:, None, None] * (rng.random((24, 32)) < 0.2)
    tifffile.imwrite(tmp_path / "in.tif", rng.poisson(photons * flashes).astype(dtype), photometric="minisblack")
    messages = []
    settled = settings(iterations=0)
    assert not denoise_files(
        [tmp_path / "in.tif"], tmp_path / "out.tif", settled, method="gaussian", say=messages.append
    )
    assert any("steps of uint16 are coarser than what is left" in text for text in messages) == said
    record = json.loads((tmp_path / "out.tif.json").read_text())
    assert (record["output"]["rounding_share"] > 0.1) == said
    assert any("convert the recording to float32" in text for text in record["messages"]) == said


@pytest.mark.parametrize("name", ["out.tif", "out.TIFF", "out.btf", "out.tf8"])
def test_an_output_that_is_named_as_a_file_is_one(name):
    stack = Path("in.tif")
    assert output_files([stack], Path(name)) == {stack: Path(name)}
    assert output_files([stack], Path("folder")) == {stack: Path("folder/in.tif")}


def test_inspect_says_of_large_intensities_what_it_says_of_small_ones(noisy_stack, tmp_path):
    for name, offset in (("near", 0), ("far", 2_000_000_000)):
        tifffile.imwrite(tmp_path / f"{name}.tif", noisy_stack.astype(np.int32) + offset)
    near, far = (inspect(tmp_path / f"{name}.tif") for name in ("near", "far"))
    assert far["noise"]["gain"] == pytest.approx(near["noise"]["gain"], rel=1e-3)
    assert far["noise"]["photons_per_pixel"] == pytest.approx(near["noise"]["photons_per_pixel"], rel=0.02)
    assert far["noise"]["offset"] - 2e9 == pytest.approx(near["noise"]["offset"], abs=5)
    for end in ("low", "high"):
        assert far["normalization"][end] - 2e9 == pytest.approx(near["normalization"][end], abs=1)
    assert "20000" in describe(far)
