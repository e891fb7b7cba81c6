"""How keys and values are stored: one codec per file."""
