"""The activation of a frozen MLP and its derivative; README.md beside this file has the equations."""
