"""The command line: llorch-jax generate, chat, score, inspect, validate, convert. No logic, only words in and out."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llorch_jax.cache.layouts import SYNTAX
from llorch_jax.cache.planning import plan_memory
from llorch_jax.cli import chat as chat_terminal
from llorch_jax.cli.terminal import bar, enable_compilation_cache, messages, show_bytes, show_timings, waiting
from llorch_jax.errors import ConstraintError, DraftError, LlorchError, TokenError
from llorch_jax.evaluation.perplexity import score
from llorch_jax.evaluation.validation import Verdict, compare, intermediates, load_reference
from llorch_jax.loading.checkpoint import Model, convert, load, load_config, locate
from llorch_jax.params import count_params, nbytes, param_shapes
from llorch_jax.sampling import breakers_of
from llorch_jax.text.batch_file import generate_file
from llorch_jax.text.generation import generate, stream
from llorch_jax.text.results import Generation, tokenizer_of
from llorch_jax.text.speculative import generate_speculative
from llorch_jax.text.timing import Timings

app = typer.Typer(
    help="GPT-2 inference in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="demo, a directory in Hugging Face's layout, or a hub id.")
]
CacheOption = Annotated[str, typer.Option(help=f"Layout of the KV cache: {SYNTAX}.")]
ModelArgument = Annotated[str, typer.Argument(help="demo, a directory in Hugging Face's layout, or a hub id.")]


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 bad input or a failed validation, 2 wrong usage, 130 interrupted."""
    enable_compilation_cache()
    try:
        app()
    except LlorchError as error:
        messages.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    finally:
        _flush()


@app.command(name="generate")
def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - reads it from standard input.")] = None,
    model: ModelOption = "demo",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that reach this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw from tokens so near to the most likely one.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Draw from the most typical tokens.")] = None,
    top_n_sigma: Annotated[float | None, typer.Option(help="Draw from logits so near to the largest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens that occurred are rarer.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Per time that a token was generated.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Of tokens that were generated.")] = None,
    dry_multiplier: Annotated[float | None, typer.Option(help="Of the DRY penalty on repeated sequences.")] = None,
    dry_base: Annotated[float | None, typer.Option(help="DRY: by which it grows with the sequence (1.75).")] = None,
    dry_allowed_length: Annotated[int | None, typer.Option(help="DRY: up to here it costs nothing (2).")] = None,
    dry_breaker: Annotated[
        list[str] | None, typer.Option(help="DRY: no sequence extends over tokens with this text; may be repeated.")
    ] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No so many tokens occur twice in a row.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="The text does not end before.")] = None,
    xtc_probability: Annotated[float | None, typer.Option(help="Of excluding the top choices.")] = None,
    xtc_threshold: Annotated[float | None, typer.Option(help="XTC: how likely a top choice is at least (0.1).")] = None,
    mirostat_tau: Annotated[float | None, typer.Option(help="Keep the surprise near so many bits per token.")] = None,
    mirostat_eta: Annotated[float | None, typer.Option(help="Mirostat: how fast it learns (0.1).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    regex: Annotated[str | None, typer.Option(help="The new text matches this regular expression.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="The new text is JSON by this schema, a file or the schema itself.")
    ] = None,
    grammar: Annotated[
        str | None, typer.Option(help="The new text follows this grammar (Lark or GBNF), a file or the grammar itself.")
    ] = None,
    top_logprobs: Annotated[int, typer.Option(help="With --json: so many alternatives per token.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    cache: CacheOption = "static",
    overflow: Annotated[
        str, typer.Option(help="error, or reencode: go past the context with the first and newest tokens.")
    ] = "error",
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print each piece when it is there.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Print where the time went, on standard error.")] = False,
    speculative: Annotated[
        str | None, typer.Option(help="lookup: guess repetitions of the text and check several tokens at once.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller model that guesses tokens; see --model.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='Prompts from JSON lines, {"prompt": ...}; goes with --out.')
    ] = None,
    target: Annotated[Path | None, typer.Option("--out", help="Where results go; goes on where it stopped.")] = None,
    batch_size: Annotated[int, typer.Option(help="With --file: so many prompts at once.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="With --file: start --out anew.")] = False,
) -> None:
    """Continue a text, or the prompts of a file."""
    if (prompt is None) == (file is None) or (file is None) != (target is None):
        raise typer.BadParameter("expected a prompt, or --file and --out")
    text = "" if prompt is None else _text(prompt)
    loaded, load_seconds = _load(model)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings |= {"typical_p": typical_p, "top_n_sigma": top_n_sigma, "repetition_penalty": repetition_penalty}
    settings |= {"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty}
    settings |= {"dry_multiplier": dry_multiplier, "no_repeat_ngram_size": no_repeat_ngram_size}
    settings |= {"dry_base": dry_base, "dry_allowed_length": dry_allowed_length}
    settings |= {"dry_breakers": _breakers(loaded, dry_breaker) if dry_breaker else None}
    settings |= {"min_new_tokens": min_new_tokens, "xtc_probability": xtc_probability, "xtc_threshold": xtc_threshold}
    settings |= {"mirostat_tau": mirostat_tau, "mirostat_eta": mirostat_eta}
    settings |= {"stop": stop, "top_logprobs": top_logprobs, "seed": seed, "cache": cache, "overflow": overflow}
    settings |= {"regex": regex, "json_schema": _content(json_schema), "grammar": _content(grammar)}
    if file is not None and target is not None:
        if speculative or draft:
            raise DraftError("--file: expected neither --speculative nor --draft with it")
        _generate_file(loaded, file, target, batch_size, overwrite, {**settings, "max_new_tokens": max_new_tokens})
        return
    if speculative or draft:
        spent = _speculate(loaded, text, max_new_tokens, settings, speculative, draft, as_json)
    elif stream and not as_json:
        spent = _stream_to_stdout(loaded, text, max_new_tokens, settings)
    else:
        with waiting("compiling and generating"):
            out = generate(loaded, text, max_new_tokens, **settings)
        print(_as_json(text, out) if as_json else text + out.text)
        spent = out.timings
    if timings:
        show_timings(load_seconds, spent)


app.command(name="chat")(chat_terminal.start(load))


@app.command(name="score")
def score_command(
    text: Annotated[str, typer.Argument(help="The text; - reads it from standard input.")],
    model: ModelOption = "demo",
    stride: Annotated[int | None, typer.Option(help="How far windows over a long text move on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every token.")] = False,
) -> None:
    """How likely a model finds a text: perplexity and bits per byte."""
    given = _text(text)
    loaded, _ = _load(model)
    with waiting("compiling and scoring"):
        result = score(loaded, given, stride=stride)
    summary = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte, "logprob": result.total}
    if as_json:
        print(json.dumps({**summary, **dataclasses.asdict(result)}))
    else:
        print(*(f"{name} {value:.4f}" for name, value in summary.items()), sep="\n")


@app.command(name="inspect")
def inspect_command(model: ModelArgument = "demo", cache: CacheOption = "static") -> None:
    """Show a model's configuration and the bytes of its parameters and cache, without loading the weights."""
    _, directory = locate(model)
    config = load_config(directory)
    table = Table("setting", "value", title=escape(model))
    for field in dataclasses.fields(config):
        table.add_row(field.name, str(getattr(config, field.name)))
    Console().print(table)
    shapes = param_shapes(config)
    print(f"parameters: {count_params(shapes):,}; {show_bytes(nbytes(shapes))} in float32")
    plan = plan_memory(config, cache)
    print(f"{cache} cache: {show_bytes(plan.total)} per sequence of up to {config.n_positions} tokens")
    if plan.full != plan.total:
        print(f"  and {show_bytes(plan.full)} once it has grown to that length")
    print(f"  {show_bytes(plan.per_token)} per token in {config.cache_layers} layers")


@app.command(name="validate")
def validate_command(
    model: ModelArgument,
    reference: Annotated[Path, typer.Option("--reference", "-r", help=".npz file of reference arrays.")],
) -> None:
    """Compare a model with reference arrays at twelve points; exits with 1 where one differs."""
    arrays, temperature = load_reference(reference)
    loaded, _ = _load(model)
    greedy = arrays.get("12_greedy")
    new_tokens = greedy.shape[-1] if greedy is not None and greedy.size and greedy.ndim else 1
    with waiting("compiling and running"):
        captured = intermediates(
            loaded.params, loaded.config, arrays["tokens"], temperature=temperature, new_tokens=new_tokens
        )
    verdicts = compare(captured, arrays)
    Console().print(_verdict_table(verdicts))
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@app.command(name="convert")
def convert_command(
    model: ModelArgument,
    directory: Annotated[Path, typer.Argument(help="Where to write config.json, model.safetensors, tokenizer.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Write a model as a directory in Hugging Face's layout."""
    with waiting("converting"):
        convert(model, directory, dtype=dtype)
    print(f"wrote {directory}")


def _flush() -> None:
    """Writes out what `print` has kept back. Who reads may have gone, as `head` does: no reason for a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at exit


def _text(argument: str) -> str:
    """The argument, or what standard input holds where it is a dash."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise TokenError(f"standard input: expected {error.encoding} text ({error.reason})") from None


def _breakers(model: Model, marks: list[str]) -> list[int]:
    """The ids of tokens that hold one of the marks."""
    tokenizer = tokenizer_of(model)
    return breakers_of([tokenizer.decode([token]) for token in range(tokenizer.vocab_size)], marks)


def _content(argument: str | None) -> str | None:
    """What a file holds where the argument is the path of one, else the argument."""
    if argument is None or not os.path.isfile(argument):
        return argument
    try:
        return Path(argument).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConstraintError(f"{argument}: expected a readable file in UTF-8 ({error})") from None


def _load(source: str) -> tuple[Model, float]:
    """The model, and how many seconds loading took."""
    start = time.perf_counter()
    with waiting(f"loading {source}") as progress:
        model = load(source, progress=progress)
    return model, time.perf_counter() - start


def _stream_to_stdout(model: Model, prompt: str, max_new_tokens: int, settings: dict[str, Any]) -> Timings:
    pieces = stream(model, prompt, max_new_tokens, **settings)
    with waiting("compiling"):
        piece = next(pieces)
    print(prompt, piece.text, sep="", end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()
    return piece.timings


def _generate_file(
    model: Model, file: Path, target: Path, batch_size: int, overwrite: bool, settings: dict[str, Any]
) -> None:
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    with bar("prompts") as progress:
        count = generate_file(
            model, file, target, batch_size=batch_size, overwrite=overwrite, progress=progress, **given
        )
    messages.print(f"continued {count} prompts; all results are in {target}", markup=False)


def _speculate(
    model: Model,
    prompt: str,
    max_new_tokens: int,
    settings: dict[str, Any],
    speculative: str | None,
    draft: str | None,
    as_json: bool,
) -> Timings:
    """Prints the text at once, and on standard error what the guesses were good for."""
    if settings.pop("overflow") != "error":
        raise DraftError("--overflow: expected error with --speculative or --draft, which do not re-encode")
    known = ("temperature", "top_k", "top_p", "seed", "cache")
    for name in settings.keys() - known:
        if settings[name]:
            raise DraftError(f"{name}: expected only {', '.join(known)} with --speculative or --draft")
    settings = {name: settings[name] for name in known}
    if speculative and draft:
        raise DraftError("--speculative, --draft: expected one of them, got both")
    guesses: Any = _load(draft)[0] if draft else speculative
    with waiting("compiling and generating"):
        out, stats = generate_speculative(model, prompt, max_new_tokens, draft=guesses, **settings)
    print(_as_json(prompt, out) if as_json else prompt + out.text)
    messages.print(
        f"guesses: {stats.acceptance_rate:.0%} of {stats.proposed.sum()} accepted, {stats.tokens_per_step:.2f} tokens "
        f"per step over {stats.steps} steps"
    )
    return out.timings


def _as_json(prompt: str, out: Generation) -> str:
    fields = dataclasses.asdict(out)
    fields["timings"]["ms_per_token"] = out.timings.ms_per_token
    return json.dumps({"prompt": prompt, **fields}, ensure_ascii=False)


def _verdict_table(verdicts: list[Verdict]) -> Table:
    table = Table("point", "what", "largest error", "allowed", "verdict")
    for verdict in verdicts:
        point = verdict.point
        outcome = "pass" if verdict.passed else f"FAIL {verdict.note}".rstrip()
        table.add_row(str(point.number), point.what, f"{verdict.error:.2e}", f"{point.tolerance:.0e}", outcome)
    return table


if __name__ == "__main__":
    main()
