"""One spelling for answers: Unicode, LaTeX's dress, brackets that carry nothing.

Owns spelling only: nothing here changes a value, and nothing is judged. Text in `\\text{...}` and
its like is kept between WORD_OPEN and WORD_CLOSE, so that later rules can tell words from symbols.
"""

from __future__ import annotations

import re
import unicodedata

WORD_OPEN, WORD_CLOSE = "\u27e6", "\u27e7"  # white square brackets, which no answer uses
MAX_CHARACTERS = 4000

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile("[₀-₉]+")
_VULGAR = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_SYMBOLS = {
    **{"\u2212": "-", "\u2044": "/", "\u2215": "/", "÷": "/", "\u066b": ".", "\u066c": ","},
    **{
        "\u066a": "%",
        "\u00d7": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "≤": r"\le ",
        "≥": r"\ge ",
    },
    **{"≅": r"\cong ", "\u2225": r"\parallel ", "⊥": r"\perp ", "\u223c": r"\sim "},
    **{
        "→": r"\rightarrow ",
        "≠": r"\ne ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "∅": r"\emptyset ",
    },
    **{"\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "…": r"\ldots ", "°": r"^\circ "},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "∠": r"\angle ", "△": r"\triangle "},
    **{"、": ",", "。": ".", "\uff0c": ",", "\uff1b": ";"},
}
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))")
_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **{"neq": "ne", "varnothing": "emptyset", "to": "rightarrow", "cdots": "ldots"},
    **{"dots": "ldots", "lt": "<", "gt": ">", "lbrace": "{", "rbrace": "}", "degree": "^\\circ"},
}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_NOTHING = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|displaystyle|textstyle|limits|nolimits)"
    r"(?![a-zA-Z])\.?|\\!"
)
_SPACE = re.compile(
    r"\\[,;: ]|\\(?:quad|qquad|thinspace|enspace)(?![a-zA-Z])|~|\u00a0|\u202f|\u2009"
)
_ROW_END = "\u27e1"  # stands for \\\\ meanwhile, which is no space
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|mbox|emph"
    r"|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_GROUPED = re.compile(r"(?<![0-9.])([0-9]{1,3}(?:(?: |\\,|\{,\})[0-9]{3})+)(?![0-9])")
_BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])")


def normal_form(text: str) -> str:
    """Return an answer in one spelling; words stay between WORD_OPEN and WORD_CLOSE."""
    text = _SUPERSCRIPT_RUN.sub(
        lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m.group()) + "}", text
    )
    text = _SUBSCRIPT_RUN.sub(
        lambda m: "_{" + "".join(str(ord(c) - 0x2080) for c in m.group()) + "}", text
    )
    text = _VULGAR.sub(" ", text)  # 5½ is 5 1/2, not 51/2
    text = unicodedata.normalize("NFKC", text.replace("℃", "°C").replace("℉", "°F"))
    text = "".join(_character(c) for c in text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)
    text = text.replace("\\\\", _ROW_END)
    text = _EMPTY_SET.sub(r"\\emptyset ", text)
    text = _GROUPED.sub(lambda m: re.sub(r"[^0-9]", "", m.group()), text)
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = _NOTHING.sub("", _SPACE.sub(" ", text))
    for _ in range(3):  # one inside another
        text = _WRAPPED.sub(rf"{WORD_OPEN}\1{WORD_CLOSE}", text)
    text = _COMMAND.sub(_command, text)
    text = _BLACKBOARD.sub(r"\\mathbb{\1}", text)
    text = text.strip().removesuffix(".").strip()
    return " ".join(_bare(text).split()).replace(_ROW_END, "\\\\")


def words(text: str) -> str:
    """Return a normal form without the marks around words."""
    return " ".join(text.replace(WORD_OPEN, " ").replace(WORD_CLOSE, " ").split())


def is_balanced(text: str) -> bool:
    """Whether braces, `\\left` and `\\right`, and environments are closed as they were opened.

    Round and square brackets are not: (1, 2] is an interval.
    """
    depth = 0
    escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    counts = [
        len(re.findall(rf"\\{command}(?![a-zA-Z])", text))
        for command in ("left", "right", "begin", "end")
    ]
    return depth == 0 and counts[0] == counts[1] and counts[2] == counts[3]


def split(text: str, separators: str = ",;") -> list[str]:
    """Cut at separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in separators:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    if category == "Cf":  # of no width, or of direction
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return character


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    other = _COMMANDS.get(name)
    if other is None:
        return match.group()
    return f"\\{other}" if other.isalpha() else (f"\\{other}" if other in "{}" else other)


def _bare(text: str) -> str:
    """Take off dollars and braces around the whole, and brackets around one thing."""
    while True:
        text = text.strip()
        if len(text) > 1 and text[0] == "$" == text[-1]:
            text = text.strip("$")
        elif len(text) > 1 and text[0] + text[-1] in ("{}", "()") and _encloses(text):
            inner = text[1:-1]
            if text[0] == "(" and (len(split(inner)) > 1 or not inner.strip()):
                return text
            text = inner
        else:
            return text


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1 and text[place - 1] != "\\"
    return False
