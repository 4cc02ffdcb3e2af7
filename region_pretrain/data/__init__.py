"""Data sets, view geometry, photometry and loaders."""
