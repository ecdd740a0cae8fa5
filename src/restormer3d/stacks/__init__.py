"""Stacks on disk: TIFF recordings of every dialect, read lazily and written back as drop-in replacements."""

from restormer3d.stacks.chain import StackError
from restormer3d.stacks.check import StackCheck, check_stack
from restormer3d.stacks.layout import TIFF_SUFFIXES
from restormer3d.stacks.missing import WithoutMissing, missing_again, without_missing
from restormer3d.stacks.read import TiffStack, open_stack
from restormer3d.stacks.rounding import Rounding, too_coarse
from restormer3d.stacks.write import WriteSummary, check_folder, check_output, finished_frames, to_dtype, write_stack

__all__ = [
    "TIFF_SUFFIXES",
    "Rounding",
    "StackCheck",
    "StackError",
    "TiffStack",
    "WithoutMissing",
    "WriteSummary",
    "check_folder",
    "check_output",
    "check_stack",
    "finished_frames",
    "missing_again",
    "open_stack",
    "to_dtype",
    "too_coarse",
    "without_missing",
    "write_stack",
]
