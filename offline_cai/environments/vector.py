"""Environments side by side, in this process or in supervised worker processes; whatever goes wrong in one is named.

Workers come from a fork server, so that none inherits threads, locks or pipes of the training process; it imports the
package once. They ignore SIGINT and SIGTERM, which are the training process's affair, and end when it does.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space, iterate

from offline_cai.core import Spec
from offline_cai.environments.make import env_spec
from offline_cai.errors import UserError
from offline_cai.spaces import leaves, one_hot, part_at, unflatten_action

Maker = Callable[[], gym.Env]
Fault = Literal["raised", "died", "hung", "not finite"]
TO_MAKE = 120.0  # seconds that a worker may take to start and to make an environment


class EnvironmentFault(UserError):
    """An environment failed; the text says which, in which worker, at which step of the episode of which seed, and how.

    `environment` is its number; `worker` that of its worker, None in the training process.
    """

    def __init__(
        self,
        text: str,
        fault: Fault | None = None,
        environment: int | None = None,
        worker: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(text)
        self.fault, self.environment, self.worker, self.seed = fault, environment, worker, seed


class Steps(NamedTuple):
    """What one step of N environments gave."""

    obs: np.ndarray  # [N, O]
    reward: np.ndarray  # [N]
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool


class Environments:
    """`count` environments that are stepped together and reset by mask; observations are flat float64 rows of `spec`.

    Without workers they live in this process (`envs`), where an exception and a number that is not finite are found
    out; with workers, one that was killed or hangs as well. A script that uses workers begins under
    `if __name__ == "__main__":`, as with all of multiprocessing.

    Args:
        maker: makes one environment; for workers it has to be picklable, such as a functools.partial of a function.
        workers: processes that share the environments evenly; 0 for none.
        timeout: seconds that a worker may take for one step or reset of one environment.
        first: the number of the first environment, where several processes share them.

    Raises:
        UserError: no environment is asked for, or it cannot be made.
        EnvironmentFault: from every method, when an environment fails. They are closed then.
    """

    def __init__(self, maker: Maker, count: int, workers: int = 0, timeout: float = 60.0, first: int = 0) -> None:
        if count < 1:
            raise UserError(f"{count} environments were asked for; at least one is needed.")
        self.count, self._maker, self._workers = count, maker, workers
        self._timeout, self._first, self.name = timeout, first, ""
        self.restart()

    def restart(self) -> None:
        """Make all environments anew, in new workers: what to do after a fault, before `rebuild`."""
        count, workers, maker = self.count, self._workers, self._maker
        self.envs = list[gym.Env]()
        self._seeds: list[int | None] = [None] * count
        self._steps = [0] * count
        self._hosts: list[_Here | _Worker] = [_Worker(i, maker) for i in range(min(workers, count))] or [_Here(maker)]
        shares = np.array_split(np.arange(count), len(self._hosts))
        self._home = [
            (host, slot) for host, share in zip(self._hosts, shares, strict=True) for slot in range(len(share))
        ]
        self._ask((i, "make") for i in range(count))
        for i in range(count):
            self.spec, self.name = self._answer(i, TO_MAKE)
        if not workers:
            self.envs = [hosted.env for hosted in self._hosts[0].hosted]  # type: ignore[union-attr]
        self._obs = np.zeros((count, self.spec.obs_width))

    def reset(self, seeds: Sequence[int], which: np.ndarray | None = None) -> np.ndarray:
        """Begin the episodes with these seeds [N] in the environments `which` [N] bool, None for all.

        Returns observations [N, O]: the first ones there, the latest elsewhere.
        """
        chosen = range(self.count) if which is None else np.flatnonzero(which).tolist()
        self._ask((i, "reset", seeds[i]) for i in chosen)
        for i in chosen:
            self._begin(i, seeds[i])
        return self._obs.copy()

    def step(self, action: np.ndarray) -> Steps:
        """One step of each with raw actions [N, A]."""
        self._ask((i, "step", action[i]) for i in range(self.count))
        results = [self._advance(i) for i in range(self.count)]
        reward, terminated, truncated = (np.array(column) for column in zip(*results, strict=True))
        return Steps(self._obs.copy(), reward, terminated, truncated)

    def rebuild(self, seeds: Sequence[int], actions: Sequence[Iterable[np.ndarray]]) -> list[np.ndarray]:
        """Begin the episodes with these seeds [N] and take the actions [T_i, A]; the observations [T_i + 1, O] of each.

        This brings environments back to where they were: a simulator's whole state cannot be saved.
        """
        self._ask(
            (i, *call)
            for i in range(self.count)
            for call in (("reset", seeds[i]), *(("step", action) for action in actions[i]))
        )
        seen = []
        for i in range(self.count):
            self._begin(i, seeds[i])
            rows = [self._obs[i].copy()]
            for _ in actions[i]:
                self._advance(i)
                rows.append(self._obs[i].copy())
            seen.append(np.stack(rows))
        return seen

    def close(self) -> None:
        for host in self._hosts:
            host.close()

    def _ask(self, calls: Iterable[tuple[Any, ...]]) -> None:
        """Send calls (environment, name, arguments). Each host answers its own one after the other, in their order."""
        of_host: dict[_Here | _Worker, list[tuple[Any, ...]]] = {host: [] for host in self._hosts}
        for i, *call in calls:
            host, slot = self._home[i]
            of_host[host].append((slot, *call))
        for host, its_calls in of_host.items():
            host.ask(its_calls)

    def _begin(self, i: int, seed: int) -> None:
        self._seeds[i], self._steps[i] = seed, 0
        self._obs[i] = self._finite(i, self._answer(i))

    def _advance(self, i: int) -> tuple[float, bool, bool]:
        self._steps[i] += 1
        obs, reward, terminated, truncated = self._answer(i)
        self._obs[i] = self._finite(i, obs, reward)
        return reward, terminated, truncated

    def _answer(self, i: int, timeout: float | None = None) -> Any:
        answer = self._home[i][0].answer(timeout or self._timeout)
        if answer.fault == "refused":
            self.close()
            raise UserError(answer.value)
        if answer.fault is not None:
            raise self._fault(i, answer.fault, answer.value, answer.trace)
        return answer.value

    def _finite(self, i: int, obs: np.ndarray, reward: float = 0.0) -> np.ndarray:
        bad = np.flatnonzero(~np.isfinite(obs))
        if len(bad):
            names = [part.name for part in self.spec.obs for _ in range(part.width)]
            what = f"gave {obs[bad[0]]} in column {bad[0]} of its observation ({names[bad[0]]!r})"
            raise self._fault(i, "not finite", what)
        if not np.isfinite(reward):
            raise self._fault(i, "not finite", f"gave the reward {reward}")
        return obs

    def _fault(self, i: int, fault: Fault, what: str, trace: str = "") -> EnvironmentFault:
        self.close()
        host, seed = self._home[i][0], self._seeds[i]
        when = "when it was made" if seed is None else f"at step {self._steps[i]} of the episode with seed {seed}"
        name = f" ({self.name})" if self.name else ""
        text = f"environment {self._first + i}{name} in {host.name} {what}, {when}."
        error = EnvironmentFault(text, fault, self._first + i, host.number, seed)
        if trace:
            error.add_note(trace)
        return error


# Where they live -----------------------------------------------------------------------------------------------------


class _Hosted:
    """One environment and what can be asked of it."""

    def __init__(self, maker: Maker) -> None:
        self.env = maker()
        self.spec, self._parts = env_spec(self.env), list(leaves(self.env.observation_space))
        self._choices = any(part.choices for part in self._parts)

    def about(self) -> tuple[Spec, str]:
        return self.spec, self.env.spec.id if self.env.spec else type(self.env.unwrapped).__name__

    def reset(self, seed: int) -> np.ndarray:
        obs, _ = self.env.reset(seed=int(seed))
        return self._row(obs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        obs, reward, terminated, truncated, _ = self.env.step(self._taken(action))
        return self._row(obs), float(reward), bool(terminated), bool(truncated)

    def _row(self, obs: Any) -> np.ndarray:
        """`flatten` of one observation, in the types of its space."""
        parts = [np.asarray(part_at(obs, part.path), dtype=part.space.dtype).reshape(-1) for part in self._parts]
        numbers = np.concatenate(parts, dtype=np.float64)
        return one_hot(self.env.observation_space, numbers[None])[0] if self._choices else numbers

    def _taken(self, action: np.ndarray) -> Any:
        space = self.env.action_space
        if isinstance(space, gym.spaces.Box):
            return action.reshape(space.shape).astype(space.dtype)
        return next(iter(iterate(batch_space(space), unflatten_action(space, action[None]))))


class _Answer(NamedTuple):
    fault: Literal["raised", "died", "hung", "refused"] | None
    value: Any
    trace: str = ""


def _work_on(hosted: list[_Hosted], maker: Maker, slot: int, call: str, *arguments: Any) -> _Answer:
    try:
        if call == "make":
            hosted.append(_Hosted(maker))
            return _Answer(None, hosted[slot].about())
        return _Answer(None, getattr(hosted[slot], call)(*arguments))
    except UserError as error:
        return _Answer("refused", str(error))
    except Exception as error:
        text = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        return _Answer("raised", text.removesuffix(".").removesuffix(": "), traceback.format_exc())


class _Here:
    """Environments in this process; a call is worked on when its answer is asked for."""

    number, name = None, "the training process"

    def __init__(self, maker: Maker) -> None:
        self._maker, self.hosted = maker, list[_Hosted]()
        self._calls = deque[tuple[Any, ...]]()

    def ask(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = deque(calls)

    def answer(self, timeout: float) -> _Answer:
        slot, call, *arguments = self._calls.popleft()
        return _work_on(self.hosted, self._maker, slot, call, *arguments)

    def close(self) -> None:
        for hosted in self.hosted:
            with suppress(Exception):  # one that failed may fail again
                hosted.env.close()


class _Worker:
    """Environments in another process. It answers call by call, so that the environment it is stuck in is known."""

    def __init__(self, number: int, maker: Maker) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, maker), daemon=True)
        self._process.start()
        theirs.close()
        self.number, self.name = number, f"worker {number} (process {self._process.pid})"

    def ask(self, calls: list[tuple[Any, ...]]) -> None:
        with suppress(OSError):  # it is dead, and `answer` says so
            self._pipe.send(calls)

    def answer(self, timeout: float) -> _Answer:
        try:
            if not self._pipe.poll(timeout):
                return _Answer("hung", f"gave no answer within {timeout:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return _Answer("died", f"is lost, for its worker {_how(self._process.exitcode)}")

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hint = " (which a system out of memory does, too)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _work(pipe: Connection, maker: Maker) -> None:
    """A worker's life. It leaves without ceremony: what it holds is the system's to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hosted: list[_Hosted] = []
    with suppress(EOFError, OSError):  # the other end was closed, or its process is gone
        while True:
            for slot, call, *arguments in pipe.recv():
                pipe.send(_work_on(hosted, maker, slot, call, *arguments))
    os._exit(0)
