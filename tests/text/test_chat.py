"""Conversations: what is prefilled, taking back, branches, files; and the command in a real terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.errors import ChatError
from llorch_jax.text.chat import RAW, Chat, Template


@pytest.fixture(scope="module")
def model():
    return lj.load("demo")


def say(chat, words, count=12):
    return "".join(chat.reply(words, count))


@pytest.mark.parametrize("cache", ["static", "dynamic", "paged", "int8", "rotating:512", "h2o:512"])
def test_only_new_text_is_prefilled_and_turns_are_one_text(model, cache):
    chat = Chat(model, RAW, cache=cache)
    first = say(chat, "Once upon a time")
    assert chat.stats["prefilled"] == len(model.tokenizer.encode("Once upon a time"))
    second = say(chat, " But the king")
    assert chat.stats["prefilled"] == len(model.tokenizer.encode(" But the king")) + 1  # and the token sampled last
    assert chat.text == f"Once upon a time{first} But the king{second}"
    if cache != "int8":
        whole = lj.generate(model, f"Once upon a time{first} But the king", 12)
        assert second == whole.text


def test_undo_is_as_if_the_turn_had_not_been(model):
    chat = Chat(model, RAW, temperature=0.9, seed=4, repetition_penalty=1.2)
    say(chat, "Once upon a time")
    before = [*chat.tokens]
    second = say(chat, " there")
    chat.undo()
    assert chat.tokens == before
    assert say(chat, " there") == second
    chat.undo()
    chat.undo()
    assert (chat.tokens, chat.turns) == ([], [])
    with pytest.raises(ChatError, match="turn to take back"):
        chat.undo()
    with pytest.raises(ChatError, match="some text"):
        chat.reply("")


def test_branches_do_not_touch_each_other(model):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time")
    twin = chat.fork()
    other = say(twin, " The fox")
    mine = say(chat, " The queen")
    assert (twin.text[-len(other) :], chat.text[-len(mine) :]) == (other, mine)
    chat.undo()
    assert say(chat, " The fox") == other


def test_replies_end_before_the_users_role(model):
    stop = " the"
    template = Template("\nKing: ", "\nFox:", (stop,))
    chat = Chat(model, template, temperature=0.8, seed=1, system="A talk.")
    reply = say(chat, "Where do you go?", 60)
    assert stop not in reply
    assert chat.text == f"A talk.\nKing: Where do you go?\nFox:{reply}"
    held = int(np.asarray(chat.cache.lengths)[0])
    assert held < len(chat.tokens)
    again = Chat(model, template, temperature=0.8, seed=1, system="A talk.")
    say(again, "Where do you go?", 60)
    again.cache = again.cache.clear()  # all of it is read anew
    assert say(again, "And then?", 8) == say(chat, "And then?", 8)


def test_a_reply_that_is_closed_stays_as_far_as_it_was_read(model):
    chat = Chat(model, RAW)
    pieces = chat.reply("Once upon a time", 50)
    taken = "".join(next(pieces) for _ in range(3))
    pieces.close()
    assert chat.text == f"Once upon a time{taken}"
    assert say(chat, " and") == lj.generate(model, f"Once upon a time{taken} and", 12).text


def test_a_full_context_is_told_and_changes_nothing(model):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time", 600)  # as many as there is room for
    assert len(chat.tokens) == model.config.n_positions + 1
    before = [*chat.tokens]
    with pytest.raises(lj.CapacityError, match=r"a turn of 0 tokens or fewer.*take back a turn"):
        chat.reply(" more")
    assert chat.tokens == before


def test_files(model, tmp_path):
    chat, path = Chat(model, RAW), tmp_path / "talk"
    say(chat, "Once upon a time")
    chat.save(path)
    other = Chat(model, RAW)
    say(other, "No")
    other.load(path)
    assert (other.tokens, other.turns) == (chat.tokens, chat.turns)
    assert say(other, " The fox") == say(chat, " The fox")
    assert other.stats["prefilled"] == len(model.tokenizer.encode(" The fox")) + 1
    path.write_bytes(path.read_bytes()[:-100])
    before = [*other.tokens]
    with pytest.raises(ChatError):
        other.load(path)
    assert other.tokens == before


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.seen = ""
        main, child = pty.openpty()
        command = [sys.executable, "-m", "llorch_jax", "chat", *arguments]
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
        os.close(child)
        self.main = main

    def until(self, pattern, seconds=120):
        """Reads until the pattern is there, and returns what came before it and with it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.main], [], [], 1)[0]:
                self.seen += os.read(self.main, 65536).decode(errors="replace").replace("\r", "")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def send(self, text):
        os.write(self.main, text.encode())


def test_the_command_in_a_terminal(tmp_path):
    terminal = Terminal("--raw", "-n", "8", "--temperature", "0")
    terminal.until("> ")
    terminal.send("Once upon a time\n")
    reply = terminal.until(r"\n> ").split("\n", 1)[1]
    terminal.send("/stats\n")
    assert "12 of 512 tokens; static cache" in terminal.until(r"prefilled.*\n> ")
    terminal.send("/fork other\n")
    terminal.until("in branch other\n> ")
    terminal.send(f"/save {tmp_path / 'talk'}\n")
    terminal.until("saved 12 tokens.*\n> ")
    terminal.send("/undo\n")
    terminal.until("took back a turn; 0 tokens are left\n> ")
    terminal.send("Once upon a time\n")
    assert terminal.until(r"\n> ").split("\n", 1)[1] == reply
    terminal.send("/nonsense\n")
    assert "Traceback" not in terminal.until("error: expected one of .*\n> ")
    terminal.send(f"/load {tmp_path / 'talk'}\n")
    terminal.until("loaded 12 tokens\n> ")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
    os.close(terminal.main)
