"""The page: its style, and pictures and tables as HTML. It has no scripts and needs nothing outside itself."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from offline_cai import config

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #57534e; --line: #e7e5e4; --back: #fff; --box: #f5f5f4;
--mark: #faf5f0; --accent: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e5e4; --soft: #a8a29e; --line: #3f3f46; --back: #141416;
--box: #202024; --mark: #2a211c; --accent: #fb923c; } img.chart { filter: invert(.92) hue-rotate(180deg); } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 66rem;
margin: 2rem auto; padding: 0 1.1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem; } h2 { font-size: 1.3rem; margin-top: 2.6rem;
border-top: 1px solid var(--line); padding-top: 1rem; } h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p.score, ul.notes { background: var(--mark); border-left: 4px solid var(--accent); padding: .6rem .9rem; }
ul.notes { list-style: none; margin: 1rem 0; } ul.notes li { margin: .2rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem 1rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } .scores td, .scores th { white-space: nowrap; } .scores td:first-child { white-space: normal;
min-width: 8rem; } td.n, .scores th:not(:first-child) { text-align: right; } tr.over td { font-weight: 600; }
img { max-width: 100%; height: auto; } .wide img { min-width: 34rem; } figure { margin: 1rem 0; }
figcaption, .note { color: var(--soft); font-size: .88rem; } pre { background: var(--box); padding: .9rem;
overflow-x: auto; font-size: .82rem; line-height: 1.4; } summary { cursor: pointer; margin: .8rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .5rem 1rem; }
.grid figure { margin: 0; }
"""


def page(title: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def heading(level: int, text: str) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{html.escape(" ".join(text.split()))}</p>'


def notes(sentences: Sequence[str]) -> str:
    """Sentences in a box; nothing without any."""
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def picture(data: bytes, caption: str, kind: str = "chart", alt: str = "") -> str:
    """A PNG or GIF inside the page: a `chart` on white, which a dark page turns dark, or a `film`, left as it is.

    `alt` is for who does not see it; without it the caption says enough.
    """
    what = "gif" if data.startswith(b"GIF") else "png"
    encoded, text = base64.b64encode(data).decode(), html.escape(caption)
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    said = html.escape(alt) or text
    return f'<figure><img class="{kind}" alt="{said}" src="data:image/{what};base64,{encoded}">{below}</figure>'


def grid(pictures: Sequence[str]) -> str:
    """Pictures beside each other, as many as there is room for."""
    return f'<div class="grid">{"".join(pictures)}</div>'


def wide(content: str) -> str:
    """What scrolls by itself on a narrow screen instead of becoming too small to see."""
    return f'<div class="scroll wide">{content}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", over: Sequence[int] = ()) -> str:
    """A table in a box that scrolls by itself; rows numbered in `over` are set off."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = []
    for number, row in enumerate(rows):
        first, rest = html.escape(row[0]), "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in row[1:])
        style = ' class="over"' if number in over else ""
        lines.append(f"<tr{style}><td>{first}</td>{rest}</tr>")
    top = f"<tr>{top}</tr>" if any(head) else ""
    return f'<div class="scroll"><table class="{kind}">{top}{"".join(lines)}</table></div>'


def pairs(data: Mapping[str, Any]) -> str:
    """A mapping, nested ones with dotted names."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(number(value))}</td></tr>"
        for name, value in config.flatten(data)
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def details(summary: str, content: str) -> str:
    """What is folded away until it is asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
