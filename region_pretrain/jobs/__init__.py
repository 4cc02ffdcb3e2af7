"""Whole jobs: several command lines that belong together, and what they come to."""
