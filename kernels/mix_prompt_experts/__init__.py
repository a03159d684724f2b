"""Mixture of prompt experts by routing scores; README.md beside this file has the derivation."""
