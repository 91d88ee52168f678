"""The parts of an HTML page that needs no other file: style, tables, charts as SVG, pictures as data."""

import base64
import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mona_mm.checkpoint.atomic import AtomicLocalBackend

INK = '#010203'
"""The colour that stands for that of the page's text in a chart: dark on a light page, light on a dark one."""

_STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #555; --line: #ddd; --page: #fff; --link: #06c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --quiet: #aaa; --line: #444; --page: #16181c; --link: #7ab8ff; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--page); }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
a { color: var(--link); }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
.scroll { overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 0 1.5rem; }
.charts > figure { min-width: 0; }
figure { margin: 1.2rem 0; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption, .note { color: var(--quiet); font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 4px;
  padding: .6rem .8rem; font-size: 12.5px; }
summary { cursor: pointer; color: var(--link); }
"""


def html_page(title: str, body: str) -> str:
    """The text of a page.

    Args:
        title: the title, as plain text.
        body: what follows the heading, as HTML.
    """
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def html_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], text_last: bool = True) -> str:
    """An HTML table.

    Args:
        columns: the head of each column and what it means, which is shown under the mouse.
        rows: the cells of each row as plain text.
        text_last: whether the last column is text, like the first one; all others are numbers.
    """

    def line(tag: str, cells: Iterable[str]) -> str:
        *others, last = cells
        text = ' class="text"' if text_last else ''
        return '<tr>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in others) + f'<{tag}{text}>{last}</{tag}></tr>'

    heads = (f'<span title="{html.escape(meaning)}">{html.escape(head)}</span>' for head, meaning in columns)
    lines = [line('th', heads), *(line('td', map(html.escape, row)) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def html_figure(content: str, caption: str) -> str:
    """A figure of a chart or picture, given as HTML, with a caption, given as plain text."""
    return f'<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>'


def html_picture(jpeg: bytes, description: str) -> str:
    """A JPEG file as an image within the page, with a description for those who do not see it."""
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(description)}">'


def jpeg_of(image: np.ndarray, quality: int = 85) -> bytes:
    """The bytes of a JPEG file of an image ``(H, W, 3)`` in BGR."""
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def chart_text(name: str, longest: int = 30) -> str:
    """A name as text of a chart, cut to ``longest`` characters.

    matplotlib takes what is between two dollar signs for a formula, and leaves names with an underscore before them out
    of legends.
    """
    text = name if len(name) <= longest else f'{name[: longest - 1]}\u2026'
    return (' ' if text.startswith('_') else '') + text.replace('$', r'\$')


@contextlib.contextmanager
def _without_font_warnings() -> Iterator[None]:
    """Suspend a warning for each character that the font of charts lacks, as in Chinese names of classes."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Glyph .* missing from')
        yield


def svg_of(chart: Figure) -> str:
    """The ``<svg>`` element of a chart; the same chart always has the same text, and :data:`INK` becomes the colour of
    the page's text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': 'mona_mm', 'svg.fonttype': 'none'}), _without_font_warnings():
        FigureCanvasSVG(chart).print_svg(buffer, metadata=dict(Date=None, Creator=None))
    text = buffer.getvalue().replace(INK, 'currentColor')
    return re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)


def save_png(chart: Figure, file: str | Path, dpi: int = 110) -> None:
    """Write a chart to a PNG file, completely or not at all; its folder is created if it does not exist."""
    buffer = io.BytesIO()
    with _without_font_warnings():
        FigureCanvasAgg(chart).print_figure(buffer, dpi=dpi)
    AtomicLocalBackend().put(buffer.getvalue(), file)
