"""Where the page's server listens, and the hosts that lead there."""

from __future__ import annotations

import socket

EVERY_ADDRESS = ""  # among the hosts of a server that listens at all addresses
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERYBODY = {  # hosts that stand for all addresses, and an address of documentation
    "0.0.0.0": (socket.AF_INET, "192.0.2.1"),  # noqa: S104, what it means is known here
    "::": (socket.AF_INET6, "2001:db8::1"),
}


def check_address(host: str, port: int | None) -> None:
    """Checks that one can listen there.

    Raises:
        ValueError: One cannot.
    """
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        raise ValueError(
            f"host {host} and port {port} cannot be listened at ({error}); pass another port or "
            "host"
        ) from error


def reachable(host: str) -> str:
    """Returns the address at which others find this computer, for 0.0.0.0; otherwise the host."""
    if host in EVERYBODY:
        family, documented = EVERYBODY[host]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((documented, 9))  # nothing is sent
                host = probe.getsockname()[0]
            except OSError:  # no network
                host = "localhost"
    return f"[{host}]" if ":" in host else host


def served_hosts(host: str) -> set[str]:
    """Lists the hosts, besides `LOOPBACK`, under which a server that listens at one is asked."""
    if host not in EVERYBODY:
        return {host.strip("[]").lower()}
    own = {socket.gethostname().lower()}
    return {EVERY_ADDRESS, *own, *(f"{name}.local" for name in own)}
