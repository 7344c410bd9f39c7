"""What every algorithm has to do. It finds new ones by itself: a file in algorithms/ is enough."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from offline_cai import algorithms, config, seeding
from offline_cai.core import Algorithm, Batch, Explorer, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.training import checkpoint
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState

NAMES = algorithms.names()


def build(name: str, store: Trajectories, seed: int = 0) -> Algorithm:
    """The algorithm with its default config."""
    torch.manual_seed(seed)
    cls = algorithms.find(name)
    algorithm = cls(store.spec, cls.Config())
    algorithm.fit(store.chunks)
    return algorithm


def update(algorithm: Algorithm, store: Trajectories, steps: int = 1) -> dict[str, float]:
    needs = algorithm.needs
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, needs.padding)
    state = TrainingState(algorithm, TrainingConfig(), Accelerator(cpu=True))
    metrics: dict[str, float] = {}
    for step in range(steps):
        rows = windows.starts[seeding.rng(0, step).integers(len(windows.starts), size=4)]
        metrics = algorithm.update(windows.gather(rows, seeding.keys(0, step, torch.arange(4))), state)
    return metrics


def observations(store: Trajectories) -> np.ndarray:
    return np.asarray(store.obs[store.step_rows()][:3], dtype=np.float64)


def test_algorithms_are_found_by_their_files() -> None:
    assert {"bc", "diffuser", "guide"} <= set(NAMES)
    with pytest.raises(UserError, match="did you mean 'diffuser'"):
        algorithms.find("difuser")


@pytest.mark.parametrize("name", NAMES)
def test_who_asks_for_data_of_its_own_can_explore(name: str, store: Trajectories) -> None:
    algorithm = build(name, store)
    assert algorithm.needs.source == "offline" or isinstance(algorithm, Explorer)


@pytest.mark.parametrize("name", NAMES)
def test_one_update_changes_every_group_and_its_loss_is_finite(name: str, store: Trajectories) -> None:
    algorithm = build(name, store)
    before = {key: p.detach().clone() for key, p in algorithm.named_parameters()}
    metrics = update(algorithm, store)
    assert metrics and all(np.isfinite(value) for value in metrics.values())
    for prefixes in algorithm.needs.groups.values():
        group = [key for key in before if key.startswith(tuple(prefixes))]
        assert any(not torch.equal(before[key], dict(algorithm.named_parameters())[key]) for key in group), prefixes


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_function_of_parameters_and_batch(name: str, store: Trajectories) -> None:
    algorithm, needs = build(name, store), build(name, store).needs
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, needs.padding)
    batch = windows.gather(windows.starts[:3], seeding.keys(0, 0, torch.arange(3)))
    for phase in needs.groups:
        first, second = algorithm(batch, phase), algorithm(batch, phase)
        assert first.terms and all(torch.equal(first.terms[name], second.terms[name]) for name in first.terms)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_hand_are_those_of_autograd(
    name: str, store: Trajectories, small: SimpleNamespace, float64: None
) -> None:
    algorithm, needs = build(name, store), build(name, store).needs
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, needs.padding)
    batch = windows.gather(windows.starts[:12], seeding.keys(0, 0, torch.arange(12)))
    batch = Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batch))  # type: ignore[arg-type]
    by_hand = small.assert_by_hand(algorithm, batch)
    assert by_hand or name not in ("sac", "iql"), "these have them, for default configs"


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_is_in_two_groups(name: str, store: Trajectories) -> None:
    """A group's parameters are parts of a vector of its own."""
    algorithm = build(name, store)
    for key, _ in algorithm.named_parameters():
        assert sum(key.startswith(prefixes) for prefixes in algorithm.needs.groups.values()) <= 1, key


@pytest.mark.parametrize("name", NAMES)
def test_the_sums_of_a_loss_add_up_over_any_cut_of_the_batch(name: str, store: Trajectories, float64: None) -> None:
    """What lets processes and micro-batches share a batch: no sample's part depends on its neighbours."""
    algorithm, needs = build(name, store).double(), build(name, store).needs
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, needs.padding)
    batch = windows.gather(windows.starts[:5], seeding.keys(0, 0, torch.arange(5)))
    batch = Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batch))  # type: ignore[arg-type]
    for phase in needs.groups:
        whole, parts = algorithm(batch, phase), [algorithm(part, phase) for part in batch.split(2)]
        assert whole.entries == sum(part.entries for part in parts)
        for sums in ("terms", "metrics"):
            for key, value in getattr(whole, sums).items():
                assert torch.allclose(value, sum(getattr(part, sums)[key] for part in parts), rtol=1e-12), key


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_algorithm_acts_as_before_without_its_data(name: str, store: Trajectories, tmp_path: Path) -> None:
    algorithm = build(name, store)
    update(algorithm, store, steps=2)
    export = checkpoint.Export(name, algorithm.config, algorithm.spec, algorithm.state_dict())
    path = checkpoint.save(tmp_path, 2, export, {"x": torch.zeros(1)}, {})
    loaded = checkpoint.load(path)
    assert loaded.spec == store.spec and loaded.config == algorithm.config
    obs = observations(store)
    assert np.array_equal(algorithm.eval().policy(seed=4).act(obs)[0], loaded.policy(seed=4).act(obs)[0])


@pytest.mark.parametrize("name", NAMES)
def test_policies_act_in_raw_units_within_bounds_on_any_input(name: str, store: Trajectories) -> None:
    policy = build(name, store).policy(seed=0)
    policy.reset()
    for scale in (1.0, 1e3, -1e3):
        action, log_prob = policy.act(observations(store) * scale)
        assert action.shape == (3, 2) and np.isfinite(action).all()
        assert (np.abs(action) <= np.array(store.spec.action.high) + 1e-6).all()
        assert log_prob is None or log_prob.shape == (3,)
        policy.reset(np.ones(3, dtype=bool))


@pytest.mark.parametrize("name", NAMES)
def test_raw_units_follow_the_bounds_of_the_spec(name: str, store: Trajectories, spec: Spec) -> None:
    """Component 1 has twice the range of component 0, and saturated policies have to use it."""
    action, _ = build(name, store).policy(seed=0).act(observations(store) * 1e4)
    if np.abs(action[:, 1]).max() > 1:
        assert np.abs(action[:, 0]).max() <= 1
    wide = type(spec)(spec.obs, type(spec.action)((-1.0, -50.0), (1.0, 50.0)), spec.dt)
    stretched = (e._replace(action=e.action * np.array([1, 25])) for e in store.episodes())
    rescaled = Trajectories.from_episodes(wide, stretched)
    moved, _ = build(name, rescaled).policy(seed=0).act(observations(store) * 1e4)
    assert np.abs(moved[:, 1]).max() > 2, "the second component goes beyond the old bound"


@pytest.mark.parametrize("name", NAMES)
def test_seeds_reproduce_training_and_acting(name: str, store: Trajectories) -> None:
    def once() -> tuple[dict[str, torch.Tensor], np.ndarray]:
        algorithm = build(name, store, seed=3)
        update(algorithm, store, steps=3)
        return algorithm.state_dict(), algorithm.policy(seed=5).act(observations(store))[0]

    (first, acted), (second, again) = once(), once()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert np.array_equal(acted, again)
    other = build(name, store, seed=4).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_its_config_is_documented(name: str) -> None:
    assert all(text for _, _, text in config.describe(algorithms.find(name).Config()))
    assert algorithms.find(name).__module__.endswith(name)
