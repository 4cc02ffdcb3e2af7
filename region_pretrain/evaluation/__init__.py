"""Probes: classification of regions from frozen features."""
