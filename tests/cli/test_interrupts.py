"""Ctrl-C at random moments in a pseudo-terminal: the exit code, how soon, and what is printed."""

import collections
import os
import random
import sys
import time

import pseudo_terminal
import pytest
from profiles import whole

ENDLESS = ["generate", "Once", "-n", "100000", "--overflow", "reencode"]
COMMANDS = {
    "stream": [*ENDLESS, "--top-k", "40"],
    "at once": [*ENDLESS, "--no-stream"],
    "score": ["score", "Once upon a time " * 100],
    "chat": ["chat", "--raw", "-n", "500"],
}
BEGINS = {"stream": "Once", "chat": r"\n> "}  # what is printed first
LONGEST = 10.0  # seconds until the process has ended; a step that takes more than one is not waited for


def interrupt_once(kind, delay, late):
    """Starts a command, presses Ctrl-C, and says what happened and how long it took.

    The key is pressed `delay` seconds after the handler is there or, where it should be `late`, after the first output.
    """
    with pseudo_terminal.Terminal(*COMMANDS[kind]) as terminal:
        if kind == "chat":
            terminal.send("Once upon a time\n")  # waits in the terminal until the chat reads it
        terminal.wait_for_handler()
        if late and kind in BEGINS:
            terminal.until(BEGINS[kind])
        terminal.drain(delay)
        if terminal.process.poll() is not None:
            return "ended before", 0.0
        sent = time.monotonic()
        terminal.send("\x03")
        if kind == "chat":
            terminal.drain(0.05)
            leave(terminal)
        code, seen = terminal.finish()
        seconds = time.monotonic() - sent
    for mark in ("Traceback", "Exception ignored", "Fatal", "Segmentation"):
        if mark in seen:
            return f"{mark}: {seen[-2000:]}", seconds
    if kind == "chat" and code == 0:
        return "went on", seconds
    return ("130" if code == 130 else f"exit code {code}: {seen[-500:]}"), seconds


def leave(terminal):
    """Types /quit until the chat has ended: what is typed before it reads is lost with the interrupt."""
    deadline = time.monotonic() + LONGEST
    while terminal.process.poll() is None and time.monotonic() < deadline:
        try:
            terminal.send("/quit\n")
        except OSError:
            return
        terminal.drain(0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_interrupts_at_random_moments_end_with_130_or_end_the_reply():
    count = whole(500, quick=4)
    draws = random.Random(int(os.environ.get("LLORCH_SEED", "1")))
    found = collections.Counter()
    slowest = 0.0
    for number in range(count):
        kind = ("stream", "chat", "stream", "chat", "at once", "score")[number % 6]
        late = draws.random() < 0.6
        outcome, seconds = interrupt_once(kind, draws.uniform(0, 0.5 if late else 3.0), late)
        found[kind, outcome] += 1
        if outcome == "130":
            slowest = max(slowest, seconds)
        if number % 50 == 49:
            print(number + 1, dict(found), f"{slowest:.2f} s", flush=True)
    print(f"{count} interrupts: {dict(found)}; the slowest took {slowest:.2f} s")
    allowed = {"130", "ended before", "went on"}
    assert {outcome for _, outcome in found} <= allowed, found
    assert sum(number for (_, outcome), number in found.items() if outcome != "ended before") >= 0.8 * count
    assert slowest < LONGEST
