"""How peers learn from each other: one package for each strategy."""
