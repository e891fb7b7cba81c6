"""How fast a model runs here: seconds of a prefill and of a decode step, measured on random tokens."""

import dataclasses
import statistics

import jax
import numpy as np

from llorch_jax.cache.layouts import fit_cache
from llorch_jax.cache.placement import new_cache
from llorch_jax.decoding.loop import generate_from
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.steps import start
from llorch_jax.errors import CapacityError, OptionError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.timing import Stopwatch
from llorch_jax.tracing import whole


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measurements, one per repeat, without compiling.

    Attributes:
        batch: number of rows B.
        prompt_tokens: number of tokens of each row in the prefill.
        new_tokens: number of generated tokens of each row, including the one from the prefill.
        compile: seconds of tracing and compiling, or of reading compiled programs, before the first repeat.
        prefill: seconds from a prepared request to the first token of every row.
        step: seconds per decode step, in which every row gets one token: the time of the compiled loop over its steps.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    compile: float
    prefill: tuple[float, ...]
    step: tuple[float, ...]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows per second, by the median."""
        return self.batch * self.prompt_tokens / statistics.median(self.prefill)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens of all rows per second, by the median."""
        return self.batch / statistics.median(self.step)


def measure_speed(
    model: Model,
    *,
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 5,
    cache: str = "static",
    codec: str | None = None,
    residual: int | None = None,
) -> Speed:
    """Prefills random tokens and decodes greedily, as `generate` does, several times after one that compiles.

    Args:
        model: from `load`.
        batch: rows B, 1 or more.
        prompt_tokens: of each row, 1 or more.
        new_tokens: of each row, 2 or more.
        repeats: measurements, 1 or more.
        cache: layout of the KV cache, with `codec` and `residual` as in `make_cache`.

    Raises:
        OptionError: a number is out of range.
        CapacityError: the tokens do not fit the context.
        CacheError: the cache is unknown.
    """
    for name, value, least in (("batch", batch, 1), ("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2)):
        whole(name, value, OptionError, least=least, most=2**30)
    whole("repeats", repeats, OptionError)
    config, mesh = model.config, model.params.mesh
    total = prompt_tokens + new_tokens - 1
    if total > config.n_positions:
        raise CapacityError(f"tokens: expected at most n_positions={config.n_positions} per row, got {total}")
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, prompt_tokens), dtype=np.int32)
    watch = Stopwatch()
    prefill: list[float] = []
    step: list[float] = []
    for _ in range(repeats + 1):
        empty = new_cache(mesh, fit_cache, config, cache, batch, total, codec=codec, residual=residual)
        request = prepare(config, ids, new_tokens, empty, eos_id=None, mesh=mesh)
        watch.lap()
        state = jax.block_until_ready(start(model.params, config, request))
        prefill.append(watch.lap())
        jax.block_until_ready(generate_from(model.params, config, request, state))
        step.append(watch.lap() / (new_tokens - 1))
    return Speed(batch, prompt_tokens, new_tokens, watch.compile, tuple(prefill[1:]), tuple(step[1:]))
