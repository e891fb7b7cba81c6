"""What only a separate process shows: closed, full or abandoned streams, and compiled programs that are kept."""

import os
import signal
import subprocess
import sys

import pseudo_terminal
import pytest
import tiny

import llorch_jax as lj

PROMPT = "Once"
PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny.random_model()
    path = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return str(path)


def shell(line, folder, **environment):
    """Runs a line of shell in which `llorch` is the command: exit code, standard output, standard error."""
    command = f'llorch() {{ "{sys.executable}" -m llorch_jax "$@"; }}; {line}'
    found = subprocess.run(
        ["bash", "-c", command],
        env=pseudo_terminal.environment(MODEL=folder, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stdout, found.stderr


FULL = "error: standard output: No space left on device\n"
CLOSED = "error: standard output: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ('llorch generate Once -m "$MODEL" -n 4 >/dev/full', 1, FULL),
        ('llorch score Once -m "$MODEL" --json >/dev/full', 1, FULL),
        ('llorch inspect "$MODEL" >/dev/full', 1, FULL),
        ("llorch --help >/dev/full", 1, FULL),
        ('llorch inspect "$MODEL" >&-', 1, CLOSED),
        ('llorch generate Once -m "$MODEL" -n 4 >&-', 1, CLOSED),
        ('llorch generate - -m "$MODEL" <&-', 1, "error: standard input: cannot be read (Bad file descriptor)\n"),
        ('llorch inspect "$MODEL" 2>&-', 0, ""),
        ('llorch inspect "$MODEL/none" 2>/dev/full', 1, ""),
        ('llorch inspect "$MODEL" | true; exit ${PIPESTATUS[0]}', 141, ""),
        ('llorch generate Once -m "$MODEL" -n 60 | true; exit ${PIPESTATUS[0]}', 141, ""),
        ('llorch score Once -m "$MODEL" --json | true; exit ${PIPESTATUS[0]}', 141, ""),
    ],
)
def test_streams_that_are_closed_full_or_left_end_in_one_line_or_none(folder, line, code, err):
    found = shell(line, folder)
    assert (found[0], found[2]) == (code, err)


def test_characters_that_the_output_lacks_are_question_marks(folder):
    code, out, err = shell('llorch generate été -m "$MODEL" -n 1', folder, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert out.startswith("?t?")


def test_a_background_job_ignores_interrupts_as_its_shell_wants(folder):
    code = "from llorch_jax.cli import interrupts; import signal; interrupts.install(); print(signal.getsignal(2) == 1)"
    assert shell(f"trap '' INT; '{sys.executable}' -c '{code}'", folder) == (0, "True\n", "")  # SIG_IGN


def test_an_interrupted_conversion_leaves_no_half_model(folder, tmp_path):
    target = tmp_path / "new"
    code = (
        "import os, signal, sys; from llorch_jax import cli; from llorch_jax.loading import checkpoint;"
        "write = checkpoint.write_tensors;"
        "checkpoint.write_tensors = lambda *given: (write(*given), os.kill(os.getpid(), signal.SIGINT));"
        f"sys.argv = ['llorch-jax', 'convert', {folder!r}, {str(target)!r}]; cli.main()"
    )
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    found = subprocess.run(
        [sys.executable, "-c", code], env=pseudo_terminal.environment(), capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (128 + signal.SIGINT, "", "")
    assert not target.exists() or os.listdir(target) == []


def test_compiled_programs_are_kept(folder, tmp_path):
    environment = pseudo_terminal.environment(XDG_CACHE_HOME=str(tmp_path))
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "llorch_jax", "score", PROMPT, "-m", folder]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("perplexity ")
    assert any("_logprobs" in name for name in os.listdir(tmp_path / "llorch_jax" / "xla"))


def test_a_cache_of_programs_that_cannot_be_written_is_one_line(folder):
    code, out, err = shell('llorch score Once -m "$MODEL"', folder, JAX_COMPILATION_CACHE_DIR="/dev/null/xla")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("warning: compiled programs cannot be kept in /dev/null/xla (")
    assert out.startswith("perplexity ")
