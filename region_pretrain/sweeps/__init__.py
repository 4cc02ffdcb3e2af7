"""Sweeps: many pre-trainings and fine-tunings as one graph of command lines, and their report."""
