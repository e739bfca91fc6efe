"""`index.html` of an inspection: one file, no script. What comes from the data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_mmr1.inspection.charts import histogram, quartiles
from megatron_mmr1.inspection.contamination import RULES
from megatron_mmr1.inspection.findings import Findings
from megatron_mmr1.inspection.samples import Sample
from megatron_mmr1.observability.plots import show
from megatron_mmr1.observability.template import card, empty, page, section

MAX_LISTED = 200  # findings of a table; the JSON lines beside the page have all
MAX_IDS = 20  # of one reason
MAX_CHARACTERS = 2000  # of one text
KINDS = {"rl": "questions with a gold answer", "sft": "conversations"}


def html(found: Findings, row_ids: dict[int, str], samples: Sequence[Sample]) -> str:
    """Return the page.

    Args:
        row_ids: of the rows in `found.duplicates`.
    """
    name = Path(found.source).name
    body = (
        _header(found, name)
        + section(
            "What is in it?", "Usable rows. Bars name their range when pointed at.", _sizes(found)
        )
        + section(
            "What would training set aside?",
            "The checks are those of training." + _left_out(found),
            _bad_rows(found),
        )
        + section(
            "What is there twice?",
            "Rows with the same text (Unicode NFKC, white space collapsed) and the same pixels of "
            "all images. Rows of one set whose answers differ are counted as conflicts.",
            _duplicates(found, row_ids),
        )
        + section("Which benchmark questions are in it?", RULES, _pairs(found))
        + section(
            "What do rows look like?", "Drawn at random, bad ones among them.", _samples(samples)
        )
    )
    return page(f"Inspection of {name}", body)


def _header(found: Findings, name: str) -> str:
    part = "" if found.num_inspected == found.num_rows else f" of {found.num_rows:,}"
    checked = sum(count for count, _ in found.benchmarks.values())
    tiles = [
        ("Rows", f"{found.num_inspected:,}", f"inspected{part}"),
        ("Usable", f"{found.num_usable:,}", _share(found.num_usable, found.num_inspected)),
        ("Bad", f"{len(found.bad_rows):,}", _share(len(found.bad_rows), found.num_inspected)),
        ("Repeated", f"{found.num_same:,}", f"rows; {found.conflicts:,} sets with conflicts"),
        (
            "In benchmarks",
            f"{found.num_contaminated:,}" if found.benchmarks else "-",
            f"rows, against {checked:,} questions" if found.benchmarks else "none given",
        ),
    ]
    cards = "".join(
        f'<div class="card"><div class="label">{label}</div><div class="value">{value}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in tiles
    )
    style = "<style>.tiles{grid-template-columns:repeat(5,1fr)}td{vertical-align:top}</style>"
    return (
        f'{style}<header><h1>{escape(name)}</h1><p class="sub">{KINDS[found.kind]} · '
        f'{escape(found.source)}</p></header><div class="tiles">{cards}</div>'
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of the rows" if whole else ""


def _left_out(found: Findings) -> str:
    if found.has_model:
        return ""
    return (
        " Without --model those that need one are left out: lengths in tokens, and vision "
        "tokens or unknown ones in the text."
    )


def _sizes(found: Findings) -> str:
    cards = [
        card(name, histogram(values, name), quartiles(values))
        for name, values in found.sizes.items()
        if len(values)
    ]
    if found.answers:
        total = found.answers.total()
        rows = [(kind, f"{n:,}", show(n / total, True)) for kind, n in found.answers.most_common()]
        cards.append(card("answers", _table(("kind", "rows", "share"), rows)))
    return f'<div class="grid">{"".join(cards)}</div>' if cards else empty("No usable row.")


def _bad_rows(found: Findings) -> str:
    rows = [
        (reason, f"{len(bad):,}", bad[0].reason, _listed([row.row_id for row in bad]))
        for reason, bad in found.reasons()
    ]
    return _listing(("reason", "rows", "for example", "ids"), rows, "No row is bad.")


def _duplicates(found: Findings, row_ids: dict[int, str]) -> str:
    rows = [
        (f"{len(numbers):,}", _listed([row_ids[number] for number in numbers]))
        for numbers in found.duplicates
    ]
    return _listing(("rows", "ids"), rows, "No row is there twice.")


def _pairs(found: Findings) -> str:
    if not found.benchmarks:
        return f'<div class="card">{empty("No benchmark was given.")}</div>'
    read = [
        (name, f"{count:,}", f"{bad:,}", f"{_rows_of(found, name):,}")
        for name, (count, bad) in found.benchmarks.items()
    ]
    pairs = [(p.row_id, p.match.benchmark, p.match.question_id, p.match.how) for p in found.pairs]
    return _listing(
        ("benchmark", "questions", "bad ones", "rows of the data"), read, ""
    ) + _listing(("row", "benchmark", "question", "how"), pairs, "No row was found in a benchmark.")


def _rows_of(found: Findings, benchmark: str) -> int:
    return len({pair.number for pair in found.pairs if pair.match.benchmark == benchmark})


def _samples(samples: Sequence[Sample]) -> str:
    cards = []
    for row, thumbnails in samples:
        images = "".join(
            f'<img alt="image of the row" src="data:image/png;base64,{data}">'
            for data in thumbnails
        )
        facts = {"answer": row.answer, "tokens": row.num_tokens or "", "bad": row.reason}
        listed = "".join(
            f"<dt>{name}</dt><dd>{escape(_cut(str(value)))}</dd>"
            for name, value in facts.items()
            if value
        )
        cards.append(
            f'<div class="card"><div class="head"><h3>{escape(_cut(row.row_id))}</h3></div>'
            f'<div class="group"><div class="images">{images}</div><div>'
            f'<div class="question">{escape(_cut(row.question))}</div><dl>{listed}</dl>'
            "</div></div></div>"
        )
    return f'<div class="stack">{"".join(cards)}</div>'


def _listing(head: Sequence[str], rows: Sequence[Sequence[str]], words: str) -> str:
    if not rows:
        return f'<div class="card">{empty(words)}</div>'
    note = f"{MAX_LISTED} of {len(rows):,}." if len(rows) > MAX_LISTED else ""
    return f'<div class="stack">{card("", _table(head, rows[:MAX_LISTED]), note)}</div>'


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cut(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _listed(row_ids: Sequence[str]) -> str:
    more = f" and {len(row_ids) - MAX_IDS:,} more" if len(row_ids) > MAX_IDS else ""
    return ", ".join(row_id[:80] for row_id in row_ids[:MAX_IDS]) + more


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
