"""PushT's expert: pushes from here or from elsewhere around the block, planned by sampling in a model of them."""

from typing import Final, NamedTuple

import numpy as np

from envs.experts.push_t_model import agent_path, blocks_path
from envs.experts.push_t_routes import CONTACTS, Routes, routes
from envs.push_t import CENTRE_OF_GRAVITY, DAMPING, GOAL, STIFFNESS, PushT, on_table
from envs.push_t_drawing import TABLE_SIZE
from envs.task import Task

LAG: Final = DAMPING / STIFFNESS  # s: the agent stays behind a moving target by this times its speed

# How far the block is: the distance of its centre of gravity, px, plus a weight times the angle, rad. Pushing can move
# the block without turning it but not turn it without moving it, so the weight exceeds what lengths would say (50).
TURN_WEIGHTS: Final = (100.0, 150.0)  # one of them for an episode
TURN_WEIGHTS_OUT: Final = (60.0, 300.0)  # another one where no push makes the block any nearer
ARRIVED: Final = 1.5  # px: covers well over 0.95 of the goal
# Steps that the rest of an episode takes: PATIENCE log(distance + CLOSEST).
PATIENCE: Final = 25.0
CLOSEST: Final = 0.5

PUSHES_HERE: Final = 256
PUSHES_ELSEWHERE: Final = 384
LONGEST_HERE: Final = 10  # control steps
LONGEST_ELSEWHERE: Final = 14
BACKING_OFF: Final = 3  # control steps after a push in which the agent leaves the block
BACK: Final = 30.0  # px from where the agent is, more or less, at the push's end
BEST: Final = 8  # pushes that are varied once more
VARIATIONS: Final = 16  # of each
LOOK_EVERY: Final = 4  # control steps: then the push is planned again

WALKING: Final = 22.0  # px per control step, by which a way's time is guessed
STARTING: Final = 4  # control steps between a way and its push
WALKING_SPEEDS: Final = (28.0, 20.0, 12.0)  # px per control step
WALK_STEPS: Final = 8  # then the way is planned again
NEAR: Final = 6.0  # px from a way's end
SLOW: Final = 60.0  # px/s at a way's end
TOUCH: Final = 0.5  # px: the block moves on the way by no more than this beyond what can't be helped


class Pushes(NamedTuple):
    """N ways to move the target: steps of a length in a direction that turns, for a time; then back."""

    direction: np.ndarray  # [N] rad
    step: np.ndarray  # [N] px per control step
    turn: np.ndarray  # [N] rad per control step
    duration: np.ndarray  # [N] control steps, at least 1

    def targets(self, start: np.ndarray, steps: int) -> np.ndarray:
        """The targets `[N, steps, 2]` of moves that begin at points `[2]` or `[N, 2]`."""
        time = np.arange(steps)
        headings = self.direction[:, None] + self.turn[:, None] * time
        unit = np.stack([np.cos(headings), np.sin(headings)], -1)  # [N, steps, 2]
        pushing = (time < self.duration[:, None])[..., None]
        forward = start[..., None, :] + (self.step[:, None, None] * unit * pushing).cumsum(1)
        last = np.take_along_axis(unit, self.duration[:, None, None] - 1, 1)
        backward = forward - (2 * self.step + BACK)[:, None, None] * last  # the agent is two steps behind its target
        return np.clip(np.where(pushing, forward, backward), 0, TABLE_SIZE)

    def rows(self, rows: np.ndarray) -> "Pushes":
        """Some of them, by their indices."""
        return Pushes(*(field[rows] for field in self))

    def varied(self, random: np.random.Generator, longest: int) -> "Pushes":
        """Each a little different."""
        number = len(self.step)
        return Pushes(
            self.direction + random.normal(0, 0.1, number),
            self.step * np.exp(random.normal(0, 0.15, number)),
            self.turn + random.normal(0, 0.03, number),
            np.clip(self.duration + random.integers(-1, 2, number), 1, longest),
        )


class Plan(NamedTuple):
    """A push from where the agent is."""

    value: float  # control steps to the goal, as expected
    targets: np.ndarray  # [T, 2]
    duration: int  # control steps of them that push; then the agent leaves the block


class Elsewhere(NamedTuple):
    """A push from one of CONTACTS."""

    value: float
    contact: int
    push: Pushes  # of one row


class PushTExpert:
    """Pushes the block to its goal; two of them with other random numbers push it in other ways.

    Every few steps it samples pushes from where the agent is, and pushes from all around the block, and takes what is
    expected to bring the block to the goal first, the way around it included.

    Args:
        task: a PushT.
        np_random: draws all that is sampled.
    """

    def __init__(self, task: Task, np_random: np.random.Generator) -> None:
        if not isinstance(task, PushT):
            raise TypeError(f"task must be a PushT, got {task}")
        self._task, self._random = task, np_random
        self._turn_weight = np_random.uniform(*TURN_WEIGHTS)
        self._targets: list[np.ndarray] = []  # for the next steps
        self._rest: Plan | None = None  # of the present push, after those
        self._next: Elsewhere | None = None  # what the agent is walking to

    def action(self) -> np.ndarray:
        """The agent's next target `[2]` float32."""
        if not self._targets:
            self._look()
        return self._targets.pop(0).astype(np.float32)

    def _look(self) -> None:
        """Plan the next steps: go on walking, push, or begin to walk."""
        ways = routes(self._task.agent, self._task.pose)
        intended = None
        if self._next is not None and np.isfinite(ways.lengths[self._next.contact]):
            if not self._has_arrived(self._next.contact):
                self._targets = self._walk(ways, self._next.contact)
                return
            intended = self._next.push
        self._next = None
        here = self._best_here(intended)
        elsewhere = None if intended is not None else self._best_elsewhere(ways)
        self._rest = None
        if elsewhere is None or here.value < min(elsewhere.value, self._value_now()):
            self._targets = list(here.targets[: min(LOOK_EVERY, here.duration)])
            if here.duration > LOOK_EVERY:
                self._rest = Plan(here.value - LOOK_EVERY, here.targets[LOOK_EVERY:], here.duration - LOOK_EVERY)
            return
        if elsewhere.value >= self._value_now():
            self._turn_weight = self._random.uniform(*TURN_WEIGHTS_OUT)
        self._next = elsewhere
        self._targets = self._walk(ways, elsewhere.contact)

    # ---- pushes

    def _best_here(self, intended: Pushes | None) -> Plan:
        random, steps = self._random, LONGEST_HERE + BACKING_OFF
        agent, velocity, block = self._state()
        pushes = Pushes(
            random.uniform(-np.pi, np.pi, PUSHES_HERE),
            np.exp(random.uniform(np.log(2), np.log(24), PUSHES_HERE)),
            random.normal(0, 0.1, PUSHES_HERE),
            random.integers(1, LONGEST_HERE + 1, PUSHES_HERE),
        )
        if intended is not None:
            close = intended.rows(np.zeros(PUSHES_HERE // 4, int)).varied(random, LONGEST_HERE)
            pushes = _joined(pushes, close)
        start = agent + LAG * velocity
        targets, durations = pushes.targets(start, steps), pushes.duration
        values = self._values(targets, durations, agent, velocity, block)
        best = pushes.rows(np.argsort(values)[:BEST].repeat(VARIATIONS)).varied(random, LONGEST_HERE)
        more = [(best.targets(start, steps), best.duration)]
        if self._rest is not None:
            waiting = np.repeat(self._rest.targets[-1:], steps - len(self._rest.targets), 0)
            more.append((np.concatenate([self._rest.targets, waiting])[None], np.array([self._rest.duration])))
        for new_targets, new_durations in more:
            new_values = self._values(new_targets, new_durations, agent, velocity, block)
            targets, durations = np.concatenate([targets, new_targets]), np.concatenate([durations, new_durations])
            values = np.concatenate([values, new_values])
        first = int(values.argmin())
        return Plan(float(values[first]), targets[first], int(durations[first]))

    def _best_elsewhere(self, ways: Routes) -> Elsewhere | None:
        """The best push from the contacts that can be reached; None if there are none."""
        random, pose = self._random, self._task.pose
        lengths = ways.lengths[: len(CONTACTS.points)]
        reached = np.flatnonzero(np.isfinite(lengths))
        if len(reached) == 0:
            return None
        contacts = random.choice(reached, PUSHES_ELSEWHERE)
        pushes = Pushes(
            CONTACTS.inward[contacts] + pose[2] + random.normal(0, 0.4, PUSHES_ELSEWHERE),
            random.uniform(3, 20, PUSHES_ELSEWHERE),
            random.normal(0, 0.07, PUSHES_ELSEWHERE),
            random.integers(2, LONGEST_ELSEWHERE + 1, PUSHES_ELSEWHERE),
        )
        start = on_table(CONTACTS.points[contacts], pose)
        targets = pushes.targets(start, LONGEST_ELSEWHERE + BACKING_OFF)
        values = self._values(targets, pushes.duration, start, np.zeros(2), self._state()[2])
        values += lengths[contacts] / WALKING + STARTING
        first = int(values.argmin())
        return Elsewhere(float(values[first]), int(contacts[first]), pushes.rows(np.array([first])))

    def _values(
        self, targets: np.ndarray, durations: np.ndarray, agent: np.ndarray, velocity: np.ndarray, block: np.ndarray
    ) -> np.ndarray:
        """Expected control steps to the goal `[N]` under targets `[N, T, 2]` that push for a duration `[N]`."""
        blocks = blocks_path(block, agent_path(agent, velocity, targets))
        distances = distance_to_goal(blocks, self._turn_weight)  # [T, N]
        last = np.minimum(durations + BACKING_OFF, len(distances)) - 1
        values = durations + _steps_to_go(distances[last, np.arange(len(last))])
        arrived = distances < ARRIVED  # on the way: that ends the episode
        first = np.where(arrived.any(0), arrived.argmax(0) + 1 + _steps_to_go(0.0), np.inf)
        return np.minimum(values, first)

    def _value_now(self) -> float:
        block = self._state()[2][:, None]
        return float(_steps_to_go(distance_to_goal(block, self._turn_weight))[0])

    def _state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The agent's position and velocity, and the block's centre of gravity and angle `[3]`."""
        pose = self._task.pose
        return self._task.agent, self._task.agent_velocity, np.append(on_table(CENTRE_OF_GRAVITY, pose), pose[2])

    # ---- walking

    def _has_arrived(self, contact: int) -> bool:
        agent, velocity, _ = self._state()
        goal = on_table(CONTACTS.points[contact], self._task.pose)
        return bool(np.linalg.norm(agent - goal) < NEAR and np.linalg.norm(velocity) < SLOW)

    def _walk(self, ways: Routes, contact: int) -> list[np.ndarray]:
        """Targets of the next steps on the way to a contact, as fast as the block is left alone."""
        agent, velocity, block = self._state()
        way = np.concatenate([agent[None], ways.way(contact)])
        at = np.append(0, np.linalg.norm(np.diff(way, axis=0), axis=1).cumsum())
        lead = LAG * np.linalg.norm(velocity)
        gone = np.minimum(lead + np.outer(WALKING_SPEEDS, np.arange(1, WALK_STEPS + 1)), at[-1])
        targets = np.stack([np.interp(gone, at, way[:, 0]), np.interp(gone, at, way[:, 1])], -1)
        blocks = blocks_path(block, agent_path(agent, velocity, targets))  # [T, 3, speeds]
        moved = np.abs(blocks - block[:, None]).max(0)
        moved = moved[:2].max(0) + self._turn_weight * moved[2]
        fastest = int(np.argmax(moved < moved.min() + TOUCH))
        steps = np.ceil((at[-1] - lead) / WALKING_SPEEDS[fastest])
        return list(targets[fastest, : int(np.clip(steps, 1, WALK_STEPS))])


def distance_to_goal(blocks: np.ndarray, turn_weight: float) -> np.ndarray:
    """How far blocks `[..., 3, N]` (centre of gravity and angle) are from the goal, px, `[..., N]`."""
    x, y = on_table(CENTRE_OF_GRAVITY, GOAL)
    turn = (blocks[..., 2, :] - GOAL[2] + np.pi) % (2 * np.pi) - np.pi
    return np.hypot(blocks[..., 0, :] - x, blocks[..., 1, :] - y) + turn_weight * np.abs(turn)


def _steps_to_go(distance: np.ndarray | float) -> np.ndarray:
    return PATIENCE * np.log(np.asarray(distance) + CLOSEST)


def _joined(first: Pushes, second: Pushes) -> Pushes:
    return Pushes(*(np.concatenate(fields) for fields in zip(first, second, strict=True)))
