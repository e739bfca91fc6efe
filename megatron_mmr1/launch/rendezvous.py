"""How the processes of a run meet: the store at MASTER_ADDR:MASTER_PORT, which torchrun, Kubernetes
or the user names in the environment.

Owns what is said when they don't meet. Process groups are backend/parallel.py's.

Why a store must be new at each start: backends leave the addresses of their processes in it, and a
restart that finds those of the dead hangs or fails. torch 2.13's agent keeps one store over its
restarts; what is done about that is in `_prefix`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

# Processes of one launch start together and import the same; a cold network file system takes
# minutes for that.
_JOIN_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where this process met the others, and which of them it is.

    Attributes:
        store: keys and values that all processes see; new at every start.
    """

    store: dist.Store
    rank: int
    world_size: int


def meet(join_timeout: timedelta = _JOIN_TIMEOUT) -> Meeting:
    """Meet the processes that the environment tells of; without RANK, this one is alone.

    Raises:
        ValueError: the port is taken, nobody answers there, or not all came in time.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        return Meeting(_loopback_store(), 0, 1)
    prefix = _prefix(os.environ)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=join_timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(_why_not_met(str(error), join_timeout)) from error
    return Meeting(dist.PrefixStore(prefix, store), rank, world_size)


def host_name() -> str:
    """Return what messages call this node."""
    return socket.gethostname()


def has_several_nodes(environment: Mapping[str, str]) -> bool:
    """Say whether torchrun's variables tell of more than one node."""
    return int(environment.get("GROUP_WORLD_SIZE", "1")) > 1


def _prefix(environment: Mapping[str, str]) -> str:
    """Return what this start's keys begin with, so that it finds none of an earlier one's.

    On one node the restart's number does. On several it doesn't, since a node that was replaced
    counts from 0 again: there the store itself has to be new.

    Raises:
        ValueError: torchrun would restart several nodes over one store.
    """
    agent_keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    max_restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if agent_keeps_store and max_restarts and has_several_nodes(environment):
        raise ValueError(
            f"--max-restarts={max_restarts} on several nodes would meet again in the store of the "
            "processes that died; with --rdzv-backend=c10d, export "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun on every node; with the static "
            "rendezvous give --max-restarts=0 and start all nodes again"
        )
    return f"start_{environment.get('TORCHELASTIC_RESTART_COUNT', '0') if agent_keeps_store else 0}"


def _why_not_met(reason: str, timeout: timedelta) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason:
        return (
            f"MASTER_PORT={port} is in use on node {host_name()}, where rank 0 has to listen; "
            f"choose another (`python tools/doctor.py --port {port}` says whether one is free)"
        )
    if "clients joined" in reason:
        came = reason.partition("waiting for clients.")[2].partition("clients joined")[0].strip()
        return (
            f"of the processes that were to meet at MASTER_ADDR={address} MASTER_PORT={port} only "
            f"{came} came to node {host_name()} within {timeout.total_seconds():.0f} s; look at "
            "the other nodes' own messages, and at the firewall between them"
        )
    return (
        f"rank {os.environ['RANK']} on node {host_name()} found nobody at MASTER_ADDR={address} "
        f"MASTER_PORT={port} within {timeout.total_seconds():.0f} s; see whether rank 0 has "
        f"started, then what `python tools/doctor.py --rdzv {address}:{port}` says on this node"
    )


def _loopback_store() -> dist.TCPStore:
    """A store that listens on 127.0.0.1 only (torch's own listens on every interface)."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT={port} is in use on 127.0.0.1 ({error.strerror}); "
                "choose another with MASTER_PORT=NNNN, or leave it unset to have a free one picked"
            ) from error
        listener.listen()
        os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
        return dist.TCPStore(
            "127.0.0.1",
            int(os.environ["MASTER_PORT"]),
            world_size=1,
            is_master=True,
            master_listen_fd=listener.detach(),
        )
