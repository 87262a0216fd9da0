"""The guard of conftest.py: a test that reaches for another machine fails before anything is sent."""

import socket
import sys

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0), ("example.org", 443)])
@pytest.mark.parametrize("event", ["socket.connect", "socket.sendto", "socket.sendmsg"])
def test_another_machine_is_refused(event: str, address: tuple[object, ...]) -> None:
    with pytest.raises(ConnectionRefusedError, match="tests use no network"):
        sys.audit(event, None, address)


def test_looking_up_a_name_is_refused() -> None:
    with pytest.raises(ConnectionRefusedError, match=r"example\.org"):
        sys.audit("socket.getaddrinfo", "example.org", 443, 0, 0, 0)


def test_this_machine_can_be_reached() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=10) as client,
        server.accept()[0] as accepted,
    ):
        client.sendall(b"here")
        assert accepted.recv(4) == b"here"
