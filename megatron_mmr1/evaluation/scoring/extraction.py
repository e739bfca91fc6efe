r"""Where in a response the boxed answer is looked for.

Strict: a response with an `<answer>` tag is held to the rule of its training (rewards/format.py):
the last box inside the last complete `<answer>`, or nothing. A response without one comes from a
model that was never taught the tags, and the prompt asks for a box alone: the last box after its
thoughts, anywhere if it has none. A thought that never ends (cut at the token limit) has no answer.

Compat: the last box anywhere, inside a thought too, as the kits look for it.

The embedded task has one rule, that of its training, whatever the tags.
"""

from __future__ import annotations

from megatron_mmr1.evaluation.questions import Extracted
from megatron_mmr1.rewards import extract_answer


def extract(response: str, benchmark: str = "") -> Extracted:
    r"""Return what the box holds under both rules; None where there is no complete `\boxed{}`."""
    if benchmark == "digits":
        return Extracted(extract_answer(response), extract_answer(response))
    if "<answer>" in response:
        strict = extract_answer(response)
    else:
        _, ended, rest = response.rpartition("</think>")
        is_cut = "<think>" in (rest if ended else response)
        strict = None if is_cut else _last_box(rest)
    return Extracted(strict, _last_box(response))


def _last_box(text: str) -> str | None:
    """Return what `extract_answer` finds when the tags play no part."""
    bare = text.replace("<answer>", "").replace("</answer>", "")
    return extract_answer(f"<answer>{bare}</answer>")
