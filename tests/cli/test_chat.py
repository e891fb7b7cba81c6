"""The chat in a pseudo-terminal: commands, interrupts, and signals that end it. Nothing of a conversation is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pseudo_terminal
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.cli import app
from llorch_jax.text.chat import RAW, Chat

PROMPT = r"\n> "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a tiny model that never ends a text."""
    model = tiny.random_model()
    path = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return path


@pytest.fixture
def state(tmp_path):
    """An environment whose rescued conversations go to a directory of the test."""
    return pseudo_terminal.environment(XDG_STATE_HOME=str(tmp_path / "state"))


def chat(folder, *arguments, env=None):
    return pseudo_terminal.Terminal("chat", "--raw", "-m", folder, "-n", "6", *arguments, env=env)


def text_of(folder, path):
    """The conversation in a file."""
    conversation = Chat(lj.load(folder), RAW)
    conversation.load(path)
    return conversation.text


def test_commands(folder, tmp_path):
    with chat(folder, "--temperature", "0") as terminal:
        greeting = terminal.until(PROMPT)
        assert "tiny" in greeting
        assert "a context of 64 tokens" in greeting
        assert "/help" in greeting
        terminal.send("Once\n")
        reply = terminal.until(PROMPT)
        assert "[cut after 6 tokens, see --max-new-tokens]" in reply
        terminal.send("/stats\n")
        stats = terminal.until(PROMPT)
        assert re.search(r"\d+ of 64 tokens; static cache of", stats)
        assert re.search(r"compiled for \d+\.\d\d s, \d+ tokens prefilled in \d+ ms, 6 generated at", stats)
        terminal.send("/fork other\n")
        terminal.until("in branch other" + PROMPT)
        terminal.send(f"/save {tmp_path / 'talk'}\n")
        terminal.until("saved .* tokens.*" + PROMPT)
        terminal.send("/undo\n")
        terminal.until("removed a turn; 0 tokens are left" + PROMPT)
        terminal.send("/stats\n")
        terminal.until("no reply so far" + PROMPT)  # not those of the turn taken back
        terminal.send("Once\n")
        assert terminal.until(PROMPT) == reply
        terminal.send("/new\n")
        terminal.until("a new conversation" + PROMPT)
        terminal.send(f"/load {tmp_path / 'talk'}\n")
        terminal.until("loaded .* tokens" + PROMPT)
        terminal.send('"""Two\nlines"""\n')
        terminal.until(PROMPT)
        terminal.send(f"/save {tmp_path / 'lines'}\n")
        terminal.until("saved.*" + PROMPT)
        terminal.send("\x1b[A\x1b[A\n")  # the line before the last one: the second of two lines
        terminal.until(r'lines"""')
        terminal.until(PROMPT)
        terminal.send("\x04")
        assert terminal.finish()[0] == 0
    assert "Two\nlines" in text_of(folder, tmp_path / "lines")


def test_another_reply(talking):
    replies = []
    for _ in range(2):
        talking.send("/regenerate\n")
        replies.append(talking.until(PROMPT).partition("\n")[2])
    assert replies[0] != replies[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save ~nosuchuser/x", "whose user is unknown"),
        ("/save /dev/null/x", "cannot be written"),
        ("/save /dev/full", "expected a regular file, got a device"),
        (f"/save {'x' * 300}", "cannot be written"),
        ("/load nothing-here", "nothing-here: cannot be read"),
        ("/load /dev/zero", "expected a regular file"),
        ("/save", "expected the name of a file, got none"),
        ("/nonsense", "expected one of /new"),
    ],
)
def test_no_name_ends_the_chat(folder, talking, line, message):
    talking.send(line + "\n")
    seen = talking.until(r"error: [^\n]*" + PROMPT)
    assert message in seen
    assert "Traceback" not in seen


@pytest.fixture(scope="module")
def talking(folder):
    """A chat that has had a turn, for another reply to it and all lines that go wrong."""
    with chat(folder, "--temperature", "1.5") as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        yield terminal
        terminal.send("/stats\n")
        assert re.search(r"[1-9]\d* of 64 tokens", terminal.until(PROMPT))
        terminal.send("/quit\n")
        assert terminal.finish()[0] == 0


def test_bytes_that_are_no_text_do_not_end_the_chat(folder, talking):
    os.write(talking.main, b"\xff\xfe\n")
    seen = talking.until(PROMPT)
    assert "Traceback" not in seen


def test_turns_from_a_pipe(folder):
    command = [sys.executable, "-m", "llorch_jax", "chat", "--raw", "-m", folder, "-n", "6"]
    typed = b"Once\n/save a\0b\n\xff\n/stats\n"
    found = subprocess.run(command, input=typed, env=pseudo_terminal.environment(), capture_output=True)
    messages = found.stderr.decode()
    assert found.returncode == 0
    assert "no file can have this name" in messages
    assert re.search(r"[1-9]\d* of 64 tokens", messages)
    assert b"> " not in found.stdout


def test_an_interrupt_ends_the_reply_or_clears_the_line_and_never_leaves(folder):
    with pseudo_terminal.Terminal("chat", "--raw", "-n", "500") as terminal:
        terminal.until(PROMPT)
        terminal.send("half a line\x03")
        terminal.until("/quit or Ctrl-D leaves" + PROMPT)
        terminal.send("Once upon a time\n")
        terminal.until(r"time\n[^\n]")  # the reply has begun
        terminal.send("\x03")
        assert "[interrupted]" in terminal.until(PROMPT)
        terminal.send("/stats\n")
        assert 4 < int(re.search(r"(\d+) of 512 tokens", terminal.until(PROMPT))[1]) < 500
        terminal.send(" and\n")
        terminal.until(r"and\n[^\n]")
        terminal.send("\x03\x03")
        terminal.until(PROMPT)
        terminal.send("/quit\n")
        assert terminal.finish()[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_at_the_prompt_or_in_a_reply_saves_the_session(folder, tmp_path, state, number, code):
    session = tmp_path / "talk"
    with chat(folder, "--session", session, env=state) as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        os.kill(terminal.process.pid, number)
        found, seen = terminal.finish()
    assert (found, "Traceback" in seen) == (code, False)
    before = text_of(folder, session)
    assert before.startswith("Once")
    with pseudo_terminal.Terminal("chat", "--raw", "-n", "500", "--session", tmp_path / "demo", env=state) as terminal:
        terminal.until(PROMPT)
        terminal.send("Once upon a time\n")
        terminal.until(r"time\n[^\n]{8}")
        os.kill(terminal.process.pid, number)
        found, seen = terminal.finish()
    assert (found, "Traceback" in seen) == (code, False)
    assert len(text_of("demo", tmp_path / "demo")) > len("Once upon a time") + 8
    assert not (tmp_path / "state").exists()


def test_an_unsaved_chat_is_kept_if_a_signal_ends_it(folder, tmp_path, state):
    with chat(folder, env=state) as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        os.kill(terminal.process.pid, signal.SIGTERM)
        code, seen = terminal.finish()
    assert code == 143
    (kept,) = (tmp_path / "state" / "llorch_jax").iterdir()
    assert f"the conversation was saved in {kept}" in seen
    assert text_of(folder, kept).startswith("Once")


def test_an_unsaved_chat_is_kept_if_the_terminal_is_closed(folder, tmp_path, state):
    with chat(folder, env=state) as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        terminal.hang_up()
        assert terminal.process.wait(60) == 129
    (kept,) = (tmp_path / "state" / "llorch_jax").iterdir()
    assert text_of(folder, kept).startswith("Once")


def test_a_kill_loses_nothing_of_a_session_but_the_turn_under_way(folder, tmp_path):
    with chat(folder, "--session", tmp_path / "talk") as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        terminal.process.kill()
    with chat(folder, "--session", tmp_path / "talk") as terminal:
        terminal.until(r"loaded \d+ tokens" + PROMPT)
        terminal.send("/quit\n")
        assert terminal.finish()[0] == 0
    assert text_of(folder, tmp_path / "talk").startswith("Once")


REFUSED = r"error: .*(cannot be|regular file)"


def test_a_session_that_cannot_be_written_is_refused_before_the_first_prompt(folder):
    with chat(folder, "--session", "/dev/full") as terminal:
        code, seen = terminal.finish()
    assert code == 1
    assert re.search(REFUSED, seen)
    assert "> " not in seen


@pytest.mark.parametrize("name", ["/dev/null/talk", "no/such/folder/talk", "x" * 300])
def test_other_names_of_sessions_that_cannot_be_written_are_refused_at_the_start(folder, name, capfd):
    assert app.run(["chat", "--raw", "-m", str(folder), "--session", name]) == 1
    out, err = capfd.readouterr()
    assert re.search(REFUSED, err)
    assert "> " not in out


def test_a_session_that_cannot_be_written_any_more_is_kept_elsewhere(folder, tmp_path, state):
    place = tmp_path / "place"
    place.mkdir()
    with chat(folder, "--session", place / "talk", env=state) as terminal:
        terminal.until(PROMPT)
        terminal.send("Once\n")
        terminal.until(PROMPT)
        shutil.rmtree(place)
        terminal.send(" more\n")
        terminal.until("error: .*cannot be written.*" + PROMPT)
        terminal.send("/quit\n")
        code, seen = terminal.finish()
    assert code == 1
    (kept,) = (tmp_path / "state" / "llorch_jax").iterdir()
    assert f"the conversation was saved in {kept}" in seen
    assert " more" in text_of(folder, kept)
