"""Compares tensors with those of the official K-Net, which were computed with weights that can be regenerated."""
