"""Activity denoised once more, after the windows: in what many pixels and frames share.

:mod:`~restormer3d.activity.components` keeps what stands out of noise, block by block;
:mod:`~restormer3d.activity.footprints` and :mod:`~restormer3d.activity.courses` denoise the strongest components of
larger fields, in space and in time.
"""
