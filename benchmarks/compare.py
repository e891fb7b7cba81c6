"""A comparison with other implementations, on the same weights and in one run.

    python -m benchmarks.compare --peer transformers=PYTHON --peer ctranslate2=PYTHON --peer llama.cpp=PYTHON
                                 [--preset gpt2] [--cases 1x64+64,1x512+4,8x64+16] [--weights float32,int8]
                                 [--rounds 3]

PYTHON is the interpreter of an environment that has the peer; docs/benchmarks.md says how to make one. A case is
BATCHxPROMPT+NEW. In each round every contender in turn generates one token (the prefill) and then NEW tokens; a step is
the difference divided by NEW - 1. First the greedy tokens are compared: the exit code is 1 if a float32 peer
disagrees by more than its rounding.
The ratio is the time of llorch_jax, with weights of the same precision, divided by the peer's. Without w8a8, whoever
rounds activations to 8 bits is compared with our int8.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import llorch_jax as lj
from benchmarks.agreement import judged, leading, rounding, tell_agreement
from benchmarks.decoder import random_tokens
from benchmarks.limits import Limits
from benchmarks.measure import Sample, interleaved, machine, random_model
from benchmarks.peer_process import SCRIPTS, Peer, PeerError
from benchmarks.reports import Report, keep, parser, report, row, show, spread

Case = tuple[int, int, int]  # batch, prompt, new
Run = Callable[[list[list[int]], int], tuple[list[list[int]], float]]  # tokens, new -> new tokens, seconds
OURS = "llorch_jax"
PRECISIONS = ("float32", "float16", "int8", "w8a8", "int4")


class Contender(NamedTuple):
    """An implementation that takes part in the comparison.

    Attributes:
        run: generates greedily.
        precision: precision of its weights, one of `PRECISIONS`.
    """

    run: Run
    precision: str


def measure(
    preset: str,
    peers: dict[str, tuple[str, Path | None]],
    cases: list[Case],
    rounds: int,
    weights: Sequence[str] = ("float32",),
) -> Report:
    """One row for each contender and case, and whether the tokens agree.

    Args:
        preset: preset of the model.
        peers: for each name its interpreter, and a script that replaces the usual one, if any.
        cases: cases to time.
        rounds: number of rounds.
        weights: precisions in which llorch_jax takes part, including float32.
    """
    config, params = random_model(preset)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        directory = Path(folder) / "model"
        write_checkpoint(directory, config, params)
        contenders = ours(config, params, weights)
        versions: dict[str, str] = {}
        builds: dict[str, str] = {}
        for name, (python, script) in peers.items():
            peer = stack.enter_context(Peer(name, python, script))
            peer.load(directory, Path(folder), machine()["cores"])
            versions |= peer.versions
            builds |= {name: peer.build} if peer.build else {}
            for variant, precision in peer.variants.items():
                contenders[f"{name} {variant}"] = Contender(functools.partial(peer.generate, variant), precision)
        agreement: list[Report] = []
        rows: list[Report] = []
        for case in cases:
            tokens = random_tokens(config, *case[:2]).tolist()
            lines = list(_agreement(contenders, case, tokens, functools.partial(judged, params, config, tokens)))
            able = {line["contender"] for line in lines if "error" not in line}
            taking_part = {name: each for name, each in contenders.items() if name in able}
            values = interleaved(_tasks(taking_part, case, tokens), rounds)
            agreement += lines
            rows += _rows(case, taking_part, values)
        limits = interleaved(Limits.of(preset).tasks(), rounds)
    extra = {"agreement": agreement, "versions": versions, "builds": builds}
    return report("compare", {"preset": preset}, rows, limits, "peer", **extra)


def ours(config: lj.GPT2Config, params: lj.Params, weights: Sequence[str]) -> dict[str, Contender]:
    """This library, with weights in each of some precisions."""
    found = {}
    for precision in weights:
        stored = params if precision == "float32" else lj.quantize(params, precision)
        found[_ours(precision)] = Contender(functools.partial(run_ours, stored, config), precision)
    return found


def _ours(precision: str) -> str:
    return OURS if precision == "float32" else f"{OURS} {precision}"


def write_checkpoint(directory: Path, config: lj.GPT2Config, params: lj.Params) -> None:
    """Writes the model in Hugging Face's layout, with a vocabulary of made-up words, which converters require."""
    lj.save_model(directory, config, params)
    words = {f"t{token}": token for token in range(config.vocab_size - 1)}
    words["<|endoftext|>"] = config.vocab_size - 1
    (directory / "vocab.json").write_text(json.dumps(words))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def run_ours(
    params: lj.Params, config: lj.GPT2Config, tokens: list[list[int]], new: int
) -> tuple[list[list[int]], float]:
    """Generates greedily, as a peer's worker does: the new tokens of every row, and the seconds it took."""
    start = time.perf_counter()
    result = lj.generate_tokens(params, config, tokens, new)[0].tolist()
    return result, time.perf_counter() - start


def _label(case: Case) -> str:
    return f"{case[0]}x{case[1]}+{case[2]}"


def _agreement(
    contenders: dict[str, Contender], case: Case, tokens: list[list[int]], judge: Callable[..., Report]
) -> Iterator[Report]:
    """How far each contender's tokens are ours, judged in float32; or the error of one that cannot run the case."""
    expected = contenders[OURS].run(tokens, case[2])[0]
    for name, each in contenders.items():
        line: Report = {"case": _label(case), "contender": name, "exact": each.precision == "float32"}
        try:
            got = each.run(tokens, case[2])[0]
        except PeerError as error:
            yield line | {"error": str(error)}
            continue
        yield line | (judge(expected, got, rounding(name)) if line["exact"] else leading(expected, got))


def _tasks(contenders: dict[str, Contender], case: Case, tokens: list[list[int]]) -> dict[str, Callable[[], float]]:
    """For every contender, tasks that return the milliseconds of a prefill and of a whole generation."""
    tasks: dict[str, Callable[[], float]] = {}
    for name, each in contenders.items():
        tasks[f"prefill {name}"] = lambda run=each.run: 1000 * run(tokens, 1)[1]
        tasks[f"whole {name}"] = lambda run=each.run: 1000 * run(tokens, case[2])[1]
    return tasks


def _rows(case: Case, contenders: dict[str, Contender], values: dict[str, list[float]]) -> list[Report]:
    """Prefill and step of every contender, compared with llorch_jax in the same precision, or in float32.

    Our own rows in other precisions are compared with our float32 row. `time` is the contender's own time.
    """
    batch, _, new = case
    times = {}
    for name in contenders:
        prefill = values[f"prefill {name}"]
        pairs = zip(values[f"whole {name}"], prefill, strict=True)
        times["prefill", name] = prefill
        times["step", name] = [(whole - first) / (new - 1) for whole, first in pairs]
    rows = []
    for (kind, name), theirs in times.items():
        partner = _partner(contenders[name].precision, contenders)
        own = times[kind, partner]
        against = theirs
        if contenders[name].precision != "float32" and name == partner:
            against = times[kind, OURS]
        extra = {"kind": kind, "case": _label(case), "contender": name, "precision": contenders[name].precision}
        line = row(f"{_label(case)} {kind} {name}", own, against, time=Sample.of(theirs), **extra)
        line["tokens_per_second"] = 1000 * batch / line["time"].median if kind == "step" else None
        rows.append(line)
    return sorted(rows, key=lambda line: line["kind"])


def _partner(precision: str, contenders: Container[str]) -> str:
    """Our contender in a precision, or else in the nearest that takes part."""
    near = {"w8a8": ("w8a8", "int8")}.get(precision, (precision,))
    return next((_ours(each) for each in near if _ours(each) in contenders), OURS)


def _case(text: str) -> list[Case]:
    cases = []
    for part in text.split(","):
        batch, rest = part.split("x")
        prompt, new = rest.split("+")
        cases.append((int(batch), int(prompt), int(new)))
    if min(min(case[:2]) for case in cases) < 1 or min(case[2] for case in cases) < 2:
        raise argparse.ArgumentTypeError(f"expected BATCHxPROMPT+NEW with 2 new tokens or more, got {text}")
    return cases


def precisions(text: str) -> list[str]:
    """The value of an option with precisions of our own weights, which always include float32."""
    chosen = text.split(",")
    if unknown := [each for each in chosen if each not in PRECISIONS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PRECISIONS)}; got {unknown[0]}")
    return [each for each in PRECISIONS if each == "float32" or each in chosen]


def describe(line: Report) -> str:
    """The addition to a row: how long the contender itself took."""
    return f"itself {spread(line['time'])} ms"


def peer_option(text: str, names: Iterable[str] = tuple(SCRIPTS)) -> tuple[str, tuple[str, Path | None]]:
    """The value of an option --peer with one of some names, for `measure`."""
    name, _, python = text.partition("=")
    if name not in names or not python:
        raise argparse.ArgumentTypeError(f"expected NAME=PYTHON with one of {', '.join(names)}; got {text}")
    return name, (python, None)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "--peer", type=peer_option, action="append", default=[], metavar="NAME=PYTHON", help="any number"
    )
    options.add_argument("--cases", type=_case, default=[(1, 64, 64), (1, 512, 4), (8, 64, 16)])
    options.add_argument(
        "--weights",
        type=precisions,
        default=["float32"],
        help="precisions of llorch_jax (default: float32)",
    )
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, dict(chosen.peer), chosen.cases, chosen.rounds, chosen.weights)
    show(figures, describe)
    keep(figures, chosen.json)
    return tell_agreement(figures)


if __name__ == "__main__":
    sys.exit(main())
