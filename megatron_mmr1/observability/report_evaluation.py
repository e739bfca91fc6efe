"""`report.html` of an evaluation: numbers with intervals, by group, and answers to read.

Made from the folder's `summary.json` and `samples.jsonl` (evaluation/outcome.py and writers.py own
them) and small images. Whatever comes from a file is escaped before it enters the page.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_mmr1.observability.files import iter_lines, replacing
from megatron_mmr1.observability.template import card, empty, page, section

NUM_SHOWN = 10  # answers of each outcome
MAX_CHARACTERS = 20_000  # of a response
# An outcome, its heading, and its class in the style sheet.
_OUTCOMES = (
    ("wrong", "Wrong", "wrong"),
    ("correct", "Right", "correct"),
    ("unscored", "Unscored", "could_not_judge"),
)


def write_evaluation_report(folder: Path, thumbnails: Mapping[str, Sequence[bytes]]) -> Path:
    """Write the page and return its path.

    Args:
        folder: of one evaluation.
        thumbnails: by question id, small PNG or JPEG images; of some questions.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    title = f"{summary['name']} on {summary['benchmark']}"
    body = (
        _header(summary, title)
        + section("By group", _how_to_read(summary), _groups(summary))
        + section(
            "What does it say?",
            "The same questions for every model, as far as their outcome is the same. Strict "
            "outcomes; the response is folded.",
            _gallery(folder / "samples.jsonl", thumbnails),
        )
    )
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page(title, body), encoding="utf-8", errors="replace")
    return path


def percent(value: float | None) -> str:
    """A share as a percentage; "-" where there is none."""
    return "-" if value is None else f"{value:.1%}"


def interval(accuracy: Mapping[str, Any]) -> str:
    """The 95% interval of an accuracy in words."""
    if accuracy["low"] is None:
        return "no interval"
    return f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}%"


def bounds(accuracy: Mapping[str, Any]) -> str:
    """What holds whatever a judge would say of unscored answers."""
    return f"{100 * (accuracy['lowest'] or 0):.1f} to {100 * (accuracy['highest'] or 0):.1f}%"


def _header(summary: dict[str, Any], title: str) -> str:
    overall = summary["overall"]
    how = "greedy" if not summary["temperature"] else f"sampled at T={summary['temperature']:g}"
    details = [f"model {summary['model']}", f"data {summary['data']}", how]
    sub = " · ".join(escape(str(detail)) for detail in details)
    tiles = []
    for rule in ("strict", "compat"):
        accuracy = overall[rule]
        words = f"95% interval {interval(accuracy)}"
        if accuracy["num_unscored"]:
            words += f"; with the unscored, anywhere from {bounds(accuracy)}"
        tiles.append(_tile(f"Accuracy, {rule}", percent(accuracy["value"]), words, "wider"))
    unscored = overall["strict"]["num_unscored"]
    length = "-" if overall["mean_tokens"] is None else f"{overall['mean_tokens']:.0f}"
    tiles += [
        _tile(
            "Responses",
            f"{overall['num_responses']:,}",
            f"to {summary['num_questions']:,} questions; {summary['num_bad_rows']:,} rows set "
            f"aside; {unscored:,} unscored",
        ),
        _tile("Cut off", f"{overall['num_cut_off']:,}", "at the length limit"),
        _tile("Length", length, "tokens a response, on average"),
    ]
    return (
        f'<header><h1>{escape(title)}</h1><p class="sub">{sub}</p></header>'
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _tile(label: str, value: str, note: str, kind: str = "") -> str:
    return (
        f'<div class="card {kind}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _how_to_read(summary: dict[str, Any]) -> str:
    text = "Dots are strict accuracy, bars its 95% interval by bootstrap."
    if summary["benchmark"] == "mathverse":
        text += " The five versions of a problem are drawn together."
    if summary["overall"]["strict"]["num_unscored"]:
        text += " Unscored answers, which need a reader, are in no denominator."
    return text


def _groups(summary: dict[str, Any]) -> str:
    cards = [
        card(group, _table(values), kind="wide") for group, values in summary["groups"].items()
    ]
    if not cards:
        return f'<div class="card">{empty("The data has no groups.")}</div>'
    return f'<div class="stack">{"".join(cards)}</div>'


def _table(values: dict[str, Any]) -> str:
    names = ("answers", "strict", "95%", "compat", "unscored", "cut off")
    head = "<th></th><th></th>" + "".join(f'<th class="num">{name}</th>' for name in names)
    rows = []
    for value, numbers in values.items():
        strict, compat = numbers["strict"], numbers["compat"]
        cells = (
            f"{numbers['num_responses']:,}",
            percent(strict["value"]),
            interval(strict),
            percent(compat["value"]),
            f"{strict['num_unscored']:,}",
            f"{numbers['num_cut_off']:,}",
        )
        columns = "".join(f'<td class="num">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(value)}</td>{_range(strict)}{columns}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _range(accuracy: Mapping[str, Any]) -> str:
    spans = ""
    if accuracy["low"] is not None:
        left, width = 100 * accuracy["low"], 100 * (accuracy["high"] - accuracy["low"])
        style = f"left:{left:.2f}%;width:{width:.2f}%;background:var(--c0)"
        spans += f'<span class="gain" style="{style}"></span>'
    if accuracy["value"] is not None:
        spans += f'<span class="after" style="left:{100 * accuracy["value"]:.2f}%"></span>'
    return f'<td class="range"><div class="track">{spans}</div></td>'


def _gallery(samples: Path, thumbnails: Mapping[str, Sequence[bytes]]) -> str:
    """Choose by digest, those with an image first: a sample that does not depend on the model."""
    chosen: dict[str, list[tuple[bool, str, int, dict[str, Any]]]] = {}
    for number, line in enumerate(iter_lines(samples)):
        sample = json.loads(line)
        has_none = sample["question_id"] not in thumbnails
        key = (has_none, sample["digest"], number, sample)
        of_outcome = chosen.setdefault(sample["strict"]["outcome"], [])
        of_outcome.append(key)
        if len(of_outcome) > 2 * NUM_SHOWN:
            of_outcome.sort(key=lambda item: item[:3])
            del of_outcome[NUM_SHOWN:]
    parts = []
    for outcome, heading, kind in _OUTCOMES:
        shown = sorted(chosen.get(outcome, []), key=lambda item: item[:3])[:NUM_SHOWN]
        if shown:
            cards = [
                _answer(sample, kind, thumbnails.get(sample["question_id"], ()))
                for *_, sample in shown
            ]
            parts.append(f'<div class="stack"><h2>{heading}</h2>{"".join(cards)}</div>')
    return "".join(parts) or f'<div class="card">{empty("There is no response.")}</div>'


def _answer(sample: dict[str, Any], kind: str, images: Sequence[bytes]) -> str:
    shown = "".join(_image(data) for data in images)
    letters = (chr(ord("A") + number) for number in range(len(sample["choices"])))
    options = "".join(
        f"<dt>({letter})</dt><dd>{escape(str(choice))}</dd>"
        for letter, choice in zip(letters, sample["choices"], strict=True)
    )
    extracted = "(no box)" if sample["extracted"] is None else sample["extracted"]
    named = {
        "gold": sample["target"],
        "extracted": extracted,
        "compat": f"{sample['compat']['outcome']}, {sample['compat']['reason']}",
        "id": sample["question_id"],
    }
    named |= {group: ", ".join(values) for group, values in sample["groups"].items()}
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in named.items()
    )
    strict = sample["strict"]
    remarks = [strict["reason"]] + (["cut off"] if sample["is_cut_off"] else [])
    response = sample["resps"][0]
    cut = response[:MAX_CHARACTERS]
    if len(response) > len(cut):
        cut += f"\n... and {len(response) - len(cut):,} more characters"
    question = sample["question"] or "(the question is in the image)"
    return (
        '<div class="card"><div class="group">'
        f'<div><div class="images">{shown}</div></div><div>'
        f'<div class="question">{escape(question)}</div>'
        f"{f'<dl>{options}</dl>' if options else ''}<dl>{listed}</dl>"
        f'<div class="answers"><div class="answer {kind}"><div class="verdict"><span>'
        f"<b>{escape(strict['outcome'])}</b> · {escape(', '.join(remarks))}</span>"
        f"<span>{sample['num_tokens']:,} tokens</span></div>"
        f"<details><summary>response</summary><pre>{escape(cut) or '(empty response)'}</pre>"
        "</details></div></div></div></div></div>"
    )


def _image(data: bytes) -> str:
    is_png = data.startswith(b"\x89PNG")  # of a tiny image
    kind = ' class="pixels"' if is_png else ""
    encoded = base64.b64encode(data).decode("ascii")
    source = f"data:image/{'png' if is_png else 'jpeg'};base64,{encoded}"
    return f'<img{kind} alt="question image" src="{source}">'
