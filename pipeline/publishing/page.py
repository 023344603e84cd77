"""Parts of a report's page, which needs no other file and suits dark, light and narrow screens."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --line: #8886; --back: #8882 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 68em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left }
tr { border-bottom: 1px solid var(--line) } td { font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } h1, h2 { overflow-wrap: anywhere }
.wide td:first-child { background: Canvas; left: 0; position: sticky }
.pictures { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(14em, 1fr)) }
figure { margin: 0 } img, svg { max-width: 100%; height: auto } img { image-rendering: pixelated }
pre { background: var(--back); padding: 1em; overflow-x: auto }
polyline { fill: none; stroke-width: 1.5 } text { fill: currentColor; font-size: 12px }
</style></head><body>
<h1>$title</h1>
<p>$state</p>
$body
</body></html>
"""
)
#: colours of runs that stand out from black and from white
COLOURS = ("#3b82f6", "#f97316", "#22a06b", "#d946ef", "#b8860b", "#e11d48", "#0891b2", "#7c6f64")
_WIDTH, _HEIGHT, _MARGIN = 680, 280, 48


def page(title: str, state: str, parts: Iterable[str]) -> bytes:
    """Return a page in UTF-8 with a title, a sentence and sections."""
    text = _PAGE.substitute(title=escape(title), state=escape(state), body="\n".join(parts))
    return text.encode()


def section(title: str, body: str) -> str:
    """Return a section of HTML."""
    return f"<h2>{escape(title)}</h2>\n{body}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text, with or without a head."""
    lines = [_line("th", head)] if head else []
    lines += [_line("td", row) for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def picture(path: Path) -> str:
    """Return an image with the bytes of a PNG file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/png;base64,{data}">'


def gallery(pictures: Iterable[tuple[str, Path]]) -> str:
    """Return captions with PNG files, in as many columns as the screen has room for."""
    figures = (
        f"<figure>{picture(path)}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, path in pictures
    )
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str) -> str:
    """Plot named lines of points (x, y); x starts at 0, and y spans the middle 98 % of values."""
    shown = [(name, points) for name, points in lines if points]
    if not shown:
        return "<p>No run has a log.</p>"
    values = sorted(y for _, points in shown for _, y in points)
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    span, right = (high - low) or 1.0, max(x for _, points in shown for x, _ in points) or 1.0
    parts = []
    for number, (name, points) in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(
            f"{_MARGIN + x / right * (_WIDTH - 2 * _MARGIN):.1f},"
            f"{_HEIGHT - _MARGIN - _inside((y - low) / span) * (_HEIGHT - 2 * _MARGIN):.1f}"
            for x, y in points
        )
        parts.append(f'<polyline points="{places}" stroke="{colour}"></polyline>')
        parts.append(
            f'<text x="{_WIDTH - _MARGIN}" y="{_MARGIN + 14 * number}" text-anchor="end" '
            f'style="fill: {colour}">{escape(name)}</text>'
        )
    for text, x, y in (
        (f"{high:.3g}", 2, _MARGIN), (f"{low:.3g}", 2, _HEIGHT - _MARGIN),
        (label, 2, 16), ("0", _MARGIN, _HEIGHT - 24),
        (f"step {right:g}", _WIDTH - _MARGIN - 60, _HEIGHT - 24),
    ):  # fmt: skip
        parts.append(f'<text x="{x}" y="{y}">{escape(text)}</text>')
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n{body}\n</svg>'


def _inside(share: float) -> float:
    return min(max(share, -0.05), 1.05)


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
