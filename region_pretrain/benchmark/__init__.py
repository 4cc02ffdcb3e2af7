"""How close the data path and a training step come to what the machine can do."""
