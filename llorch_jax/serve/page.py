"""The page at the server's root: a single file without dependencies."""

from pathlib import Path

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
