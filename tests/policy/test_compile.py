"""A compiled policy predicts what it predicted before, and its file stays the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from .tiny_policies import ACTION_DIM, MLP, STATE_DIM, draws_of, tiny

NETWORKS: list[dict[str, Any]] = [
    MLP,
    {"name": "unet1d", "channels": (8, 16), "step_dim": 8, "groups": 4},
    {"name": "transformer", "width": 16, "depth": 1, "heads": 2},
]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def observation() -> dict[str, Tensor]:
    return {"state": torch.randn(1, 2, STATE_DIM, generator=torch.Generator().manual_seed(3))}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network["name"]))
def test_the_network_is_one_graph_that_computes_the_same(network: dict[str, Any]) -> None:
    graphs: list[fx.GraphModule] = []

    def record(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    policy = tiny("drifting", network=network, horizon=8)
    before, names = policy.predict(observation(), draws_of(0)), set(policy.state_dict())
    policy.compile(backend=record, fullgraph=True, dynamic=False)
    torch.testing.assert_close(policy.predict(observation(), draws_of(0)), before)
    assert len(graphs) == 1 and set(policy.state_dict()) == names
    assert before.shape == (1, 4, ACTION_DIM)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network["name"]))
def test_compiled_code_predicts_the_same(network: dict[str, Any]) -> None:
    policy = tiny("drifting", network=network, horizon=8)
    before = policy.predict(observation(), draws_of(0))
    policy.compile()
    torch.testing.assert_close(policy.predict(observation(), draws_of(0)), before, rtol=1e-4, atol=1e-4)
