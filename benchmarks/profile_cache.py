"""Where the time of a decode step goes, and whether the cache deserves its own module: the decision by measurement.

    python -m benchmarks.profile_cache [--preset gpt2] [--batch 1] [--lengths 64,960]
                                       [--layouts static,dynamic,rotating:256+4,paged,int8,int4]

Parts of a step are timed by leaving them out (benchmarks/variants.py): cache update, attention with its reads of keys
and values, feed-forward layers, output projection with the log-probability, sampling. The dense layers of attention
are the difference between chains of all dense layers with and without them. What is left is the rest, so that the
table sums to the step of the compiled loop.

A layout's "read" is what its step without update takes longer than that of a static cache of as many slots: gathering
pages, decoding codes. Update and read together are the share that the performance signal is about.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import llorch_jax as lj
from benchmarks import variants
from benchmarks.caches import LAYOUTS
from benchmarks.decoder import Decoder, make_cache
from benchmarks.limits import Limits
from benchmarks.measure import Sample, interleaved, random_model
from benchmarks.reports import Report, keep, numbers, parser, report, row, show
from benchmarks.signals import signals

STEPS = 8  # per measurement
DENSE = ("qkv", "attn_proj", "fc", "mlp_proj")


def measure(preset: str, batch: int, lengths: list[int], layouts: list[str], rounds: int) -> Report:
    """The parts of a step at the first length, the cache's share for every layout and length, and the signals."""
    config, params = random_model(preset)
    parts, values = step_parts(config, params, preset, batch, lengths[0], rounds)
    shares = [line for length in lengths for line in cache_shares(config, params, batch, length, layouts, rounds)]
    rows = [row(f"{line['layout']} {line['length']}", line.pop("steps"), line.pop("base"), **line) for line in shares]
    setting = {"preset": preset, "batch": batch}
    extra = {"parts": parts, "parts_length": min(lengths[0], longest(config, rounds)), "signals": signals(shares)}
    return report("profile_cache", setting, rows, values, "static without update", **extra)


def step_parts(
    config: lj.GPT2Config, params: lj.Params, preset: str, batch: int, length: int, rounds: int
) -> tuple[dict[str, Sample], dict[str, list[float]]]:
    """Milliseconds of each part of a step with a static cache; and all that was measured."""
    whole = decoder(config, params, "static", batch, length, rounds, tight=True)
    state, policy = whole.rewind(), whole.request.policy
    blind = dataclasses.replace(policy, sampler=variants.FirstWord())
    still = dataclasses.replace(state, cache=variants.without_update(state.cache))
    single = dataclasses.replace(state, cache=variants.with_one_slot(state.cache))
    narrow, silent = variants.without_ffn(config, params), variants.without_head(config, params)
    programs = {
        "step": variants.StepProgram(params, config, policy, state),
        "no sampler": variants.StepProgram(params, config, blind, state),
        "no head": variants.StepProgram(silent[1], silent[0], blind, state),
        "no ffn": variants.StepProgram(narrow[1], narrow[0], policy, state),
        "no update": variants.StepProgram(params, config, policy, still),
        "one slot": variants.StepProgram(params, config, policy, single),
    }
    tasks: dict[str, Callable[[], float]] = {
        name: lambda program=program: program.step_ms(STEPS) for name, program in programs.items()
    }
    for name in ("", "qkv", "attn_proj"):
        tasks[f"dense but {name}"] = variants.dense_ms(params, batch, [each for each in DENSE if each != name])
    values = interleaved({**Limits.of(preset).tasks(), "loop": whole.step_ms, **tasks}, rounds)
    return _differences(values), values


def _differences(values: dict[str, list[float]]) -> dict[str, Sample]:
    """The parts, from the programs with and without them, round by round; they sum to the loop's step."""
    pairs = {
        "QKV": ("dense but ", "dense but qkv"),
        "attention": ("no update", "one slot"),
        "cache update": ("step", "no update"),
        "attention's projection": ("dense but ", "dense but attn_proj"),
        "FFN": ("step", "no ffn"),
        "LM head, log-probability": ("no sampler", "no head"),
        "sampling": ("step", "no sampler"),
    }
    parts = {name: [a - b for a, b in zip(values[x], values[y], strict=True)] for name, (x, y) in pairs.items()}
    # Medians of differences do not add up; the rest is what makes the table's medians do so.
    known = sum(statistics.median(part) for part in parts.values())
    parts["rest: norms, residuals, embedding, loop"] = [value - known for value in values["loop"]]
    return {name: Sample.of(part) for name, part in parts.items()} | {"whole step": Sample.of(values["loop"])}


def cache_shares(
    config: lj.GPT2Config, params: lj.Params, batch: int, length: int, layouts: list[str], rounds: int
) -> list[Report]:
    """For each layout what update and reads take of a step, and what a step allocates."""
    tasks: dict[str, Callable[[], float]] = {}
    slots, allocated, lengths = {}, {}, {}
    for layout in layouts:
        each = decoder(config, params, layout, batch, length, rounds)
        lengths[layout] = each.length
        slots[layout] = min(variants.slots_of(each.state.cache), config.n_positions)
        still = dataclasses.replace(each.state, cache=variants.without_update(each.state.cache))
        whole = variants.StepProgram(params, config, each.request.policy, each.state)
        partial = variants.StepProgram(params, config, each.request.policy, still)
        allocated[layout] = whole.allocated()
        tasks[f"step {layout}"] = lambda program=whole: program.step_ms(STEPS)
        tasks[f"no update {layout}"] = lambda program=partial: program.step_ms(STEPS)
    for count in set(slots.values()):
        tasks[f"base {count}"] = _static_base(config, params, batch, count)
    values = interleaved(tasks, rounds)
    return [_share(values, layout, lengths[layout], slots[layout], allocated[layout]) for layout in layouts]


def _share(values: dict[str, list[float]], layout: str, length: int, slots: int, allocated: int) -> Report:
    names = (f"step {layout}", f"no update {layout}", f"base {slots}")
    steps, still, base = (values[name] for name in names)
    update = statistics.median(a - b for a, b in zip(steps, still, strict=True))
    read = 0.0 if layout == "static" else statistics.median(a - b for a, b in zip(still, base, strict=True))
    share = (update + read) / statistics.median(steps)
    line = {"layout": layout, "length": length, "slots": slots, "update_ms": update, "read_ms": read, "share": share}
    return line | {"allocated": allocated, "steps": steps, "base": base}


def _static_base(config: lj.GPT2Config, params: lj.Params, batch: int, slots: int) -> Callable[[], float]:
    """A step on a static cache of so many slots that does not write."""
    each = Decoder(params, config, lj.StaticCache.init(config, batch_size=batch, capacity=slots), slots // 2, 1)
    still = dataclasses.replace(each.state, cache=variants.without_update(each.state.cache))
    program = variants.StepProgram(params, config, each.request.policy, still)
    return lambda: program.step_ms(STEPS)


def decoder(
    config: lj.GPT2Config, params: lj.Params, layout: str, batch: int, length: int, rounds: int, tight: bool = False
) -> Decoder:
    """A decoder on a cache with room for all the steps of all rounds, or tight: for no more than those."""
    length, new = min(length, longest(config, rounds)), STEPS * (rounds + 1)
    capacity = length + new if tight else config.n_positions
    return Decoder(params, config, make_cache(config, layout, batch, capacity), length, new)


def longest(config: lj.GPT2Config, rounds: int) -> int:
    """The longest text behind which there is room for the steps of all rounds."""
    return config.n_positions - STEPS * (rounds + 1)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--lengths", type=numbers, default=[64, 960], help="tokens in the cache, with commas")
    options.add_argument("--layouts", default=",".join(LAYOUTS), help="with commas")
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.batch, chosen.lengths, chosen.layouts.split(","), chosen.rounds)
    show(figures, _describe)
    tell_parts(figures)
    tell_signals(figures)
    keep(figures, chosen.json)


def _describe(line: Report) -> str:
    cost = f"update {line['update_ms']:.2f} + read {line['read_ms']:.2f} ms = {100 * line['share']:.1f} %"
    return f"{cost}, {line['allocated'] / 1e6:.2f} MB allocated per call"


def tell_parts(figures: Report) -> None:
    """Prints the table of the step by part."""
    whole = figures["parts"]["whole step"]["median"]
    print(f"a step by part, static cache, {figures['parts_length']} tokens (timed by leaving the part out):")
    for name, part in figures["parts"].items():
        print(f"  {name:<42}{part['median']:>8.2f} ms {100 * part['median'] / whole:>6.1f} %")


def tell_signals(figures: Report) -> None:
    """Prints the four signals for a cache module of its own."""
    print("signals for a cache module of its own:")
    for name, signal in figures["signals"].items():
        print(f"  {name:<13}{'yes' if signal['on'] else 'no':<5}{signal['value']}")


if __name__ == "__main__":
    main()
