"""Small self-contained reports: one HTML file with its pictures inside, no script and no CDN.

In: tables, paragraphs and matplotlib figures. Out: bytes of a PNG, text of an HTML page. The same
input gives the same bytes, so that a report can be a DVC output: no clock, no library version.

    fig = new_figure(7, 3)
    fig.subplots().plot([1, 2], [3, 4])
    picture = image(figure_png(fig), "recall over k")
    page = html_report("Retrieval", [section("Recall", "What it is.", picture)])

Every helper escapes the text it is given; only what they return is HTML.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe-Ito: told apart by colour-blind readers. Blue, orange, green, vermilion, purple, grey.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#6b7280")

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#fff}
body{max-width:60rem;margin:2rem auto;padding:0 1rem}h1{font-size:1.6rem;margin:0 0 .4rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #e4e7eb}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;margin:.5rem 0}
th,td{padding:.3rem .7rem;border-bottom:1px solid #e4e7eb;text-align:left;vertical-align:top}
th{background:#f5f7fa}.number{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto}pre{background:#f5f7fa;padding:.6rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:44rem){.scroll img{max-width:none;width:42rem}
.scroll table{width:max-content;max-width:42rem}}
.good,.bad,.unsure{display:inline-block;padding:.05rem .5rem;border-radius:.3rem;font-weight:600}
.good{background:#d8f3e6;color:#05603a}.bad{background:#fde3d8;color:#932f00}.unsure{background:#fff1cc;color:#6b4e00}
"""


class Markup(str):
    """Text that is HTML already; a table cell of this type is not escaped again."""

    __slots__ = ()


def new_figure(width: float = 7.0, height: float = 3.2) -> Figure:
    """An empty figure (inches) without pyplot's global state, so that threads cannot mix them."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure_png(fig: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes (no software tag, no date)."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(fig)
    stream = io.BytesIO()
    fig.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def paragraph(text: str) -> Markup:
    """One paragraph of plain text."""
    return Markup(f"<p>{html.escape(text)}</p>")


def preformatted(text: str) -> Markup:
    """Text with its line breaks, in a fixed-width font."""
    return Markup(f"<pre>{html.escape(text)}</pre>")


def badge(text: str, good: bool | None) -> Markup:
    """A coloured word: green, red, or yellow when ``good`` is None."""
    kind = "unsure" if good is None else "good" if good else "bad"
    return Markup(f'<span class="{kind}">{html.escape(text)}</span>')


def image(png: bytes, alt: str) -> Markup:
    """A picture inside the page; ``alt`` says in words what it shows.

    On a telephone it keeps a width at which its letters can be read, and scrolls.
    """
    data = base64.b64encode(png).decode()
    picture = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    return Markup(f'<div class="scroll">{picture}</div>')


def table(rows: Iterable[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str]) -> Markup:
    """A table. Rows are mappings keyed by column name, or sequences in column order.

    Numbers and what heads them stand right-aligned, floats with four significant digits; None
    reads "none".
    """
    cells = [
        [row.get(name) for name in columns] if isinstance(row, Mapping) else list(row)
        for row in rows
    ]
    kinds = [
        _NUMBER if any(_is_number(row[at]) for row in cells) else "" for at in range(len(columns))
    ]
    head = "".join(
        f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True)
    )
    lines = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in cells)
    return Markup(f'<div class="scroll"><table><tr>{head}</tr>\n{lines}\n</table></div>')


_NUMBER = ' class="number"'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    """One table cell."""
    if isinstance(value, Markup):
        return f"<td>{value}</td>"
    if isinstance(value, bool) or value is None:
        return f"<td>{ {True: 'yes', False: 'no', None: 'none'}[value] }</td>"
    if isinstance(value, int):
        return f"<td{_NUMBER}>{value:,}</td>"
    if isinstance(value, float):
        return f"<td{_NUMBER}>{value:.4g}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def section(heading: str, *parts: str) -> Markup:
    """A heading and what stands below it. A part that is plain text becomes a paragraph."""
    body = "\n".join(part if isinstance(part, Markup) else paragraph(part) for part in parts)
    return Markup(f"<section><h2>{html.escape(heading)}</h2>\n{body}</section>")


def html_report(title: str, sections: Iterable[str], summary: str = "") -> str:
    """The whole page. ``summary`` is one line, text or a :func:`badge`, below the title."""
    line = summary if isinstance(summary, Markup) else paragraph(summary) if summary else ""
    body = "\n".join(part if isinstance(part, Markup) else paragraph(part) for part in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{line}\n{body}\n</body></html>\n"
    )
