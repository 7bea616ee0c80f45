"""HTML: elements, what the page is made of again and again, numbers for people, and the style."""

from __future__ import annotations

import base64
import html
import math
import struct
from collections.abc import Iterable, Mapping, Sequence

from fdm_jax.progress import significant
from fdm_jax.reporting.runs import Run

ABSENT = "–"
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}

# Browsers fetch nothing for the page, whatever a name in it may say.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already; other text is escaped on its way into an element."""


def element(tag: str, *content: str, **attributes: str | int | None) -> Html:
    """<tag attribute="...">content</tag>; a trailing _ of an attribute is dropped, None leaves it out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    start = f"<{tag}{written}>"
    return Html(start if tag in ("img", "meta") else f"{start}{joined(content)}</{tag}>")


def joined(content: Iterable[str]) -> Html:
    """One piece of HTML."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in content))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Html:
    """A table whose first ``words`` columns are words, and the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> Html:
        return element("tr", *(element(tag, c, class_="number" if i >= words else None) for i, c in enumerate(row)))

    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", element("thead", cells("th", head)), body), class_="table")


def note(*content: str) -> Html:
    """A paragraph in small print."""
    return element("p", *content, class_="note")


def section(title: str, *content: str) -> Html:
    """A section, or nothing if there is nothing in it."""
    return element("section", element("h2", title), *content) if any(content) else Html()


def picture(png: bytes, alt: str, class_: str | None = None) -> Html:
    """A PNG inside the page."""
    width, height = struct.unpack(">II", png[16:24])
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return element("img", src=source, alt=alt, width=width, height=height, class_=class_)


def swatch(run: Run) -> Html:
    """The line that the run has in the plots."""
    style = f"border-top: 3px {'solid' if run.momentum else 'dashed'} {run.colour}"
    return element("span", class_="swatch", style=style)


def named(run: Run) -> Html:
    """The run's name with its line."""
    return joined([swatch(run), " ", element("span", run.name, class_="name")])


def legend(runs: Iterable[Run], marks: Mapping[str, str] | None = None) -> Html:
    """Lines of runs, and marks of what else is told apart in a plot: {name: matplotlib's mark}."""
    entries = [named(run) for run in runs] + [joined([MARKS[mark], " ", name]) for name, mark in (marks or {}).items()]
    return element("ul", *(element("li", entry) for entry in entries), class_="legend")


def plot(png: bytes | None, title: str, key: Html, *caption: str) -> Html:
    """A plot with title, legend and caption; nothing if there is no picture."""
    if png is None:
        return Html()
    below = element("figcaption", *caption) if any(caption) else Html()
    return element("figure", element("h3", title), key, picture(png, title, "plot"), below)


# --- Numbers for people ---


def shown(value: float | None, deviation: float | None = None) -> str:
    """Four digits, or as many as the deviation allows."""
    if value is None:
        return ABSENT
    if deviation:
        digits = min(max(1 - math.floor(math.log10(abs(deviation))), 0), 8)
        return f"{value:.{digits}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.{digits}f}"
    return significant(value)


def counted(n: float) -> str:
    """80000 -> "80,000", 200000000 -> "200 M"."""
    return f"{n / 1e6:.4g} M" if n >= 10_000_000 else f"{n:,.0f}"


def duration(seconds: float | None) -> str:
    """5000 -> "1 h 23 min"."""
    if seconds is None:
        return ABSENT
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


# --- Style ---

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --ink: #1c2024; --soft: #5f6872; --line: #dde1e6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1d2125; --ink: #e6e9ec; --soft: #9aa4ae; --line: #343a41; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 16px 0 6px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin-top: 16px; }
.note, figcaption, small { color: var(--soft); font-size: 12.5px; }
.note { margin: 6px 0 0; max-width: 90ch; overflow-wrap: anywhere; }
small { display: block; }
.table { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 8px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { min-width: 140px; }
.number { text-align: right; }
td { overflow-wrap: anywhere; }
td.number { overflow-wrap: normal; }
.swatch { display: inline-block; width: 20px; height: 0; vertical-align: 4px; }
.name { font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 4px 0 8px; font-size: 13px; }
.legend .name { font-weight: 400; overflow-wrap: anywhere; }
figure { margin: 0 0 20px; }
figcaption { margin-top: 4px; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
.plot { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
.plot[width="1600"] { width: 100%; }
.plot[width="960"] { width: 60%; }
.grids { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 10px; }
.grids.last { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.grids figure { margin: 0 0 8px; }
.grids img { width: 100%; border-radius: 3px; }
img.last { image-rendering: pixelated; }
details { margin-top: 8px; }
summary { cursor: pointer; }
"""
