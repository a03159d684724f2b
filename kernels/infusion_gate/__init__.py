"""The gate of an infusion, one number a sample and head; README.md beside this file has the derivation."""
