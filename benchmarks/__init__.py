"""Benchmarks: how good (`benchmarks.quality`) and how fast (`benchmarks.speed`) the package is on this machine."""
