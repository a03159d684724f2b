"""Attention in windows that share their sample's prompts; README.md beside this file has the derivation."""
