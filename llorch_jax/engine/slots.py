"""The engine's compiled programs: a chunk of a prompt, the first token of a slot, and the next token of some slots.

The device holds the state of each slot that changes from step to step; block tables and settings belong to the host and
are passed in every call. The programs own the slots that they are given: these are donated, and the pools are written
in place.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.placement import pinned
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.params import DecodingParams
from llorch_jax.decoding.steps import Alternatives, DecodeState, alternatives, choose
from llorch_jax.model import output_logits, run
from llorch_jax.params import Params
from llorch_jax.sampling import History, Sampling
from llorch_jax.sampling.masking import Masked

TOP_LOGPROBS = 20  # number of alternatives that a step records if any of its requests asks for some


@struct.dataclass
class Slots:
    """The state of B slots on the device.

    Attributes:
        cache: the pools, and the lengths of the slots; its tables are not used.
        token: int32 [B], the newest token of each slot, which is not in the cache yet.
        finished: bool [B], slots whose text has ended, or that have none.
        remaining: int32 [B], number of tokens that each may still get.
        history: tokens of each slot so far.
    """

    cache: PagedCache
    token: jax.Array
    finished: jax.Array
    remaining: jax.Array
    history: History

    @classmethod
    def empty(cls, cache: PagedCache, capacity: int) -> "Slots":
        """Slots without requests, one for each row of an empty cache; `capacity` is the maximum length of a text."""
        batch = cache.lengths.shape[0]

        def zeros() -> jax.Array:
            return jnp.zeros(batch, jnp.int32)

        history = History(jnp.zeros((batch, capacity), jnp.int32), zeros(), zeros())
        return cls(cache, zeros(), jnp.ones(batch, bool), zeros(), history)


class Settings(NamedTuple):
    """How tokens are chosen, for every slot; NumPy arrays or device arrays.

    Attributes:
        sampler: a superset, see `Sampling.superset`.
        keys: uint32 [B, W], data of the random keys.
        eos_ids: int32 [B, E], padded with -1.
        known: int32 [1, ceil(V / 32)], bits of the ids that may be drawn; None for all.
    """

    sampler: Sampling
    keys: Any
    eos_ids: Any
    known: Any = None

    def rows(self, rows: jax.Array, allowed: "Allowed | None" = None) -> DecodingParams:
        """The settings of some slots; for use in `jit`."""
        of = partial(jax.tree.map, lambda array: jnp.asarray(array)[rows])
        sampler: Any = of(self.sampler)
        if self.known is not None:
            sampler = Masked(sampler, self.known, insists=False)
        if allowed is not None:
            sampler = Masked(sampler, jnp.asarray(allowed.mask), jnp.asarray(allowed.insists))
        return DecodingParams(sampler, jax.random.wrap_key_data(of(self.keys)), of(self.eos_ids))


class Allowed(NamedTuple):
    """The tokens that guides allow next, see `Masked`.

    Attributes:
        mask: int32 [A, ceil(V / 32)]; all ones in rows without a guide.
        insists: bool [A], rows with a guide.
    """

    mask: Any
    insists: Any


class Entrant(NamedTuple):
    """A request that gets a slot, with its prompt in the cache.

    Attributes:
        slot: int32.
        tokens: int32 [S], prompt and earlier results, padded.
        length: int32, number of these tokens.
        prompt: int32, how many of them belong to the prompt.
        remaining: int32, number of tokens that it may still get.
    """

    slot: Any
    tokens: Any
    length: Any
    prompt: Any
    remaining: Any


class Chosen(NamedTuple):
    """New tokens.

    Attributes:
        token: int32 [A].
        logprob: float32 [A], under the model; NaN where no token could be chosen.
        top: the `TOP_LOGPROBS` most likely ids, or all ids of a smaller vocabulary; zeros if they were not wanted.
    """

    token: jax.Array
    logprob: jax.Array
    top: Alternatives


@partial(jax.jit, static_argnames="config", donate_argnames="slots")
def prefill(
    params: Params, config: GPT2Config, slots: Slots, tokens: Any, start: Any, count: Any, table: Any, final: Any
) -> tuple[jax.Array, Slots]:
    """Logits [1, V] after the final chunk of one request's tokens, or zeros after another.

    The output projection has a third of GPT-2 small's weights: it takes as long as ten more tokens in a chunk.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        slots: all slots; only the pools change.
        tokens: int32 [1, T], padded on the right.
        start: int32 [1], position of the first token.
        count: int32 [1], number of tokens without padding.
        table: int32 [1, N], the request's pages.
        final: bool, whether this is the final chunk.
    """
    out = run(params, config, tokens, _rows_of(slots.cache, start, table), count)
    cache = slots.cache.replace(keys=out.cache.keys, values=out.cache.values)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)  # [1, 1, D]
    logits = jax.lax.cond(
        final,
        lambda hidden: output_logits(params, hidden[:, 0].T, (1,)),
        lambda hidden: jnp.zeros((1, config.vocab_size), jnp.float32),
        last,
    )
    return logits, pinned(params.mesh, slots.replace(cache=cache))  # type: ignore[attr-defined]


@partial(jax.jit, static_argnames="mesh", donate_argnames="slots")
def enter(
    slots: Slots,
    settings: Settings,
    logits: jax.Array,
    entrant: Entrant,
    allowed: Allowed,
    wanted: Any,
    *,
    mesh: Mesh | None = None,
) -> tuple[Chosen, Slots]:
    """The first token of a request, which now gets a slot, given the logits [1, V] after its prompt.

    Like those below, it records the alternatives if `wanted`, a bool.
    """
    row = jnp.asarray(entrant.slot)[None]
    length = jnp.asarray(entrant.length)[None]
    before = DecodeState(
        token=None,
        logprob=None,
        finished=jnp.zeros(1, bool),
        remaining=jnp.asarray(entrant.remaining)[None],
        cache=None,
        history=History(jnp.asarray(entrant.tokens)[None], length, jnp.asarray(entrant.prompt)[None]),
    )
    state = choose(settings.rows(row, allowed), logits, before, length)
    slots = slots.replace(cache=_with_lengths(slots.cache, row, length))  # type: ignore[attr-defined]
    return _chosen(state, logits, wanted), pinned(mesh, _put(slots, row, state))


@partial(jax.jit, static_argnames="config", donate_argnames="slots")
def decode(
    params: Params, config: GPT2Config, slots: Slots, settings: Settings, rows: Any, tables: Any, wanted: Any
) -> tuple[Chosen, Slots]:
    """The next token of some slots: `feed` and `draw` in one program, for slots without guides.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        slots: all slots.
        settings: the settings of all slots.
        rows: int32 [A], distinct slot numbers, padded with B, which stands for no slot.
        tables: int32 [A, N], their pages.
        wanted: bool, whether to record the alternatives.
    """
    logits, slots = _feed(params, config, slots, rows, tables)
    chosen, slots = _draw(slots, settings, logits, rows, None, wanted)
    return chosen, pinned(params.mesh, slots)


@partial(jax.jit, static_argnames="config", donate_argnames="slots")
def feed(params: Params, config: GPT2Config, slots: Slots, rows: Any, tables: Any) -> tuple[jax.Array, Slots]:
    """Logits [A, V] after the newest token of some slots; arguments as `decode`.

    The slots' next tokens, which `draw` chooses, may be restricted by guides that need the newest ones on the host.
    """
    logits, slots = _feed(params, config, slots, rows, tables)
    return logits, pinned(params.mesh, slots)


@partial(jax.jit, static_argnames="mesh", donate_argnames="slots")
def draw(
    slots: Slots,
    settings: Settings,
    logits: jax.Array,
    rows: Any,
    allowed: Allowed,
    wanted: Any,
    *,
    mesh: Mesh | None = None,
) -> tuple[Chosen, Slots]:
    """The next token of some slots, given the logits [A, V] of `feed` for the same rows."""
    chosen, slots = _draw(slots, settings, logits, rows, allowed, wanted)
    return chosen, pinned(mesh, slots)


def _rows_of(cache: PagedCache, lengths: jax.Array, tables: Any) -> PagedCache:
    """A cache with the same pools, whose rows have these lengths and tables."""
    sources = jnp.full((len(cache.keys), lengths.shape[0]), -1, jnp.int32)
    return cache.replace(tables=jnp.asarray(tables), lengths=jnp.asarray(lengths), sources=sources)


def _feed(params: Params, config: GPT2Config, slots: Slots, rows: Any, tables: Any) -> tuple[jax.Array, Slots]:
    """Logits [A, V] after the newest token of some slots, which goes into the cache; of those that are not done."""
    before = _state_of(slots, rows)
    count = 1 - before.done.astype(jnp.int32)
    cache = _rows_of(slots.cache, slots.cache.lengths[_there(slots, rows)], tables)
    out = run(params, config, before.token[:, None], cache, count, last=True)
    cache = slots.cache.replace(keys=out.cache.keys, values=out.cache.values)
    return out.logits, slots.replace(cache=_with_lengths(cache, rows, out.cache.lengths))  # type: ignore[attr-defined]


def _draw(
    slots: Slots, settings: Settings, logits: jax.Array, rows: Any, allowed: Allowed | None, wanted: Any
) -> tuple[Chosen, Slots]:
    """The next token of some slots whose newest one is in the cache."""
    there = _there(slots, rows)
    state = choose(settings.rows(there, allowed), logits, _state_of(slots, rows), slots.cache.lengths[there])
    return _chosen(state, logits, wanted), _put(slots, rows, state)


def _chosen(state: DecodeState, logits: jax.Array, wanted: Any) -> Chosen:
    """The new tokens, with the alternatives given logits [A, V] if they are wanted.

    The logits themselves are not returned: copying them takes longer than all else that is done for a greedy token.
    """
    count = min(TOP_LOGPROBS, logits.shape[1])

    def nothing() -> Alternatives:
        shape = (logits.shape[0], count)
        return Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    return Chosen(state.token, state.logprob, jax.lax.cond(wanted, lambda: alternatives(logits, count), nothing))


def _there(slots: Slots, rows: Any) -> jax.Array:
    """Slot numbers that exist, also for rows that stand for no slot."""
    return jnp.minimum(rows, slots.token.shape[0] - 1)


def _state_of(slots: Slots, rows: Any) -> DecodeState:
    """The state of some slots, without their cache; rows that stand for no slot are finished."""
    there = _there(slots, rows)
    return DecodeState(
        token=slots.token[there],
        logprob=None,
        finished=slots.finished[there] | (rows >= slots.token.shape[0]),
        remaining=slots.remaining[there],
        cache=None,
        history=jax.tree.map(lambda array: array[there], slots.history),
    )


def _with_lengths(cache: PagedCache, rows: Any, lengths: jax.Array) -> PagedCache:
    """The cache with new lengths of some slots; rows that stand for no slot are dropped."""
    return cache.replace(lengths=cache.lengths.at[rows].set(lengths, mode="drop"))


def _put(slots: Slots, rows: Any, state: DecodeState) -> Slots:
    """The slots after the choice of a token for some of them; rows that stand for no slot are dropped."""

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[rows].set(new, mode="drop")

    return slots.replace(  # type: ignore[attr-defined]
        token=put(slots.token, state.token),
        finished=put(slots.finished, state.finished),
        remaining=put(slots.remaining, state.remaining),
        history=jax.tree.map(put, slots.history, state.history),
    )
