"""Small environments with faults on request, importable by worker processes."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Stub(gymnasium.Env):
    """A point that adds up its actions; its numbers are those of the policy, to the last bit.

    Args:
        length: steps of an episode, plus seed mod 3: episodes end in different slices of 4 steps.
        raises, dies, exits, hangs: seeds of the episodes in which that happens, at step 3.
        no_reset: seeds whose reset raises.
        solved_at: step from which on the score is 1 and all is done.
        camera: whether there is an image as well, which counts the steps; black while nobody looks at it.
        always_draws: even then.
        no_opengl: whether a reset can't draw.
        once: a folder that remembers which seed has died, exited or hung already; without it that happens each time.
        render_mode, picture, draws_badly: as of a task; side of a picture; "raises" or "dies" when it is drawn.
    """

    PHASES = ("half", "whole")
    CONTROL_HZ = 20.0
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (3,), np.float32)})

    def __init__(
        self,
        *,
        length: int = 11,
        raises: tuple[int, ...] = (),
        dies: tuple[int, ...] = (),
        exits: tuple[int, ...] = (),
        hangs: tuple[int, ...] = (),
        no_reset: tuple[int, ...] = (),
        solved_at: int | None = None,
        camera: bool = False,
        always_draws: bool = False,
        no_opengl: bool = False,
        once: str | None = None,
        render_mode: str | None = None,
        picture: int = 32,
        draws_badly: str | None = None,
    ) -> None:
        self.length, self.raises, self.dies, self.exits, self.hangs = length, raises, dies, exits, hangs
        self.no_reset, self.once, self.solved_at, self.no_opengl = no_reset, once, solved_at, no_opengl
        self.camera, self.always_draws, self.draws_images = camera, always_draws, True
        self.drawn: list[int] = []  # steps after which an image was drawn
        self.render_mode, self.picture, self.draws_badly = render_mode, picture, draws_badly

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        assert seed is not None
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.position = self.np_random.normal(size=2).astype(np.float32)
        if seed in self.no_reset:
            raise RuntimeError("no initial state")
        if self.no_opengl:
            raise ImportError("no picture can be drawn")
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, Any]:
        if not self.action_space.contains(action):
            raise ValueError(f"action {action} outside the box")
        self.steps += 1
        if self.steps == 3:
            self._fail()
        self.position = self.position + action * np.float32(0.1)
        return self._observation(), 0.0, self.steps >= self.length + self.seed % 3, False, self._info()

    def render(self) -> np.ndarray:
        if self.render_mode is None:
            raise ValueError("no render mode")
        if self.draws_badly == "raises":
            raise ImportError("there is no OpenGL")
        if self.draws_badly == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        return np.full((self.picture, self.picture, 3), min(255, 20 * self.steps), np.uint8)

    def _observation(self) -> dict[str, np.ndarray]:
        state = np.append(self.position, np.float32(self.steps))
        if not self.camera:
            return {"state": state}
        image = np.zeros((2, 2, 3), np.uint8)
        if self.draws_images or self.always_draws:
            self.drawn.append(self.steps)
            image += np.uint8(100 + self.steps)
        return {"state": state, "image": image}

    def _info(self) -> dict[str, Any]:
        score = float(1 / (1 + np.abs(self.position).sum()))
        phases = int(score > 0.2) + int(score > 0.4)
        if self.solved_at is not None and self.steps >= self.solved_at:
            score, phases = 1.0, 2
        return {"score": score, "phases": phases, "success": phases == 2, "diverged": False, "seed": self.seed}

    def _fail(self) -> None:
        if self.seed in self.raises:
            raise RuntimeError("the gripper is lost")
        if self.seed in self.dies and self._first_time():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed in self.exits and self._first_time():
            os._exit(3)
        if self.seed in self.hangs and self._first_time():
            time.sleep(600)

    def _first_time(self) -> bool:
        if self.once is None:
            return True
        mark = Path(self.once) / str(self.seed)
        seen = mark.exists()
        mark.touch()
        return not seen


class WithoutTorch(Stub):
    """Refuses a process that has imported torch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        loaded = [name for name in ("torch", "driftfield") if name in sys.modules]
        if loaded:
            raise ImportError(f"a worker has imported {loaded}")


STUBS = {"stub": Stub, "without_torch": WithoutTorch}


def make(task: str, **options: Any) -> gymnasium.Env:
    if task not in STUBS:
        raise ValueError(f"there is no task {task!r}")
    return STUBS[task](**options)
