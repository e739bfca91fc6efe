"""Writes tests/data/bad: `python tests/bad_data_files.py`. One small file for each bad input.

A file is named for its kind of data (`rl_` questions, `sft_` conversations) and for what is wrong
in it. Its first and last lines are good; test_bad_data.py says which others are bad, and why.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "data" / "bad"
GOOD = "images/good.png"
# Enough for Python's JSON parser to give up.
DEEP = b"[" * 20_000 + b"]" * 20_000


def rl(
    row_id: Any = "bad", problem: Any = "<image>Sum?", images: Any = (GOOD,), **more: Any
) -> dict:
    listed = list(images) if isinstance(images, tuple) else images
    return {"id": row_id, "problem": problem, "answer": "8", "images": listed} | more


def sft(
    row_id: Any = "bad", problem: Any = "<image>Sum?", images: Any = (GOOD,), **more: Any
) -> dict:
    listed = list(images) if isinstance(images, tuple) else images
    turns = [("human", problem), ("gpt", more.pop("response", "8"))]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": row_id, "conversations": conversations, "images": listed} | more


def of_both(row) -> dict[str, list]:
    """Cases that questions and conversations share, by name; `row` is `rl` or `sft`."""
    good = json.dumps(row("bad")).encode()
    return {
        "bomb": [row(images=("images/bomb.png",))],
        "truncated_jpeg": [row(images=("images/truncated.jpg",))],
        "narrow": [row(images=("images/narrow.png",))],
        "zero_bytes": [row(images=("images/empty.png",))],
        "no_image_inside": [row(images=("images/page.png",))],
        "missing": [row(images=("images/nowhere.png",)), row("folder", images=("images",))],
        "long_path": [row(images=("iVBORw0KGgo" * 40,))],  # an image in place of its path
        "traversal": [
            row(images=("../outside.png",)),
            row("absolute", images=("/etc/hostname",)),
            row("inside", images=("images/../images/good.png",)),
        ],
        "symlink": [
            row(images=("images/link_out.png",)),
            row("in", images=("images/link_in.png",)),
        ],
        "tag_without_image": [row(images=()), row("null", images=None)],
        "image_without_tag": [row(problem="Sum?")],
        "image_counts": [
            row("two for one", images=(GOOD, GOOD)),
            row("one for two", problem="<image>Sum<image>?"),
        ],
        "long_prompt": [row(problem="<image>" + "Sum?" * 40)],
        "vision_token": [
            row("image", problem="<image><|image_pad|>Sum?"),
            row("video", problem="<image>Sum?<|video_pad|>"),
        ],
        "not_utf8": [good.replace(b"Sum", b"S\xfcm")],
        "huge_integer": [good.replace(b'"bad"', b"9" * 5000)],
        "deep_nesting": [good.replace(b'"bad"', b'"bad", "more": ' + DEEP)],
        "half_surrogate": [good.replace(b"Sum", b"S\\ud800m")],
        "cut_off": [good[:40]],
        "no_object": [b"[1, 2]", b'"text"', b"null"],
        # Lines end in "\n" alone: these rows are good.
        "separators": [
            row("line\u2028end", source="a\u2028b\u0085c\u2029d"),
            row("next\u0085line"),
        ],
        "nan": [row(problem=float("nan")), row(float("nan"), images=float("nan"))],
        "wrong_types": [
            row("list", problem=["Sum?"]),
            row("number", problem=5),
            row("images", images=5),
            row("image", images=({"url": "a"},)),
        ],
        # These render right: white where nothing is painted, and mid-grey.
        "rendered": [
            row("transparent", images=("images/transparent.png",)),
            row("opaque", images=("images/opaque.png",)),
            row("grey16", images=("images/grey16.png",)),
        ],
    }


RL = of_both(rl) | {
    "duplicate_ids": [rl("good-1"), rl("twice"), rl("twice")],
    "empty_answer": [
        rl("blank", answer=" \n"),
        rl("null", answer=None),
        rl("nan", answer=float("nan")),
    ],
    "answer_types": [
        rl("list", answer=["8"]),
        rl("object", answer={"a": 8}),
        rl("bool", answer=True),
    ],
    "empty_problem": [rl(problem=" ", images=())],
}
SFT = of_both(sft) | {
    "empty_response": [sft("blank", response=" "), sft("null", response=None)],
    "response_tags": [sft("tag", response="<image>"), sft("token", response="<|image_pad|>")],
    "turns": [
        sft("alone", conversations=[{"from": "human", "value": "Sum?"}], images=()),
        sft("none", conversations=[]),
        sft("speaker", conversations=[{"from": ["human"], "value": "Sum?"}], images=()),
    ],
}


def picture(file_name: str, image: Image.Image, keep_bytes: int | None = None) -> None:
    file = io.BytesIO()
    image.save(file, "JPEG" if file_name.endswith("jpg") else "PNG", optimize=True)
    (FOLDER / "images" / file_name).write_bytes(file.getvalue()[:keep_bytes])


def main() -> None:
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    picture("good.png", Image.new("RGB", (56, 28), "navy"))
    picture("bomb.png", Image.new("1", (13_000, 13_000)))
    picture("truncated.jpg", Image.fromarray(noise), keep_bytes=1500)
    picture("narrow.png", Image.new("L", (20_000, 1)))
    picture("transparent.png", Image.new("RGBA", (56, 28), (255, 0, 0, 0)))
    picture("opaque.png", Image.new("RGBA", (56, 28), (9, 8, 7, 255)))
    picture("grey16.png", Image.new("I;16", (56, 28), 0x80FF))
    (FOLDER / "images" / "empty.png").write_bytes(b"")
    (FOLDER / "images" / "page.png").write_text("<html>404 Not Found</html>\n")
    for kind, row, cases in (("rl", rl, RL), ("sft", sft, SFT)):
        for name, bad in cases.items():
            lines = [
                line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
                for line in [row("good-1"), *bad, row("good-2")]
            ]
            (FOLDER / f"{kind}_{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")


if __name__ == "__main__":
    main()
