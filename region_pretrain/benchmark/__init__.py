"""Benchmarks of the loader, a training step and recipes of regions."""
