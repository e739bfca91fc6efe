"""What the doctor looks at in the network: a port, and the place where nodes are to meet."""

from __future__ import annotations

import ipaddress
import os
import socket

from megatron_mmr1.launch.findings import Finding, do, ok

_CONNECT_TIMEOUT_S = 3.0


def check_port(port: int) -> Finding:
    """Whether a process can listen on a port here, on all interfaces."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            listener.bind(("", port))
        except OSError as error:
            return do(
                "port",
                f"{port} can't be listened on here ({error.strerror}); end what has it (`ss -ltnp "
                f"'sport = :{port}'` shows it), or give another to --master-port, --rdzv-endpoint "
                "or MASTER_PORT on all nodes",
            )
    return ok("port", f"{port} is free")


def check_rendezvous(endpoint: str) -> list[Finding]:
    """Whether HOST:PORT can be met at from here, and whether others can meet this node.

    Raises:
        ValueError: it is not of that form.
    """
    host, _, number = endpoint.rpartition(":")
    if not host or not number.isdigit():
        raise ValueError(f"--rdzv={endpoint} is not of the form HOST:PORT; give, say, node-1:29500")
    port = int(number)
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return [
            do(
                "rendezvous",
                f"{host} does not resolve on {socket.gethostname()} ({error.strerror}); use a name "
                "that all nodes know, or an address",
            )
        ]
    assert isinstance(address, str)
    if _is_mine(address):
        return [_meet_here(host, address, port)]
    return [_meet_there(host, address, port), _found_by_others(address, port)]


def _meet_here(host: str, address: str, port: int) -> Finding:
    if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
        return do(
            "rendezvous",
            f"{host} is this node, but resolves to {address} here, where no other node gets to; "
            f"put its address in the network into /etc/hosts, or give that in place of {host}",
        )
    free = check_port(port)
    if free.status == "DO":
        return do("rendezvous", f"{host}:{port} is this node, and port {free.text}")
    return ok("rendezvous", f"{host}:{port} is this node ({address}), and the port is free")


def _meet_there(host: str, address: str, port: int) -> Finding:
    where = f"{host}:{port} ({address})"
    try:
        socket.create_connection((address, port), _CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return ok("rendezvous", f"{where} is reached; nobody listens there yet")
    except OSError as error:
        reason = error.strerror or f"no answer within {_CONNECT_TIMEOUT_S:.0f} s"
        return do(
            "rendezvous",
            f"{where} is not reached from {socket.gethostname()}: {reason}; look at the firewall, "
            "the route and whether that node is up",
        )
    return ok("rendezvous", f"{where} answers")


def _found_by_others(endpoint_address: str, port: int) -> Finding:
    """Other nodes connect to this one by its name, unless torchrun is told otherwise: it takes
    options that it was not given from PET_*.
    """
    if given := os.environ.get("PET_LOCAL_ADDR"):
        if _is_mine(given):
            return ok("host name", f"other nodes are told PET_LOCAL_ADDR={given} in its place")
        return do("host name", f"PET_LOCAL_ADDR={given} is no address of this node; give one")
    name = socket.getfqdn(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        try:
            probe.connect((endpoint_address, port))
        except OSError as error:
            return do("host name", f"no route to {endpoint_address} ({error.strerror}); mend it")
        mine = probe.getsockname()[0]
    try:
        resolved = socket.gethostbyname(name)
    except OSError:
        resolved = "nothing"
    if resolved != "nothing" and not ipaddress.ip_address(resolved).is_loopback:
        return ok("host name", f"{name} is {resolved}")
    return do(
        "host name",
        f"{name}, the name that torchrun tells the other nodes, resolves to {resolved} here; "
        f"export PET_LOCAL_ADDR={mine} on this node, or mend /etc/hosts",
    )


def _is_mine(address: str) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True
