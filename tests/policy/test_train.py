"""`python -m policy.train` end to end, small: what it leaves, how it resumes, what it refuses, what it learns from."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield.training import generator, load_config, read_checkpoint, read_log, run_program
from driftfield.training.distributed import TIMEOUT_S
from policy import train
from policy.config import CONFIG_DIR, TrainConfig
from policy.draws import Draws
from policy.methods import load_policy
from policy.policy import Batch, PolicyLoss
from policy.replay_buffer import ReplayBuffer
from policy.train import Training, load_buffer

ROOT = Path(__file__).parents[2]
TINY = (
    "network.width=16", "network.depth=1", "drifting.generated=4", "batch_size=8", "samples=160", "warmup_samples=16",
    "log_every=16", "checkpoint_every=40", "evaluation.every=40", "evaluation.episodes=0", "evaluation.keep=2",
    "demonstrations.held_out=0.25", "device=cpu", "ema_decay=0.9",
)  # fmt: skip
STEPS = 20


def episodes(seed: int, count: int = 8) -> ReplayBuffer:
    """Made-up demonstrations of 12 to 20 steps, with the arm's numbers of dimensions."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(12, 21, count)
    parts = [{"state": draws.normal(size=(n, 9)), "action": draws.uniform(0, 0.3, (n, 2))} for n in lengths]
    return ReplayBuffer.from_episodes([{key: part[key].astype(np.float32) for key in part} for part in parts])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "arm.zarr"
    episodes(0).save(folder)
    return folder


def overrides(folder: Path, data: Path, *more: str) -> list[str]:
    return [*TINY, f"run_dir={folder / 'run'}", f"demonstrations.path={data}", *more]


def run(arguments: list[str]) -> int:
    return run_program(
        train.main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description="", arguments=arguments
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "policy.train", *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def final_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    loaded = read_checkpoint(folder / "run" / "checkpoints")
    assert loaded is not None and loaded.step == STEPS
    return loaded.tensors


def assert_same_end(one: Path, other: Path) -> None:
    """The same bits in the checkpoint, the finished policy, the log and the evaluations."""
    states = final_state(one), final_state(other)
    assert states[0].keys() == states[1].keys()
    for group, named in states[0].items():
        assert named.keys() == states[1][group].keys()
        assert all(torch.equal(tensor, states[1][group][name]) for name, tensor in named.items()), group
    logs = [
        [(line["step"], line["loss"]) for line in read_log(each / "run" / "metrics.jsonl")] for each in (one, other)
    ]
    assert logs[0] == logs[1]
    for file in ("model/model.safetensors", "model/config.json", *(f"evaluations/{n:012d}.json" for n in (40, 160))):
        assert (one / "run" / file).read_bytes() == (other / "run" / file).read_bytes(), file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run from start to end without disturbance."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(overrides(folder, data)) == 0
    return folder


def trainer(data: Path, *more: str) -> Training:
    config = load_config(
        TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=overrides(data.parent, data, *more)
    )
    return Training(config, load_buffer(config), torch.device("cpu"))


# ---- a run


def test_run_leaves_the_averaged_policy_and_its_figures(finished: Path) -> None:
    results = json.loads((finished / "run" / "results.json").read_text(encoding="utf-8"))
    lines = read_log(finished / "run" / "metrics.jsonl")
    assert results["samples_seen"] == 160 and [line["samples_seen"] for line in lines] == list(range(16, 161, 16))
    assert all(line["lambda/0.3"] > 0 and line["rejected_steps"] == 0 for line in lines)
    assert lines[-1]["learning_rate"] < lines[4]["learning_rate"]
    state = final_state(finished)
    averages = {name.removeprefix("0.9/"): each for name, each in state["ema"].items() if name.startswith("0.9/")}
    policy = load_policy(finished / "run" / "model")
    weights = dict(policy.named_parameters())
    assert weights.keys() == averages.keys()
    assert all(torch.equal(weights[name], averages[name]) for name in weights)
    assert not any(torch.equal(state["model"][name], averages[name]) for name in weights)
    assert policy.task == "arm_reach" and policy.task_options == {"observation": "state"}


def test_evaluations_are_kept_and_the_policies_of_the_last_and_the_best(finished: Path) -> None:
    names = [path.stem for path in sorted((finished / "run" / "evaluations").glob("*.json"))]
    assert [int(name) for name in names] == [40, 80, 120, 160]
    # Without episodes all scores are 0, and the first is the best.
    kept = sorted(int(path.name) for path in (finished / "run" / "snapshots").iterdir())
    assert kept == [40, 120, 160]
    last, model = (load_policy(finished / "run" / name).state_dict() for name in ("snapshots/000000000160", "model"))
    assert all(torch.equal(last[name], model[name]) for name in model)


def test_same_command_on_a_finished_run_changes_nothing(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (finished / "run").rglob("*.json") if path.name != "run.json"}
    assert run(overrides(finished, data)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert "complete" in capsys.readouterr().out


def test_killed_anywhere_and_started_again_ends_bit_identical(finished: Path, data: Path, tmp_path: Path) -> None:
    for fault in ("train.step.13:exit", "checkpoint.before_rename:exit"):
        ended = subprocess.run(
            command(*overrides(tmp_path, data)), env=environment(DRIFTFIELD_FAULT=fault), cwd=tmp_path,
            capture_output=True, text=True, timeout=110,
        )  # fmt: skip
        assert ended.returncode == 9, ended.stderr
    assert run(overrides(tmp_path, data)) == 0
    assert_same_end(tmp_path, finished)


def test_sigterm_saves_and_the_same_command_goes_on_with_the_same_demonstrations(
    finished: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = Training.step

    def step_with_signal(training: Training) -> dict[str, float | Tensor]:
        if training.step_number == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(training)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", step_with_signal)
        assert run(overrides(tmp_path, data)) == 143
    stopped = read_checkpoint(tmp_path / "run" / "checkpoints")
    assert stopped is not None and stopped.step == 13
    capsys.readouterr()
    episodes(1).save(tmp_path / "other.zarr")
    assert run(overrides(tmp_path, tmp_path / "other.zarr")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: demonstrations: expected those that this run began with, fingerprint ")
    assert episodes(0).fingerprint in message and episodes(1).fingerprint in message
    shutil.copytree(data, tmp_path / "moved.zarr")
    assert run(overrides(tmp_path, tmp_path / "moved.zarr")) == 0
    assert_same_end(tmp_path, finished)


def test_folder_of_another_run_is_refused_naming_the_difference(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(overrides(finished, data, "seed=1")) == 2
    message = capsys.readouterr().err
    assert "seed (was 0, now 1)" in message and "run_dir=" in message


def test_command_collects_trains_rolls_out_and_films(tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("evaluation.")]
    words += ["run_dir=run", "demonstrations.collect=10", "evaluation.episodes=2", "evaluation.workers=1"]
    ended = subprocess.run(
        command(*words, "evaluation.videos=1"), env=environment(), cwd=tmp_path, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert len(ReplayBuffer.load(tmp_path / "data" / "robots" / "arm_reach.zarr")) == 10
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    evaluation = results["last_evaluation"]
    assert evaluation["samples"] == 160 and evaluation["summary"]["episodes"] == 2
    assert evaluation["held_out_nearest_error"] <= evaluation["held_out_mean_error"]
    assert results["best_score"] == evaluation["summary"]["score"]
    assert load_policy(tmp_path / "run" / "model").action_dim == 2
    video = tmp_path / "run" / "episodes.mp4"
    assert video.stat().st_size > 1000 if video.exists() else "no video" in ended.stdout + ended.stderr


# ---- what a step learns from


def test_held_out_episodes_are_never_learned_from(data: Path) -> None:
    training, buffer = trainer(data), episodes(0)
    assert training.held_out is not None
    seen, held_out = (
        set(windows.indices(np.arange(len(windows))).flatten().tolist())
        for windows in (training.windows, training.held_out)
    )
    assert not seen & held_out and seen | held_out == set(range(buffer.num_steps))
    few = trainer(data, "demonstrations.keep=3").windows
    starts = [0, *buffer.episode_ends[:-1]]
    chosen = set(few.indices(np.arange(len(few))).flatten().tolist())
    assert chosen < seen and len(chosen & set(starts)) == 3


def test_held_out_errors_are_of_the_same_noise_each_time_and_disturb_nothing(data: Path) -> None:
    asked, alone = trainer(data), trainer(data)
    before = asked.held_out_errors()
    assert {"held_out_nearest_error", "held_out_mean_error", "held_out_spread"} <= before.keys()
    asked.step_number = 7
    assert asked.held_out_errors() == before
    asked.step_number = 0
    asked.step()
    alone.step()
    assert asked.held_out_errors() != before
    mine, theirs = asked.policy.state_dict(), alone.policy.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert trainer(data, "demonstrations.held_out=0").held_out_errors() == {}


def test_further_positives_are_of_the_nearest_windows_itself_first(data: Path) -> None:
    training, plain = trainer(data, "drifting.positives=3"), trainer(data)
    assert training._positives is not None and plain._positives is None
    numbers = torch.tensor([4, 0, len(training.windows) - 1])
    batch, alone = (each._batch(each.windows, numbers, each._positives) for each in (training, plain))
    assert batch.actions.shape == (3, 3, 16, 2)
    assert torch.equal(batch.observation["state"], alone.observation["state"])
    assert torch.equal(batch.actions[:, :1], alone.actions)
    every = plain._batch(plain.windows, torch.arange(len(plain.windows)), None)
    seen = plain.policy.normalizer.normalize("state", every.observation["state"]).flatten(1)
    nearest = torch.cdist(seen[numbers], seen).argsort(1)[:, :3]
    assert torch.equal(nearest[:, 0], numbers)
    assert torch.equal(batch.actions, every.actions[nearest].squeeze(2))
    used: list[Batch] = []
    loss = training.policy.loss
    training.policy.loss = lambda batch, noise, **_: (used.append(batch), loss(batch, noise))[1]  # type: ignore[method-assign]
    training.step()
    assert used[0].actions.shape == (8, 3, 16, 2)


def test_an_epoch_learns_from_every_window_once(data: Path) -> None:
    training = trainer(data, "batch_size=1")
    chunks: list[Tensor] = []
    training.policy.loss = lambda batch, noise, **_: (  # type: ignore[method-assign]
        chunks.append(batch.actions),
        PolicyLoss(sum(each.sum() for each in training.policy.parameters()).view(1), {}),
    )[1]
    for _ in range(len(training.windows)):
        training.step()
    everything = training._batch(training.windows, torch.arange(len(training.windows)), None).actions
    rows = [sorted(map(tuple, each.flatten(1).tolist())) for each in (torch.cat(chunks), everything)]
    assert rows[0] == rows[1]


def test_initial_weights_and_steps_follow_from_the_seed(data: Path) -> None:
    first, again, other = trainer(data), trainer(data), trainer(data, "seed=1")
    torch.manual_seed(123)
    losses = [each.step()["gradient_norm"] for each in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_steps_are_adamws_of_the_mean_loss(network: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PyTorch's own optimizer: learning rate, decay, betas and clip of the configuration, then the average."""
    words = ("learning_rate=1e-2", "weight_decay=0.5", "betas=[0.8,0.9]", "clip_norm=0.01", "schedule=constant")
    training = trainer(data, *words, *(("network.name=transformer",) if network == "transformer" else ()))
    batches: list[Batch] = []
    loss_of = training._loss
    monkeypatch.setattr(training, "_loss", lambda batch, draws: (batches.append(batch), loss_of(batch, draws))[1])
    policy = copy.deepcopy(training.policy).train()
    decayed = [p for name, p in policy.named_parameters() if network == "mlp" or is_matrix(name, policy)]
    others = [p for p in policy.parameters() if all(p is not each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    average = [parameter.detach().clone() for parameter in policy.parameters()]
    for step in range(3):
        values = training.step()
        optimizer.zero_grad()
        noise = generator(training.config.seed, "noise", step, 0)
        loss = policy.loss(batches[step], Draws(noise, range(8), 8)).loss.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.01)
        assert norm > 0.01 and float(values["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(values["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = [1e-6, 1e-6 + (1e-2 - 1e-6) / 2, 1e-2][step]  # 8 of 16 samples a step
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, policy.parameters(), strict=True)]
    moved = training.ema.state_dict()
    for (name, found), expected, mean in zip(
        training.policy.named_parameters(), policy.parameters(), average, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved[f"0.9/{name}"], mean, rtol=1e-3, atol=1e-4)


def is_matrix(name: str, policy: torch.nn.Module) -> bool:
    """Whether a transformer decays a parameter: weights of linear maps and attention, not biases, norms, positions."""
    owner, _, kind = name.rpartition(".")
    of = policy.get_submodule(owner)
    return kind.endswith("weight") and isinstance(of, torch.nn.Linear | torch.nn.MultiheadAttention)


def test_temperatures_are_annealed_over_the_first_part_of_the_run(data: Path) -> None:
    training = trainer(data, "drifting.temperature_start=4", "drifting.temperature_fraction=0.5", "learning_rate=1e-9")
    factors: list[float] = []
    loss = training.policy.loss
    training.policy.loss = lambda batch, draws, **keywords: (  # type: ignore[method-assign]
        factors.append(keywords["temperature_factor"]),
        loss(batch, draws, **keywords),
    )[1]
    for _ in range(STEPS):
        training.step()
    expected = [4.0 ** (1 - step / 10) for step in range(10)] + 10 * [1.0]
    assert factors == pytest.approx(expected)
    assert len(trainer(data, "method=regression", "drifting.temperature_start=4").step()) > 0  # which has none


def test_collapse_is_said_once_after_the_warm_up(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = trainer(data, "learning_rate=1e-12", "drifting.normalize_over=x")
    with torch.no_grad():
        for parameter in training.policy.network.out.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    said = []
    for _ in range(16):
        training.step()
        said.append(capsys.readouterr().out)
    last = said.pop(11)  # two steps of warm-up, and ten batches
    assert not any(said)
    assert last.startswith("note: in 100% of the observations all 4 chunks agree.") and last.count("\n") == 1
    spread = trainer(data)
    for _ in range(16):
        spread.step()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("shares", "words"), [([1.0] + 9 * [0.0], ""), ([0.0] + 9 * [1.0], ""), ([0.9] + 9 * [1.0], "99%")]
)
def test_one_batch_does_not_decide_on_collapse(
    shares: list[float], words: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = trainer(data)
    training.step_number = 3  # past the warm-up
    for each in shares:
        training._warn_of_collapse({"collapsed": torch.tensor(each)})
    said = capsys.readouterr().out
    assert (f"note: in {words} of the observations" in said) if words else not said


# ---- several processes


@pytest.mark.parametrize(("method", "held_out"), [("drifting", 0.25), ("diffusion", 0.0)])
def test_two_processes_take_the_steps_of_one(method: str, held_out: float, data: Path, tmp_path: Path) -> None:
    words = ("samples=24", "log_every=8", f"method={method}", f"demonstrations.held_out={held_out}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "policy.train"]
    ended = subprocess.run(
        [sys.executable, *launcher, *overrides(tmp_path, data, *words)], env=environment(), cwd=tmp_path,
        capture_output=True, text=True, timeout=115,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    alone = trainer(data, *words)
    first = {name: each.clone() for name, each in alone.policy.state_dict().items()}
    steps = [alone.step() for _ in range(3)]
    log = read_log(tmp_path / "run" / "metrics.jsonl")
    for name in ["loss", "gradient_norm", *(["lambda/0.3"] if method == "drifting" else [])]:
        assert [line[name] for line in log] == pytest.approx([float(step[name]) for step in steps], rel=1e-4)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 3
    for name, weight in alone.policy.named_parameters():
        assert (saved.tensors["model"][name] - weight).norm() < 0.01 * (weight - first[name]).norm(), name


def test_the_others_wait_while_the_main_process_simulates(
    finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def group(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> AbstractContextManager[None]:
        waits.append(timeout_s)
        return nullcontext()

    monkeypatch.setattr(train, "process_group", group)
    assert run(overrides(finished, data)) == 0
    tool_hang_s = 200 * 10  # to collect experiment=tool_hang_scripted, by RESULTS.md, with one worker
    assert waits[0] > 10 * tool_hang_s > TIMEOUT_S


# ---- bad input


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task=arm_wrestle", ["task: expected one of arm_reach, ", "found 'arm_wrestle'"]),
        ("demonstrations.path=/nonexistent/demos.zarr", ["/nonexistent/demos.zarr"]),
        ("learning_rte=1", ["learning_rte", "did you mean 'learning_rate'"]),
        ("action_steps=16", ["action_steps: expected 1 to horizon - obs_steps + 1 = 15, found 16"]),
        ("obs_steps=20", ["action_steps: expected 1 to"]),
        ("drifting.positives=5000", ["count: expected 1 to", "5000"]),
        ("method=diffusion diffusion.steps=101", ["steps must be 1 to train_steps = 100, got 101"]),
        ("network.name=transformer network.heads=5", ["heads"]),
        ("network.name=unet1d horizon=15", ["horizon: expected a multiple of 4, found 15"]),
        ("observation=image crop=40", ["demonstrations: expected a camera, found action, state"]),
        ("task=lift", ["lift"]),
        ("run_dir=/dev/null/run", ["/dev/null/run"]),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    override: str, words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*overrides(tmp_path, data), *override.split()]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("method", ["diffusion", "regression"])
def test_the_baselines_train_by_the_same_program(method: str, data: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"diffusion": ["diffusion.train_steps=5", "diffusion.steps=5"], "regression": []}
    assert run(overrides(tmp_path, data, f"method={method}", *words[method])) == 0
    assert type(load_policy(tmp_path / "run" / "model")).__name__.lower() == f"{method}policy"
    evaluation = json.loads((tmp_path / "run" / "evaluations" / f"{160:012d}.json").read_text(encoding="utf-8"))
    assert evaluation["held_out_loss"] > 0
