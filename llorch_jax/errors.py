"""The errors that llorch_jax raises on bad input: all are `ValueError`s with expected-versus-got messages."""


class LlorchError(ValueError):
    """Base of every error that llorch_jax raises on bad input."""


class ConfigError(LlorchError):
    """A model setting is unknown, invalid, or contradicts another; the message names the field."""


class CheckpointError(LlorchError):
    """A model directory, weight file or tensor is missing, unexpected, misshapen or corrupt; the message names it."""


class TokenError(LlorchError):
    """Token ids or prompt lengths are empty, of a wrong shape or dtype, or outside the vocabulary."""


class CapacityError(LlorchError):
    """More tokens than a cache or the model's context has room for."""


class CacheError(LlorchError):
    """A cache cannot be made with the given settings, or an operation got arguments that do not fit the cache."""


class ReferenceFileError(LlorchError):
    """A reference file cannot be read, or holds no validation points."""


class BatchFileError(LlorchError):
    """A file of prompts or of results is invalid."""


class ChatError(LlorchError):
    """A conversation cannot do what was requested, or its file is invalid."""


class ConstraintError(LlorchError):
    """A constraint is invalid, cannot be enforced, or needs the extra `constrained`."""


class ModelError(LlorchError):
    """A model lacks what a call needs, such as a tokenizer."""


class OptionError(LlorchError):
    """An option of text generation is unknown, invalid, or unsupported by the method; the message names it."""


class SearchError(LlorchError):
    """A setting of a search is invalid; the message names it."""


class DraftError(LlorchError):
    """A draft has an invalid setting, or does not fit the model."""


class SamplerError(LlorchError):
    """A sampling setting is invalid; the message names it."""


class QuantizationError(LlorchError):
    """Weights cannot be stored in the requested format."""


class SessionError(LlorchError):
    """A session's file is missing, damaged or of another model, or a session cannot be saved."""


class MeshError(LlorchError):
    """A mesh of devices cannot be made, or does not fit the model or the call."""


class NonFiniteError(LlorchError):
    """The model computed NaN or infinite logits, so that no token can be chosen."""


class EngineError(LlorchError):
    """A request could not be queued or answered by the engine; the message says why."""


class EngineFullError(EngineError):
    """As many requests wait as may; a later attempt may succeed."""


class ExportError(LlorchError):
    """A program cannot be serialized, or was serialized by something else."""


class ClusterError(LlorchError):
    """A Ray cluster cannot be reached, failed, or got a dataset that does not fit; or the extra `ray` is missing."""
