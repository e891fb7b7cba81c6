"""The layers of the package: imports go upwards in the table of docs/architecture.md, and nowhere else."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M)
LAYERS = {place: number for number, row in enumerate(ROWS) for place in re.findall(r"`([^`]+)`", row)}
FACADES = {"", "cache", "__main__"}  # they only hand on the names of others


def layer_of(module: str) -> int | None:
    """The row of a module such as cache/paged/arrays; None for a facade."""
    if module in FACADES:
        return None
    parts = module.split("/")
    found = [LAYERS[place] for n in (1, 2) if (place := "/".join(parts[:n])) in LAYERS]
    assert found, f"{module}: expected a row in docs/architecture.md, got none"
    return found[0]


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llorch_jax":
            base = node.module.replace(".", "/")
            under = [f"{base}/{alias.name}" for alias in node.names]
            names |= {each if (ROOT / f"{each}.py").exists() else base for each in under}
    return {name.removeprefix("llorch_jax").lstrip("/") for name in names}


def test_imports_go_upwards_only():
    wrong, modules = [], sorted((ROOT / "llorch_jax").rglob("*.py"))
    assert len(ROWS) > 10
    assert len(modules) > 50
    for path in modules:
        module = path.relative_to(ROOT / "llorch_jax").with_suffix("").as_posix().removesuffix("/__init__")
        module = "" if module == "__init__" else module
        layer = layer_of(module)
        for name in imports_of(path):
            other = layer_of(name)
            if layer is not None and other is not None and other > layer:
                wrong.append(f"{module} imports {name}, which is in a lower row")
    assert not wrong, "\n".join(wrong)
