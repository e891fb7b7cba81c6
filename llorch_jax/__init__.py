"""GPT-2 inference as pure functions in JAX, with the KV cache as an immutable pytree."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from llorch_jax.cores import take_enough_threads

if TYPE_CHECKING:
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
    from llorch_jax.decoding.beam import Beams, beam_search
    from llorch_jax.decoding.contrastive import contrastive_search
    from llorch_jax.decoding.exporting import register_exports
    from llorch_jax.decoding.loop import compile_count, decode_step, generate_tokens, prefill, stream_tokens
    from llorch_jax.decoding.overflow import Reencode
    from llorch_jax.decoding.session import Session, load_session, save_session
    from llorch_jax.decoding.speculative.drafts import DraftModel, PromptLookup
    from llorch_jax.decoding.speculative.loop import Speculation, speculate_tokens
    from llorch_jax.errors import (
        CacheError,
        CapacityError,
        CheckpointError,
        ConfigError,
        ConstraintError,
        DraftError,
        EngineError,
        ExportError,
        LlorchError,
        MeshError,
        ModelError,
        NonFiniteError,
        OptionError,
        QuantizationError,
        SamplerError,
        SearchError,
        SessionError,
        TokenError,
    )
    from llorch_jax.evaluation.loglikelihood import Choice, choices
    from llorch_jax.evaluation.perplexity import Score, score
    from llorch_jax.evaluation.validation import intermediates
    from llorch_jax.loading.checkpoint import Model, convert, load, quantize_model, save_model, save_quantized
    from llorch_jax.meshes import make_mesh
    from llorch_jax.model import forward
    from llorch_jax.params import BlockParams, Params, count_params, init_params, param_shapes
    from llorch_jax.quantization import quantize
    from llorch_jax.sampling import Greedy, History, Mirostat, Sampler, Sampling
    from llorch_jax.sharding import shard
    from llorch_jax.text.asynchronous import astream
    from llorch_jax.text.constrained.constraint import Constraint
    from llorch_jax.text.engine import Engine
    from llorch_jax.text.engine_stats import EngineStats
    from llorch_jax.text.generation import generate, stream
    from llorch_jax.text.handles import Handle
    from llorch_jax.text.options import GenerationOptions
    from llorch_jax.text.results import Generation, Piece
    from llorch_jax.text.samples import generate_n
    from llorch_jax.text.speculative import generate_speculative
    from llorch_jax.tokenizer import Tokenizer

# Every public name and its module, which is imported when the name is first asked for: the command line can take
# interrupts and print its help before JAX is loaded.
_HOMES = {
    "Beams": "decoding.beam",
    "BlockParams": "params",
    "CacheError": "errors",
    "CachePool": "cache",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "Choice": "evaluation.loglikelihood",
    "ConfigError": "errors",
    "Constraint": "text.constrained.constraint",
    "ConstraintError": "errors",
    "DraftError": "errors",
    "DraftModel": "decoding.speculative.drafts",
    "DynamicCache": "cache",
    "Engine": "text.engine",
    "EngineError": "errors",
    "EngineStats": "text.engine_stats",
    "EvictingCache": "cache",
    "ExportError": "errors",
    "GPT2Config": "config",
    "Generation": "text.results",
    "GenerationOptions": "text.options",
    "Greedy": "sampling",
    "Handle": "text.handles",
    "History": "sampling",
    "KVCache": "cache",
    "LlorchError": "errors",
    "MemoryPlan": "cache",
    "MeshError": "errors",
    "Mirostat": "sampling",
    "Model": "loading.checkpoint",
    "ModelError": "errors",
    "NonFiniteError": "errors",
    "OptionError": "errors",
    "PagedCache": "cache",
    "Params": "params",
    "Piece": "text.results",
    "PromptLookup": "decoding.speculative.drafts",
    "QuantizationError": "errors",
    "QuantizedCache": "cache",
    "Reencode": "decoding.overflow",
    "RotatingCache": "cache",
    "Sampler": "sampling",
    "SamplerError": "errors",
    "Sampling": "sampling",
    "Score": "evaluation.perplexity",
    "SearchError": "errors",
    "Session": "decoding.session",
    "SessionError": "errors",
    "Speculation": "decoding.speculative.loop",
    "StaticCache": "cache",
    "TokenError": "errors",
    "Tokenizer": "tokenizer",
    "astream": "text.asynchronous",
    "beam_search": "decoding.beam",
    "choices": "evaluation.loglikelihood",
    "compile_count": "decoding.loop",
    "contrastive_search": "decoding.contrastive",
    "convert": "loading.checkpoint",
    "count_params": "params",
    "decode_step": "decoding.loop",
    "evict": "cache",
    "fingerprint": "cache",
    "forward": "model",
    "generate": "text.generation",
    "generate_n": "text.samples",
    "generate_speculative": "text.speculative",
    "generate_tokens": "decoding.loop",
    "init_params": "params",
    "intermediates": "evaluation.validation",
    "load": "loading.checkpoint",
    "load_cache": "cache",
    "load_session": "decoding.session",
    "make_cache": "cache",
    "make_mesh": "meshes",
    "param_shapes": "params",
    "plan_memory": "cache",
    "prefill": "decoding.loop",
    "quantize": "quantization",
    "quantize_model": "loading.checkpoint",
    "register_exports": "decoding.exporting",
    "save_cache": "cache",
    "save_model": "loading.checkpoint",
    "save_quantized": "loading.checkpoint",
    "save_session": "decoding.session",
    "score": "evaluation.perplexity",
    "shard": "sharding",
    "speculate_tokens": "decoding.speculative.loop",
    "stream": "text.generation",
    "stream_tokens": "decoding.loop",
}

__version__ = "0.1.0"


take_enough_threads()  # before JAX starts


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"llorch_jax.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"llorch_jax.{name}") is not None:
        return importlib.import_module(f"llorch_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    "Engine",
    "EngineError",
    "EngineStats",
    "EvictingCache",
    "ExportError",
    "GPT2Config",
    "Generation",
    "GenerationOptions",
    "Greedy",
    "Handle",
    "History",
    "KVCache",
    "LlorchError",
    "MemoryPlan",
    "MeshError",
    "Mirostat",
    "Model",
    "ModelError",
    "NonFiniteError",
    "OptionError",
    "PagedCache",
    "Params",
    "Piece",
    "PromptLookup",
    "QuantizationError",
    "QuantizedCache",
    "Reencode",
    "RotatingCache",
    "Sampler",
    "SamplerError",
    "Sampling",
    "Score",
    "SearchError",
    "Session",
    "SessionError",
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
    "make_mesh",
    "param_shapes",
    "plan_memory",
    "prefill",
    "quantize",
    "quantize_model",
    "register_exports",
    "save_cache",
    "save_model",
    "save_quantized",
    "save_session",
    "score",
    "shard",
    "speculate_tokens",
    "stream",
    "stream_tokens",
]
