"""Are the numbers right at this parallel layout? Every log-prob and gradient against Hugging Face.

    python tools/check_parity.py --hf DIR parallel.tp_size=2 parallel.cp_size=2   # your model
    python tools/check_parity.py --matrix docs                  # `make parity`: every layout
    python tools/check_parity.py --matrix DIR --ci              # `make parity-ci`: a part of it

On a CPU with real Megatron-Core over gloo. The matrix makes a tiny random model of every family;
one layout without --hf a Qwen2.5-VL. Exit status 1 when a comparison is out of bounds or a negative
control is not caught.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.model_folder import has_vision
from megatron_mmr1.config.schema import ParityConfig
from megatron_mmr1.config.validate import validate_parity
from megatron_mmr1.parity.layouts import CONTROLS, LAYOUTS, Layout
from megatron_mmr1.parity.matrix import Cell, Compared, cells_of, run_matrix
from megatron_mmr1.parity.models import build_tiny
from megatron_mmr1.parity.table import as_html, as_markdown, is_good, summary, tables

_HEADING = "Parity of every parallel layout"


def main() -> None:
    """Check one layout, or all of them."""
    arguments, options = _split(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        scratch = Path(name)
        if "--matrix" in options:
            results = _check(_matrix_cells(scratch, "--ci" in options), scratch)
            _write(results, Path(options["--matrix"]), "--ci" in options)
        else:
            if "--hf" in options:
                arguments = [f"model.path={options['--hf']}", *arguments]
            elif not any(a.startswith("model.path=") for a in arguments):
                arguments = [f"model.path={build_tiny('qwen2_5_vl', scratch / 'tiny')}", *arguments]
            config = load_config(ParityConfig, "parity", arguments)
            validate_parity(config)
            results = _check(_one_layout(config), scratch)
            print(as_markdown(tables(results)))
    print(summary(results))
    raise SystemExit(0 if all(map(is_good, results)) else 1)


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Part key=value arguments from options; --hf and --matrix take a value."""
    arguments, options, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--hf", "--matrix"):
            if not rest:
                raise ValueError(f"{word} needs a folder; give one, as in {word} DIR")
            options[word] = rest.pop(0)
        elif word == "--ci":
            options[word] = ""
        else:
            arguments.append(word)
    if "--matrix" in options and (arguments or "--hf" in options):
        raise ValueError("--matrix checks its own layouts and models; leave out what goes with it")
    return arguments, options


def _matrix_cells(scratch: Path, is_ci: bool) -> list[Cell]:
    layouts = [layout for layout in LAYOUTS if layout.in_ci or not is_ci]
    folders: dict[tuple[str, bool], str] = {}

    def folder_of(layout: Layout) -> str:
        key = layout.model, layout.is_tied
        if key not in folders:
            name = layout.model + ("_tied" if layout.is_tied else "")
            folders[key] = str(build_tiny(layout.model, scratch / name, tied=layout.is_tied))
        return folders[key]

    return cells_of(layouts, CONTROLS, folder_of)


def _one_layout(config: ParityConfig) -> list[Cell]:
    """The asked layout; in float32 also one process of ours, to hold it against."""
    asked = Layout(
        "as asked",
        config.parallel,
        config.dp_size,
        config.max_tokens_per_microbatch,
        dtype=config.precision.dtype,
        freeze_vision=config.model.freeze_vision,
        is_own_model=True,
        kinds=() if has_vision(config.model.path) else ("text",),
    )
    alone = Layout("one process", ParityConfig().parallel, dtype=asked.dtype, kinds=asked.kinds)
    layouts = [asked] if asked.num_ranks == 1 else [alone, asked]
    return cells_of(layouts, (), lambda layout: config.model.path)


def _check(cells: list[Cell], scratch: Path) -> list[Compared]:
    from rich.progress import Progress

    start = time.monotonic()
    total = sum(len(cell.layout.all_kinds) for cell in cells)
    with Progress() as progress:
        task = progress.add_task("comparing", total=total)
        results = run_matrix(cells, scratch, lambda done: progress.update(task, completed=done))
        progress.update(task, completed=len(results))
    minutes = (time.monotonic() - start) / 60
    print(f"{len(results)} comparisons of {len(cells)} cases in {minutes:.1f} minutes")
    return results


def _write(results: list[Compared], folder: Path, is_ci: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made, name = tables(results), "parity-ci" if is_ci else "parity"
    command = f"`make {name}`"
    words = (
        f"Written by {command}: real Megatron-Core over gloo, on a CPU, tiny random models "
        "(4 layers, 4 heads, 2 key/value heads), a Qwen2.5-VL unless the row names another. "
        f"{summary(results)}."
    )
    page = folder / f"{name}.html"
    page.write_text(as_html(made, _HEADING, words.replace("`", "")), encoding="utf-8")
    text = f"# {_HEADING}\n\n{words}\n\n{as_markdown(made)}"
    (folder / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"tables: {folder / name}.md and {page}")


if __name__ == "__main__":
    run_main(main)
