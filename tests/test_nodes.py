"""What is refused before training starts because nodes don't go together, or don't meet.

Real processes on two machines made of namespaces; they load no Megatron, so a case takes seconds.
"""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from namespaces import CABLE, Node, two_nodes, why_no_namespaces
from processes import REPOSITORY, Finished, Process

from megatron_mmr1.cli import load_config
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.launch.nodes import check_nodes, differences
from megatron_mmr1.launch.rendezvous import Meeting
from megatron_mmr1.launch.versions import source_hash

pytestmark = pytest.mark.distributed

SCRIPT = str(REPOSITORY / "tests" / "node_check.py")
PORT = "29400"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    if missing := why_no_namespaces():
        pytest.skip(missing)
    with two_nodes(tmp_path) as both:
        yield both


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64}')
    return folder


def check_on(
    nodes: list[Node],
    folder: Path,
    *arguments: str,
    second_only: tuple[str, ...] = (),
    **second_environment: str,
) -> list[Finished]:
    """One process on each node; the second one may be started otherwise than the first."""
    started = []
    for rank, node in enumerate(nodes):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": nodes[0].name, "MASTER_PORT": PORT, "PYTHONPATH": str(REPOSITORY)}
        extra = second_only if rank else ()
        place |= second_environment if rank else {}
        command = (SCRIPT, "60", f"output_dir={folder / 'outputs'}", *arguments, *extra)
        started.append(node.start(folder / f"rank_{rank}", *command, **place))
    return [process.wait() for process in started]


def test_nodes_that_go_together_get_rank_0s_folder(nodes: list[Node], tmp_path: Path, model: Path):
    for finished in check_on(nodes, tmp_path, f"model.path={model}"):
        assert finished.succeeded().stdout == f"run folder: {tmp_path / 'outputs' / 'run'}\n"
    assert list((tmp_path / "outputs" / "run").iterdir()) == []  # the mark is gone


def test_every_way_in_which_a_node_differs_is_named_on_all_ranks(
    nodes: list[Node], tmp_path: Path, model: Path
):
    """Another torch, another command line, another copy of the model, and a folder of its own."""
    (tmp_path / "outputs").mkdir()
    other_model, packages = tmp_path / "other_model", tmp_path / "packages"
    shutil.copytree(model, other_model)
    (other_model / "config.json").write_text('{"hidden_size": 96}')  # of the same size
    pretend_installed(packages, "torch", "2.12.0")
    nodes[1].run("mount", "--bind", str(other_model), str(model))
    nodes[1].run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "outputs"))
    both = check_on(
        nodes,
        tmp_path,
        f"model.path={model}",
        second_only=("rollout.group_size=4",),
        PYTHONPATH=f"{packages}:{REPOSITORY}",
    )
    for finished, whose in zip(both, ("error", "error on rank 1 (node gpu-02)"), strict=True):
        assert finished.returncode == 2
        message = finished.stderr.strip().splitlines()[-1]
        assert message.startswith(f"{whose}: node gpu-02 has torch 2.12.0 and rank 0's node gpu-01")
        assert "install the same requirements files" in message
        assert "node gpu-02 was started with rollout.group_size=4 and" in message
        assert f"model.path='{model}' holds other files on node gpu-02" in message
        assert f"output_dir='{tmp_path / 'outputs'}' is not shared: " in message
        assert message.count(";") == 7  # four faults with a remedy each, and nothing else
        assert "Traceback" not in finished.stderr


def test_another_state_of_the_code_is_named(nodes: list[Node], tmp_path: Path, model: Path):
    changed = tmp_path / "checkout" / "megatron_mmr1"
    shutil.copytree(REPOSITORY / "megatron_mmr1", changed)
    shutil.copytree(REPOSITORY / "hydra_conf", changed.parent / "hydra_conf")
    (changed / "types.py").write_text((changed / "types.py").read_text() + "\n# changed\n")
    both = check_on(nodes, tmp_path, f"model.path={model}", PYTHONPATH=str(changed.parent))
    for finished in both:
        assert finished.returncode == 2
        assert "node gpu-02 runs another state of megatron_mmr1" in finished.stderr
        assert source_hash(changed) in finished.stderr and source_hash() in finished.stderr


def test_a_node_of_several_ranks_is_named_once():
    ours = {
        "host": "gpu-01",
        "versions": {"torch": "2.13.0"},
        "code": "a",
        "settings": {},
        "files": {},
        "sees_folder": True,
        "folder": "/run",
    }
    theirs = ours | {"host": "gpu-02", "versions": {"torch": "2.12.0"}}
    assert len(differences(ours, [theirs] * 8)) == 1
    assert differences(ours, [ours | {"host": "gpu-02"}] * 8) == []


def config_of(tmp_path: Path) -> GrpoConfig:
    return load_config(GrpoConfig, "experiment", [f"output_dir={tmp_path}", "model.path=any"])


def test_rank_0_names_the_ranks_that_said_nothing(tmp_path: Path):
    """Rank 1 has spoken; 2 and 3 met and ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("nodes/facts/1", "{}")
    wait = timedelta(seconds=0.5)
    with pytest.raises(ValueError, match=r"waited in vain for what rank 2, 3 had to say") as caught:
        check_nodes(Meeting(store, 0, 4), config_of(tmp_path), tmp_path, answer_timeout=wait)
    assert "look at the other nodes' own messages" in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # the mark is gone


def test_a_rank_whose_store_is_silent_or_ends_says_so(tmp_path: Path):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    wait = timedelta(seconds=1)
    store = dist.TCPStore("127.0.0.1", host.port, timeout=wait, wait_for_workers=False)
    with pytest.raises(ValueError, match=r"^rank 1 on node .* waited in vain for what rank 0, 1 "):
        check_nodes(Meeting(store, 1, 2), config_of(tmp_path), None)
    del host
    with pytest.raises(ValueError, match=r"^rank 1 on node .* lost the store .*rank 0's first$"):
        check_nodes(Meeting(store, 1, 2), config_of(tmp_path), None)


def test_the_doctor_tells_a_node_where_it_cannot_be_met(nodes: list[Node], tmp_path: Path):
    """Asked on the second node: another one that is up, one behind a cut cable, and a name of its
    own that other nodes can't use.
    """

    def ask(name: str, endpoint: str, **environment: str) -> str:
        log, tool = tmp_path / name, str(REPOSITORY / "tools" / "doctor.py")
        return nodes[1].start(log, tool, "--rdzv", endpoint, **environment).wait().stdout

    good = ask("good", "gpu-01:29500")
    assert "OK rendezvous: gpu-01:29500 (10.77.0.1) is reached; nobody listens there yet" in good
    assert "OK host name: gpu-02 is 10.77.0.2" in good
    hosts = (tmp_path / "hosts").read_text()
    (tmp_path / "hosts").write_text(hosts.replace("10.77.0.2", "127.0.1.1"))
    nodes[0].run("ip", "link", "set", CABLE, "down")
    bad = ask("bad", "gpu-01:29500")
    assert "DO rendezvous: gpu-01:29500 (10.77.0.1) is not reached from gpu-02" in bad
    assert "DO host name: gpu-02, the name that torchrun tells the other nodes, resolves to" in bad
    assert "export PET_LOCAL_ADDR=10.77.0.2 on this node" in bad
    mended = ask("mended", "gpu-01:29500", PET_LOCAL_ADDR="10.77.0.2")
    assert "OK host name: other nodes are told PET_LOCAL_ADDR=10.77.0.2" in mended
    wrong = ask("wrong", "gpu-01:29500", PET_LOCAL_ADDR="10.77.0.1")
    assert "DO host name: PET_LOCAL_ADDR=10.77.0.1 is no address of this node" in wrong
    mine = ask("mine", "gpu-02:29500")
    assert "DO rendezvous: gpu-02 is this node, but resolves to 127.0.1.1 here" in mine


@pytest.mark.parametrize("script", ["c10d", "static"])
def test_a_taken_port_ends_a_launch_script_before_torchrun_starts(tmp_path: Path, script: str):
    """By itself torchrun ends with a stack trace; with c10d after a minute."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        settings = {"NODES": "2", "NODE": "0", "RANKS_PER_NODE": "1", "PYTHON": sys.executable}
        command = (f"examples/torchrun/{script}.sh", "run=any")
        endpoint = f"127.0.0.1:{port}"
        launched = Process(
            tmp_path / "log", *command, program="bash", ENDPOINT=endpoint, **settings
        ).wait()
    assert launched.returncode == 1 and "Traceback" not in launched.stderr
    (line,) = [line for line in launched.stderr.splitlines() if line.startswith("DO")]
    assert line.startswith(f"DO rendezvous: {endpoint} is this node, and port {port} can't be")


@pytest.mark.parametrize("script", ["c10d", "static"])
@pytest.mark.parametrize(("nodes", "asked"), [("1", "--port 29500"), ("2", "--rdzv gpu-01:29500")])
def test_one_node_is_asked_for_its_port_alone(tmp_path: Path, script: str, nodes: str, asked: str):
    """Its name may be 127.0.1.1 there, as Debian sets it, where two nodes could not meet. A small
    program is in Python's place.
    """
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"NODES": nodes, "NODE": "0", "RANKS_PER_NODE": "1", "ENDPOINT": "gpu-01:29500"}
    settings["PYTHON"] = str(tmp_path / "python")
    command = (f"examples/torchrun/{script}.sh", "run=any")
    launched = Process(tmp_path / "log", *command, program="bash", **settings).wait().succeeded()
    assert launched.stderr.startswith(f"tools/doctor.py {asked}\n")
    assert f"-m torch.distributed.run --nnodes={nodes} " in launched.stdout


def pretend_installed(folder: Path, package: str, version: str) -> None:
    """Let a Python that looks into `folder` first believe in another version of a package."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def meet_alone(log: Path, rank: str, port: int, **environment: str) -> Finished:
    """One of two processes, on loopback; the other doesn't come."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environment
    return Process(log, SCRIPT, "3", "model.path=any", **place).wait()


def test_a_port_in_use_where_rank_0_must_listen_is_named(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused = meet_alone(tmp_path / "log", "0", port)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"error: MASTER_PORT={port} is in use on node {socket.gethostname()}" in refused.stderr


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("0", "only 1/2 came to node"),
        ("1", "found nobody at MASTER_ADDR=127.0.0.1 MASTER_PORT="),
    ],
)
def test_a_process_that_stays_alone_says_so_and_where(tmp_path: Path, rank: str, message: str):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    alone = meet_alone(tmp_path / "log", rank, port)
    assert alone.returncode == 2 and "Traceback" not in alone.stderr
    assert message in alone.stderr and str(port) in alone.stderr


def test_restarts_of_several_nodes_over_one_store_are_refused(tmp_path: Path):
    """They would find the addresses of dead processes there (see launch/rendezvous.py)."""
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    refused = meet_alone(tmp_path / "log", "0", 1, GROUP_WORLD_SIZE="2", **elastic)
    assert refused.returncode == 2
    assert "--max-restarts=3" in refused.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refused.stderr


def test_a_restart_on_one_node_finds_nothing_of_the_start_before(tmp_path: Path):
    """Though torchrun gives it the same store again."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    script = str(REPOSITORY / "tests" / "restarted.py")
    command = ("-m", *launcher, script, str(tmp_path))
    Process(tmp_path / "log", *command, PYTHONPATH=str(REPOSITORY)).wait().succeeded()
    for rank in (0, 1):
        found = [(tmp_path / f"start_{start}_rank_{rank}").read_text() for start in (0, 1)]
        assert found == ["[False, False]", "[False, True]"]


def test_the_hash_of_the_code_follows_names_and_contents(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_hash(tmp_path)
    assert source_hash(tmp_path) == first
    os.rename(tmp_path / "a.py", tmp_path / "b.py")
    renamed = source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, renamed, source_hash(tmp_path)}) == 3
