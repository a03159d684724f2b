"""Swin's merging of patches up to its product, for tokens and prompts together; README.md beside this file has the
derivation."""
