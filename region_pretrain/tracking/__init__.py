"""Tracking services (Weights & Biases, MLflow), each in a process of its own.

An outage, a retry or a hanging upload then cannot delay the training, and nothing that a service's
package does reaches the training's random numbers or signals. Nothing here imports PyTorch.
"""
