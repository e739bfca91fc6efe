"""The command line: `experiment=NAME key=value ...` to a config, and faults to one message.

The only module that imports hydra, and only inside `load_config`. Hydra composes and does nothing
else: no change of directory, no output folder, no logging. Does not own the checks of values
(config/validate.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

CONF_DIR = Path(__file__).resolve().parents[1] / "hydra_conf"
DEFAULT_EXPERIMENT = "digits"
# How long a rank other than 0 leaves rank 0, which as a rule has the same fault, to speak first.
_RANK_0_FIRST_S = 3.0


def load_config[T](schema: type[T], group: str, argv: list[str]) -> T:
    """Compose the config that a command line asks for; `--help` prints it as YAML and exits.

    Args:
        schema: a dataclass of config/schema.py.
        group: a folder of hydra_conf/ whose files are the experiments that `experiment=NAME`
            chooses from (default: digits), or the name of a single file there. A folder that is
            named as a section of the schema holds presets of it, as in `sampler=paper_table_6`;
            they come after the experiment and before single keys.
        argv: the command line without the program's name.

    Returns:
        The resolved config; in a folder's, `experiment` is the name chosen.

    Raises:
        ValueError: an unknown experiment or key, a value of the wrong type, a required key that
            has no value, or bad syntax.
    """
    wants_help = "--help" in argv or "-h" in argv
    overrides = [argument for argument in argv if argument not in ("--help", "-h")]
    known = experiments(group)
    name = None
    if known:
        chosen = [a.partition("=")[2] for a in overrides if a.startswith("experiment=")]
        overrides = [a for a in overrides if not a.startswith("experiment=")]
        name = chosen[-1] if chosen else DEFAULT_EXPERIMENT
        if name not in known:
            raise ValueError(f"experiment={name!r} is unknown; use one of: {', '.join(known)}")
    presets, overrides = _presets(schema, overrides)
    config = _compose(schema, f"{group}/{name}" if name else group, presets, overrides)
    if name:
        config.experiment = name
    if wants_help:
        if _rank() == 0:
            print(_help(schema, known, config))
        raise SystemExit(0)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            return OmegaConf.to_object(config)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, schema)) from error
    raise ValueError(
        f"{', '.join(f'{key}=???' for key in missing)}: required and not set; "
        f"add {' '.join(f'{key}=VALUE' for key in missing)}"
    )


def experiments(group: str) -> list[str]:
    """Return the names that `experiment=` takes: the YAML files of hydra_conf/`group`/."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a fault of the user's is one line on stderr and exit status 2.

    Such a fault is a ValueError that our own code raises. Everything else propagates with its
    traceback, ValueErrors of libraries among it.

    Parallelism: only rank 0 (environment variable RANK) prints a fault that all ranks have. The
    others wait a moment before they exit: torchrun ends everybody at the first exit, and rank 0
    must have spoken by then. A rank that is still there after the wait is alone with its fault and
    prints it, with its rank and, if there are several, its node.
    """
    # Before torch is imported: its C++ side then shows errors, not notices.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main()
    except ValueError as error:
        if not _is_raised_by_us(error.__traceback__):
            raise
        rank = _rank()
        if rank:
            time.sleep(_RANK_0_FIRST_S)
        message = " ".join(str(error).split())
        print(f"error{_whose(rank)}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _whose(rank: int) -> str:
    """Whose fault it is, unless it is rank 0's; with several nodes also the node's name."""
    if not rank:
        return ""
    has_several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return f" on rank {rank}" + (f" (node {socket.gethostname()})" if has_several_nodes else "")


def _presets(schema: type, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Tell apart SECTION=NAME of a preset file; return the files, and the other overrides."""
    folders = _preset_folders(schema)
    presets, others = [], []
    for override in overrides:
        section, _, name = override.partition("=")
        known = folders.get(section, [])
        if known and not name.startswith("{"):
            if name not in known:
                keys = _types(get_type_hints(schema)[section])
                raise ValueError(
                    f"{section}={name!r} is unknown; use one of: {', '.join(known)}; or set a key, "
                    f"as in {section}.{next(key for key in keys if key != 'preset')}=VALUE"
                )
            presets.append(f"{section}/{name}@{section}")
        else:
            others.append(override)
    return presets, others


def _preset_folders(schema: type) -> dict[str, list[str]]:
    """The sections of a schema that have presets, with their names."""
    sections = [key for key, kind in _types(schema).items() if kind == "section"]
    return {section: known for section in sections if (known := experiments(section))}


def _compose(schema: type, config_name: str, presets: list[str], overrides: list[str]) -> Any:
    """Merge schema, the YAML files and the overrides into a structured DictConfig."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known_keys = list(_types(schema))
    for override in overrides:
        _check_override(override, known_keys)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    files = ["schema", f"{config_name}@_global_", *presets, "_self_"]
    store.store(name="main", node={"defaults": files})
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("main")
        # Not by hydra: for it, a key that is named like a folder of presets is no key.
        for override in OverridesParser.create().parse_overrides(overrides):
            OmegaConf.update(config, override.key_or_group, override.value())
        return config
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(_explain(error, schema)) from error


def _check_override(override: str, known_keys: list[str]) -> None:
    """Leave of Hydra's grammar what is of use here: key=value with a known key and one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    if not equals or override[0] in "+~-" or not key:
        raise ValueError(f"{override!r} is not of the form key=value; --help shows all keys")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ValueError(f"{override!r} has no effect: hydra only reads settings here; remove it")
    if key not in known_keys:
        raise ValueError(f"{override} is unknown; {_did_you_mean(key, known_keys)}")
    try:
        has_one_value = not OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        has_one_value = False
    if not has_one_value:
        raise ValueError(
            f"{key}={value} cannot be read as one value; quote it inside the argument: "
            f"'{key}=\"...\"'"
        )


def _explain(error: BaseException, schema: type) -> str:
    """Say what hydra, omegaconf or yaml found as key, value and remedy."""
    text = " ".join(str(error).split())
    where = f" (in {text.split(chr(39))[1]}.yaml)" if text.startswith("In '") else ""
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    key = str(cause.full_key)
    types = _types(schema)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return f"{key} is unknown{where}; {_did_you_mean(key, list(types))}"
    if isinstance(cause, ValidationError):
        expected = types.get(key, "another type")
        if expected == "section":
            inner = next(name for name in types if name.startswith(f"{key}."))
            return f"{key}={cause.value!r} is a section{where}; set its keys, as in {inner}=VALUE"
        value = "null" if cause.value is None else repr(cause.value)
        return f"{key}={value} is of the wrong type{where}; give a value of type {expected}"
    reason = str(cause.msg).splitlines()[0]
    return f"{key} cannot be resolved{where}: {reason}; give a plain value"


def _did_you_mean(key: str, names: list[str]) -> str:
    section, _, last = key.rpartition(".")
    close = [name for name in names if name.rpartition(".")[2] == last]
    if not close and section in names:
        inside = [n.rpartition(".")[2] for n in names if n.rpartition(".")[0] == section]
        close = [f"{section}.{n}" for n in difflib.get_close_matches(last, inside)]
    elif not close:
        close = difflib.get_close_matches(key, names)
    if not close:
        return "--help shows all keys"
    return f"did you mean {' or '.join(close)}?"


def _types(schema: Any, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a dataclass with its type's name; "section" for a nested dataclass."""
    types: dict[str, str] = {}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            types[prefix + field.name] = "section"
            types |= _types(hint, f"{prefix}{field.name}.")
        else:
            types[prefix + field.name] = hint.__name__ if isinstance(hint, type) else str(hint)
    return types


def _help(schema: type, known: list[str], config: Any) -> str:
    folders = _preset_folders(schema)
    choices = [f"[{key}=NAME] " for key in (["experiment"] if known else []) + list(folders)]
    lines = [f"usage: {Path(sys.argv[0]).name} {''.join(choices)}[key=value ...]"]
    if known:
        lines.append(f"experiments: {', '.join(known)} (default: {DEFAULT_EXPERIMENT})")
    lines += [f"{section}=NAME: {', '.join(names)}" for section, names in folders.items()]
    lines += ["", "Every key, with the value it has here (??? must be given):", ""]
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(config).rstrip()


def _is_raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame of the traceback is in this package or in the main script."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return module == "__main__" or module.partition(".")[0] == __name__.partition(".")[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
