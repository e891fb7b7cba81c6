"""Strict JAX settings for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network

import jax
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
