"""Measuring what was learnt: few-label subsets, probes of frozen features, and the report."""
