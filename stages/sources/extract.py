"""HTML, DOCX and PDF to text. Runs in a child process (stages.sources.sandbox) and nowhere else.

In: the bytes of one file. Out: its text, and its title where the file itself has one. Raises
Unreadable with the reason, or whatever the library raises.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

from stages.sources.containers import refuse_bomb
from stages.sources.files import Limits, reason

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

#: What a reader of the page does not read.
DROPPED = ("script", "style", "noscript", "template", "svg", "nav", "head", "iframe")
#: A DOCX may unpack to 64 MiB of XML.
DOCX = Limits(max_bytes=4 << 20)
TITLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => p:fresh"


class Unreadable(Exception):
    """A file without usable text; the message is the reason."""


def extract(kind: str, data: bytes) -> tuple[str, str | None]:
    """(text, title or None) of a file of kind html, docx or pdf."""
    text, title = {"html": html, "docx": docx, "pdf": pdf}[kind](data)
    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    title = " ".join((title or "").replace("\0", "").encode("utf-8", "replace").decode().split())
    if not text.strip():
        raise Unreadable(f"no text in this {kind} file")
    return text, title or None


def html(data: bytes) -> tuple[str, str | None]:
    """Markdown of the page's main part."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(_decoded(data), "lxml")
    title = soup.title.get_text() if soup.title else None
    for tag in soup.find_all(DROPPED):
        tag.decompose()
    for tag in soup.select("[role=navigation], [hidden]"):
        tag.decompose()
    mains = soup.select("main, [role=main]")
    return _markdown(mains[0] if len(mains) == 1 else soup), title


def _decoded(data: bytes) -> str:
    """The page's characters: UTF-8 where they are, else what the page declares.

    Without this, bs4 asks whichever guessing library is installed, and the text depends on it.
    """
    from bs4.dammit import EncodingDetector

    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    declared = EncodingDetector.find_declared_encoding(data, is_html=True) or "windows-1252"
    try:
        return data.decode(declared, "replace")
    except LookupError:
        return data.decode("windows-1252", "replace")


def _markdown(node: BeautifulSoup | Tag) -> str:
    from markdownify import MarkdownConverter

    converter: Any = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        strip=["img"],
        escape_asterisks=False,
        escape_underscores=False,
        table_infer_header=True,
    )
    text: str = converter.convert_soup(node)
    lines = (line.rstrip() for line in text.strip().splitlines())
    return "\n".join(lines) + "\n"


def docx(data: bytes) -> tuple[str, str | None]:
    """Markdown of the document's body, by way of HTML."""
    import mammoth

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        total = sum(item.file_size for item in archive.infolist())
    refuse_bomb(total, len(data), DOCX, "the file")
    page = mammoth.convert_to_html(
        io.BytesIO(data), style_map=TITLES, convert_image=mammoth.images.img_element(_no_image)
    )
    text, _ = html(page.value.encode())
    return text, None


def _no_image(image: object) -> dict[str, str]:
    return {"src": ""}


def pdf(data: bytes) -> tuple[str, str | None]:
    """The text of every page, an empty line between pages; no layout, no OCR."""
    from pypdf import PdfReader

    if b"%PDF-" not in data[:1024]:
        raise Unreadable("not a PDF: no %PDF- at its beginning")
    if b"%%EOF" not in data[-4096:]:
        raise Unreadable("truncated: no %%EOF at its end")
    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("encrypted: it asks for a password")
    pages = []
    for number, page in enumerate(reader.pages, 1):
        try:
            pages.append(page.extract_text())
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # pypdf raises KeyError, TypeError and more on broken objects
            raise Unreadable(f"page {number}: {type(error).__name__}: {reason(error)}") from error
    if not any(page.strip() for page in pages):
        raise Unreadable(f"no text on its {len(pages)} pages: images only")
    return "\n\n".join(page.strip() for page in pages) + "\n", _pdf_title(reader)


def _pdf_title(reader: Any) -> str | None:
    try:
        title = reader.metadata.title if reader.metadata else None
        return str(title) if title else None
    except Exception:  # a broken information dictionary costs the title, not the text
        return None
