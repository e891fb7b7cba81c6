"""Models that tests can make in no time: one of random weights, and one that knows a single text by heart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import llorch_jax as lj

END_OF_TEXT = 256
CONFIG = lj.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_kv_heads=2)


def byte_tokenizer() -> lj.Tokenizer:
    """A token for each byte, and `<|endoftext|>`, id 256."""
    vocab = {symbol: id for id, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE({**vocab, "<|endoftext|>": END_OF_TEXT}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return lj.Tokenizer(backend)


def random_params(config: lj.GPT2Config) -> lj.Params:
    """Random weights, large enough for clear choices and uneven attention."""
    return jax.jit(_sharp_params, static_argnums=0)(config, jax.random.key(0))


def _sharp_params(config: lj.GPT2Config, key: jax.Array) -> lj.Params:
    params = lj.init_params(config, key)
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, params)


def random_model(**changes: Any) -> lj.Model:
    """A model of random weights over bytes."""
    config = dataclasses.replace(CONFIG, **changes)
    return lj.Model(config, random_params(config), byte_tokenizer(), "tiny")


def reciting_model(text: str) -> lj.Model:
    """A model that continues every prompt with what `text` has at the place where the prompt ends, and then ends.

    Its blocks add nothing; the position embedding says where a token stands, and the output projection what is next.
    """
    tokenizer, size = byte_tokenizer(), 64
    ids = [*tokenizer.encode(text), END_OF_TEXT]
    assert len(ids) <= size
    config = lj.GPT2Config(
        vocab_size=257,
        n_positions=size,
        n_embd=size,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        eos_token_id=END_OF_TEXT,
    )
    silent = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), lj.param_shapes(config))
    head = jnp.zeros((257, size)).at[jnp.asarray(ids[1:]), jnp.arange(len(ids) - 1)].set(10.0)
    norm = silent.ln_f.replace(weight=jnp.ones(size))
    return lj.Model(config, silent.replace(wpe=jnp.eye(size), ln_f=norm, lm_head=head), tokenizer, "reciting")
