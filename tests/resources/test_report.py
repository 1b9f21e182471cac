"""Reports are self-contained, escape what they are given and repeat byte for byte."""

from __future__ import annotations

import struct

from resources.report import (
    badge,
    figure_png,
    html_report,
    image,
    new_figure,
    paragraph,
    preformatted,
    section,
    table,
)


def draw() -> bytes:
    figure = new_figure(4, 2)
    figure.subplots().plot([1, 2, 3], [3, 1, 2])
    return figure_png(figure, dpi=50)


def test_a_figure_is_a_png_of_its_size_and_repeats() -> None:
    png = draw()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (200, 100)
    assert png == draw()
    assert b"Software" not in png and b"matplotlib" not in png


def test_the_page_holds_everything_and_points_nowhere() -> None:
    page = html_report(
        "A <title>",
        [
            section("Part & one", "plain <b>", paragraph("para"), image(draw(), 'a "picture"')),
            section("Two", table([{"a": 1234, "b": 0.123456}], ["a", "b"]), preformatted("x <y>")),
        ],
        badge("PASS", True),
    )
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    for text in (
        "A &lt;title&gt;",
        "Part &amp; one",
        "plain &lt;b&gt;",
        "x &lt;y&gt;",
        "a &quot;picture&quot;",
        ">1,234<",
        ">0.1235<",
        'class="good"',
    ):
        assert text in page
    for outside in ("http:", "https:", "<script", "<link", "@import"):
        assert outside not in page


def test_cells_by_type() -> None:
    rows = [[None, True, False, badge("no", False), "<i>", 7]]
    html = table(rows, list("abcdef"))
    assert "<td>none</td><td>yes</td><td>no</td>" in html
    assert '<td><span class="bad">no</span></td><td>&lt;i&gt;</td>' in html
    assert '<td class="number">7</td>' in html
    assert '<th class="number">f</th>' in html and "<th>a</th>" in html
