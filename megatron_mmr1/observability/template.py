"""The report's building blocks in HTML: page, section, card. One file, no script."""

from __future__ import annotations

from html import escape

from megatron_mmr1.observability.style import CSS


def page(title: str, body: str) -> str:
    """Return the whole HTML document; `body` is already HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    """Return a headed part of the page; `content` is already HTML."""
    return f'<h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{content}'


def card(title: str, content: str, note: str = "", legend: str = "", kind: str = "") -> str:
    """Return a titled box; `content` and `legend` are already HTML."""
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    head = f'<div class="head"><h3>{escape(title)}</h3><div class="legend">{legend}</div></div>'
    return f'<div class="card {kind}">{head}{content}{foot}</div>'


def legend_item(name: str, color: int, value: str = "") -> str:
    """Return a coloured square, a name and a value."""
    number = f" <b>{escape(value)}</b>" if value else ""
    return f'<span><i class="swatch c{color}"></i>{escape(name)}{number}</span>'


def empty(words: str) -> str:
    """Say in words why there is no plot."""
    return f'<div class="empty">{escape(words)}</div>'
