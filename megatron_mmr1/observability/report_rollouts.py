"""The report's responses: what was asked, what the model said, what the verifier made of it."""

from __future__ import annotations

import base64
import binascii
import struct
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_mmr1.observability.plots import show
from megatron_mmr1.observability.rollouts import iter_rollouts, rollout_steps
from megatron_mmr1.observability.template import empty

NUM_GROUPS = 3
NUM_ROLLOUTS = 4
PIXEL_ART_LIMIT = 128  # images at most this wide are enlarged without blurring


def rollout_cards(run_dir: Path) -> str:
    """Show the first groups of the last and the first step whose rollouts were kept."""
    steps = rollout_steps(run_dir)
    if not steps:
        return f'<div class="card">{empty("No rollouts were kept.")}</div>'
    names = {steps[0]: "first"} | {steps[-1]: "last"}
    cards = []
    for step in sorted(names, reverse=True):
        cards += [
            _group_card(group, f"Step {step} ({names[step]})")
            for group in islice(iter_rollouts(run_dir, step), NUM_GROUPS)
        ]
    return f'<div class="stack">{"".join(cards)}</div>'


def _group_card(group: dict[str, Any], when: str) -> str:
    rollouts = group["rollouts"]
    num_correct = sum(rollout["outcome"] == "correct" for rollout in rollouts)
    images = "".join(_image(encoded) for encoded in group["images"])
    names = {"answer": "gold answer", "category": "category", "prompt_id": "id"}
    listed = "".join(
        f"<dt>{name}</dt><dd>{escape(str(group[key]))}</dd>"
        for key, name in names.items()
        if group[key]
    )
    answers = "".join(_answer(rollout) for rollout in rollouts[:NUM_ROLLOUTS])
    others = "".join(_answer(rollout) for rollout in rollouts[NUM_ROLLOUTS:])
    if others:
        summary = f"{len(rollouts) - NUM_ROLLOUTS} more responses"
        others = (
            f'<details><summary>{summary}</summary><div class="answers">{others}</div></details>'
        )
    return (
        f'<div class="card"><div class="head"><h3>{escape(when)}</h3><div class="legend">'
        f"{num_correct} of {len(rollouts)} correct</div></div>"
        f'<div class="group"><div><div class="images">{images}</div>'
        f'<div class="question">{escape(group["question"])}</div><dl>{listed}</dl></div>'
        f'<div><div class="answers">{answers}</div>{others}</div></div></div>'
    )


def _answer(rollout: dict[str, Any]) -> str:
    outcome = str(rollout["outcome"])
    reward = "no reward" if rollout["reward"] is None else f"reward {show(rollout['reward'])}"
    remarks = [] if rollout["is_well_formed"] else ["bad format"]
    remarks += ["cut off"] if rollout["finish_reason"] == "length" else []
    words = ", ".join([rollout["reason"], *remarks])
    tokens = f"{len(rollout['token_ids'])} tokens"
    return (
        f'<div class="answer {escape(outcome)}"><div class="verdict">'
        f"<span><b>{escape(outcome.replace('_', ' '))}</b> · {escape(words)}</span>"
        f"<span>{reward} · {tokens}</span></div>"
        f"<pre>{escape(rollout['text']) or '(empty response)'}</pre></div>"
    )


def _image(encoded: str) -> str:
    width = _png_width(encoded)
    kind = ' class="pixels"' if width is not None and width <= PIXEL_ART_LIMIT else ""
    return f'<img{kind} alt="question image" src="data:image/png;base64,{escape(encoded)}">'


def _png_width(encoded: str) -> int | None:
    try:
        header = base64.b64decode(encoded[:32], validate=True)
    except binascii.Error:
        return None
    if len(header) < 24 or not header.startswith(b"\x89PNG"):
        return None
    return struct.unpack(">I", header[16:20])[0]
