"""Whether as many processes run, on as many machines, as an experiment is made for (`launch.*`).

Owns that check; reads no environment and imports nothing heavy.
"""

from __future__ import annotations

from megatron_mmr1.config.schema import LaunchConfig

_PORT = 29500  # of the line that is proposed; any free one does


def check_launch(
    launch: LaunchConfig, world_size: int, num_nodes: int, module: str, experiment: str
) -> None:
    """Refuse an experiment on another number of processes or nodes than it states.

    Args:
        world_size: the number of processes, one a GPU (torchrun's WORLD_SIZE).
        num_nodes: on so many machines (torchrun's GROUP_WORLD_SIZE).
        module: what was started with `-m`, for the message.
        experiment: its name, for the message.

    Raises:
        ValueError: names what is stated and what runs, and the line to start.
    """
    for key, value in (("nodes", launch.nodes), ("gpus_per_node", launch.gpus_per_node)):
        if value is not None and value < 1:
            raise ValueError(f"launch.{key}={value} is too small; use 1 or more, or null for any")
    right_nodes = launch.nodes in (None, num_nodes)
    if right_nodes and launch.gpus_per_node in (None, world_size / num_nodes):
        return
    nodes = num_nodes if launch.nodes is None else launch.nodes
    gpus = world_size // num_nodes if launch.gpus_per_node is None else launch.gpus_per_node
    raise ValueError(
        f"launch.nodes={launch.nodes} and launch.gpus_per_node={launch.gpus_per_node}, and "
        f"{_counted(world_size, 'process', 'es')} on {_counted(num_nodes, 'node')} "
        f"{'is' if world_size == 1 else 'are'} running; start "
        f"`{torchrun_line(nodes, gpus, module, experiment)}`{' on every node' * (nodes > 1)}, or "
        "take another number knowingly with launch.nodes=null launch.gpus_per_node=null"
    )


def torchrun_line(nodes: int, gpus_per_node: int, module: str, experiment: str) -> str:
    """Return the command that starts an experiment; HOST is a node that all others reach."""
    meeting = (
        "--standalone"
        if nodes == 1
        else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:{_PORT} "
        f"--rdzv-id {experiment}"
    )
    return (
        f"torchrun {meeting} --nproc-per-node {gpus_per_node} -m {module} experiment={experiment}"
    )


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
