"""Measurements of speed, memory and quality. Results are data in benchmarks/results; README.md lists the commands."""
