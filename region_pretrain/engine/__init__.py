"""Training: runs, the training loop, hooks, and bit-exact resume."""
