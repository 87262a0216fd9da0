"""What every test gets: no network, the same random numbers each time, and torch's defaults back afterwards."""

import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

# Triton looks at this when a module with kernels is imported, which doctests do before any test's own folder is read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("driftfield", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("driftfield")


def is_on_this_machine(address: object) -> bool:
    """Whether a socket address, as socket.connect takes it, is a loopback or a Unix address."""
    if not isinstance(address, tuple):
        return True  # the path of a Unix socket
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name that would have to be looked up


def refuse_the_network(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: raises ConnectionRefusedError where Python is about to reach another machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = (arguments[0] or "",)
    else:
        return
    if address is not None and not is_on_this_machine(address):
        raise ConnectionRefusedError(f"tests use no network, but {event} was asked for {address!r}")


# A hook cannot be taken out again, so it holds for doctests and for what runs between tests as well.
sys.addaudithook(refuse_the_network)


@pytest.fixture(autouse=True)
def fixed_seeds_and_torch_defaults() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from numpy's global state
    torch.manual_seed(0)
    threads, dtype, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
    if torch.are_deterministic_algorithms_enabled():  # setting it loads the compiler, which takes seconds
        torch.use_deterministic_algorithms(False)
