"""The matrix as a page: Markdown for the documents, HTML to look at. Loads nothing heavy."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mmr1.parity.bounds import (
    APART,
    BFLOAT16_BOUND,
    GRADIENT_BOUND,
    LOGPROB_BOUND,
    LOSS_BOUND,
)
from megatron_mmr1.parity.layouts import BATCH_KINDS, Layout
from megatron_mmr1.parity.matrix import Compared


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of a table; `is_good` is None where nothing is judged."""

    text: str
    is_good: bool | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table with a sentence that says what its figures are."""

    title: str
    words: str
    columns: list[str]
    rows: list[list[Entry]]


def is_good(compared: Compared) -> bool:
    """Whether a comparison came out as it must: within bounds, or, a control, outside them."""
    if compared.cell.control:
        return not _within(compared.hugging_face)
    if not compared.is_bit_for_bit:
        return False
    if compared.error is not None:
        assert compared.hugging_face_error is not None
        return 0 < compared.error <= BFLOAT16_BOUND * compared.hugging_face_error
    return _within(compared.hugging_face) and (
        compared.one_process is None or _within(compared.one_process, _room(compared.cell.layout))
    )


def tables(results: Sequence[Compared]) -> list[Table]:
    """Make the tables that there are results for."""
    exact = [r for r in results if not r.cell.control and r.error is None]
    made = []
    if exact:
        made.append(_exact_table(exact))
    rounded = [r for r in results if not r.cell.control and r.error is not None]
    if rounded:
        made.append(_rounded_table(rounded))
    controls = [r for r in results if r.cell.control]
    if controls:
        made.append(_control_table(controls))
    return made


def summary(results: Sequence[Compared]) -> str:
    """Say in a sentence how many comparisons came out as they must."""
    controls = [r for r in results if r.cell.control]
    others = [r for r in results if not r.cell.control]
    words = f"{sum(map(is_good, others))} of {len(others)} comparisons within bounds"
    if controls:
        words += f", {sum(map(is_good, controls))} of {len(controls)} negative controls caught"
    return words


def as_markdown(made: Sequence[Table]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for table in made:
        parts += [f"## {table.title}", "", table.words, ""]
        parts.append("| " + " | ".join(table.columns) + " |")
        parts.append("|---" * len(table.columns) + "|")
        for row in table.rows:
            parts.append("| " + " | ".join(_marked(entry) for entry in row) + " |")
        parts.append("")
    return "\n".join(parts)


def as_html(made: Sequence[Table], heading: str, words: str) -> str:
    """Return one self-contained page."""
    body = [f"<h1>{html.escape(heading)}</h1>", f"<p>{html.escape(words)}</p>"]
    for table in made:
        body.append(f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.words)}</p><table>")
        body.append("<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in table.columns) + "</tr>")
        body += ["<tr>" + "".join(_cell(entry) for entry in row) + "</tr>" for row in table.rows]
        body.append("</table>")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>{html.escape(heading)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; color: #1b1f24 }}
table {{ border-collapse: collapse; margin: 1rem 0 2rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #d8dee4; text-align: left }}
th {{ background: #f6f8fa }} .good {{ background: #dafbe1 }} .bad {{ background: #ffd8d3 }}
</style></head><body>{"".join(body)}</body></html>
"""


def _exact_table(results: Sequence[Compared]) -> Table:
    kinds = [k for k in BATCH_KINDS if any(r.kind == k for r in results)]
    rows = []
    for name in dict.fromkeys(r.cell.layout.name for r in results):
        mine = [r for r in results if r.cell.layout.name == name]
        by_kind = {r.kind: r for r in mine}
        row = [Entry(name), Entry(str(mine[0].cell.layout.num_ranks))]
        row += [_difference(by_kind[k].hugging_face) if k in by_kind else Entry("") for k in kinds]
        compared = [r.one_process for r in mine if r.one_process is not None]
        worst = {
            key: max(values[key] for values in compared)
            for key in ("logprob", "loss", "gradient")
            if compared
        }
        exported = all(r.is_bit_for_bit for r in mine)
        row.append(Entry("bit for bit" if exported else "DIFFERENT", exported))
        room = _room(mine[0].cell.layout)
        row.append(_difference(worst, room) if worst else Entry(""))
        rows.append(row)
    return Table(
        "Float32",
        "Largest difference of a response token's log-prob in nats, and of a gradient tensor in "
        "its norm (the worst of all tensors), against Hugging Face on the same sequences, "
        "unpacked. "
        f"Bounds: {LOGPROB_BOUND:g} and {GRADIENT_BOUND:g}; the loss differs by at most "
        f"{LOSS_BOUND:g}. Weights: Hugging Face -> Megatron -> Hugging Face, every tensor of the "
        "files once. The last column is the worst of the row against ours in one "
        "process (of a model of your own: twice the bounds).",
        ["layout", "processes", *kinds, "weights", "against one process"],
        rows,
    )


def _rounded_table(results: Sequence[Compared]) -> Table:
    rows = []
    for result in results:
        error, theirs = result.error, result.hugging_face_error
        assert error is not None and theirs is not None
        rows.append(
            [
                Entry(result.cell.layout.name),
                Entry(result.kind),
                Entry(f"{error:.2e}"),
                Entry(f"{theirs:.2e}"),
                Entry(f"{error / theirs:.2f}", is_good(result)),
            ]
        )
    return Table(
        "bfloat16",
        "Mean error of a log-prob against Hugging Face in float32, in nats: ours, Hugging Face's "
        f"own in bfloat16, and their ratio (bound {BFLOAT16_BOUND:g}).",
        ["layout", "batch", "our error", "Hugging Face's error", "ratio"],
        rows,
    )


def _control_table(results: Sequence[Compared]) -> Table:
    rows = []
    for result in results:
        found, caught = result.hugging_face, is_good(result)
        assert found is not None
        rows.append(
            [
                Entry(result.cell.control),
                Entry(result.cell.layout.name),
                Entry(f"{found['logprob']:.1e}"),
                Entry(f"{found['loss']:.1e}"),
                Entry(f"{found['gradient']:.1e}", None, found["worst_gradient"]),
                Entry("caught" if caught else "MISSED", caught),
            ]
        )
    return Table(
        "Negative controls",
        "Deliberately wrong variants, each a mistake that has been made elsewhere: the comparison "
        "must fail.",
        ["mistake", "layout", "log-prob", "loss", "gradient", ""],
        rows,
    )


def _room(layout: Layout) -> float:
    """How many bounds two outcomes of ours may be from one another."""
    return APART if layout.is_own_model else 1.0


def _difference(found: dict[str, object] | None, room: float = 1.0) -> Entry:
    assert found is not None
    text = f"{found['logprob']:.1e} / {found['gradient']:.1e}"
    return Entry(text, _within(found, room), str(found.get("worst_gradient", "")))


def _within(found: dict[str, object] | None, room: float = 1.0) -> bool:
    assert found is not None
    bounds = {"logprob": LOGPROB_BOUND, "loss": LOSS_BOUND, "gradient": GRADIENT_BOUND}
    return all(float(str(found[key])) <= room * bound for key, bound in bounds.items())


def _marked(entry: Entry) -> str:
    return f"**{entry.text} (out of bounds)**" if entry.is_good is False else entry.text


def _cell(entry: Entry) -> str:
    shade = {True: ' class="good"', False: ' class="bad"', None: ""}[entry.is_good]
    return f'<td{shade} title="{html.escape(entry.title)}">{html.escape(entry.text)}</td>'
