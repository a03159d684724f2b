"""Residual sum and layer norm in one pass; README.md beside this file has the derivation and the floors."""
