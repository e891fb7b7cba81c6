"""The wording of the report: titles, explanations, settings, rows and further columns of each benchmark."""

import dataclasses
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

TIMES = "\N{MULTIPLICATION SIGN}"
READING = (
    "Each figure is the median of several rounds, with minimum and maximum in small print. A floor is the shortest "
    "time that the work can take on this machine: for a decode step, reading the weights and the live keys and values "
    "once at the memory bandwidth; for a prefill, its arithmetic at the speed of a large matrix product. Both limits "
    "are measured in the same rounds. A ratio is the measured figure divided by the floor, or by what the table names, "
    f"round by round: lower is better, and 1.00 {TIMES} means equally fast."
)
QUICK = "Quick run on a tiny model: it shows that every benchmark works. Its figures are meaningless."


@dataclasses.dataclass(frozen=True)
class Words:
    """The wording for one benchmark.

    Attributes:
        title: title of its section.
        about: one or two sentences about what is measured.
        row: the name of a row, from the row and the report's setting.
        columns: further columns, by header with unit.
    """

    title: str
    about: str
    row: Callable[[Row, Row], str] = lambda line, setting: str(line["name"])
    columns: tuple[Column, ...] = ()


def number(value: float) -> str:
    """A number with three significant digits, or with all digits of its whole part if that has more."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def plural(count: int, thing: str) -> str:
    """A count with its noun, such as 1 row or 8 rows."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def case_words(case: str) -> str:
    """A case of a comparison, such as "8 rows of 64 tokens" for 8x64+16."""
    rows, _, rest = case.partition("x")
    return f"{plural(int(rows), 'row')} of {rest.partition('+')[0]} tokens"


def _field(name: str) -> Callable[[Row], str]:
    return lambda line: number(line[name])


def _part(name: str) -> Callable[[Row], str]:
    return lambda line: number(line["parts"][name])


TOKENS: Column = ("tokens/s", _field("tokens_per_second"))
COMPILING: Column = ("compiling, s", _field("compile_s"))

WORDS = {
    "decode": Words(
        "Decoding",
        "One step of the compiled loop of generate_tokens.",
        lambda line, setting: (
            f"{setting['preset']}, {plural(setting['batch'], 'row')} of {setting['prompt']:,} tokens, "
            f"{setting['cache']} cache"
        ),
        (TOKENS, COMPILING),
    ),
    "prefill": Words(
        "Prefill",
        "Reading a prompt. The share of the peak is the inverse of the ratio.",
        lambda line, setting: f"{setting['preset']}, {plural(setting['batch'], 'row')} of {line['tokens']:,} tokens",
        (TOKENS, ("share of peak, %", lambda line: number(100 * line["share_of_peak"]))),
    ),
    "batch": Words(
        "Batches and layers",
        "A decode step with more rows, and in models with more layers.",
        lambda line, setting: plural(line["size"], "row" if line["series"] == "batch" else "layer"),
        ((f"relative to the first, {TIMES}", _field("to_first")), TOKENS, COMPILING),
    ),
    "long_context": Words(
        "Long context",
        "A decode step by number of tokens in the cache.",
        lambda line, setting: f"{line['layout']} cache, {line['length']:,} tokens",
    ),
    "stream": Words(
        "Streaming", "A token of stream_tokens, compared with one of the compiled loop of generate_tokens."
    ),
    "startup": Words(
        "Start-up",
        "Seconds from starting a process to the first token, with an empty (cold) and a filled (warm) compilation "
        "cache, compared with a process that only imports jax and computes one number. The parts are those of the last "
        "round; compiling is part of the first token.",
        columns=(
            ("import, s", _part("import")),
            ("loading, s", _part("load")),
            ("first token, s", _part("first_token")),
            ("of that compiling, s", _part("compile_first")),
            ("all compiling, s", _part("compile_all")),
        ),
    ),
    "memory": Words(
        "Memory",
        "Peak resident memory of a fresh process by cache layout, in excess of an interpreter with jax.",
        lambda line, setting: f"{line['layout']} cache",
        (
            ("cache, MB", _field("cache")),
            ("peak when loading, MB", _part("load")),
            ("first generation, MB", _part("first")),
            ("next, MB", _part("next")),
        ),
    ),
    "profile_cache": Words(
        "Where a step's time goes",
        "A decode step by part, from the profiler's times of each operation: the parts sum to the step of the median "
        "round. The share of cache update and read decides whether a cache deserves a separate module.",
        lambda line, setting: f"{line['layout']} cache, {line['length']:,} tokens",
        (
            ("cache's share, %", lambda line: number(100 * line["share"])),
            ("allocated per call, MB", lambda line: number(line["allocated"] / 1e6)),
            (f"under the profiler, {TIMES}", _field("profiling")),
        ),
    ),
    "compare": Words(
        "Other implementations",
        "Prefill and decode step of other implementations on the same weights, in one run. A ratio is this "
        "library's time divided by the other's, with weights of the same precision if both have it: below "
        f"1.00 {TIMES} this library is faster.",
        lambda line, setting: f"{line['contender']}, {line['case']}",
        (TOKENS,),
    ),
    "sampling": Words("Sampling", "Choosing a token from random logits, compared with a decode step."),
}

SETTINGS = {
    "preset": "model",
    "batch": "rows",
    "prompt": "tokens of prompt",
    "new": "new tokens",
    "capacity": "cache slots",
    "cache": "cache",
    "history": "tokens of history",
}
SIGNALS = {
    "performance": "speed: cache operations take over 20 % of a step",
    "features": "features: there are several strategies",
    "code": "code: the cache is longer than attention",
    "requirements": "requirements: features that a few lines inside attention could not provide",
}


def words(benchmark: str) -> Words:
    """The wording for a benchmark; just its name if there is none here."""
    return WORDS.get(benchmark, Words(benchmark, ""))
