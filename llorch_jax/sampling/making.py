"""Samplers by names of settings, as texts and the command line have them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llorch_jax.errors import SamplerError
from llorch_jax.sampling.base import Sampler
from llorch_jax.sampling.greedy import Greedy
from llorch_jax.sampling.mirostat import Mirostat
from llorch_jax.sampling.sampler import Sampling

BREAKERS = ("\n", ":", '"', "*")  # of DRY, llama.cpp's defaults


def make_sampler(temperature: Any = 1.0, **settings: Any) -> Sampler:
    """The sampler for settings of `Sampling.create`; temperature 0 takes the most likely token that they leave.

    With `mirostat_tau` (and `mirostat_eta`, 0.1) it is a `Mirostat`, which combines with a temperature only.

    Raises:
        SamplerError: a setting is unknown or out of range, whether or not it is used.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "mirostat_tau" in given:
        tau, eta = given.pop("mirostat_tau"), given.pop("mirostat_eta", 0.1)
        if given or np.any(np.asarray(temperature) == 0):
            named = ", ".join(given) or "temperature 0"
            raise SamplerError(f"mirostat_tau: expected a temperature above 0 and no other setting, got {named}")
        return Mirostat.create(tau, eta, temperature)
    if "mirostat_eta" in given:
        raise SamplerError("mirostat_eta: expected together with mirostat_tau, got it alone")
    sampler = Sampling.create(temperature, **given)
    return Greedy() if sampler.greedy and not sampler.more else sampler


def breakers_of(pieces: Sequence[str], marks: Sequence[str] = BREAKERS) -> list[int]:
    """The ids whose text, pieces[id], holds one of the marks: what DRY does not look past, as in llama.cpp."""
    return [number for number, piece in enumerate(pieces) if any(mark in piece for mark in marks)]
