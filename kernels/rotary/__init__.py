"""Rotary positions of packed heads; README.md beside this file has the derivation."""
