"""What a person sees of a run: a live bar in a terminal, one printed line a step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

# Metric key -> (label, format). A metric that isn't here isn't shown.
GRPO_FIELDS = {
    "reward/mean": ("reward", "{:.3f}"),
    "groups/pass_rate": ("correct", "{:.1%}"),
    "groups/mixed_rate": ("mixed groups", "{:.0%}"),
    "rollout/tokens_per_s": ("tokens/s", "{:,.0f}"),
    "eval/accuracy_sampled": ("held-out", "{:.1%}"),
}
SFT_FIELDS = {"loss": ("loss", "{:.4f}"), "tokens_per_s": ("tokens/s", "{:,.0f}")}


class Progress:
    """Shows how far a run is and how it does.

    Args:
        total: the step at which the run ends.
        initial: steps already done when this process started (a resumed run).
        title: what is running.
        fields: which metrics are shown, and how; `GRPO_FIELDS` or `SFT_FIELDS`.
        console: where to write; standard output by default.
        is_quiet: show nothing (ranks other than 0).
        is_brief: inside another one: no bar, and a line whenever a tenth is done.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        title: str = "training",
        fields: Mapping[str, tuple[str, str]] = GRPO_FIELDS,
        console: Console | None = None,
        is_quiet: bool = False,
        is_brief: bool = False,
    ) -> None:
        self._total, self._initial, self._step, self._title = total, initial, initial, title
        self._fields = fields
        self._shown: dict[str, str] = {}
        self._start = time.monotonic()
        self._console = console or Console(quiet=is_quiet)
        self._bar = Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None, complete_style="blue", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[clock]}", style="dim", markup=False),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=initial, clock="")
        self._is_brief, self._tenths = is_brief, initial * 10 // max(total, 1)
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal and not is_brief
        self._live = Live(console=self._console, get_renderable=self._render) if is_live else None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show `step` as done; a metric absent now (held-out accuracy) keeps its last value."""
        self._step = step
        for key, (label, form) in self._fields.items():
            value = metrics.get(key)
            if value is not None:
                self._shown[label] = form.format(value) if math.isfinite(value) else "-"
        if self._is_brief:
            if (tenths := step * 10 // self._total) > self._tenths:
                self._tenths = tenths
                self._print(f"{self._title}: {step / self._total:.0%}  {self._clock()}")
        elif self._live is None:
            width = len(str(self._total))
            self._print(f"step {step:{width}}/{self._total}  {self._summary()}  {self._clock()}")

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def _render(self) -> Group:
        self._bar.update(self._task, completed=self._step, clock=self._clock())
        return Group(self._bar, Text("  " + self._summary(), overflow="ellipsis", no_wrap=True))

    def _summary(self) -> str:
        return "  ".join(f"{label} {value}" for label, value in self._shown.items())

    def _clock(self) -> str:
        elapsed = time.monotonic() - self._start
        done = self._step - self._initial
        if done <= 0:
            return f"{_minutes(elapsed)} elapsed"
        left = elapsed / done * (self._total - self._step)
        return f"{_minutes(elapsed)} elapsed, {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
