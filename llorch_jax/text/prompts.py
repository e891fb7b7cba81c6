"""From texts to a request for their tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.decoding.overflow import padded
from llorch_jax.decoding.request import Request, prepare
from llorch_jax.errors import TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.collecting import Growing
from llorch_jax.text.ending import Ending
from llorch_jax.text.options import GenerationOptions, Method, per_prompt
from llorch_jax.text.vocabulary import tokenizer_of

Prompt = str | list[int]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that run together.

    Attributes:
        eos_ids: ids that end a text.
        request: for the prompts' tokens.
        rows: what has been generated for each row so far.
    """

    eos_ids: tuple[int, ...]
    request: Request
    rows: list[Growing]


def prompt_list(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        got = "none" if isinstance(prompt, list | tuple) else type(prompt).__name__
        raise TokenError(f"prompt: expected a text or a list of texts, got {got}")
    for text in prompt:
        if not isinstance(text, str):
            raise TokenError(f"text: expected a str, got {type(text).__name__}")
    return list(prompt)


def encode_prompts(model: Model, prompts: Sequence[Prompt], *, begins: bool = True) -> list[list[int]]:
    """Token ids of each prompt, which may be ids already; a text that `begins` gets what the tokenizer puts before it.

    Raises:
        TokenError: a prompt is empty or has characters that the tokenizer lacks.
    """
    tokenizer = tokenizer_of(model)
    rows = [
        prompt if isinstance(prompt, list) else tokenizer.encode(prompt, add_special_tokens=begins)
        for prompt in prompts
    ]
    for number, row in enumerate(rows):
        if not row:
            raise TokenError(f"prompt {number}: expected at least one token, got an empty text")
    return rows


def make_batch(
    model: Model, prompts: Sequence[Prompt], options: GenerationOptions, method: Method, copies: int = 1
) -> Batch:
    """A checked batch of prompts, each repeated `copies` times; nothing runs.

    Raises:
        LlorchError: an option does not fit the method or the model, or a prompt does not fit the context.
    """
    options.check_method(method)
    options.check_model(model)
    # Tokens in the cache come before the prompts, which then do not begin a text.
    begins = not isinstance(options.cache, KVCache) or options.cache.is_empty()
    ids = [row for row in encode_prompts(model, prompts, begins=begins) for _ in range(copies)]
    limits = [limit for limit in options.limits(len(prompts)) for _ in range(copies)]
    endings = [Ending.of(model, options, limit) for limit in limits]
    tokens, lengths = padded(ids)
    keys = row_keys(options.seed, len(prompts), copies)
    mesh = model.params.mesh
    longest = max(len(row) + limit - 1 for row, limit in zip(ids, limits, strict=True))
    cache = options.fitted_cache(model.config, len(ids), min(longest, model.config.n_positions), mesh)
    request = prepare(
        model.config,
        tokens,
        limits,
        cache,
        lengths,
        options.sampler_for(model),
        keys,
        endings[0].ids,
        options.overflow,
        top_logprobs=options.top_logprobs,
        mesh=mesh,
    )
    rows = [Growing(tokenizer_of(model), ending, row) for row, ending in zip(ids, endings, strict=True)]
    return Batch(endings[0].ids, request, rows)


def key_of_seed(seed: int) -> jax.Array:
    """A random key from the lowest 32 bits."""
    return jax.random.key(int(seed) % 2**32)


def row_key(seed: int, number: int) -> jax.Array:
    """The key that `row_keys` gives one row for a seed, however many rows come before it."""
    return jax.random.fold_in(key_of_seed(seed), number)


def row_keys(seed: int | Sequence[int], prompts: int, copies: int = 1) -> jax.Array:
    """A key for each row [prompts * copies].

    With one seed it is the seed's key folded with the row's number. With one seed per prompt each prompt has the keys
    that it would have alone.

    Raises:
        OptionError: there are several seeds, but not one per prompt.
    """
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    if not isinstance(seed, Sequence):
        return fold(key_of_seed(seed), jnp.arange(prompts * copies))
    keys = jnp.stack([key_of_seed(each) for each in per_prompt("seed", seed, prompts)])
    numbers = jnp.asarray(np.arange(copies))
    return jax.vmap(fold, (0, None))(keys, numbers).reshape(-1)
