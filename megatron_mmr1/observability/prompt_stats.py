"""`prompt_stats.parquet/`: what the sampler believed of each prompt, a row a prompt an update.

A folder with a file an update, which parquet readers take as one table: adding an update costs that
update alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mmr1.observability.files import replacing

PROMPT_STATS_FILE = "prompt_stats.parquet"

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("category", pa.string()),
        ("pass_rate", pa.float64()),  # believed; NaN: nothing is known
        ("posterior_a", pa.float64()),  # Beta(a, b) of the pass rate; NaN: no posterior
        ("posterior_b", pa.float64()),
        ("ovs", pa.float64()),
        ("tds", pa.float64()),
        ("vps", pa.float64()),
        ("weight", pa.float64()),  # the score in force: draws are in proportion to it
        ("draws", pa.int64()),
        ("age", pa.int64()),  # steps since the last visit
    ]
)


def append_prompt_stats(
    run_dir: Path | str, rows: Mapping[str, Sequence[object] | np.ndarray]
) -> None:
    """Add one update's rows: the columns of `SCHEMA`, all of one length and one step.

    Its file is renamed into place, so that a reader never sees half of it.
    """
    table = pa.table({name: pa.array(rows[name]) for name in SCHEMA.names}).cast(SCHEMA)
    path = Path(run_dir) / PROMPT_STATS_FILE / f"step_{rows['step'][0]:06d}.parquet"
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_prompt_stats(run_dir: Path | str) -> dict[str, np.ndarray]:
    """Return the columns, rows in the order written; empty columns when there is no file."""
    paths = sorted((Path(run_dir) / PROMPT_STATS_FILE).glob("step_*.parquet"))
    table = pa.concat_tables(
        [SCHEMA.empty_table(), *(pq.read_table(path, schema=SCHEMA) for path in paths)]
    )
    return {name: table[name].to_numpy() for name in SCHEMA.names}


def truncate_prompt_stats(run_dir: Path, step: int) -> None:
    """Drop the rows of updates after `step`."""
    for path in (run_dir / PROMPT_STATS_FILE).glob("step_*.parquet"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
