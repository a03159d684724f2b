"""Measurements; never packaged."""
