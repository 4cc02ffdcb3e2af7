"""The training loop, hooks, and exact resume."""
