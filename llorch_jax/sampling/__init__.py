"""From logits to token ids: samplers, and the transforms of logits that they are made of."""

from llorch_jax.sampling.base import History, KnowsProbabilities, Sampler, check_sampler
from llorch_jax.sampling.greedy import Greedy
from llorch_jax.sampling.ids import bias_of_json
from llorch_jax.sampling.making import breakers_of, make_sampler
from llorch_jax.sampling.mirostat import Mirostat
from llorch_jax.sampling.penalties import (
    apply_bad_words,
    apply_dry,
    apply_forced_tokens,
    apply_frequency_penalty,
    apply_logit_bias,
    apply_min_new_tokens,
    apply_no_repeat_ngram,
    apply_presence_penalty,
    apply_repetition_penalty,
)
from llorch_jax.sampling.sampler import Sampling
from llorch_jax.sampling.truncation import (
    apply_epsilon_cutoff,
    apply_eta_cutoff,
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_n_sigma,
    apply_top_p,
    apply_typical_p,
    apply_xtc,
    dynamic_temperature,
)

__all__ = [
    "Greedy",
    "History",
    "KnowsProbabilities",
    "Mirostat",
    "Sampler",
    "Sampling",
    "apply_bad_words",
    "apply_dry",
    "apply_epsilon_cutoff",
    "apply_eta_cutoff",
    "apply_forced_tokens",
    "apply_frequency_penalty",
    "apply_logit_bias",
    "apply_min_new_tokens",
    "apply_min_p",
    "apply_no_repeat_ngram",
    "apply_presence_penalty",
    "apply_repetition_penalty",
    "apply_temperature",
    "apply_top_k",
    "apply_top_n_sigma",
    "apply_top_p",
    "apply_typical_p",
    "apply_xtc",
    "bias_of_json",
    "breakers_of",
    "check_sampler",
    "dynamic_temperature",
    "make_sampler",
]
