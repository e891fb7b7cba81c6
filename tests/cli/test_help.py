"""What --help shows at 80 columns: nothing cut off, every option explained; and what it costs."""

import re
import subprocess
import sys

import pseudo_terminal
import pytest
import typer

from llorch_jax import __version__
from llorch_jax.cli import options
from llorch_jax.cli.app import app
from llorch_jax.sampling.settings import SETTINGS

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


def help_of(monkeypatch, capsys, *command):
    """The help text at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        app([*command, "--help"], prog_name="llorch-jax")
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_shows_every_option_in_full_within_80_columns(monkeypatch, capsys, command):
    text = help_of(monkeypatch, capsys, *([] if command is None else [command]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for parameter in (GROUP if command is None else GROUP.commands[command]).params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("-"):
                assert re.search(rf"(?m)^│[^│]*(?<![-\w]){name}(?![-\w])", text), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence(command):
    for parameter in GROUP.commands[command].params:
        if parameter.name != "help":
            assert re.fullmatch(r"\S.*\.", parameter.help), (command, parameter.name)


def test_the_commands_share_one_set_of_sampling_options():
    shared = {
        setting.name for panel in ("Sampling", "Penalties", "Length and ending") for setting in options.PANELS[panel]
    }
    assert {*SETTINGS} | {"top_k", "top_p", "temperature"} <= shared  # all that the library has
    for command in ("generate", "chat"):
        assert shared <= {parameter.name for parameter in GROUP.commands[command].params}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("top_k: expected whole numbers, got 0", "--top-k: expected whole numbers, got 0"),
        ("stop_ids: expected ids in 0 .. 7", "--stop-id: expected ids in 0 .. 7"),
        (
            "xtc_threshold: expected together with xtc_probability",
            "--xtc-threshold: expected together with --xtc-probability",
        ),
        ("seed: expected a number; the seed counts", "--seed: expected a number; the seed counts"),
        ("my_top_k/stop: missing", "my_top_k/stop: missing"),
    ],
)
def test_errors_name_options(message, shown):
    assert options.explain(ValueError(message)) == shown


def test_version_help_and_wrong_usage_do_not_load_jax():
    code = (
        "import sys; from llorch_jax.cli.app import run; code = run(sys.argv[1:]);"
        "print('jax' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    for arguments, expected in ((["--version"], 0), (["chat", "--help"], 0), (["generate", "--nonsense"], 2)):
        found = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=pseudo_terminal.environment(), capture_output=True, text=True
        )
        assert (found.returncode, found.stderr.splitlines()[-1]) == (expected, "False")
        if arguments == ["--version"]:
            assert found.stdout == f"llorch-jax {__version__}\n"


def test_shells_complete_commands_and_options():
    asked = {"_LLORCH_JAX_COMPLETE": "complete_bash", "COMP_WORDS": "llorch-jax gen", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "llorch_jax"]
    found = subprocess.run(command, env=pseudo_terminal.environment(**asked), capture_output=True, text=True)
    assert found.stdout.split() == ["generate"]
    asked |= {"COMP_WORDS": "llorch-jax generate --top", "COMP_CWORD": "2"}
    found = subprocess.run(command, env=pseudo_terminal.environment(**asked), capture_output=True, text=True)
    assert set(found.stdout.split()) >= {"--top-k", "--top-p"}
