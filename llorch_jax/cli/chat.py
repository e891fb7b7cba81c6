"""`llorch-jax chat`: a conversation in the terminal. The conversation itself is in `text.chat`."""

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from llorch_jax import __version__
from llorch_jax.cli import interrupts, lines, rescue
from llorch_jax.cli.loading import load_model
from llorch_jax.cli.options import explain
from llorch_jax.cli.terminal import note, show_bytes, waiting
from llorch_jax.cli.values import resolve
from llorch_jax.errors import ChatError, LlorchError
from llorch_jax.files import exists
from llorch_jax.params import count_params
from llorch_jax.text.chat import RAW, Chat, Template

HELP = '''\
/new          begin a new conversation
/regenerate   remove the last reply and draw another one
/undo         remove the last turn
/save FILE    save the conversation, with its cache
/load FILE    load a saved conversation
/fork [NAME]  continue in a copy; without a name, list the branches
/switch NAME  continue in another branch; the first one is main
/stats        tokens, memory and speed
/quit         quit; so does Ctrl-D. Ctrl-C ends a reply
"""           begins a text of several lines, which ends with another """'''
REPLY = 36  # cyan


class Terminal:
    """The branches of a conversation, and the commands that work on them."""

    def __init__(self, chat: Chat, max_new_tokens: int, session: Path | None = None) -> None:
        self.branches = {"main": chat}
        self.name = "main"
        self.max_new_tokens = max_new_tokens
        self.session = session
        self.saved: dict[str, list[int]] = {}  # tokens of each branch when it was last saved
        self.commands: dict[str, Callable[[str], None]] = {
            "/new": self.new,
            "/regenerate": self.regenerate,
            "/undo": self.undo,
            "/save": self.save,
            "/load": self.load,
            "/fork": self.fork,
            "/switch": self.switch,
            "/stats": self.stats,
            "/help": lambda _: note(HELP),
        }

    @property
    def chat(self) -> Chat:
        """The branch in use."""
        return self.branches[self.name]

    def greet(self) -> None:
        """Says which model this is and how to get help."""
        model = self.chat.model
        note(
            f"llorch_jax {__version__}: {model.name}, {count_params(model.params) / 1e6:.1f} million parameters, "
            f"a context of {self.chat.context} tokens"
        )
        note("/help lists the commands. Ctrl-C ends a reply, Ctrl-D leaves.")

    def run(self) -> None:
        """Reads and answers turns until /quit or the end of the input. Errors are shown and the conversation continues.

        Raises:
            Interrupted: by a signal other than SIGINT.
        """
        interactive = lines.is_interactive()
        while True:
            try:
                line = lines.read_turn()
                if line.strip() == "/quit":
                    return
                self.answer(line)
            except EOFError:
                if interactive:
                    interrupts.check_terminal()
                return
            except interrupts.Interrupted as interrupt:
                if interrupt.number != signal.SIGINT:
                    raise
                note("\n/quit or Ctrl-D leaves")
            except LlorchError as error:
                note(f"error: {explain(error)}", style="red")

    def answer(self, line: str) -> None:
        """Runs a command, or takes the line as a turn and prints the reply as it is generated."""
        command, _, argument = line.strip().partition(" ")
        if not command.startswith("/"):
            self.show(self.chat.reply(line, self.max_new_tokens))
        elif command in self.commands:
            self.commands[command](argument.strip())
        else:
            raise ChatError(f"expected one of {', '.join(self.commands)}, /quit; got {command}")

    def show(self, pieces: Generator[str, None, None]) -> None:
        """Prints a reply as it is generated. SIGINT ends it; the printed text stays part of the conversation.

        Raises:
            Interrupted: by a signal other than SIGINT.
        """
        with contextlib.closing(pieces):
            with waiting("preparing the reply"):
                first = next(pieces, "")
            try:
                self._print(first, pieces)
            except interrupts.Interrupted as interrupt:
                if interrupt.number != signal.SIGINT:
                    raise
        self._tell_ending()
        self.keep_up_to_date()

    def _print(self, first: str, pieces: Iterator[str]) -> None:
        start, end = (f"\x1b[{REPLY}m", "\x1b[0m") if lines.has_colors() else ("", "")
        # After "Assistant:" a reply begins with a space.
        print(start, first.lstrip(" ") if self.chat.template.after else first, sep="", end="", flush=True)
        try:
            interrupts.check()
            for piece in pieces:
                print(piece, end="", flush=True)
                interrupts.check()
        finally:
            print(end, flush=True)

    def _tell_ending(self) -> None:
        """Says why a reply ended if it may have been cut."""
        ended = self.chat.turns[-1].ended if self.chat.turns else None
        context = self.chat.context
        if ended == "length":
            note(f"[cut after {self.max_new_tokens} tokens, see --max-new-tokens]")
        elif ended == "context":
            note(f"[cut: the context of {context} tokens is full; /undo removes a turn, /new starts over]")
        elif ended == "closed":
            note("[interrupted]")

    def keep_up_to_date(self) -> None:
        """Writes the text of the conversation to the session's file, without its cache, which would take longer."""
        if self.session is not None:
            self.chat.save(self.session, with_cache=False)
            self.saved[self.name] = [*self.chat.tokens]

    def unsaved(self) -> dict[str, Chat]:
        """The branches with turns that have not been saved."""
        return {
            name: chat for name, chat in self.branches.items() if chat.turns and self.saved.get(name) != chat.tokens
        }

    def new(self, _: str) -> None:
        self.chat.new()
        note("a new conversation")

    def regenerate(self, _: str) -> None:
        self.show(self.chat.regenerate(self.max_new_tokens))

    def undo(self, _: str) -> None:
        self.chat.undo()
        note(f"removed a turn; {len(self.chat.tokens)} tokens are left")

    def save(self, name: str) -> None:
        self.chat.save(_path(name))
        self.saved[self.name] = [*self.chat.tokens]
        note(f"saved {len(self.chat.tokens)} tokens in {name}")

    def load(self, name: str) -> None:
        self.chat.load(_path(name))
        note(f"loaded {len(self.chat.tokens)} tokens")

    def fork(self, name: str) -> None:
        if not name:
            note(", ".join(f"{each} (here)" if each == self.name else each for each in self.branches))
            return
        if name in self.branches:
            raise ChatError(f"/fork: expected a new name for a branch, got {name}, which exists")
        self.branches[name] = self.chat.fork()
        self.switch(name)

    def switch(self, name: str) -> None:
        if name not in self.branches:
            raise ChatError(f"/switch: expected one of {', '.join(self.branches)}; got {name or 'no name'}")
        self.name = name
        note(f"in branch {name}")

    def stats(self, _: str) -> None:
        chat = self.chat
        context = chat.context
        note(f"{len(chat.tokens)} of {context} tokens; {chat.layout} cache of {show_bytes(chat.cache.memory_usage())}")
        turn = chat.turns[-1] if chat.turns else None
        if turn is None or turn.timings is None:
            note("no reply so far")
            return
        spent = turn.timings
        note(
            f"last turn: compiled for {spent.compile:.2f} s, {turn.prefilled} tokens prefilled in "
            f"{1000 * spent.prefill:.0f} ms, {turn.generated} generated at {spent.ms_per_token:.2f} ms/token"
        )


def _path(name: str) -> Path:
    if not name:
        raise ChatError("expected the name of a file, got none")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ChatError(f"expected the name of a file, got {name}, whose user is unknown") from None


def start(
    source: str,
    settings: dict[str, Any],
    max_new_tokens: int,
    system: str,
    roles: tuple[str, str] | None,
    session: Path | None,
) -> None:
    """Runs the command.

    Args:
        source: the model's source, as for `load`.
        settings: options of `Chat`.
        max_new_tokens: maximum number of new tokens per reply.
        system: the text at the start of the conversation.
        roles: names of the user and the model; None for none.
        session: file with the conversation, read first and written after every turn.

    Raises:
        LlorchError: a setting is invalid, or the session's file cannot be read or written.
    """
    model, _ = load_model(source, settings)
    template = RAW if roles is None else Template(f"\n{roles[0]}: ", f"\n{roles[1]}:", (f"\n{roles[0]}:",))
    chat = Chat(model, template, system=system, **resolve(settings, model.tokenizer))
    terminal = Terminal(chat, max_new_tokens, session)
    interrupts.take(signal.SIGTERM, signal.SIGHUP)
    with interrupts.mode(interrupts.Mode.KEEP), rescue.on_failure(terminal.unsaved):
        lines.use_history()
        terminal.greet()
        if session is not None and exists(session, ChatError):
            terminal.load(str(session))
        terminal.keep_up_to_date()  # fails at once if the file cannot be written
        try:
            terminal.run()
        finally:
            if session is not None:
                terminal.save(str(session))
