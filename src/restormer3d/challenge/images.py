"""The platform's image files: what its check of a TIFF file asks for, and MetaImage by way of TIFF."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from restormer3d.stacks import StackError, check_output, open_stack, write_stack

RESOLUTION_UNIT = 296
INCH, CENTIMETER = 2, 3


def set_resolution_unit(path: Path) -> None:
    """Give every page of a TIFF file a resolution unit, in place; the voxels and the rest of the file stay.

    The platform takes a TIFF file only if its pages have a size in inches or centimeters, and many recordings say
    "no unit". The numbers that go with it are kept.

    Parameters
    ----------
    path : Path
        A TIFF file whose pages have the tags XResolution, YResolution and ResolutionUnit, as `write_stack` leaves it.
    """
    with tifffile.TiffFile(path, mode="r+") as tif:
        for page in tif.pages:
            unit = page.aspage().tags[RESOLUTION_UNIT]
            if unit.value not in (INCH, CENTIMETER):
                unit.overwrite(CENTIMETER)


@contextmanager
def denoised_mha(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """Lend a TIFF copy of a MetaImage, and turn the denoised TIFF into a MetaImage of the same geometry.

    Parameters
    ----------
    source, target : Path
        MetaImage files of frames along their third axis.

    Yields
    ------
    tuple of Path
        The TIFF file to read, and the one to write.

    Raises
    ------
    StackError
        If the source is no MetaImage of 3 axes and one channel, or SimpleITK is missing.
    """
    image = _read_mha(source)
    with tempfile.TemporaryDirectory(prefix="restormer3d-") as folder:
        noisy, denoised = (Path(folder) / f"{source.name}{suffix}" for suffix in (".tif", ".denoised.tif"))
        voxels = _simple_itk().GetArrayViewFromImage(image)  # (T, H, W)
        check_output(target, voxels.shape, voxels.dtype, source=source, overwrite=True)
        write_stack(noisy, voxels, shape=voxels.shape, dtype=voxels.dtype)
        del voxels
        yield noisy, denoised
        with open_stack(denoised) as stack:
            _write_mha(target, stack[:], image)


def _simple_itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise StackError("MetaImage files (*.mha) need SimpleITK: pip install 'restormer3d[challenge]'") from error
    return SimpleITK


def _read_mha(path: Path) -> Any:
    try:
        image = _simple_itk().ReadImage(str(path), imageIO="MetaImageIO")  # else it goes by the suffix: no *.MHA
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise StackError(f"{path}: expected a MetaImage file, SimpleITK can't read it: {reason}") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise StackError(
            f"{path}: expected a MetaImage of 3 axes (columns, rows, frames) and one channel, found the size "
            f"{image.GetSize()} and {image.GetNumberOfComponentsPerPixel()} channels"
        )
    return image


def _write_mha(path: Path, voxels: np.ndarray, like: Any) -> None:
    """Write (T, H, W) voxels with the geometry of another MetaImage; the file gets its name when it is complete."""
    image = _simple_itk().GetImageFromArray(voxels)
    image.CopyInformation(like)
    part = path.with_name(f".{path.stem}.part-{os.getpid()}.mha")
    try:
        _simple_itk().WriteImage(image, str(part), useCompression=True)
        written = _simple_itk().ReadImage(str(part))  # SimpleITK does not notice that a disk is full
        if not np.array_equal(_simple_itk().GetArrayViewFromImage(written), voxels):
            raise OSError(f"{path}: the file was not written completely. Is the disk full?")
        os.replace(part, path)
    except RuntimeError as error:
        raise OSError(f"{path}: SimpleITK can't write the file: {str(error).strip().splitlines()[-1]}") from error
    finally:
        part.unlink(missing_ok=True)
