"""Products with frozen weights, with what follows them in their epilogue."""
