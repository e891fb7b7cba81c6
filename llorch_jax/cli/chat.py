"""The command `llorch-jax chat`: a conversation in the terminal. What a conversation is, is in `chat`."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llorch_jax.cli.terminal import messages, show_bytes, waiting
from llorch_jax.errors import ChatError, LlorchError
from llorch_jax.text.chat import RAW, Chat, Template

HELP = """\
/save FILE    write the conversation, with its cache
/load FILE    go on with one that was written
/fork [NAME]  go on in a copy; without a name, list the branches
/switch NAME  go on in another branch; the first one is main
/undo         take back the last turn
/stats        tokens, memory, speed
/quit         leave; so does Ctrl-D. Ctrl-C ends a reply"""


class Terminal:
    """Branches of a conversation, and the commands on them."""

    def __init__(self, chat: Chat, max_new_tokens: int) -> None:
        self.branches, self.name, self.max_new_tokens = {"main": chat}, "main", max_new_tokens
        self.commands: dict[str, Callable[[str], None]] = {
            "/save": self.save,
            "/load": self.load,
            "/fork": self.fork,
            "/switch": self.switch,
            "/undo": self.undo,
            "/stats": self.stats,
            "/help": lambda _: tell(HELP),
        }

    @property
    def chat(self) -> Chat:
        """The branch in use."""
        return self.branches[self.name]

    def run(self) -> None:
        """Reads lines and answers them until /quit or the end of the input. Errors are told; the conversation stays."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` line editing and a history
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                tell("\n/quit or Ctrl-D leaves")
                continue
            if line.strip() == "/quit":
                return
            try:
                self.answer(line)
            except KeyboardInterrupt:
                print(flush=True)
            except LlorchError as error:
                messages.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def answer(self, line: str) -> None:
        """Runs a command, or takes the line as a turn and prints the reply as it comes."""
        command, _, argument = line.strip().partition(" ")
        if command.startswith("/"):
            if command not in self.commands:
                raise ChatError(f"expected one of {', '.join(self.commands)}, /quit; got {command}")
            self.commands[command](argument.strip())
            return
        pieces = self.chat.reply(line, self.max_new_tokens)
        with contextlib.closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
        print(flush=True)

    def save(self, name: str) -> None:
        self.chat.save(_path(name))
        tell(f"saved {len(self.chat.tokens)} tokens in {name}")

    def load(self, name: str) -> None:
        self.chat.load(_path(name))
        tell(f"loaded {len(self.chat.tokens)} tokens")

    def fork(self, name: str) -> None:
        if not name:
            tell(", ".join(f"{each} (here)" if each == self.name else each for each in self.branches))
            return
        if name in self.branches:
            raise ChatError(f"expected a new name for a branch, got {name}, which there is")
        self.branches[name] = self.chat.fork()
        self.switch(name)

    def switch(self, name: str) -> None:
        if name not in self.branches:
            raise ChatError(f"expected one of {', '.join(self.branches)}; got {name or 'no name'}")
        self.name = name
        tell(f"in branch {name}")

    def undo(self, _: str) -> None:
        self.chat.undo()
        tell(f"took back a turn; {len(self.chat.tokens)} tokens are left")

    def stats(self, _: str) -> None:
        chat, of = self.chat, self.chat.stats
        used, context = len(chat.tokens), chat.model.config.n_positions
        tell(
            f"{used} of {context} tokens; {chat.layout} cache of {show_bytes(chat.cache.memory_usage())}\n"
            f"last turn: {of['prefilled']} tokens prefilled in {of['prefill_ms']:.0f} ms, {of['generated']} generated "
            f"at {of['ms_per_token']:.2f} ms"
        )


def tell(text: str) -> None:
    """Prints what is no part of the conversation."""
    messages.print(text, style="dim", markup=False, soft_wrap=True)


def _path(name: str) -> Path:
    if not name:
        raise ChatError("expected the name of a file, got none")
    return Path(name).expanduser()


def start(load: Callable[[str], Any]) -> Callable[..., None]:
    """The command; `load` gives the model of a name."""

    def chat(
        model: Annotated[str, typer.Option("--model", "-m", help="demo, a directory, or a hub id.")] = "demo",
        cache: Annotated[str, typer.Option(help="Layout of the KV cache, as for generate.")] = "static",
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Of a reply, at most.")] = 128,
        temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
        top_k: Annotated[int | None, typer.Option(help="Draw from so many most likely tokens.")] = None,
        top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that reach this probability.")] = None,
        repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repetitions are rarer.")] = None,
        seed: Annotated[int, typer.Option(help="The same seed and words give the same replies.")] = 0,
        system: Annotated[str, typer.Option(help="A text that the conversation begins with.")] = "",
        user: Annotated[str, typer.Option(help="The user's role.")] = "User",
        assistant: Annotated[str, typer.Option(help="The model's role.")] = "Assistant",
        raw: Annotated[bool, typer.Option("--raw", help="No roles: the model goes on with the text.")] = False,
        session: Annotated[Path | None, typer.Option(help="Load this file if it is there; save it in the end.")] = None,
    ) -> None:
        """Talk with a model, or write a text in turns; /help tells the commands."""
        if max_new_tokens < 1:
            raise ChatError(f"--max-new-tokens: expected 1 or more, got {max_new_tokens}")
        template = RAW if raw else Template(f"\n{user}: ", f"\n{assistant}:", (f"\n{user}:",))
        with waiting(f"loading {model}"):
            loaded = load(model)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        settings["repetition_penalty"] = repetition_penalty
        terminal = Terminal(Chat(loaded, template, cache=cache, system=system, **settings), max_new_tokens)
        if session is not None and session.exists():
            terminal.load(str(session))
        terminal.run()
        if session is not None:
            terminal.save(str(session))

    return chat
