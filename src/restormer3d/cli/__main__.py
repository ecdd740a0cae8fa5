"""`python -m restormer3d.cli` is the command line."""

from restormer3d.cli import main

main()
