"""Comparison with tensors that the official K-Net computed, from weights that anyone can regenerate."""
