"""Weights of other libraries and releases, to the detector's names and back."""
