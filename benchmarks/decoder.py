"""Repeatable decoding loops: the compiled programs of `llorch_jax.decoding.steps`, timed on their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llorch_jax as lj
from benchmarks.measure import seconds
from llorch_jax.buckets import bucket
from llorch_jax.cache.layouts import fit_cache
from llorch_jax.decoding import steps
from llorch_jax.decoding.request import prepare
from llorch_jax.text.timing import compile_seconds


class Decoder:
    """The loop of `generate_tokens` after a text of fixed length, repeatedly on the same cache."""

    def __init__(
        self,
        params: lj.Params,
        config: lj.GPT2Config,
        cache: lj.KVCache,
        length: int,
        new: int,
        sampler: Any = None,
    ) -> None:
        """Fills the cache with `length` random tokens; each loop adds `new` to them."""
        self.params, self.config, self.length, self.new = params, config, length, new
        batch = cache.batch_size
        tokens = random_tokens(config, batch, length)
        self.request = prepare(config, tokens, new + 1, cache, None, sampler, jax.random.key(0), None)
        self._cache: Any = self.request.cache
        self.span = jnp.asarray([1, new + 1], jnp.int32)
        self.out = steps.filler(self.request.decoding, bucket(new + 1))
        self._fill()

    def _fill(self) -> None:
        state = steps.start(self.params, self.config, dataclasses.replace(self.request, cache=self._cache))
        self.state = dataclasses.replace(state, cache=state.cache.reserve(self.new))
        self._token = np.array(state.token)

    def rewind(self) -> steps.DecodeState:
        """The state after the text, with room for the new tokens."""
        cache = self.state.cache
        try:
            cache = cache.crop(self.length)
        except lj.CacheError:  # a ring that has overwritten tokens that it needs
            self._cache = cache.clear().reserve(self.length)
            self._fill()
            cache = self.state.cache
        state = dataclasses.replace(self.state, token=jax.device_put(self._token), cache=cache.reserve(self.new))
        state = dataclasses.replace(state, remaining=jax.device_put(np.full_like(self._token, self.new)))
        return jax.block_until_ready(state)

    def compile(self) -> float:
        """Seconds of tracing and compiling the loop, which runs once."""
        before = compile_seconds()
        self.step_ms()
        return compile_seconds() - before

    def step_ms(self) -> float:
        """Milliseconds per step of one loop."""
        state = self.rewind()

        def run() -> Any:
            self.out, self.state = steps.loop(
                self.params, self.config, self.request.decoding, self.out, state, self.span
            )
            return self.out, self.state

        return 1000 * seconds(run) / self.new


def random_tokens(config: lj.GPT2Config, batch: int, length: int) -> np.ndarray:
    """The same random ids every time, int32 [batch, length]."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)


def make_cache(config: lj.GPT2Config, name: str, batch: int, tokens: int | None = None) -> lj.KVCache:
    """An empty cache by name: a layout, or a layout and a codec such as "paged/int8".

    Args:
        config: the model's hyperparameters.
        name: the layout, as `lj.make_cache` takes it, and optionally a slash and the codec.
        batch: number of rows.
        tokens: number of tokens to make room for, rounded up to a bucket, if the layout has a capacity; None means the
            whole context.
    """
    layout, _, codec = name.partition("/")
    if tokens is None:
        return lj.make_cache(config, layout, batch_size=batch, codec=codec or None)
    return fit_cache(config, layout, batch, tokens, codec=codec or None)
