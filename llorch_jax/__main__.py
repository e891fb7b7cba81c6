"""`python -m llorch_jax` is the command line."""

from llorch_jax.cli import main

main()
