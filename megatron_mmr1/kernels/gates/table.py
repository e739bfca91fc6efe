"""A gate's result, and all of them as tables."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SLACK = 1.01  # of "~": a target's own access, banned columns, a sequence's few scalars


def _is_near(found: float, limit: float) -> bool:
    """No less either: then something was not counted."""
    return limit <= found <= limit * SLACK


_SIGNS = {"<=": operator.le, "==": operator.eq, ">=": operator.ge, "~": _is_near}
_INTRODUCTION = """\
# Gates of the GRPO kernels

Written by `make kernel-gates`, on a machine without a GPU. {versions}.

Machine code is that of `triton_form.py`'s own launches, compiled for each architecture; bytes and
launches are counted in Triton's interpreter. Nothing here is a time.

Cells: {places}, or one number where they agree. A variant is a kernel and the
call that launches it first.
"""
_NOTES = """\
Instructions a logit: of the loop over whole tiles, over the logits that a thread takes in each
round; the forward and the backward loop's summed. Without an entropy bonus GRPO still reports the
entropy, so its forward loop makes it; a given gradient without entropy leaves it out.

Bytes are those that the kernels ask for; ~ allows 1% above, and nothing below. The fused kernel
reads a row twice: 6 bytes a bf16 logit, of which memory moves 4 when the row stays in the L2 cache
between the reads (0.3 MB a row of 152,064). The same holds of the second read of ratio "sequence".
Atomics are not counted.
"""


@dataclass(frozen=True, slots=True)
class Gate:
    """One number against its limit.

    Attributes:
        subject: what was measured: a kernel's variant, or a path of several kernels.
        name: of the quantity.
        place: where: an architecture, or how it was counted.
        is_control: made bad on purpose: good when out of the limit.
    """

    subject: str
    name: str
    place: str
    found: float
    sign: str
    limit: float
    is_control: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the number is as it should be."""
        return _SIGNS[self.sign](self.found, self.limit) != self.is_control

    @property
    def bound(self) -> str:
        """The limit with its sign."""
        return f"{self.sign} {self.limit:g}"

    @property
    def verdict(self) -> str:
        """OK or FAIL; of a control, whether it was caught."""
        if self.is_control:
            return "FAIL, as it should" if self.is_good else "NOT CAUGHT"
        return "OK" if self.is_good else "FAIL"


def as_markdown(gates: Sequence[Gate], versions: str) -> str:
    """Return all results: machine code pivoted by variant, the rest and the controls as lists."""
    code = [g for g in gates if g.place.startswith("sm_") and not g.is_control]
    others = [g for g in gates if not g.place.startswith("sm_") and not g.is_control]
    places = " / ".join(dict.fromkeys(g.place for g in code))
    parts = [_INTRODUCTION.format(versions=versions, places=places)]
    parts += ["## Machine code\n", *_pivots(code)]
    parts += ["## Counted\n", _list(others)]
    parts += ["## Controls\n\nMade bad on purpose; each must fail its gate.\n"]
    parts += [_list([g for g in gates if g.is_control]), _NOTES]
    return "\n".join(parts)


def summary(gates: Sequence[Gate]) -> str:
    """Return one line on all of them."""
    bad, controls = [g for g in gates if not g.is_good], sum(g.is_control for g in gates)
    return f"{len(gates) - controls} gates, {controls} controls: {len(bad) or 'none'} out of bounds"


def _pivots(gates: Sequence[Gate]) -> list[str]:
    """Return a table for every set of gates that subjects share: subjects down, gates across."""
    subjects: dict[str, dict[str, list[Gate]]] = {}
    for gate in gates:
        column = f"{gate.name} {gate.bound}"
        subjects.setdefault(gate.subject, {}).setdefault(column, []).append(gate)
    columns_of: dict[tuple[str, ...], list[str]] = {}
    for subject, cells in subjects.items():
        columns_of.setdefault(tuple(cells), []).append(subject)
    return [
        _table(["variant", *columns], ([s, *map(_cell, subjects[s].values())] for s in names))
        for columns, names in columns_of.items()
    ]


def _cell(gates: Iterable[Gate]) -> str:
    shown = [f"{g.found:.4g}" if g.is_good else f"**{g.found:.4g} FAIL**" for g in gates]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def _list(gates: Iterable[Gate]) -> str:
    rows = ([g.subject, g.name, g.place, f"{g.found:.4g}", g.bound, g.verdict] for g in gates)
    return _table(["what", "gate", "where", "found", "limit", "verdict"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
