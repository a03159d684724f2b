"""Attention over keys and values with a modality infused; README.md beside this file has the derivation."""
