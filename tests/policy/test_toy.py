"""The toy of two ways: its data, what its shares say of policies that are known, and its command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from driftfield.training import load_config
from policy import toy
from policy.config import CONFIG_DIR
from policy.toy import ToyConfig

ROOT = Path(__file__).parents[2]
T = 5


def configured(*overrides: str) -> ToyConfig:
    return load_config(ToyConfig, config_dir=CONFIG_DIR, config_name="toy", overrides=[f"horizon={T}", *overrides])


def test_each_way_is_demonstrated_half_of_the_time_whatever_is_seen() -> None:
    observation, chunks = toy.demonstrations(4000, T, torch.Generator().manual_seed(0))
    mode = toy.modes(observation, T)
    side = (chunks * mode).sum((1, 2)).sign()
    torch.testing.assert_close(chunks, side.view(-1, 1, 1) * mode)
    assert observation.abs().max() <= 1 and observation.std(0).min() > 0.5
    right = observation[:, 0] > 0
    assert abs(side[right].mean().item()) < 0.1 and abs(side[~right].mean().item()) < 0.1  # 4.5 standard errors
    assert mode.flatten(1).norm(dim=1).min() > 0.1


Act = Callable[[Tensor, Tensor], Tensor]  # the paths [N, T, 2] and noise [N, T, 2] to chunks


def measured(act: Act, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is measured of a policy that does this."""
    config = configured()
    policy = toy.build_policy(config, 0)

    def sample(cond: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = torch.stack([torch.randn(T, 2, generator=draw) for draw in generators])
        return act(toy.modes(cond[:, 0], T), noise)

    monkeypatch.setattr(policy, "sample", sample)
    return toy.measure(policy, config)


KNOWN: dict[str, tuple[Act, dict[str, Any]]] = {
    "either way": (
        lambda mode, noise: noise[:, :1, :1].sign() * mode,
        {"near": 1, "collapsed": 0, "coherent": 1, "first_mode": pytest.approx(0.5, abs=0.02)},
    ),
    "always the first": (
        lambda mode, noise: mode,
        {"near": 1, "collapsed": 0, "coherent": 1, "first_mode": 1, "balanced": 0},
    ),
    "their mean": (lambda mode, noise: 0 * mode, {"near": 0, "collapsed": 1, "balanced": 0}),
    "a side for every step": (
        lambda mode, noise: noise[:, :, :1].sign() * mode,
        {"collapsed": 0, "coherent": pytest.approx(2**-4, abs=0.01)},
    ),
    "a fifth of the way aside": (
        lambda mode, noise: 1.2 * mode,
        {"near": 1, "collapsed": 0, "coherent": 1, "first_mode": 1},
    ),
    "half of the way": (lambda mode, noise: 0.5 * mode, {"near": 0, "collapsed": 0, "coherent": 1}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_shares_are_those_of_a_policy_that_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, expected = KNOWN[name]
    found = measured(act, monkeypatch)
    assert {share: found[share] for share in expected} == expected
    if name == "either way":
        assert found["balanced"] > 0.95  # of 32 fair coins 10 to 22 fall on one side with probability 0.98


def test_training_leaves_the_averaged_weights() -> None:
    config = configured("steps=3", "batch_size=4", "ema_decay=0.5")
    policy, last = toy.build_policy(config, 0), toy.build_policy(config, 0)
    toy.train(policy, config, 0)
    config.ema_decay = 0.0  # the average is what was last
    toy.train(last, config, 0)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(policy.network.parameters(), last.network.parameters(), strict=True)
    )
    # With decays 0.1, 2/11, 3/12 of the first updates, the average is between the first weights and the last.
    first = torch.cat([each.flatten() for each in toy.build_policy(config, 0).network.parameters()])
    mean, end = (torch.cat([each.flatten() for each in p.network.parameters()]).detach() for p in (policy, last))
    assert (mean - end).norm() < (first - end).norm()


def test_command_writes_figures_and_a_picture(tmp_path: Path) -> None:
    words = ["out=out", "steps=4", "batch_size=8", "horizon=4", "seeds=[3,1]", "generated=4"]
    command = [sys.executable, "-m", "policy.toy", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["drifting_mlp.json", "drifting_mlp.png"]
    results = json.loads((tmp_path / "out" / "drifting_mlp.json").read_text(encoding="utf-8"))["results"]
    assert [result["seed"] for result in results] == [3, 1]
    assert all(0 <= result[share] <= 1 for result in results for share in ("near", "collapsed", "coherent", "balanced"))
    assert all(result["training_lambda/0.3"] > 0 for result in results)
    assert "seed 3  near " in ended.stdout and "seed 1  near " in ended.stdout
    with Image.open(tmp_path / "out" / "drifting_mlp.png") as image:
        image.load()
