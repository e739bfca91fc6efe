"""Whether the nodes of a run go together: the same versions, code, settings and files, and one
shared run folder. Checked in the store where the processes meet, before any process group exists,
since nodes of different versions may not even be able to talk in one.

Parallelism: every rank writes two keys and reads two; rank 0 reads everybody's and judges.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mmr1.config.schema import GrpoConfig, SftConfig
from megatron_mmr1.launch.rendezvous import Meeting, host_name
from megatron_mmr1.launch.versions import shared_versions, source_hash

# NFS may show a new file to other nodes only half a minute later.
_FOLDER_TIMEOUT_S = 40.0
_ANSWER_TIMEOUT = timedelta(minutes=5)
_MOST_SHOWN = 6  # faults in a message


def check_nodes(
    meeting: Meeting,
    config: GrpoConfig | SftConfig,
    run_dir: Path | None,
    folder_timeout_s: float = _FOLDER_TIMEOUT_S,
    answer_timeout: timedelta = _ANSWER_TIMEOUT,
) -> Path:
    """Refuse nodes that differ; every rank calls, and all get the same answer.

    Args:
        run_dir: rank 0's run folder, which exists; None on the other ranks.
        folder_timeout_s: how long a rank looks for what rank 0 put there.
        answer_timeout: how long rank 0 waits for the others.

    Returns:
        The run folder.

    Raises:
        ValueError: on every rank; names each node that differs, in what, and the remedy. Or a
            rank ended or fell silent; names those that said nothing.
    """
    if meeting.world_size == 1:
        assert run_dir is not None
        return run_dir
    try:
        folder, faults = _compare(meeting, config, run_dir, folder_timeout_s, answer_timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(_who_is_missing(meeting)) from error
    if faults:
        more = f"; and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
        raise ValueError("; ".join(faults[:_MOST_SHOWN]) + more)
    return folder


def _compare(
    meeting: Meeting,
    config: GrpoConfig | SftConfig,
    run_dir: Path | None,
    folder_timeout_s: float,
    answer_timeout: timedelta,
) -> tuple[Path, list[str]]:
    """Return the run folder and the faults, the same on every rank."""
    store, is_main = meeting.store, meeting.rank == 0
    mark: Path | None = None
    if is_main:
        assert run_dir is not None
        mark = run_dir / f".node_check_{secrets.token_hex(6)}"
        mark.touch()
        store.set("nodes/folder", json.dumps([str(run_dir), mark.name]))
    folder, mark_name = json.loads(store.get("nodes/folder"))
    mine = node_facts(config) | {"folder": os.path.abspath(folder)}
    mine["sees_folder"] = _appears(Path(folder) / mark_name, folder_timeout_s)
    store.set(f"nodes/facts/{meeting.rank}", json.dumps(mine))
    others = range(1, meeting.world_size)
    if mark is not None:
        try:
            store.wait([f"nodes/facts/{rank}" for rank in others], answer_timeout)
        finally:
            mark.unlink()
        theirs = [json.loads(store.get(f"nodes/facts/{rank}")) for rank in others]
        store.set("nodes/faults", json.dumps(differences(mine, theirs)))
    faults = json.loads(store.get("nodes/faults"))
    # Rank 0 may be the store's host: it leaves when everybody has read.
    store.set(f"nodes/read/{meeting.rank}", "")
    if is_main:
        store.wait([f"nodes/read/{rank}" for rank in others], answer_timeout)
    return Path(folder), faults


def _who_is_missing(meeting: Meeting) -> str:
    """Say which ranks wrote no facts, as far as the store still tells."""
    here = f"rank {meeting.rank} on node {host_name()}"
    remedy = "look at the other nodes' own messages"
    try:
        silent = [
            str(rank)
            for rank in range(meeting.world_size)
            if not meeting.store.check([f"nodes/facts/{rank}"])
        ]
    except (dist.DistNetworkError, dist.DistStoreError):
        return (
            f"{here} lost the store where nodes are compared: rank 0 or its torchrun has ended, "
            f"or its node is no longer reached; {remedy}, rank 0's first"
        )
    if not silent:
        return f"{here} got no answer: a process ended after the nodes were compared; {remedy}"
    more = f" and {len(silent) - _MOST_SHOWN} more" if len(silent) > _MOST_SHOWN else ""
    return (
        f"{here} waited in vain for what rank {', '.join(silent[:_MOST_SHOWN])}{more} had to say "
        f"of its node; {remedy}"
    )


def node_facts(config: GrpoConfig | SftConfig) -> dict[str, Any]:
    """Return what must be alike on all nodes, as plain values, with this node's name."""
    return {
        "host": host_name(),
        "versions": shared_versions(),
        "code": source_hash(),
        "settings": _flat(dataclasses.asdict(config)),
        "files": {key: _fingerprint(path) for key, path in _paths(config).items()},
    }


def differences(ours: dict[str, Any], theirs: list[dict[str, Any]]) -> list[str]:
    """Say how nodes differ from rank 0's; once a node, however many ranks it has."""
    faults: list[str] = []
    here = f"rank 0's node {ours['host']}"
    for facts in theirs:
        node = f"node {facts['host']}"
        for package, version in facts["versions"].items():
            if version != (wanted := ours["versions"][package]):
                faults.append(
                    f"{node} has {package} {version} and {here} has {wanted}; install the same "
                    f"requirements files on both"
                )
        if facts["code"] != ours["code"]:
            faults.append(
                f"{node} runs another state of megatron_mmr1 ({facts['code']}) than {here} "
                f"({ours['code']}); bring both checkouts to one commit"
            )
            continue  # settings may have other names there
        for key, value in facts["settings"].items():
            if value != (wanted := ours["settings"][key]):
                faults.append(
                    f"{node} was started with {key}={value} and {here} with {key}={wanted}; give "
                    "every node the same command line"
                )
        for key, found in facts["files"].items():
            if found != (wanted := ours["files"].get(key)):
                faults.append(
                    f"{key}={ours['settings'][key]!r} holds other files on {node} ({found}) than "
                    f"on {here} ({wanted}); copy it again"
                )
        if not facts["sees_folder"]:
            faults.append(
                f"output_dir={ours['settings']['output_dir']!r} is not shared: {facts['folder']} "
                f"on {node} is not the folder of that name on {here}; give an output_dir on a file "
                "system that all nodes share, at one path"
            )
    return list(dict.fromkeys(faults))


def _paths(config: GrpoConfig | SftConfig) -> dict[str, str]:
    """The keys that name files or folders which every node reads."""
    if isinstance(config, SftConfig):
        data = {"data": config.data, "validation": config.validation}
    else:
        data = {"data.train": config.data.train, "data.heldout": config.data.heldout}
    named = {"model.path": config.model.path} | data
    return {key: path for key, path in named.items() if path is not None}


def _fingerprint(path: str) -> str:
    """A hash of a file's size, or of a folder's files' names and sizes and its config.json."""
    digest, place = hashlib.blake2b(digest_size=6), Path(path)
    if place.is_file():
        digest.update(str(place.stat().st_size).encode())
    elif place.is_dir():
        for file in sorted(f for f in place.iterdir() if f.is_file()):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            if file.name == "config.json":
                digest.update(file.read_bytes())
    else:
        return "none"  # a hub id
    return digest.hexdigest()


def _appears(path: Path, timeout_s: float) -> bool:
    """Whether a file comes into sight; its folder is read anew each time."""
    deadline = time.monotonic() + timeout_s
    while True:
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
