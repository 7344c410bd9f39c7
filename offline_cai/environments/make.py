"""Gymnasium environments by name."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym

from offline_cai.core import Spec
from offline_cai.environments.maze2d import Maze2DProtocol
from offline_cai.errors import UserError, did_you_mean
from offline_cai.spaces import spec_of

WRAPPERS: Mapping[str, Callable[..., gym.Env]] = {"maze2d": Maze2DProtocol}

PACKAGES: Mapping[str, tuple[str, str]] = {
    "ALE/": ("ale-py", "ale_py"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "Meta-World/": ("metaworld", "metaworld"),
    "dm_control/": ("shimmy[dm-control]", "shimmy"),
    "highway-": ("highway-env", "highway_env"),
}
"""By the beginning of an id: the package that brings such environments, and its module, which registers them."""


def register() -> None:
    """Make the ids of gymnasium-robotics known to Gymnasium; its import prints a notice about other tasks' versions."""
    with redirect_stderr(io.StringIO()):
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)


def make(
    environment: str, kwargs: Mapping[str, Any] | None = None, wrapper: str | None = None, **options: Any
) -> gym.Env:
    """An environment by its Gymnasium id, with `kwargs` for it and one of our WRAPPERS with `options` around it.

    Raises:
        UserError: Gymnasium knows no such id, or its simulator is not installed; or there is no such wrapper.
    """
    register()
    if wrapper is not None and wrapper not in WRAPPERS:
        raise UserError(f"there is no environment wrapper {wrapper!r}; {did_you_mean(wrapper, WRAPPERS)}")
    try:
        env = gym.make(environment, disable_env_checker=True, **(kwargs or {}))
    except gym.error.UnregisteredEnv:
        raise UserError(f"Gymnasium knows no environment {environment!r}: {_where(environment)}") from None
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(
            f"the environment {environment!r} needs what is not installed: {_missing(environment, error)}"
        ) from None
    except (gym.error.Error, TypeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"cannot make the environment {environment!r} with {dict(kwargs or {})}: {text}") from None
    leftover = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if leftover is not None:  # the model is in memory by now
        Path(leftover).unlink(missing_ok=True)
    if wrapper is None:
        return env
    try:
        return WRAPPERS[wrapper](env, **options)
    except (TypeError, ValueError, IndexError) as error:
        env.close()
        raise UserError(f"the wrapper {wrapper!r} does not take {options}: {error}") from None


def _where(environment: str) -> str:
    """Where an unknown id may come from."""
    for prefix, (package, module) in PACKAGES.items():
        if environment.startswith(prefix):
            return f"pip install {package}, and write {module}:{environment}."
    near = did_you_mean(environment, gym.registry)
    if near.startswith("did you mean"):
        return near
    return "install the package that brings it, and write the package's module before it, as in ale_py:ALE/Pong-v5."


def _missing(environment: str, error: Exception) -> str:
    module, colon, _ = environment.partition(":")
    if colon and find_spec(module) is None:
        return f"the package of the module {module!r} (pip install {module})."
    if "mujoco_py" in str(error):  # the simulator of the first versions, which no current Python has
        newer = _newer(environment.rpartition(":")[2])
        return f"mujoco-py, which is no longer kept up{newer and f': take {newer}'}."
    text = " ".join(" ".join(map(str, arg)) if isinstance(arg, tuple) else str(arg) for arg in error.args)
    return f"{text.rstrip('.')}."


def _newer(environment: str) -> str:
    """The two latest versions of an id, later than its own, in words."""
    name, _, own = environment.rpartition("-v")
    others = [other.rpartition("-v") for other in gym.registry]
    later = sorted((int(v) for n, _, v in others if n == name and v.isdigit() and int(v) > int(own)), reverse=True)
    return " or ".join(f"{name}-v{version}" for version in later[:2])


def env_spec(env: gym.Env) -> Spec:
    """The Spec of an environment, with its seconds per step if its simulator tells them."""
    unwrapped = env.unwrapped
    dt = getattr(getattr(unwrapped, "point_env", unwrapped), "dt", None)
    return spec_of(env.observation_space, env.action_space, None if dt is None else float(dt))
