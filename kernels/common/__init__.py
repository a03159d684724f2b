"""Pieces that several kernels use unchanged."""
