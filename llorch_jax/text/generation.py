"""Text in, text out: generate and stream."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, overload

import jax

from llorch_jax.decoding.loop import generate_from
from llorch_jax.decoding.steps import start
from llorch_jax.decoding.streaming import Step, stream_steps
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.collecting import collect, pieces, steps_of
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import Batch, Prompt, make_batch, prompt_list
from llorch_jax.text.results import Generation, Piece
from llorch_jax.text.timing import Stopwatch


@overload
def generate(model: Model, prompt: str, max_new_tokens: int = ..., **options: Any) -> Generation: ...
@overload
def generate(model: Model, prompt: list[str], max_new_tokens: int = ..., **options: Any) -> list[Generation]: ...
def generate(
    model: Model, prompt: str | list[str], max_new_tokens: int = 64, **options: Any
) -> Generation | list[Generation]:
    """Continues a prompt, or a batch of prompts.

    Args:
        model: from `load`.
        prompt: a text, or several, which then run as one batch.
        max_new_tokens: maximum number of new tokens of each.
        options: temperature, seed, cache and all the others of `GenerationOptions`, by name. With num_beams it is a
            beam search, with penalty_alpha a contrastive search, and with one of regex, json_schema, grammar, choices
            and constraint the text matches that in full unless its finish_reason is "length".

    Returns:
        A `Generation`, or a list of them if `prompt` is a list.

    Raises:
        ModelError: the model has no tokenizer.
        OptionError: an option is unknown, invalid, or unsupported together with the others.
        TokenError: a prompt is empty or has characters that the tokenizer lacks.
        CapacityError: a prompt and its new tokens do not fit into the model's context.
        SamplerError, CacheError, SearchError: a setting of the sampler, the cache or the search is invalid.
        ConstraintError: a constraint is invalid, or llguidance (the extra `constrained`) is missing.
    """
    checked = GenerationOptions.create(max_new_tokens=max_new_tokens, **options)
    outputs = continue_texts(model, prompt_list(prompt), checked)
    return outputs[0] if isinstance(prompt, str) else outputs


def stream(model: Model, prompt: str, max_new_tokens: int = 64, **options: Any) -> Generator[Piece, None, None]:
    """Continues a prompt and yields pieces of text as they are generated; arguments and errors as `generate`.

    The text of all pieces, put together, is the text of `generate` with the same arguments. A search cannot be
    streamed, as it may still change its mind about every token.
    """
    (text,) = prompt_list([prompt])
    return stream_text(model, text, GenerationOptions.create(max_new_tokens=max_new_tokens, **options))


def continue_texts(model: Model, prompts: Sequence[Prompt], options: GenerationOptions) -> list[Generation]:
    """`generate` for checked options; a prompt may also be token ids."""
    if options.method in ("beam search", "contrastive search"):
        from llorch_jax.text.search import search_texts

        return search_texts(model, prompts, options)
    watch = Stopwatch()
    batch = make_batch(model, prompts, options, options.method)
    if options.constraint is not None or options.stop:
        return collect(_steps(model, batch, options), batch.rows, watch)
    state = jax.block_until_ready(start(model.params, model.config, batch.request))
    prefill_seconds = watch.lap()
    generated, _ = generate_from(model.params, model.config, batch.request, state)
    return collect(steps_of(generated, batch.eos_ids), batch.rows, watch, prefill_seconds)


def stream_text(model: Model, prompt: str, options: GenerationOptions) -> Generator[Piece, None, None]:
    """`stream` for checked options."""
    watch = Stopwatch()
    if options.method in ("beam search", "contrastive search"):
        options.check_method("sampling")
    batch = make_batch(model, [prompt], options, options.method)
    steps = _steps(model, batch, options)
    return pieces(steps, batch.rows[0], watch, prefill_seconds=watch.lap())


def _steps(model: Model, batch: Batch, options: GenerationOptions) -> Iterator[Step]:
    """The steps of a batch, each as soon as it is available."""
    if options.constraint is None:
        return stream_steps(model.params, model.config, batch.request)
    from llorch_jax.text.constrained.decoding import constrained_steps

    return constrained_steps(model, batch, options.constraint)
