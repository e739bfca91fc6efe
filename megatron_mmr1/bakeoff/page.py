"""The result of both stages in a folder: index.html and README.md from the JSON files there."""

from __future__ import annotations

from pathlib import Path

from megatron_mmr1.bakeoff.synthetic import page as synthetic_page
from megatron_mmr1.bakeoff.synthetic import tables as synthetic_tables
from megatron_mmr1.bakeoff.synthetic.comparison import Comparison
from megatron_mmr1.bakeoff.trained import analysis
from megatron_mmr1.bakeoff.trained import page as trained_page
from megatron_mmr1.observability import template

TITLE = "Samplers compared at equal numbers of rollouts"


def write(folder: Path) -> None:
    """Write both files of what is there of synthetic.json and trained.json."""
    html, markdown = [f"<h1>{TITLE}</h1>"], [f"# {TITLE}\n"]
    if (path := folder / "synthetic.json").exists():
        comparison = Comparison.load(path)
        html.append(synthetic_page.html(comparison))
        markdown.append(synthetic_tables.markdown(comparison))
    if (path := folder / "trained.json").exists():
        results = analysis.load_results(path)
        html.append(trained_page.html(results))
        markdown.append(trained_page.markdown(results))
    (folder / "index.html").write_text(template.page(TITLE, "".join(html)), encoding="utf-8")
    (folder / "README.md").write_text("\n".join(markdown), encoding="utf-8")
