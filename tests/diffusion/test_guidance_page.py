"""docs/guidance.md is true: every python block runs, and prints what the text block after it shows."""

import contextlib
import io
import re
from pathlib import Path

from offline_cai.diffusion import guidance

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "guidance.md").read_text(encoding="utf-8")


def test_the_page_prints_what_it_shows() -> None:
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") >= 6
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "guidance.md", "exec"), scope)
        assert out.getvalue().strip() == shown.strip()


def test_it_names_every_guide_and_its_picture_is_there() -> None:
    for name in set(guidance.GUIDES) - {"none"}:
        assert f"`{name}`" in PAGE
    assert all((DOCS / name).is_file() for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE))
