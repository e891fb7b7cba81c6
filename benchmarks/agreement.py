"""Whether another implementation's greedy tokens are ours, apart from what its rounding explains.

Where two logits are nearly equal, rounding decides which token is the more likely one, and the text goes on differently
from there. So from the first difference of a row on, each of its tokens is judged by our logits after the same tokens:
it must be the most likely one, or so close to it that the peer's rounding may have put it first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import llorch_jax as lj
from benchmarks.reports import Report

FLOAT32 = 2e-5  # two logits, each wrong by up to 2e-6 here, and allowed five times as much in a peer
LLAMA = 2.5e-3  # two logits, each wrong by up to 1.2e-3: docs/benchmarks.md says why, and how this was measured

Rows = Sequence[list[int]]


def rounding(peer: str) -> float:
    """By how much the logits of a peer's two best tokens may differ from ours, relative to each other."""
    return LLAMA if peer.startswith("llama.cpp") else FLOAT32


def leading(expected: Rows, got: Rows) -> Report:
    """The number of tokens in some rows, one after the other, and how many agree before the first that does not."""
    same = [a == b for own, theirs in zip(expected, got, strict=True) for a, b in zip(own, theirs, strict=True)]
    return {"tokens": len(same), "same": same.index(False) if False in same else len(same)}


def judged(
    params: lj.Params,
    config: lj.GPT2Config,
    prompts: Rows,
    expected: Rows,
    got: Rows,
    near: float,
    banned: int | None = None,
) -> Report:
    """`leading`, and the verdict on the rows that differ.

    Args:
        params: the model's parameters, in float32.
        config: its hyperparameters.
        prompts: the prompt of every row.
        expected: our greedy tokens after it.
        got: the peer's, as many.
        near: how far a token's logit may be below the best one.
        banned: an id that the peer never chooses; None if there is none.

    Returns:
        `rows`, how many there are, and `equal`, how many of them are ours; `gap`, how far the logits of the other rows'
        tokens are below the best one at most, and `near` as given; `banned`, whether the banned id was the best one
        somewhere; `wrong`, the first token that is too far below, in words, or None. A token of ours must be the
        best one but for float32's rounding.
    """
    gap, missed, wrong = 0.0, False, None
    different = [row for row, (own, theirs) in enumerate(zip(expected, got, strict=True)) if own != theirs]
    for row in different:
        first = next(at for at, (a, b) in enumerate(zip(expected[row], got[row], strict=True)) if a != b)
        own = _gaps(params, config, prompts[row], expected[row], None)
        theirs = _gaps(params, config, prompts[row], got[row], banned)
        wrong = wrong or _wrong(own, first, FLOAT32, f"our row {row}") or _wrong(theirs, first, near, f"row {row}")
        gap = max(gap, float(theirs.gaps[first:].max()))
        missed = missed or bool(theirs.missed[first:].any())
    counts = {"rows": len(expected), "equal": len(expected) - len(different)}
    return leading(expected, got) | counts | {"gap": gap, "near": near, "banned": missed, "wrong": wrong}


class _Gaps(NamedTuple):
    """How the logits of some tokens compare with the best ones.

    Attributes:
        gaps: float32 [N], how far each is below the best one that is not banned.
        missed: bool [N], where the banned one is better than that.
    """

    gaps: np.ndarray
    missed: np.ndarray


def _gaps(params: lj.Params, config: lj.GPT2Config, prompt: list[int], new: list[int], banned: int | None) -> _Gaps:
    """The gaps of the tokens after a prompt."""
    before = prompt + new[:-1]
    text = np.zeros((1, config.n_positions), np.int32)  # padding after the text changes nothing, and compiles once
    text[0, : len(before)] = before
    logits = lj.forward(params, config, text)[0, len(prompt) - 1 : len(before)]
    allowed = logits if banned is None else logits.at[:, banned].set(-jnp.inf)
    chosen = jnp.take_along_axis(allowed, jnp.asarray(new)[:, None], axis=1)[:, 0]
    best = allowed.max(axis=1)
    return _Gaps(np.asarray(best - chosen), np.asarray(logits.max(axis=1) > best))


def _wrong(found: _Gaps, first: int, near: float, name: str) -> str | None:
    """The first token from a given one on that is too far below the best one."""
    right = found.gaps[first:] <= near  # not if it is no number
    if right.all():
        return None
    at = first + int(np.argmin(right))
    return f"{name}, token {at}: expected a logit at most {near:.2g} below the best one, got {found.gaps[at]:.2g}"


def tell_agreement(figures: Report) -> int:
    """Prints how far the greedy tokens agree; returns 1 if a float32 peer disagrees by more than its rounding."""
    code = 0
    for line in figures["agreement"]:
        head = f"{line['case']} {line['contender']}"
        if "error" in line:
            print(f"{head}: left out ({line['error']})")
            continue
        if line["same"] == line["tokens"] or not line["exact"]:
            kind = "" if line["exact"] else " (rounded weights need not agree)"
            print(f"{head}: first {line['same']} of {line['tokens']} tokens agree{kind}")
            continue
        print(f"{head}: {line['equal']} of {line['rows']} rows agree; {_verdict(line)}")
        code = max(code, int(line["wrong"] is not None))
    return code


def _verdict(line: Report) -> str:
    if line["wrong"] is not None:
        return str(line["wrong"])
    why = f"near ties, logits at most {line['gap']:.2g} below the best one; {line['near']:.2g} is accepted"
    return f"the others differ by {why}" + (" (without the end-of-text token, which it bans)" if line["banned"] else "")
