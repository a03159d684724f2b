"""Similarity-based interaction of two prompt sets; README.md beside this file has the derivation."""
