"""Sampling: a random token after transforms of the logits.

Samplers are pytrees whose settings are traced: changing a value compiles nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.errors import SamplerError
from llorch_jax.kernels.logits import most_likely
from llorch_jax.sampling import truncation
from llorch_jax.sampling.base import MASKED, History
from llorch_jax.sampling.chain import PENALTIES, TRUNCATIONS
from llorch_jax.sampling.drawing import draw
from llorch_jax.sampling.ids import ID_SETTINGS
from llorch_jax.sampling.settings import (
    ALL,
    FIRST,
    SETTINGS,
    check_settings,
    is_mixed,
    is_off,
    number_array,
    of_rows,
    prepare_settings,
    rows_of,
    superset_settings,
    used_settings,
)
from llorch_jax.tracing import is_concrete

_CANDIDATE_BUCKETS = (64, 256, 1024)
_Finish = truncation.Finish


@struct.dataclass
class Sampling:
    """A random token after transforms of the logits; make one with `Sampling.create` or `Sampling.superset`.

    Attributes:
        temperature: float32 [] or [B].
        top_k: int32 [] or [B]; None keeps all tokens.
        top_p: float32 [] or [B]; None keeps all tokens.
        more: the other settings that are used, by name.
        candidates: a bound of top_k; only this many largest logits are sorted.
        greedy: whether the most likely token is taken instead of a random one.
        guarded: whether settings that are used may be off in some rows: each transform then runs only if it is on in
            some row, and changes no other row. Rows with temperature 0 take the most likely token.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    more: dict[str, Any]
    candidates: int | None = struct.field(pytree_node=False)
    greedy: bool = struct.field(pytree_node=False, default=False)
    guarded: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(
        cls, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None, *, greedy: bool = False, **settings: Any
    ) -> "Sampling":
        """A sampler with settings for all rows (scalars) or per row (sequences of length B).

        Transforms are applied in the order in which they are listed here, that of transformers where it has them. A
        setting that is off (None, or the value in brackets, as in transformers, vLLM and llama.cpp) is not compiled in.

        Args:
            logit_bias: dict from id to what is added to its logit, minus infinity to ban it; per row a list of dicts.
            repetition_penalty: above 0; divides (multiplies where negative) logits of tokens in prompt and text (1).
            frequency_penalty: subtracted for each time a token was generated (0).
            presence_penalty: subtracted if a token was generated (0).
            repeat_last_n: number of last tokens of prompt and text to which these three penalties apply (-1 for all).
            dry_multiplier: of the DRY penalty (0); with dry_base (1.75), dry_allowed_length (2) and dry_breakers (ids;
                per row a list of lists).
            no_repeat_ngram_size: no sequence of this many tokens occurs twice (0).
            bad_words: list of token sequences that must not occur; per row a list of such lists.
            min_new_tokens: minimum number of new tokens of a row (0).
            forced_tokens: list of ids that the text starts with; None in it forces none. Per row a list of lists.
            temperature: logits are divided by it; 0 takes the most likely token.
            dynatemp_range: the temperature moves within this distance by the entropy of the distribution (0); with
                dynatemp_exponent (1).
            top_n_sigma: logits within this many standard deviations of the largest are kept (0 or less).
            top_k: number of most likely tokens to keep (0 or -1; Fan et al. 2018, section 5.4).
            top_p: the most likely tokens whose probabilities reach this sum are kept (1; Holtzman et al. 2020, section
                3.1). 0 keeps the most likely one.
            min_p: tokens with at least this fraction of the largest probability are kept (0).
            typical_p: the most typical tokens that reach this probability are kept (1).
            epsilon_cutoff: tokens of this probability are kept (0).
            eta_cutoff: as epsilon_cutoff, lower where the distribution is flat (0).
            xtc_probability: of cutting off the top choices (0); with xtc_threshold (0.1).
            greedy: take the most likely token that is left.

        Raises:
            SamplerError: a setting is unknown or out of range.
        """
        first = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_settings({**first, **settings})
        cold = np.asarray(temperature) == 0
        used = used_settings(settings)
        kept = {name: None if is_off(name, first[name]) else first[name] for name in ("top_k", "top_p")}
        mixed = any(is_mixed(name, value) for name, value in {**kept, **used}.items() if value is not None)
        bound = None if kept["top_k"] is None else int(np.max(number_array("top_k", top_k)))
        return cls(
            temperature=jax.device_put(number_array("temperature", 1.0 if cold.all() else temperature)),
            top_k=None if bound is None else jax.device_put(number_array("top_k", top_k)),
            top_p=None if kept["top_p"] is None else jax.device_put(number_array("top_p", top_p)),
            more=prepare_settings(used),
            candidates=None if bound is None else next((b for b in _CANDIDATE_BUCKETS if b >= bound), None),
            greedy=greedy or bool(cold.all()),
            guarded=mixed or bool(cold.any() and not cold.all()),
        )

    @classmethod
    def superset(cls, rows: Sequence[Mapping[str, Any]], like: "Sampling | None" = None) -> "Sampling":
        """A sampler with separate settings for every row, in which every setting may be on or off.

        All supersets of as many rows have the same structure, so that a row that begins to use DRY, a penalty or a
        top-k compiles nothing: use it where requests come and go. The tokens are those of `Sampling.create` with a
        row's settings. It always needs a key and a history.

        Args:
            rows: settings of `create` for each row, by name; `{"temperature": 0}` takes the most likely token.
            like: another superset, whose room for ids (of `logit_bias`, `bad_words`, `forced_tokens`, `dry_breakers`)
                is kept where it is larger. Only more ids than there is room for cause recompilation.

        Raises:
            SamplerError: a setting is unknown or out of range, or is not for one row.
        """
        if not rows:
            raise SamplerError("rows: expected settings for one row or more, got none")
        for number, row in enumerate(rows):
            check_settings({"temperature": 1.0, **row})
            for name, value in row.items():
                several = ID_SETTINGS[name].per_row(value) if name in ID_SETTINGS else np.ndim(value) > 0
                if value is not None and several:
                    raise SamplerError(f"{name}: expected one value in rows[{number}], got several")
        settings = superset_settings(rows, None if like is None else like.more)
        first = {name: settings.pop(name) for name in FIRST}
        return cls(**first, more=settings, candidates=None, guarded=True)

    @property
    def needs_key(self) -> bool:
        """Whether it draws."""
        return not self.greedy

    @property
    def needs_history(self) -> bool:
        """Whether it must see the tokens so far."""
        return any(SETTINGS[name].needs_history for name in self.more)

    def __repr__(self) -> str:
        names = [*(name for name in FIRST if getattr(self, name) is not None), *self.more]
        kind = "superset, " if len(self.more) == len(SETTINGS) else "greedy, " if self.greedy else ""
        return f"Sampling({kind}{', '.join(names)})"

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplerError for a setting that names an id outside the vocabulary; host only."""
        for name in ID_SETTINGS:
            ids = self.more.get(name, np.zeros(0))
            known = np.asarray(ids[0] if isinstance(ids, tuple) else ids) if is_concrete(ids) else np.zeros(0)
            if known.size and known.max() >= vocab_size:
                raise SamplerError(f"{name}: expected ids in 0 .. {vocab_size - 1}, got {known.max()}")

    def init(self, batch: int) -> None:
        """It has no state."""

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: History | None, eos_ids: jax.Array, state: None
    ) -> tuple[jax.Array, None]:
        """Token ids int32 [B]; see `Sampler.sample`."""
        if not self.guarded:
            penalised = self.penalised(logits, history, eos_ids)
            return self._truncated(penalised, lambda values, ids: self._chosen(values, ids, keys)), None
        # Truncation never cuts off the most likely token, except by these two.
        simple = jnp.all(self._cold & ~self._on("typical_p") & ~self._on("xtc_probability"))

        best = most_likely(logits)  # in every case: finding the normalizer of the same logits finds it as well

        def all_steps() -> jax.Array:
            changed = self.penalised(logits, history, eos_ids)
            return jax.lax.cond(simple, lambda: _known(changed, most_likely(changed)), lambda: self._any(changed, keys))

        # Decided first, as logits that a condition hands on unchanged are copied.
        return jax.lax.cond(simple & ~self._any_penalty, lambda: _known(logits, best), all_steps), None

    def penalised(self, logits: jax.Array, history: History | None, eos_ids: jax.Array) -> jax.Array:
        """Logits [B, V] after the transforms that come before the temperature."""
        self._check_rows(logits.shape[0])
        if self.needs_history and history is None:
            raise SamplerError(f"history: expected one for {', '.join(self.more)}, got None")
        names = [name for name in PENALTIES if name in self.more]

        def apply(logits: jax.Array) -> jax.Array:
            for name in names:
                transform = partial(PENALTIES[name], past=history, of=self.more, ends=eos_ids)
                logits = self._apply(name, logits, transform)
            return logits

        if not self.guarded or not names:
            return apply(logits)
        return jax.lax.cond(self._any_penalty, apply, lambda logits: logits, logits)

    @property
    def _any_penalty(self) -> jax.Array:
        """bool [], whether a transform of `penalised` is on in some row."""
        return jnp.any(jnp.stack([jnp.zeros((), bool), *(jnp.any(self._on(name)) for name in PENALTIES)]))

    def _on(self, name: str) -> jax.Array:
        """bool [1 or B], the rows in which a setting is on."""
        if name not in self.more:
            return jnp.zeros(1, bool)
        value = self.more[name]
        if name == "logit_bias":
            return jnp.any(value[1] != 0, axis=1)
        if name == "bad_words":
            return jnp.any(value[1] > 0, axis=1)
        if name == "forced_tokens":
            return jnp.any(value >= 0, axis=1)
        return ~of_rows(SETTINGS[name].is_off(value))

    @property
    def _cold(self) -> jax.Array:
        """bool [1 or B], the rows that take the most likely token."""
        return of_rows(self.temperature) == 0 if not self.greedy else jnp.ones(1, bool)

    def _apply(self, name: str, logits: jax.Array, transform: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A transform of logits [B, C], in the rows in which its setting is on."""
        if name not in self.more:
            return logits
        if not self.guarded:
            return transform(logits)
        on = self._on(name)
        return jax.lax.cond(jnp.any(on), lambda x: jnp.where(on[:, None], transform(x), x), lambda x: x, logits)

    @property
    def is_plain(self) -> bool:
        """Whether `filtered` says with what probability each token is drawn, whatever came before."""
        others = self.more.keys() - TRUNCATIONS.keys() - {"top_n_sigma", "dynatemp_range", "dynatemp_exponent"}
        return not (self.greedy or self.guarded or others)

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] whose softmax is what tokens are drawn from: minus infinity where a token never is."""
        if not self.is_plain:
            raise SamplerError(
                f"sampler: expected one that depends on the logits alone, got settings {list(self.more)}"
            )
        rows = jnp.arange(logits.shape[0])[:, None]

        def spread(values: jax.Array, ids: jax.Array | None) -> jax.Array:
            return values if ids is None else jnp.full_like(logits, MASKED).at[rows, ids].set(values)

        return self._truncated(logits, spread)

    def _chosen(self, values: jax.Array, ids: jax.Array | None, keys: jax.Array) -> jax.Array:
        """The ids drawn from logits [B, C]."""

        def exclude(values: jax.Array) -> jax.Array:
            coins = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            return truncation.apply_xtc(values, coins, self.more["xtc_probability"], self.more["xtc_threshold"])

        values = self._apply("xtc_probability", values, exclude)
        if self.greedy:
            choice = jnp.argmax(values, axis=-1).astype(jnp.int32)
        else:
            choice = draw(values, keys)
            if self.guarded:
                choice = jnp.where(self._cold, jnp.argmax(values, axis=-1).astype(jnp.int32), choice)
        token = choice if ids is None else jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]
        return _known(values, choice, token)

    def _any(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """The ids that guarded rows draw: from all tokens in order of ids, or of rank where top-k or top-p is on."""
        self._check_rows(logits.shape[0])
        values = self._tempered(logits)
        top_k = jnp.full(1, ALL) if self.top_k is None else of_rows(self.top_k)
        top_p = jnp.ones(1) if self.top_p is None else of_rows(self.top_p)
        ranked = jnp.broadcast_to((top_k < ALL) | (top_p < 1), keys.shape)

        def by_id() -> jax.Array:
            return self._chosen(self._truncate_more(values), None, keys)

        def by_rank() -> jax.Array:
            limits = jnp.broadcast_to(top_k, keys.shape), jnp.broadcast_to(top_p, keys.shape)
            return truncation.sort_enough(values, *limits, self._finished(keys), ranked)

        def neither() -> jax.Array:
            return jnp.zeros(keys.shape, jnp.int32)

        from_all = jax.lax.cond(jnp.all(ranked), neither, by_id)
        return jnp.where(ranked, jax.lax.cond(jnp.any(ranked), by_rank, neither), from_all)

    def _finished(self, keys: jax.Array) -> _Finish:
        """What draws from sorted logits [B, C] that top-k and top-p have left."""
        return lambda values, ids: self._chosen(self._truncate_more(values), ids, keys)

    def _tempered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] divided by the temperature, and what top-n-sigma leaves of them."""
        temperature = self.temperature
        if self.guarded:
            temperature = jnp.where(self._cold, 1.0, of_rows(temperature))
        if "dynatemp_range" in self.more:
            spread, exponent = self.more["dynatemp_range"], self.more["dynatemp_exponent"]
            given = jnp.broadcast_to(temperature, logits.shape[:1])
            temperature = jax.lax.cond(
                jnp.any(self._on("dynatemp_range")),
                lambda: truncation.dynamic_temperature(logits, given, spread, exponent),
                lambda: given,
            )
        values = truncation.apply_temperature(logits, temperature)
        return self._apply("top_n_sigma", values, lambda x: truncation.apply_top_n_sigma(x, self.more["top_n_sigma"]))

    def _truncated(self, logits: jax.Array, finish: _Finish) -> jax.Array:
        """What `finish` makes of what is left of the logits [B, V].

        That is either all of them in order of ids, or the largest [B, C], sorted, with their ids.
        """
        self._check_rows(logits.shape[0])
        values = self._tempered(logits)
        if self.top_k is None and self.top_p is None:
            return finish(self._truncate_more(values), None)
        if self.top_p is not None and self.top_k is None:
            finished = lambda kept, ids: finish(self._truncate_more(kept), ids)  # noqa: E731
            return truncation.sort_enough(values, None, self.top_p, finished)
        largest, ids = jax.lax.top_k(values, min(self.candidates or values.shape[-1], values.shape[-1]))
        kept = truncation.keep_sorted(largest, self.top_k, self.top_p)
        return finish(self._truncate_more(jnp.where(kept, largest, MASKED)), ids)

    def _truncate_more(self, values: jax.Array) -> jax.Array:
        for name, transform in TRUNCATIONS.items():
            if name in self.more:
                values = self._apply(name, values, partial(_with, transform, self.more[name]))
        return values

    def _check_rows(self, batch: int) -> None:
        first = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        for name, setting in {**first, **self.more}.items():
            if setting is not None and rows_of(setting) not in (1, batch):
                raise SamplerError(f"{name}: expected one value or {batch}, one per row, got {rows_of(setting)}")


def _with(transform: Callable[[jax.Array, jax.Array], jax.Array], setting: jax.Array, values: jax.Array) -> jax.Array:
    return transform(values, setting)


def _known(values: jax.Array, choice: jax.Array, token: jax.Array | None = None) -> jax.Array:
    """The tokens int32 [B], -1 in rows where the choice among logits [B, C] is none because all are cut off."""
    chosen = jnp.take_along_axis(values, choice[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isneginf(chosen), -1, choice if token is None else token)
