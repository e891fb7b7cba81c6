"""Every block of code on every page runs as it stands, or says on the page why the tests do not run it.

A block of Python starts from nothing. In `console` blocks, lines after `$ ` are commands and what follows is what they
print; `cat FILE` shows a file that the next commands read. Blocks of `text` are pictures and output.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from llorch_jax.cli import app, loading
from llorch_jax.loading import checkpoint

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.M)


@pytest.fixture(autouse=True)
def demo(short_demo, monkeypatch):
    """Pages show calls, not what the demo model says."""
    if short_demo != "demo":
        monkeypatch.setattr(checkpoint, "__file__", str(short_demo.parents[1] / "loading" / "checkpoint.py"))


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("code")) + 1
        found.append(Block(page, line, fence["language"], fence["code"], fence["reason"]))
    assert 2 * len(found) == len(re.findall(r"^```", text, re.M)), f"{page.name}: a block that is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def chosen(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and block.reason is None]


def commands_of(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block; the files that it shows are written."""
    commands = []
    shown: Path | None = None
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            if shown:
                shown.write_text(shown.read_text() + line + "\n")
            continue
        shown = None
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["cat"]:
            shown = folder / words[1]
            shown.write_text("")
        elif words:
            commands.append(words)
    return commands


def test_every_block_says_what_it_is():
    for block in BLOCKS:
        known = ("python", "sh", "console", "text", "json", "ini", "dockerfile", "nginx")
        assert block.language in known, f"{block}: expected one of {', '.join(known)}, got {block.language!r}"
    assert len(chosen("python")) >= 10
    assert len(chosen("sh", "console")) >= 3


@pytest.mark.parametrize("block", chosen("python"), ids=str)
def test_python_runs_as_pasted(block, tmp_path, monkeypatch):
    if re.search(r"constraint|regex=|json_schema=", block.code):
        pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    code = "\n" * (block.line - 1) + block.code  # tracebacks name the page's line
    exec(compile(code, block.page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", chosen("sh", "console"), ids=str)
def test_commands_run_as_pasted(block, tmp_path, monkeypatch, capsys):
    if re.search("--regex|--grammar|--json-schema", block.code):
        pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "enable_compilation_cache", lambda: None)  # a setting of the whole process
    commands = commands_of(block, tmp_path)
    assert commands
    for words in commands:
        assert words[0] == "llorch-jax", f"{block}: expected llorch-jax, or a reason why it is not run, got {words}"
        code = app.run(words[1:])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert captured.out or captured.err


def names_of_tests(path: Path) -> set[str]:
    """The tests of a file, those of classes as Class::test."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def test_every_promise_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(rows) >= 30
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::([\w:]+)`", row)
        assert named, f"expected a test that holds the promise: {row}"
        for file, test in named:
            assert test in names_of_tests(ROOT / "tests" / file), f"{file}: expected {test} of the page"
