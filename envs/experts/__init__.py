"""Scripted experts: what shows a task where no human data is at hand, with several ways wherever a task has them."""

import importlib
from typing import Protocol

import gymnasium
import numpy as np

from envs.task import Task


class Expert(Protocol):
    """One episode's expert: its plan is drawn when it is constructed, after the task's reset."""

    def __init__(self, task: Task, np_random: np.random.Generator) -> None: ...

    def action(self) -> np.ndarray:
        """What to do now, in the task's action space, by the simulator's present state; without noise."""
        ...


EXPERTS = {
    "arm_reach": "envs.experts.arm_reach:ArmReachExpert",
    "push_t": "envs.experts.push_t:PushTExpert",
    "block_push": "envs.experts.block_push:BlockPushExpert",
    "lift": "envs.experts.lift:LiftExpert",
    "can": "envs.experts.can:CanExpert",
    "tool_hang": "envs.experts.tool_hang:ToolHangExpert",
    "kitchen": "envs.experts.kitchen:KitchenExpert",
}


def make_expert(name: str, env: gymnasium.Env, np_random: np.random.Generator) -> Expert:
    """An expert for the episode that an environment has just begun.

    Args:
        name: one of `EXPERTS`.
        env: the task of that name, after its reset.
        np_random: the expert's plan is drawn from it.

    Raises:
        ValueError: there is no expert of that name.
        TypeError: the environment is no task.
    """
    if name not in EXPERTS:
        raise ValueError(f"there is no expert for {name!r}: expected one of {', '.join(EXPERTS)}")
    task = env.unwrapped
    if not isinstance(task, Task):
        raise TypeError(f"an expert needs a Task, got {task}")
    module, _, expert = EXPERTS[name].partition(":")
    made: Expert = getattr(importlib.import_module(module), expert)(task, np_random)
    return made
