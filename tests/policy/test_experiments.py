"""Every recipe of configs/policy/experiment composes, says only what differs, and builds the network it names."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from driftfield.training import UserError
from driftfield.training.config import load_config
from driftfield.training.schema import to_plain
from policy.config import CONFIG_DIR, TrainConfig
from policy.policy import Policy
from policy.replay_buffer import ReplayBuffer
from policy.train import build_policy
from policy.windows import Windows, keep_episodes, validation_split

FILES = {path.stem: path for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml"))}
ROWS = 20  # of the demonstrations that a policy is built for


class Published(NamedTuple):
    """The demonstrations of a row of Table 7, and for how long Diffusion Policy learns from them."""

    episodes: int
    steps: int  # of all episodes
    kept: int | None
    epochs: int


PUSH_T = Published(206, 25650, 90, 5000)
LIFT, CAN, TOOL_HANG = (Published(200, steps, None, 5000) for steps in (9_666, 23_207, 95_962))
TABLE_7 = {
    "push_t_state": PUSH_T, "push_t_image": PUSH_T._replace(epochs=3050),
    "lift_state": LIFT, "lift_image": LIFT._replace(epochs=3050),
    "can_state": CAN, "can_image": CAN._replace(epochs=3050),
    "tool_hang_state": TOOL_HANG, "tool_hang_image": TOOL_HANG._replace(epochs=3050),
    "block_push": Published(1000, 117_000, None, 5000), "kitchen": Published(566, 128_500, None, 5000),
}  # fmt: skip
SCRIPTED = [f"{task}_scripted" for task in ("push_t", "block_push", "lift", "can", "tool_hang", "kitchen")]
# What the tasks show and take; of the robot arms by kind of action.
STATE = {"push_t": 20, "block_push": 16, "lift": 19, "can": 23, "tool_hang": 53, "kitchen": 60}
PROPRIOCEPTION = {"push_t": 2, "lift": 9, "can": 9, "tool_hang": 9}
CAMERAS = {
    "push_t": {"image": 96},
    "lift": {"agentview": 84, "robot0_eye_in_hand": 84},
    "can": {"agentview": 84, "robot0_eye_in_hand": 84},
    "tool_hang": {"sideview": 240, "robot0_eye_in_hand": 240},
}
ACTION = {"push_t": 2, "block_push": 2, "kitchen": 9}
ARM_ACTION = {"absolute": 10, "delta": 7}
every_file = pytest.mark.parametrize("name", FILES)
every_row = pytest.mark.parametrize("name", TABLE_7)


@functools.cache
def composed(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=overrides)


def build(config: TrainConfig) -> Policy:
    """The policy for demonstrations of the task's shapes, without memory for its weights."""
    shapes: dict[str, tuple[int, ...]] = {"state": (STATE[config.task],)}
    if config.observation == "image":
        shapes = {"state": (PROPRIOCEPTION[config.task],)}
        shapes |= {camera: (side, side, 3) for camera, side in CAMERAS[config.task].items()}
    shapes["action"] = (ACTION.get(config.task) or ARM_ACTION[config.action or "absolute"],)
    draws = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        key: draws.uniform(0, 1, (ROWS, *shape)).astype(np.uint8 if len(shape) == 3 else np.float32)
        for key, shape in shapes.items()
    }
    with torch.device("meta"):
        return build_policy(config, ReplayBuffer(arrays, np.array([ROWS]), {"task": config.task}))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def leaves(data: dict[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= leaves(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def test_all_rows_are_there_and_nothing_else() -> None:
    assert set(FILES) == {*TABLE_7, *SCRIPTED}


@every_file
def test_a_file_says_what_it_is_and_only_what_differs(name: str) -> None:
    path: Path = FILES[name]
    assert path.read_text(encoding="utf-8").startswith("# ")
    own: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    parents = own.pop("defaults", [])
    before = leaves(to_plain(composed(*(f"experiment={parent}" for parent in parents))))
    after = leaves(to_plain(composed(f"experiment={name}")))
    for key, value in leaves(own).items():
        assert after[key] == value
        assert before[key] != value, f"{key} is {value} without it"
    assert after["run_dir"] == f"runs/policy/{name}"


@every_file
def test_a_recipe_builds_its_policy(name: str) -> None:
    config = composed(f"experiment={name}")
    policy = build(config)
    size, chunk = 3, (3, config.horizon, policy.action_dim)
    seen = {
        key: torch.zeros(size, config.obs_steps, *shape, dtype=torch.uint8 if len(shape) == 3 else None, device="meta")
        for key, shape in policy.config["shapes"].items()
    }
    seen |= {
        key: torch.zeros(size, config.obs_steps, *shape, device="meta") for key, shape in policy.encoder.numbers.items()
    }
    cond = policy.eval().trunk(policy.encoder(seen))
    assert policy.network(torch.zeros(chunk, device="meta"), torch.zeros(size, device="meta"), cond).shape == chunk
    first = config.obs_steps - 1
    executed = [1] if name == "block_push_scripted" else [*range(1, 9)]  # a rod's push has no time for open loops
    assert [*range(config.horizon)][first : first + config.action_steps] == executed


@every_row
def test_the_networks_of_table_7_have_the_published_sizes(name: str) -> None:
    config = composed(f"experiment={name}")
    policy = build(config)
    if config.observation == "state":
        assert 64e6 < parameters(policy.network) < 67e6
    else:
        assert parameters(policy.network) == pytest.approx(250e6, rel=0.03)
        features = {"push_t": 132, "lift": 274, "can": 274, "tool_hang": 274}
        assert config.obs_steps * policy.encoder.dim == features[config.task]
    baseline = build(composed(f"experiment={name}", "method=diffusion"))
    assert parameters(baseline) == parameters(policy)


@every_row
def test_the_samples_of_table_7_are_epochs_times_windows(name: str) -> None:
    config, published = composed(f"experiment={name}"), TABLE_7[name]
    # Episodes as equal as whole steps allow: where every one is long enough, only the mean length counts.
    ends = (np.arange(1, published.episodes + 1) * published.steps) // published.episodes
    assert config.demonstrations.keep == published.kept
    train = validation_split(published.episodes, config.demonstrations.held_out).train
    if published.kept is not None:
        train = keep_episodes(train, published.kept)
    windows = Windows(
        ends, horizon=config.horizon, pad_before=config.obs_steps - 1, pad_after=config.action_steps - 1,
        episodes=train,
    )  # fmt: skip
    assert config.samples == pytest.approx(published.epochs * len(windows), rel=0.01)
    assert config.evaluation.every == config.checkpoint_every == pytest.approx(50 * len(windows), rel=0.01)


@every_row
def test_table_7_is_trained_and_rolled_out_as_diffusion_policy_is(name: str) -> None:
    config = composed(f"experiment={name}")
    image = config.observation == "image"
    assert (config.obs_steps, config.horizon, config.action_steps) == (2, 16, 8)
    assert config.batch_size == (64 if image else 256)
    assert config.warmup_samples == 500 * config.batch_size
    assert (config.learning_rate, config.schedule) == (1e-4, "cosine")
    assert (config.betas, config.weight_decay, config.clip_norm) == ((0.95, 0.999), 1e-6, None)
    assert config.ema_decay == 0.9999
    assert config.crop == ({"lift": 76, "can": 76, "tool_hang": 216, "push_t": 84}[config.task] if image else None)
    assert (config.evaluation.episodes, config.evaluation.first_seed) == (50, 100_000)
    # Scripted demonstrations must not slip into a row of the table, nor one kind of observation into another.
    assert config.demonstrations.path is not None
    paths = [composed(f"experiment={other}").demonstrations.path for other in TABLE_7]
    assert paths.count(config.demonstrations.path) == 1


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_recipes_collect_what_they_learn_from(name: str) -> None:
    config = composed(f"experiment={name}")
    assert config.demonstrations.path is None
    assert config.demonstrations.collect >= 200
    assert config.task == name.removesuffix("_scripted")
    assert parameters(build(config)) < 1e6
    assert config.evaluation.every is not None and config.samples % config.evaluation.every == 0


def demonstrations(state_size: int, action_size: int, **attributes: str) -> ReplayBuffer:
    draws = np.random.default_rng(0)
    arrays = {
        key: draws.normal(size=(ROWS, size)).astype(np.float32)
        for key, size in (("state", state_size), ("action", action_size))
    }
    return ReplayBuffer(arrays, np.array([ROWS]), attributes)


def test_the_kind_of_action_is_that_of_the_demonstrations() -> None:
    delta = demonstrations(19, 7, task="lift", action="delta")
    policy = build_policy(composed("task=lift"), delta)
    assert policy.task_options == {"observation": "state", "action": "delta"}
    assert [part.mode for part in policy.normalizer.parts["action"]] == ["identity"]


@pytest.mark.parametrize(
    ("buffer", "overrides", "message"),
    [
        (
            demonstrations(19, 7, task="lift", action="delta"),
            ("action=absolute",),
            "expected action=absolute, found delta",
        ),
        (demonstrations(23, 7, task="can"), (), "expected those of task=lift, found those of can"),
        (
            demonstrations(19, 7, task="lift", action="velocity"),
            (),
            "expected absolute or delta actions, found velocity",
        ),
        (demonstrations(19, 10, task="lift"), ("observation=image",), "expected a camera, found state"),
        (demonstrations(19, 7), (), "lift: action: expected 10 dimensions, found 7"),
    ],
)
def test_demonstrations_that_are_not_of_the_recipe_are_refused(
    buffer: ReplayBuffer, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(composed("task=lift", *overrides), buffer)
