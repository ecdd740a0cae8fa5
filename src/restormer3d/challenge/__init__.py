"""The entry of the Grand Challenge container: stacks from the platform's input folder, denoised into its output folder.

`python -m restormer3d.challenge` is the command. One job (`job`) serves both of the platform's protocols: run and exit
(`exec`), or answer HTTP requests (`server`).
"""
