"""What recordings hold that is neither tissue nor the detector's noise: found before a stack is denoised.

Each module finds one kind of it, and says what to put back afterwards; :mod:`restormer3d.artefacts.set_aside` does all
of them in their order.
"""
