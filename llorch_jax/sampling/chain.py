"""The transforms that `Sampling` is made of, by the setting that turns each on, in the order of their application."""

from collections.abc import Callable

import jax

from llorch_jax.sampling import penalties, truncation

Penalty = Callable[..., jax.Array]  # of logits, history, settings by name, end-of-text ids int32 [B, E]
TRUNCATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "min_p": truncation.apply_min_p,
    "typical_p": truncation.apply_typical_p,
    "epsilon_cutoff": truncation.apply_epsilon_cutoff,
    "eta_cutoff": truncation.apply_eta_cutoff,
}
PENALTIES: dict[str, Penalty] = {
    "logit_bias": lambda x, past, of, ends: penalties.apply_logit_bias(x, *of["logit_bias"]),
    "repetition_penalty": lambda x, past, of, ends: penalties.apply_repetition_penalty(
        x, past, of["repetition_penalty"], of.get("repeat_last_n")
    ),
    "frequency_penalty": lambda x, past, of, ends: penalties.apply_frequency_penalty(
        x, past, of["frequency_penalty"], of.get("repeat_last_n")
    ),
    "presence_penalty": lambda x, past, of, ends: penalties.apply_presence_penalty(
        x, past, of["presence_penalty"], of.get("repeat_last_n")
    ),
    "dry_multiplier": lambda x, past, of, ends: penalties.apply_dry(
        x, past, of["dry_multiplier"], of["dry_base"], of["dry_allowed_length"], of["dry_breakers"]
    ),
    "no_repeat_ngram_size": lambda x, past, of, ends: penalties.apply_no_repeat_ngram(
        x, past, of["no_repeat_ngram_size"]
    ),
    "bad_words": lambda x, past, of, ends: penalties.apply_bad_words(x, past, *of["bad_words"]),
    "min_new_tokens": lambda x, past, of, ends: penalties.apply_min_new_tokens(x, past, ends, of["min_new_tokens"]),
    "forced_tokens": lambda x, past, of, ends: penalties.apply_forced_tokens(x, past, of["forced_tokens"]),
}
