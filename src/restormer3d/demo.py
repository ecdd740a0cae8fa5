"""The demonstration: a real recording that ships with the package, denoised and drawn."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from restormer3d.progress import Progress, Say
from restormer3d.report import trace_picture
from restormer3d.settings import check_time_limit, settings
from restormer3d.stacks import TIFF_SUFFIXES, open_stack
from restormer3d.workflow import denoise_files

RECORDING = "fmi_mouse_gcamp_192x96x96.tif"  # its source and licence: data/ATTRIBUTION.md


def demo(output: Path, *, minutes: float = 4.0, progress: Progress, say: Say) -> None:
    """Denoise the recording that ships with the package and draw it before and after.

    Parameters
    ----------
    output : Path
        Folder for the denoised TIFF, its sidecar and the picture.
    minutes : float
        Time limit of the denoising.
    progress, say : function
        As for :func:`denoise_files`.

    Raises
    ------
    ValueError
        If the output is the name of a file, or the limit is no number of minutes above 0.
    RuntimeError
        If the recording could not be denoised, or there is no matplotlib to draw it.
    """
    check_time_limit(minutes)
    if not output.is_dir() and (output.exists() or output.suffix.lower() in TIFF_SUFFIXES):
        raise ValueError(f"{output}: expected a folder for the stack and the picture, got the name of a file")
    if find_spec("matplotlib") is None:
        raise RuntimeError("the picture needs matplotlib: pip install 'restormer3d[plots]'")
    source = Path(str(resources.files("restormer3d"))) / "data" / RECORDING
    failures = denoise_files(
        [source], output, settings(), time_limit=minutes, overwrite=True, progress=progress, say=say
    )
    if failures:
        raise RuntimeError(str(failures[source]))
    picture = output / "before_after.png"
    with open_stack(source) as noisy, open_stack(output / RECORDING) as denoised:
        trace_picture(noisy, denoised, picture)
    say(f"denoised stack: {output / RECORDING}")
    say(f"picture:        {picture}")
