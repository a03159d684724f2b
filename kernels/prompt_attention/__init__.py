"""Attention over prompts and tokens; README.md beside this file has the derivation."""
