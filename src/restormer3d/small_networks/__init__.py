"""Training of the small networks that denoise the static image, footprints of activity, and its courses in time.

Pairs of noisy simulated recordings, never a clean target. How the networks are used stands in
:mod:`restormer3d.static_image` and :mod:`restormer3d.activity`.
"""
