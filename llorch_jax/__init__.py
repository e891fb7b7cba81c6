"""GPT-2 inference as pure functions in JAX, with the KV cache as an immutable pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from llorch_jax.cache import (
    CachePool,
    DynamicCache,
    EvictingCache,
    KVCache,
    MemoryPlan,
    PagedCache,
    QuantizedCache,
    RotatingCache,
    StaticCache,
    evict,
    fingerprint,
    load_cache,
    make_cache,
    plan_memory,
    save_cache,
)
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.loop import compile_count, decode_step, generate_tokens, prefill, stream_tokens
from llorch_jax.decoding.overflow import Reencode
from llorch_jax.errors import (
    CacheError,
    CapacityError,
    CheckpointError,
    ConfigError,
    ConstraintError,
    DraftError,
    LlorchError,
    ModelError,
    SamplerError,
    SearchError,
    TokenError,
)
from llorch_jax.evaluation.perplexity import Score, score
from llorch_jax.evaluation.validation import intermediates
from llorch_jax.loading.checkpoint import Model, convert, load, save_model
from llorch_jax.model import forward
from llorch_jax.params import BlockParams, Params, count_params, init_params, param_shapes
from llorch_jax.sampling import Greedy, Mirostat, Sampling
from llorch_jax.text.generation import generate, stream
from llorch_jax.text.results import Generation, Piece
from llorch_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llorch_jax.decoding.beam import Beams, beam_search
    from llorch_jax.decoding.contrastive import contrastive_search
    from llorch_jax.decoding.session import Session, load_session, save_session
    from llorch_jax.decoding.speculative.drafts import DraftModel, PromptLookup
    from llorch_jax.decoding.speculative.loop import Speculation, speculate_tokens
    from llorch_jax.evaluation.loglikelihood import Choice, choices
    from llorch_jax.text.asynchronous import astream
    from llorch_jax.text.constrained.constraint import Constraint
    from llorch_jax.text.samples import generate_n
    from llorch_jax.text.speculative import generate_speculative

# Imported when they are first asked for: `import llorch_jax` stays quick.
_LATER = {
    "Beams": "decoding.beam",
    "Choice": "evaluation.loglikelihood",
    "Constraint": "text.constrained.constraint",
    "DraftModel": "decoding.speculative.drafts",
    "PromptLookup": "decoding.speculative.drafts",
    "Session": "decoding.session",
    "Speculation": "decoding.speculative.loop",
    "astream": "text.asynchronous",
    "beam_search": "decoding.beam",
    "choices": "evaluation.loglikelihood",
    "contrastive_search": "decoding.contrastive",
    "generate_n": "text.samples",
    "generate_speculative": "text.speculative",
    "load_session": "decoding.session",
    "save_session": "decoding.session",
    "speculate_tokens": "decoding.speculative.loop",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"llorch_jax.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Beams",
    "BlockParams",
    "CacheError",
    "CachePool",
    "CapacityError",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "Constraint",
    "ConstraintError",
    "DraftError",
    "DraftModel",
    "DynamicCache",
    "EvictingCache",
    "GPT2Config",
    "Generation",
    "Greedy",
    "KVCache",
    "LlorchError",
    "MemoryPlan",
    "Mirostat",
    "Model",
    "ModelError",
    "PagedCache",
    "Params",
    "Piece",
    "PromptLookup",
    "QuantizedCache",
    "Reencode",
    "RotatingCache",
    "SamplerError",
    "Sampling",
    "Score",
    "SearchError",
    "Session",
    "Speculation",
    "StaticCache",
    "TokenError",
    "Tokenizer",
    "astream",
    "beam_search",
    "choices",
    "compile_count",
    "contrastive_search",
    "convert",
    "count_params",
    "decode_step",
    "evict",
    "fingerprint",
    "forward",
    "generate",
    "generate_n",
    "generate_speculative",
    "generate_tokens",
    "init_params",
    "intermediates",
    "load",
    "load_cache",
    "load_session",
    "make_cache",
    "param_shapes",
    "plan_memory",
    "prefill",
    "save_cache",
    "save_model",
    "save_session",
    "score",
    "speculate_tokens",
    "stream",
    "stream_tokens",
]
