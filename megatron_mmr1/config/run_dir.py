"""A run's folder, `outputs/EXPERIMENT/RUN/`: its name, its `config.yaml`, and who may write there.

Owns no other file of the folder. A cold start's runs lie in `outputs/EXPERIMENT_sft/RUN/`, so that
they do not mix with the GRPO runs of the experiment of the same name; an evaluation's folder is
`outputs/evaluate/BENCHMARK/NAME/`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_mmr1.config.schema import EvaluateConfig, GrpoConfig, SftConfig

CONFIG_FILE = "config.yaml"
# Where a run lies, how it was started and over which processes it is laid change nothing that it
# computes (but for float32 rounding).
_MAY_DIFFER = re.compile(
    r"resume|output_dir|launch\..*|parallel\..*|max_tokens_per_microbatch"
    r"|rollout\.(tp_size|takes_turns|kv_cache_bytes|pixel_bytes)"
    r"|(data\.)?max_bad_share"
)
# A cold start sets aside what is longer than a micro-batch, so that this decides its draws.
_MAY_DIFFER_IN_A_COLD_START = re.compile(r"resume|output_dir|launch\..*|parallel\..*|max_bad_share")
_MAY_DIFFER_IN_EVALUATION = re.compile(
    r"output|name|max_bad_share|rollout\.kv_cache_bytes|reward\..*"
)


def new_run_name() -> str:
    """Return a name made from the time, in UTC to the second: 20260131-235959."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def check_folder_name(key: str, name: str) -> None:
    """Refuse a name that is more or less than one visible folder.

    Raises:
        ValueError: `name` is empty, starts with a dot, or holds a slash or a control character.
    """
    if not name or name.startswith(".") or set(name) & set("/\\") or not name.isprintable():
        raise ValueError(
            f"{key}={name!r} is no plain folder name; use one without slashes that does not start "
            "with a dot"
        )


def open_run_dir(config: GrpoConfig | SftConfig, run_name: str) -> Path:
    """Make the run folder with its `config.yaml`, or find it again when resuming; call on rank 0.

    Args:
        config: the resolved config. `config.yaml` records it with `run` set to `run_name`.
        run_name: `config.run`, or `new_run_name()` when that is None.

    Raises:
        ValueError: a name is no plain folder name; the folder is in use and `resume` is never; or
            the config saved there differs in more than `resume`, `output_dir` and the layout.
    """
    check_folder_name("experiment", config.experiment)
    check_folder_name("run", run_name)
    is_sft = isinstance(config, SftConfig)
    experiment_folder = f"{config.experiment}_sft" if is_sft else config.experiment
    run_dir = Path(config.output_dir) / experiment_folder / run_name
    text = OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config, run=run_name)))
    run_dir.mkdir(parents=True, exist_ok=True)
    if any(run_dir.iterdir()):
        # A run that was refused before its first record may try again, with the same config.
        has_records = (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
        if has_records and config.resume == "never":
            remedy = "use resume=auto to continue it, or another run="
            if config.optimizer.cpu_offload:  # which refuses resume=auto
                remedy = (
                    "its optimizer states can't be loaded; convert the weights of its newest "
                    "checkpoint (tools/convert_megatron_to_hf.py), and start another run= from them"
                )
            raise ValueError(f"run={run_name!r}: {run_dir} is in use; {remedy}")
        _check_same_config(run_dir, text, _MAY_DIFFER_IN_A_COLD_START if is_sft else _MAY_DIFFER)
    else:
        _save_config(run_dir, text)
    return run_dir


def open_evaluation_dir(config: EvaluateConfig) -> Path:
    """Make an evaluation's folder with its `config.yaml`, or find an unfinished one again.

    Without `config.output` it is outputs/evaluate/BENCHMARK/NAME. If that is finished, or was
    begun with other settings, the next free one of NAME-2, NAME-3, ... is.

    Args:
        config: the settled config.

    Raises:
        ValueError: `config.output` is in use for something else, or with other settings.
    """
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    if config.output is not None:
        folder = Path(config.output)
        if folder.is_file():
            raise ValueError(f"output={config.output!r} is a file; give a folder")
        if folder.is_dir() and any(folder.iterdir()):
            _check_same_config(folder, text, _MAY_DIFFER_IN_EVALUATION, "output=")
            return folder
    else:
        assert config.name is not None
        base, number = Path("outputs") / "evaluate" / config.benchmark / config.name, 1
        folder = base
        while folder.exists():
            if not (folder / "summary.json").exists() and _has_same_config(folder, text):
                return folder
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    _save_config(folder, text)
    return folder


def _has_same_config(folder: Path, text: str) -> bool:
    try:
        _check_same_config(folder, text, _MAY_DIFFER_IN_EVALUATION)
    except ValueError:
        return False
    return True


def _save_config(folder: Path, text: str) -> None:
    temporary = folder / f".{CONFIG_FILE}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def _check_same_config(
    run_dir: Path, text: str, may_differ: re.Pattern[str] = _MAY_DIFFER, key: str = "run="
) -> None:
    """Refuse to go on with another config than the one saved; `key` names the folder."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} is in use and has no {CONFIG_FILE}; use another {key}")
    saved = _flatten(OmegaConf.to_container(OmegaConf.load(path)))
    ours = _flatten(OmegaConf.to_container(OmegaConf.create(text)))
    differing = [
        f"{key}={ours.get(key, '(absent)')} here, {saved.get(key, '(absent)')} there"
        for key in sorted(saved.keys() | ours.keys())
        if not may_differ.fullmatch(key) and saved.get(key, _ABSENT) != ours.get(key, _ABSENT)
    ]
    if differing:
        raise ValueError(
            f"{path} is another run's and differs: {'; '.join(differing)}; "
            f"give the saved values, or another {key}"
        )


_ABSENT = object()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
