"""Samplers: from logits to token ids. They are pytrees whose settings are traced: changing one compiles nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax import struct
from llorch_jax.errors import SamplerError
from llorch_jax.sampling import penalties, truncation
from llorch_jax.sampling.base import MASKED, History, per_row
from llorch_jax.sampling.drawing import draw
from llorch_jax.sampling.mirostat import Mirostat
from llorch_jax.sampling.settings import SETTINGS, check_settings, prepare_settings, rows_of
from llorch_jax.tracing import is_concrete

_CANDIDATE_BUCKETS = (64, 256, 1024)


@struct.dataclass
class Greedy:
    """The most likely token; of equal ones the lowest id."""

    needs_key: bool = struct.field(pytree_node=False, default=False)
    needs_history: bool = struct.field(pytree_node=False, default=False)

    def init(self, batch: int) -> None:
        """It has no state."""

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: None, eos_ids: jax.Array, state: None
    ) -> tuple[jax.Array, None]:
        """Token ids int32 [B]; see `Sampler.sample`."""
        return most_likely(logits), None


def most_likely(logits: jax.Array) -> jax.Array:
    """int32 [B], the id of each row's largest logit, of equal ones the lowest."""
    # As argmax, which takes up to three times as long: XLA's CPU backend does not vectorise it.
    return jax.lax.top_k(logits, 1)[1][..., 0].astype(jnp.int32)


@struct.dataclass
class Sampling:
    """A random token after transforms of the logits; make one with `Sampling.create`.

    Attributes:
        temperature: float32 [] or [B].
        top_k: int32 [] or [B]; None keeps all tokens.
        top_p: float32 [] or [B]; None keeps all tokens.
        more: the other settings that were given, by name.
        candidates: a bound of top_k; only so many largest logits are sorted.
        greedy: whether the most likely token is taken instead of a random one.
    """

    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None
    more: dict[str, Any]
    candidates: int | None = struct.field(pytree_node=False)
    greedy: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(
        cls, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None, *, greedy: bool = False, **settings: Any
    ) -> "Sampling":
        """A sampler with settings for all rows (scalars) or per row (sequences of length B).

        Transforms are applied in the order in which they are listed here, that of transformers where it has them.

        Args:
            logit_bias: dict from id to what is added to its logit; per row a list of dicts.
            repetition_penalty: above 0; divides (multiplies where negative) logits of tokens in prompt and text.
            frequency_penalty: subtracted for each time a token was generated.
            presence_penalty: subtracted if a token was generated.
            dry_multiplier: of the DRY penalty; with dry_base (1.75), dry_allowed_length (2) and dry_breakers (ids;
                per row a list of lists).
            no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 for none.
            bad_words: list of token sequences that must not occur; per row a list of such lists.
            min_new_tokens: rows do not end before.
            forced_tokens: list of ids that the text starts with; None in it forces none. Per row a list of lists.
            temperature: logits are divided by it; 1e-30 or more.
            top_n_sigma: logits within so many standard deviations of the largest are kept.
            top_k: how many of the most likely tokens are kept, 1 or more (Fan et al. 2018, section 5.4).
            top_p: the most likely tokens whose probabilities reach this sum are kept; more than 0, at most 1
                (Holtzman et al. 2020, section 3.1).
            min_p: tokens at least so many times as likely as the most likely are kept, 0 .. 1.
            typical_p: the most typical tokens that reach this probability are kept, more than 0, at most 1.
            epsilon_cutoff: tokens of this probability are kept, 0 .. 1.
            eta_cutoff: as epsilon_cutoff, lower where the distribution is flat.
            xtc_probability: of cutting off the top choices; with xtc_threshold (0.1).
            greedy: take the most likely token that is left.

        Raises:
            SamplerError: a setting is unknown or out of range.
        """
        check_settings({"temperature": temperature, "top_k": top_k, "top_p": top_p, **settings})
        bound = None if top_k is None else int(np.max(top_k))
        return cls(
            temperature=jnp.asarray(temperature, jnp.float32),
            top_k=None if top_k is None else jnp.asarray(np.minimum(top_k, np.iinfo(np.int32).max), jnp.int32),
            top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
            more=prepare_settings(settings),
            candidates=None if bound is None else next((b for b in _CANDIDATE_BUCKETS if b >= bound), None),
            greedy=greedy,
        )

    @property
    def needs_key(self) -> bool:
        """Whether it draws."""
        return not self.greedy

    @property
    def needs_history(self) -> bool:
        """Whether it must see the tokens so far."""
        return any(SETTINGS[name].needs_history for name in self.more)

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplerError for a setting that names an id outside the vocabulary; host only."""
        for name in ("logit_bias", "bad_words", "forced_tokens", "dry_breakers"):
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
        return self._choose(self.penalised(logits, history, eos_ids), keys), None

    def penalised(self, logits: jax.Array, history: History | None, eos_ids: jax.Array) -> jax.Array:
        """Logits [B, V] after the transforms that come before the temperature."""
        self._check_rows(logits.shape[0])
        if "logit_bias" in self.more:
            logits = penalties.apply_logit_bias(logits, *self.more["logit_bias"])
        if not self.needs_history:
            return logits
        if history is None:
            raise SamplerError(f"history: expected one for {', '.join(self.more)}, got None")
        for name, apply in _PENALTIES.items():
            if name in self.more:
                logits = apply(logits, history, self.more)
        if "min_new_tokens" in self.more:
            logits = penalties.apply_min_new_tokens(logits, history, eos_ids, self.more["min_new_tokens"])
        if "forced_tokens" in self.more:
            logits = penalties.apply_forced_tokens(logits, history, self.more["forced_tokens"])
        return logits

    @property
    def is_plain(self) -> bool:
        """Whether `filtered` says with what probability each token is drawn, whatever came before."""
        return not self.greedy and not self.more.keys() - _TRUNCATIONS.keys() - {"top_n_sigma"}

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] whose softmax is what tokens are drawn from: minus infinity where a token never is."""
        if not self.is_plain:
            raise SamplerError(f"sampler: expected one that goes by the logits alone, got settings {list(self.more)}")
        rows = jnp.arange(logits.shape[0])[:, None]

        def spread(values: jax.Array, ids: jax.Array | None) -> jax.Array:
            return values if ids is None else jnp.full_like(logits, MASKED).at[rows, ids].set(values)

        return self._truncated(logits, spread)

    def _choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        def choose(values: jax.Array, ids: jax.Array | None) -> jax.Array:
            if "xtc_probability" in self.more:
                coins = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
                more = self.more
                values = truncation.apply_xtc(values, coins, more["xtc_probability"], more["xtc_threshold"])
            choice = jnp.argmax(values, axis=-1).astype(jnp.int32) if self.greedy else draw(values, keys)
            return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]

        return self._truncated(logits, choose)

    def _truncated(self, logits: jax.Array, finish: Callable[[jax.Array, jax.Array | None], jax.Array]) -> jax.Array:
        """What `finish` makes of what is left of the logits [B, V].

        That is either all of them in order of ids, or the largest [B, C], sorted, with their ids.
        """
        self._check_rows(logits.shape[0])
        values = truncation.apply_temperature(logits, self.temperature)
        if "top_n_sigma" in self.more:
            values = truncation.apply_top_n_sigma(values, self.more["top_n_sigma"])
        if self.top_k is None and self.top_p is None:
            return finish(self._truncate_more(values), None)
        if self.top_p is not None and self.top_k is None:
            return self._nucleus(values, self.top_p, finish)
        largest, ids = jax.lax.top_k(values, min(self.candidates or values.shape[-1], values.shape[-1]))
        kept = truncation.keep_sorted(largest, self.top_k, self.top_p)
        return finish(self._truncate_more(jnp.where(kept, largest, MASKED)), ids)

    def _nucleus(
        self, values: jax.Array, top_p: jax.Array, finish: Callable[[jax.Array, jax.Array | None], jax.Array]
    ) -> jax.Array:
        """Top-p alone: more of the logits [B, V] are sorted only if fewer do not reach it in some row."""
        total = jax.nn.logsumexp(values, axis=-1, keepdims=True)

        def attempt(size: int, *larger: int) -> jax.Array:
            largest, ids = jax.lax.top_k(values, size)

            def finish_sorted() -> jax.Array:
                kept = truncation.keep_sorted(largest, None, top_p, total)
                return finish(self._truncate_more(jnp.where(kept, largest, MASKED)), ids)

            if not larger:
                return finish_sorted()
            reached = jnp.sum(jnp.exp(largest - total), axis=-1, keepdims=True) >= per_row(top_p)
            enough = jnp.all(reached & (per_row(top_p) < 1))
            return jax.lax.cond(enough, finish_sorted, lambda: attempt(*larger))

        return attempt(*truncation.sizes_to_sort(values.shape[-1]))

    def _truncate_more(self, values: jax.Array) -> jax.Array:
        for name, apply in _TRUNCATIONS.items():
            if name in self.more:
                values = apply(values, self.more[name])
        return values

    def _check_rows(self, batch: int) -> None:
        first = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        for name, setting in {**first, **self.more}.items():
            if setting is not None and rows_of(setting) not in (1, batch):
                raise SamplerError(f"{name}: expected one value or {batch}, one per row, got {rows_of(setting)}")


_TRUNCATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "min_p": truncation.apply_min_p,
    "typical_p": truncation.apply_typical_p,
    "epsilon_cutoff": truncation.apply_epsilon_cutoff,
    "eta_cutoff": truncation.apply_eta_cutoff,
}
_PENALTIES: dict[str, Callable[[jax.Array, History, Mapping[str, Any]], jax.Array]] = {
    "repetition_penalty": lambda x, past, of: penalties.apply_repetition_penalty(x, past, of["repetition_penalty"]),
    "frequency_penalty": lambda x, past, of: penalties.apply_frequency_penalty(x, past, of["frequency_penalty"]),
    "presence_penalty": lambda x, past, of: penalties.apply_presence_penalty(x, past, of["presence_penalty"]),
    "dry_multiplier": lambda x, past, of: penalties.apply_dry(
        x, past, of["dry_multiplier"], of["dry_base"], of["dry_allowed_length"], of["dry_breakers"]
    ),
    "no_repeat_ngram_size": lambda x, past, of: penalties.apply_no_repeat_ngram(x, past, of["no_repeat_ngram_size"]),
    "bad_words": lambda x, past, of: penalties.apply_bad_words(x, past, *of["bad_words"]),
}


def make_sampler(temperature: float = 1.0, **settings: Any) -> Any:
    """The sampler for settings of `Sampling.create`; temperature 0 takes the most likely token that they leave.

    With `mirostat_tau` (and `mirostat_eta`, 0.1) it is a `Mirostat`, which combines with a temperature only.

    Raises:
        SamplerError: a setting is unknown or out of range, be it used or not.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "mirostat_tau" in given:
        tau, eta = given.pop("mirostat_tau"), given.pop("mirostat_eta", 0.1)
        if given or temperature == 0:
            raise SamplerError(f"mirostat_tau: expected a temperature above 0 and no other setting, got {given}")
        return Mirostat.create(tau, eta, temperature)
    if temperature == 0:
        sampler = Sampling.create(greedy=True, **given)
        return sampler if sampler.more else Greedy()
    return Sampling.create(temperature, **given)


def breakers_of(pieces: Sequence[str], marks: Sequence[str] = ("\n", ":", '"', "*")) -> list[int]:
    """The ids whose text, pieces[id], holds one of the marks: what DRY does not look past by custom of llama.cpp."""
    return [number for number, piece in enumerate(pieces) if any(mark in piece for mark in marks)]
