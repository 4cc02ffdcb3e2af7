"""Plots, pictures and the HTML of reports."""
