"""Requests for engines under test, and what they must answer."""

import jax
import numpy as np

import llorch_jax as lj
from llorch_jax.engine.core import Core
from llorch_jax.engine.device import Plot
from llorch_jax.engine.scheduler import Limits
from llorch_jax.engine.sequences import Request
from llorch_jax.sampling import make_sampler


def make_core(params, config, *, slots=3, num_pages=12, page_size=4, chunk=6, idle_chunk=16, codec=None, offload=0):
    limits = Limits(slots=slots, page_size=page_size, chunk=chunk, idle_chunk=idle_chunk)
    return Core(params, config, Plot(limits, num_pages, codec, offload))


class Answer:
    """What comes back for one request."""

    def __init__(self, stop_after=None):
        self.tokens = []
        self.error = None
        self.last = None
        self._stop_after = stop_after

    def on_token(self, token):
        assert self.last is None or not self.last.last
        self.tokens.append(token.id)
        self.last = token
        return len(self.tokens) != self._stop_after

    def on_error(self, error):
        assert self.error is None
        self.error = error

    @property
    def over(self):
        return self.error is not None or (self.last is not None and self.last.last)


def request(prompt, max_new_tokens, answer, *, seed=0, settings=None, **more):
    return Request(
        tokens=np.asarray(prompt, np.int32),
        max_new_tokens=max_new_tokens,
        settings=settings or {"temperature": 0.0},
        key=np.asarray(jax.random.key_data(jax.random.key(seed))),
        on_token=answer.on_token,
        on_error=answer.on_error,
        **more,
    )


def alone(params, config, prompt, max_new_tokens, *, seed=0, settings=None, eos_ids=()):
    """The tokens that `generate_tokens` gives, up to the one that ends the text; by programs of a single size."""
    padded = np.zeros((1, config.n_positions), np.int32)
    padded[0, : len(prompt)] = prompt
    tokens, _ = lj.generate_tokens(
        params,
        config,
        padded,
        max_new_tokens,
        lj.StaticCache.init(config, batch_size=1, capacity=config.n_positions),
        [len(prompt)],
        sampler=make_sampler(**(settings or {"temperature": 0.0})),
        key=jax.random.key(seed)[None],
        eos_id=eos_ids or None,
    )
    out = []
    for token in np.asarray(tokens)[0].tolist():
        out.append(token)
        if token in eos_ids:
            break
    return out


def check_books(core):
    """No page is lost or held twice, in either pool."""
    core.pages.check(core.held())
    core.offload.store.check()


def run(core, limit=2000):
    for _ in range(limit):
        if core.idle:
            return
        core.step()
        check_books(core)
    raise AssertionError("the engine did not finish")
