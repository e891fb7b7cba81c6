"""The page at the root of the server: one file without dependencies."""

from pathlib import Path

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
