"""The options of text generation: one set for all methods, checked once, before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.layouts import fit_cache
from llorch_jax.cache.placement import new_cache
from llorch_jax.checks import check_cache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.beam import check_beams, check_power
from llorch_jax.decoding.branching import check_real, count_ids
from llorch_jax.decoding.overflow import Reencode, check_overflow
from llorch_jax.errors import CacheError, CapacityError, OptionError, SearchError, TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import Sampler, check_sampler, make_sampler
from llorch_jax.sampling.masking import Masked
from llorch_jax.sampling.settings import SETTINGS
from llorch_jax.text.constrained.constraint import Constraints, take_constraint
from llorch_jax.text.names import nearest
from llorch_jax.text.stopping import check_stops
from llorch_jax.text.vocabulary import breaker_ids, known_ids, tokenizer_of
from llorch_jax.tracing import is_whole, whole

CANDIDATES = 4  # default top_k of a contrastive search
_MOST_TOKENS = 2**30  # so that the sum of two of them still is an int32 position

Method = Literal[
    "sampling",
    "constrained generation",
    "generate_n",
    "speculative decoding",
    "beam search",
    "contrastive search",
    "chat",
    "the engine",
]

SAMPLING = ("top_k", "top_p", *SETTINGS, "mirostat_tau", "mirostat_eta")
_CONSTRAINTS = ("constraint", "regex", "json_schema", "grammar", "choices")
_BEAMS = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
_DRAWING = ("temperature", "top_k", "sampling settings", "mirostat", "sampler")
_ALWAYS = ("max_new_tokens", "seed", "cache layout", "codec", "residual", "stop_ids")

_SAMPLED = (*_ALWAYS, *_DRAWING, "max_new_tokens per prompt", "seed per prompt")

# What each method takes; docs/options.md shows this table.
TAKES: dict[Method, tuple[str, ...]] = {
    "sampling": (*_SAMPLED, "cache object", "overflow", "stop", "top_logprobs"),
    "constrained generation": (*_SAMPLED, "cache object", "overflow", "top_logprobs", "constraint"),
    "generate_n": (*_SAMPLED, "overflow", "stop", "top_logprobs"),
    "speculative decoding": (*_SAMPLED, "cache object", "stop"),
    "beam search": (*_ALWAYS, *_BEAMS, "seed per prompt"),
    "contrastive search": (*_ALWAYS, "top_k", "penalty_alpha", "stop", "seed per prompt"),
    "chat": (*_ALWAYS, *_DRAWING, "overflow", "stop"),
    "the engine": (
        "max_new_tokens",
        "seed",
        "stop_ids",
        "temperature",
        "top_k",
        "sampling settings",
        "stop",
        "top_logprobs",
        "constraint",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of text generation; make them with `GenerationOptions.create`, which checks everything.

    `generate`, `stream`, `astream`, `generate_n`, `generate_speculative`, `Chat`, files of prompts and the command line
    take these names with these defaults. What a method cannot do is refused by name; see docs/options.md.

    Attributes:
        max_new_tokens: maximum number of new tokens of each prompt; one number, or one per prompt.
        temperature: 0 takes the most likely token; above 0, tokens are drawn.
        sampling: the other settings of `Sampling.create` by name, such as top_k, top_p and repetition_penalty, or
            mirostat_tau and mirostat_eta. At this level dry_breakers may hold texts as well as ids; without them
            repetitions end at tokens with a newline, a colon, a quotation mark or an asterisk, as in llama.cpp.
        sampler: a custom sampler in place of temperature and sampling settings.
        seed: of the draws: the same seed gives the same text. One per prompt gives each prompt the text that it would
            get alone. Only the lowest 32 bits count.
        cache: layout of the KV cache, such as static, dynamic, rotating:WINDOW[+SINKS], paged, int8 or h2o:BUDGET. Or a
            `KVCache` with one row per prompt, whose tokens the prompts follow; it is donated.
        codec: how the layout stores keys and values: float32, bfloat16, float16, int8 or int4; None as the layout's
            name says, or float32.
        residual: number of newest tokens that a lossy codec also keeps in float32; None means 32 with int8 and int4,
            and 0 with others.
        overflow: "error" refuses texts that would outgrow the context; "reencode", or a `Reencode`, continues with the
            first and newest tokens.
        stop: texts before which the new text ends.
        stop_ids: ids that end a text, in addition to the model's own.
        top_logprobs: number of most likely tokens to report at every step.
        constraint: what the new text must match: a `Constraint`, or a list with one or None for each prompt. The
            settings regex, json_schema, grammar and choices make one.
        num_beams: number of beams of a beam search; None, or 1 as in transformers, for none.
        num_beam_groups: groups of a diverse beam search.
        diversity_penalty: in a diverse beam search, the cost in nats of a token that an earlier group has chosen.
        length_penalty: power of the length that a finished beam's score is divided by.
        early_stopping: when a beam search ends: True, False or "never"; see `beam_search`.
        penalty_alpha: weight of the similarity penalty in a contrastive search, 0 .. 1, with `top_k` candidates (4);
            None for none.
    """

    max_new_tokens: int | tuple[int, ...] = 64
    temperature: Any = 0.0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampler: Sampler | None = None
    seed: int | tuple[int, ...] = 0
    cache: str | type[KVCache] | KVCache = "static"
    codec: str | None = None
    residual: int | None = None
    overflow: str | Reencode = "error"
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    constraint: Constraints | None = None
    num_beams: int | None = None
    num_beam_groups: int = 1
    diversity_penalty: float = 0.5
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    penalty_alpha: float | None = None

    @classmethod
    def create(cls, **given: Any) -> "GenerationOptions":
        """Options from settings by name. None is the same as leaving out an option that has no other default.

        Raises:
            OptionError: a name is unknown (the message names the nearest known one), or a value is invalid.
            SamplerError, ConstraintError, CapacityError: a setting of the sampler, the constraint, max_new_tokens or
                overflow is invalid.
        """
        for name in given:
            if name not in KNOWN:
                raise OptionError(f"{name}: got an unknown option; {nearest(name, KNOWN)}")
        given = {name: value for name, value in given.items() if value is not None or name in _NEVER_NONE}
        if is_whole(given.get("num_beams")) and given["num_beams"] == 1:
            del given["num_beams"]
        constraint = take_constraint(given)
        sampling = {name: given.pop(name) for name in SAMPLING if name in given}
        if "stop" in given:
            given["stop"] = check_stops(given["stop"])
        if "stop_ids" in given:
            given["stop_ids"] = _whole_numbers("stop_ids", given["stop_ids"])
        for name in ("seed", "max_new_tokens"):
            if isinstance(given.get(name), Sequence | np.ndarray) and not isinstance(given[name], str):
                given[name] = _whole_numbers(name, given[name])
        options = cls(sampling=sampling, constraint=constraint, **given)
        options._check()
        return options

    @property
    def method(self) -> Method:
        """How one text per prompt is generated with these options."""
        if self.num_beams is not None:
            return "beam search"
        if self.penalty_alpha is not None:
            return "contrastive search"
        return "sampling" if self.constraint is None else "constrained generation"

    def limits(self, prompts: int) -> list[int]:
        """The maximum number of new tokens for each prompt, given the number of prompts.

        Raises:
            OptionError: there are several numbers, but not one per prompt.
        """
        if isinstance(self.max_new_tokens, tuple):
            return per_prompt("max_new_tokens", self.max_new_tokens, prompts)
        return [self.max_new_tokens] * prompts

    def check_method(self, method: Method) -> None:
        """Raises OptionError for the first given option that a method does not take."""
        for name, value in self._given().items():
            kind = name
            if name in SAMPLING and name != "top_k":
                kind = "mirostat" if name.startswith("mirostat") else "sampling settings"
            if name in ("max_new_tokens", "seed") and isinstance(value, tuple):
                kind = f"{name} per prompt"
            if kind not in TAKES[method]:
                shown = "cache" if name in ("cache object", "cache layout") else name
                if kind.endswith(" per prompt"):
                    raise OptionError(f"{shown}: expected one number with {method}, got {_brief(value)}")
                raise OptionError(f"{shown}: expected none with {method}, which cannot use it, got {_brief(value)}")

    def check_model(self, model: Model) -> None:
        """Raises LlorchError for an option that does not fit a model; nothing is allocated."""
        config = model.config
        if self.top_logprobs > config.vocab_size:
            raise OptionError(f"top_logprobs: expected 0 .. vocab_size={config.vocab_size}, got {self.top_logprobs}")
        if self.method in ("beam search", "contrastive search"):
            ids = count_ids(config, known_ids(tokenizer_of(model), config.vocab_size))
            if self.num_beams is not None:
                whole("num_beams", self.num_beams, SearchError, most=self.num_beam_groups * ids)
            else:
                whole("top_k", self.sampling.get("top_k", CANDIDATES), SearchError, most=ids)
        for id in self.stop_ids:
            if not 0 <= id < config.vocab_size:
                raise TokenError(f"stop_ids: expected ids in 0 .. {config.vocab_size - 1}, got {id}")
        if isinstance(self.cache, KVCache):
            check_cache(config, self.cache)

    def _check(self) -> None:
        for limit in self.max_new_tokens if isinstance(self.max_new_tokens, tuple) else (self.max_new_tokens,):
            whole("max_new_tokens", limit, CapacityError, most=_MOST_TOKENS)
        whole("top_logprobs", self.top_logprobs, OptionError, least=0)
        check_overflow(self.overflow)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if not is_whole(seed):
                raise OptionError(f"seed: expected a whole number, got {_brief(seed)}")
        if not isinstance(self.cache, str | KVCache) and not (
            isinstance(self.cache, type) and issubclass(self.cache, KVCache)
        ):
            raise CacheError(f"cache: expected the name of a layout or a KVCache, got a {type(self.cache).__name__}")
        if isinstance(self.cache, KVCache) and not (self.codec is None and self.residual is None):
            raise CacheError("codec and residual: expected none with a cache object, which has its own")
        self._check_search()
        if self.sampler is None:
            breakers = self.sampling.get("dry_breakers")
            make_sampler(self.temperature, **{**self.sampling, "dry_breakers": [] if _is_texts(breakers) else breakers})
        else:
            self._check_sampler()

    def fitted_cache(self, config: GPT2Config, rows: int, tokens: int, mesh: Mesh | None = None) -> KVCache:
        """The cache object, or a new cache for `rows` rows of `tokens` tokens, on the mesh of the parameters.

        Raises:
            CacheError: the layout or the codec is invalid.
        """
        if isinstance(self.cache, KVCache):
            return self.cache
        settings = {"codec": self.codec, "residual": self.residual}
        return new_cache(mesh, fit_cache, config, self.cache, rows, tokens, **settings)

    def sampling_for(self, model: Model) -> dict[str, Any]:
        """The sampling settings, with the ids of a model's tokens at which repetitions end."""
        sampling = {**self.sampling}
        breakers = sampling.get("dry_breakers")
        if "dry_multiplier" in sampling and breakers is None:
            sampling["dry_breakers"] = breaker_ids(tokenizer_of(model))
        elif _is_texts(breakers):
            sampling["dry_breakers"] = breaker_ids(tokenizer_of(model), sampling["dry_breakers"])
        return sampling

    def sampler_for(self, model: Model) -> Sampler:
        """The sampler that these options describe, limited to ids that the model's tokenizer has."""
        sampler: Any = self.sampler
        if sampler is None:
            sampler = make_sampler(self.temperature, **self.sampling_for(model))
        mask = known_ids(tokenizer_of(model), model.config.vocab_size)
        return sampler if mask is None else Masked(sampler, mask, insists=False)

    def _check_search(self) -> None:
        if self.num_beams is not None:
            check_beams(
                self.num_beams,
                1,
                self.num_beam_groups,
                self.length_penalty,
                self.diversity_penalty,
                self.early_stopping,
            )
            for limit in self.max_new_tokens if isinstance(self.max_new_tokens, tuple) else (self.max_new_tokens,):
                check_power(self.length_penalty, limit)
        if self.penalty_alpha is not None:
            check_real("penalty_alpha", self.penalty_alpha, least=0.0, most=1.0)
            whole("top_k", self.sampling.get("top_k", CANDIDATES), SearchError)

    def _check_sampler(self) -> None:
        check_sampler(self.sampler)
        own = [*self.sampling, *(["temperature"] if self.temperature != 0 else [])]
        if own:
            raise OptionError(f"sampler: expected no {own[0]} with it, as it says itself how tokens are drawn")

    def _given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by the names of `TAKES`."""
        given = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, KVCache):
                given["cache object"] = value
            elif field.name == "sampling":
                given |= value
            elif value is not field.default and not np.array_equal(value, field.default):  # type: ignore[arg-type]
                given["cache layout" if field.name == "cache" else field.name] = value
        return given


KNOWN = (
    *(field.name for field in dataclasses.fields(GenerationOptions) if field.name != "sampling"),
    *SAMPLING,
    *(name for name in _CONSTRAINTS if name != "constraint"),
)


_NEVER_NONE = {
    field.name
    for field in dataclasses.fields(GenerationOptions)
    if field.default is not None and field.default != () and field.name != "sampling"
}


def _brief(value: Any) -> str:
    """A value for a message: at most a line, and never an array."""
    plain = value is None or isinstance(value, str | int | float | list | tuple)
    return repr(value)[:60] if plain else f"a {type(value).__name__}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(each, str) and each for each in value)


def per_prompt(name: str, values: Sequence[int], prompts: int) -> list[int]:
    """The values of an option that is given for each prompt.

    Raises:
        OptionError: their number differs from that of the prompts.
    """
    if len(values) != prompts:
        raise OptionError(f"{name}: expected one, or {prompts}, one per prompt, got {len(values)}")
    return list(values)


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise OptionError(f"{name}: expected a list of whole numbers, got {values!r:.80}")
    for value in values:
        if not is_whole(value):
            raise OptionError(f"{name}: expected whole numbers, got {value!r:.80}")
    return tuple(int(value) for value in values)
