"""A routed layer's prompts and their layer norm, from the products of its rows; README.md beside this file has the
derivation."""
