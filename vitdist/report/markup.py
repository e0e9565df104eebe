"""Pieces of a page. Markup.format escapes every argument that is not Markup itself."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image


def html(template: str, *values: Any, **named: Any) -> Markup:
    """`template` with `values` put in, escaped."""
    return Markup(template).format(*values, **named)


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(part for part in parts if part)


def wrap(template: str, *parts: Markup) -> Markup:
    """`template` around what `parts` have to show; nothing around nothing."""
    inside = join(parts)
    return html(template, inside) if inside else Markup()


def section(title: str, *parts: Markup) -> Markup:
    name = title.lower().replace(" ", "-")
    opening = html('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>', name, title)
    return wrap(opening + Markup("{}</section>"), *parts)


def note(text: str) -> Markup:
    return wrap('<p class="note">{}</p>', html("{}", text))


def pair(*parts: Markup) -> Markup:
    """Side by side where there is room."""
    return wrap('<div class="pair">{}</div>', *parts)


def wide(inside: Markup) -> Markup:
    """What may be wider than the page, and is then scrolled by itself."""
    return wrap('<div class="wide" tabindex="0">{}</div>', inside)


def table(head: Sequence[str], body: Sequence[Sequence[Any]], caption: str, kind: str = "") -> Markup:
    """A table whose first cell in a row names the row; nothing without rows."""
    heads = join(html('<th scope="col">{}</th>', title) for title in head)
    lines = join(
        html('<tr><th scope="row">{}</th>{}</tr>', name, join(html("<td>{}</td>", cell) for cell in cells))
        for name, *cells in body
    )
    opening = html('<table class="{}"><caption>{}</caption><thead><tr>{}</tr></thead>', kind, caption, heads)
    return wrap(opening + Markup("<tbody>{}</tbody></table>"), lines)


def bar(share: float, text: str) -> Markup:
    """A value with a bar of `share` of the cell's width."""
    return html('<span class="bar" style="--share:{:.1f}%">{}</span>', 100 * share, text)


def folded(summary: str, inside: Markup) -> Markup:
    return html("<details><summary>{}</summary>{}</details>", summary, inside) if inside else Markup()


def listing(pairs: Iterable[tuple[str, Any]], kind: str = "facts") -> Markup:
    """Names and values; those without a value are left out."""
    lines = (html("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in pairs if value)
    return wrap(f'<dl class="{kind}">{{}}</dl>', *lines)


def command(title: str, *lines: str) -> Markup:
    return html('<h3>{}</h3><pre tabindex="0"><code>{}</code></pre>', title, "\n".join(lines))


def data_uri(picture: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
