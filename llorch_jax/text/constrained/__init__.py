"""Generation under constraints: regular expressions, JSON schemas, grammars and choices."""
