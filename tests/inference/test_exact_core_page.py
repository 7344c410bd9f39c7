"""docs/exact-core.md is true: every python block runs, and prints what the text block after it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_prints_what_it_shows():
    page = (DOCS / "exact-core.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    scope: dict[str, object] = {}
    shown = 0
    printed = ""
    for language, body in blocks:
        if language == "python":
            assert printed == "", "a python block that prints is followed by a text block"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(body, "exact-core.md", "exec"), scope)
            printed = out.getvalue()
        elif language == "text":
            assert body.strip() == printed.strip()
            printed, shown = "", shown + 1
    assert printed == ""
    assert shown >= 5


def test_every_picture_and_test_that_the_page_names_exists():
    page = (DOCS / "exact-core.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert "lottery.png" in pictures
    assert all((DOCS / name).is_file() for name in pictures)
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert tests
    for path, name in tests:
        source = DOCS.parent / path
        assert source.is_file(), path
        assert not name or f"def {name}(" in source.read_text(encoding="utf-8"), f"{path}::{name}"
