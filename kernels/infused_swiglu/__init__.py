"""SwiGLU times an infused vector; README.md beside this file has the derivation."""
