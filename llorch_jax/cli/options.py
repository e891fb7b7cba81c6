"""The options that commands share, and the command line's names for the library's settings."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option that becomes a setting of the library.

    Attributes:
        name: name of the setting.
        kind: type of the value.
        metavar: the value's name in the help text: N for whole numbers, X for any, P for 0 to 1.
        help: what to give, in one sentence.
        default: None leaves the setting to the library.
        flag: the option's name if it is not the setting's name with dashes; `many` options are singular.
        many: whether the option may be given several times.
    """

    name: str
    kind: type
    metavar: str
    help: str
    default: Any = None
    flag: str | None = None
    many: bool = False

    @property
    def option(self) -> str:
        """The option's name, with its dashes."""
        return self.flag or "--" + self.name.replace("_", "-")

    def parameter(self, panel: str) -> inspect.Parameter:
        """The option as a parameter of a function's signature, from which typer reads it."""
        text = self.help.removesuffix(".") + "; may be given several times." if self.many else self.help
        option = typer.Option(self.option, rich_help_panel=panel, metavar=self.metavar, help=text)
        kind: Any = list[self.kind] if self.many else self.kind  # type: ignore[name-defined]
        if self.default is None:
            kind = kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, option]
        )


SAMPLING = (
    Setting("temperature", float, "X", "Sampling temperature; 0, the default, takes the most likely token."),
    Setting("top_k", int, "N", "Draw from the N most likely tokens."),
    Setting("top_p", float, "P", "Draw from the most likely tokens whose probabilities add up to P."),
    Setting("dynatemp_range", float, "X", "Vary the temperature by up to X with the entropy; 0 is off."),
    Setting("dynatemp_exponent", float, "X", "Exponent of the entropy for --dynatemp-range (1)."),
    Setting("min_p", float, "P", "Draw from tokens at least P times as likely as the most likely one."),
    Setting("typical_p", float, "P", "Draw from the most typical tokens whose probabilities add up to P."),
    Setting("top_n_sigma", float, "X", "Draw from logits within X standard deviations of the largest."),
    Setting("epsilon_cutoff", float, "P", "Leave out tokens less likely than P."),
    Setting("eta_cutoff", float, "P", "As --epsilon-cutoff, but lower where many tokens are likely."),
    Setting("xtc_probability", float, "P", "XTC: probability of leaving out the top choices."),
    Setting("xtc_threshold", float, "P", "XTC: probability from which a token is a top choice (0.1)."),
    Setting("mirostat_tau", float, "X", "Mirostat: target surprise, in bits per token."),
    Setting("mirostat_eta", float, "X", "Mirostat: learning rate (0.1)."),
    Setting("seed", int, "N", "Random seed; the same seed gives the same text.", 0),
)
PENALTIES = (
    Setting("repetition_penalty", float, "X", "Above 1, tokens that have occurred become less likely."),
    Setting("frequency_penalty", float, "X", "Subtracted from a logit for each time its token was generated."),
    Setting("presence_penalty", float, "X", "Subtracted from the logits of tokens that were generated."),
    Setting("repeat_last_n", int, "N", "These penalties consider the last N tokens; -1, the default, all."),
    Setting("dry_multiplier", float, "X", "DRY: strength of the penalty on repeated sequences; 0 is off."),
    Setting("dry_base", float, "X", "DRY: growth of the penalty with each repeated token (1.75)."),
    Setting("dry_allowed_length", int, "N", "DRY: length up to which sequences may repeat (2)."),
    Setting(
        "dry_breakers", str, "TEXT", "DRY: sequences end at tokens containing TEXT.", flag="--dry-breaker", many=True
    ),
    Setting("no_repeat_ngram_size", int, "N", "No sequence of N tokens occurs twice; 0 is off."),
    Setting("logit_bias", str, "ID=X", "Add X to the logit of the token with this id.", many=True),
    Setting("bad_words", str, "TEXT", "Text that must not occur.", flag="--bad-word", many=True),
    Setting("forced_tokens", int, "ID", "The next id that the text must begin with.", flag="--forced-token", many=True),
)
ENDING = (
    Setting("min_new_tokens", int, "N", "Minimum number of new tokens."),
    Setting("stop", str, "TEXT", "End before this text.", many=True),
    Setting("stop_ids", int, "ID", "End at the token with this id.", flag="--stop-id", many=True),
)
CONSTRAINTS = (
    Setting("regex", str, "PATTERN", "Regular expression that the new text must match."),
    Setting("json_schema", str, "SCHEMA", "JSON schema for the new text, or a file that contains it."),
    Setting("grammar", str, "GRAMMAR", "Grammar for the new text, Lark or GBNF, or a file that contains it."),
    Setting("choices", str, "TEXT", "One of the texts that are allowed.", flag="--choice", many=True),
)
SEARCH = (
    Setting("num_beams", int, "N", "Beam search: number of beams.", flag="--beams"),
    Setting("num_beam_groups", int, "N", "Diverse beam search: number of groups.", flag="--beam-groups"),
    Setting("diversity_penalty", float, "X", "Diverse beam search: cost of another group's choice (0.5)."),
    Setting("length_penalty", float, "X", "Beam search: scores are divided by length to the power of X (1)."),
    Setting("early_stopping", str, "WHEN", "Beam search: true, false or never; when to stop early (false)."),
    Setting(
        "penalty_alpha",
        float,
        "P",
        "Contrastive search: weight of the penalty on similar tokens, with --top-k candidates (4).",
        flag="--contrastive-alpha",
    ),
)
CACHE = (
    Setting("codec", str, "CODEC", "Storage format of keys and values: float32, bfloat16, float16, int8 or int4."),
    Setting("residual", int, "N", "Number of newest tokens also kept in float32 (32 with int8 and int4)."),
)
WEIGHTS = (
    Setting("weights", str, "FORMAT", "Storage format of the weights: float32, bfloat16, float16, int8, w8a8 or int4."),
    Setting("group_size", int, "N", "Number of weights that share a scale: 32, 64 or 128 in int8, 32 or 64 in int4."),
)
DEVICES = (Setting("mesh", str, "AXES", "Devices, as data=N,model=N: parts of the rows and of the heads."),)
PROCESSES = (
    Setting("coordinator", str, "HOST:PORT", "Address at which the processes of one run meet; that of process 0."),
    Setting("processes", int, "N", "Number of processes that compute together."),
    Setting("process", int, "N", "Number of this process, from 0; process 0 prints and writes."),
)
PANELS: dict[str, tuple[Setting, ...]] = {
    "Model": WEIGHTS,
    "Devices": DEVICES,
    "Processes": PROCESSES,
    "Cache": CACHE,
    "Sampling": SAMPLING,
    "Penalties": PENALTIES,
    "Length and ending": ENDING,
    "Constraints": CONSTRAINTS,
    "Search and speculation": SEARCH,
}

MODEL_HELP = "demo, a directory with config.json and *.safetensors, a GGUF file, or a hub id."
CACHE_HELP = (
    "Layout of the KV cache: static[:CAPACITY], dynamic, paged[:PAGE_SIZE], rotating:WINDOW[+SINKS], int8, int4, "
    "recent:BUDGET, sinks:BUDGET, h2o:BUDGET or snapkv:BUDGET."
)


def option(*names: str, metavar: str | None = None, help: str, panel: str | None = None) -> Any:
    """An option of one command."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


ModelOption = Annotated[str, option("--model", "-m", metavar="MODEL", help=f"Model: {MODEL_HELP}", panel="Model")]
CacheOption = Annotated[str, option("--cache", metavar="LAYOUT", help=CACHE_HELP, panel="Cache")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
JsonOption = Annotated[bool, option("--json", help="Print one JSON object instead.", panel="Output")]


def with_settings(*panels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of some `PANELS` to a command, which receives those given as a dict, `settings`."""
    rows = [(panel, setting) for panel in panels for setting in PANELS[panel]]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(function).parameters.items()
            if name != "settings"
        ]
        parameters = own + [setting.parameter(panel) for panel, setting in rows]

        @functools.wraps(function)
        def command(**given: Any) -> None:
            values = {setting.name: given.pop(setting.name) for _, setting in rows}
            settings = {name: value for name, value in values.items() if value is not None and value != []}
            function(**given, settings=settings)

        del command.__wrapped__  # otherwise typer would read its signature
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


_OTHERS = (
    "max_new_tokens",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "repeats",
    "top_logprobs",
    "batch_size",
    "cache",
    "overflow",
    "dtype",
    "stride",
    "weights",
    "host",
    "port",
    "api_key",
    "max_body",
    "max_texts",
    "drain_seconds",
    "slots",
    "num_pages",
    "page_size",
    "chunk",
    "max_waiting",
    "offload_bytes",
    "actors",
    "cpus",
    "ray",
)

# Advice that applies to Python only, and its counterpart on the command line.
_PHRASES = {
    "pass overwrite=True": "give --overwrite",
}


def explain(error: Exception) -> str:
    """An error's message with the names of settings replaced by those of options."""
    options = {name: "--" + name.replace("_", "-") for name in _OTHERS}
    options |= {setting.name: setting.option for panel in PANELS.values() for setting in panel}
    text = str(error)
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    for name in sorted(options, key=len, reverse=True):
        # A common English word is the name of a setting only at the beginning of the message.
        pattern = rf"(?<![-\w/.]){name}(?![-\w/.])" if "_" in name else rf"^{name}(?=[:,])"
        text = re.sub(pattern, options[name], text)
    return text
