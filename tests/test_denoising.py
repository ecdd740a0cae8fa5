"""One stack from noisy to denoised, whatever its intensities are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

import restormer3d
from restormer3d.denoising import array_and_record
from restormer3d.inspection import describe, inspect
from restormer3d.settings import settings
from restormer3d.workflow import output_files


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
