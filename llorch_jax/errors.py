"""The errors that llorch_jax raises on bad input: all are `ValueError`s with expected-versus-got messages."""


class LlorchError(ValueError):
    """Base of every error that llorch_jax raises on bad input."""


class ConfigError(LlorchError):
    """A model setting is unknown, impossible, or contradicts another one; the message names the field."""


class CheckpointError(LlorchError):
    """A model directory, weight file or tensor is missing, surplus, misshapen or corrupt; the message names it."""


class TokenError(LlorchError):
    """Token ids or prompt lengths are empty, of a wrong shape or dtype, or outside the vocabulary."""


class CapacityError(LlorchError):
    """More tokens than a cache or the model's context has room for."""


class CacheError(LlorchError):
    """A cache operation got arguments that do not fit the cache."""
