"""Everything a test writes goes to temporary folders; what is slow to make is made once per worker."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOT = tempfile.mkdtemp(prefix="offline-cai-tests-")
os.environ["MINARI_DATASETS_PATH"] = f"{_ROOT}/datasets"
os.environ["OFFLINE_CAI_CACHE"] = f"{_ROOT}/cache"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from offline_cai.core import Box, Episode, Field, Spec  # noqa: E402
from offline_cai.data.trajectories import Trajectories  # noqa: E402

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_ROOT, ignore_errors=True)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 while the test runs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def spec() -> Spec:
    """The point maze's: positions, a goal, and (x, y, vx, vy)."""
    fields = (Field("achieved_goal", 2), Field("desired_goal", 2), Field("observation", 4))
    return Spec(fields, Box((-1.0, -2.0), (1.0, 2.0)), dt=0.01)


def make_episode(spec: Spec, length: int, terminal: bool, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    action = rng.uniform(spec.action.low, spec.action.high, size=(length, spec.action_width))
    return Episode(rng.normal(size=(length + 1, spec.obs_width)), action, rng.normal(size=length), terminal)


@pytest.fixture(scope="session")
def episodes(spec: Spec) -> list[Episode]:
    """Lengths 5, 1 and 12; the first two end truly."""
    return [make_episode(spec, n, terminal, i) for i, (n, terminal) in enumerate([(5, True), (1, True), (12, False)])]


@pytest.fixture(scope="session")
def store(spec: Spec, episodes: list[Episode]) -> Trajectories:
    return Trajectories.from_episodes(spec, episodes)


@pytest.fixture(scope="session")
def dataset() -> str:
    """A small dataset collected in the simulator by its recipe; its id."""
    from offline_cai import collect

    recipe = collect.load("debug-umaze")
    if not collect.collected(recipe):
        collect.collect(recipe, quiet=True)
    return recipe.id


@pytest.fixture(scope="session")
def run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the debug Diffuser. Tests that change it work on a copy."""
    from offline_cai import commands
    from offline_cai.training import experiment

    return commands.train(experiment.load("debug-diffuser"), tmp_path_factory.mktemp("runs") / "run", quiet=True)
