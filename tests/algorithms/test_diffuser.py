import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from offline_cai import seeding
from offline_cai.algorithms.diffuser import Diffuser, DiffuserConfig, GivenConfig
from offline_cai.core import Episode, Known, Loss, Spec
from offline_cai.data import arrays
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.diffusion.evidence import Goal, ReturnInUnits
from offline_cai.errors import UserError
from offline_cai.planning.config import EvidenceConfig, PlannerConfig
from offline_cai.planning.tracking import Tracker
from offline_cai.training import experiment, loop, sources

SMALL = DiffuserConfig(rows=4, stride=2, channels=8, multipliers=(1, 2), levels=8)


def build(store: Trajectories, **changes: object) -> Diffuser:
    torch.manual_seed(0)
    diffuser = Diffuser(store.spec, dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    diffuser.fit(store.chunks)
    return diffuser


def mean(loss: Loss) -> torch.Tensor:
    return sum(loss.terms.values()) / loss.entries


@pytest.mark.parametrize("actions", [False, True])
def test_plans_begin_at_the_state_and_end_at_the_goal(store: Trajectories, actions: bool) -> None:
    obs = np.asarray(store.obs[[0, 3]], dtype=np.float64)
    plan = build(store, actions=actions).plan(obs, torch.tensor([1, 2]))
    assert plan.obs.shape == (2, 1, 4, 4) and plan.stride == 2 and plan.log_evidence is None
    plan = plan._replace(obs=plan.obs[:, 0], action=None if plan.action is None else plan.action[:, 0])
    assert np.allclose(plan.obs[:, 0], obs[:, 4:8], atol=1e-4)
    assert np.allclose(plan.obs[:, -1, :2], obs[:, 2:4], atol=1e-4), "desired_goal"
    assert not np.allclose(plan.obs[:, -1, 2:], obs[:, 6:8], atol=1e-2), "the last velocity is the model's"
    assert (plan.action is not None) == actions
    if plan.action is not None:
        assert plan.action.shape == (2, 4, 2, 2)


def test_goal_columns_say_which_numbers_the_goal_fixes(store: Trajectories) -> None:
    obs = np.asarray(store.obs[[0, 3]], dtype=np.float64)
    plan = build(store, goal_columns=(3, 0)).plan(obs, torch.tensor([1, 2]))
    assert np.allclose(plan.obs[:, 0, -1, [3, 0]], obs[:, 2:4], atol=1e-4)


def test_waypoints_are_known_in_training_and_in_plans(store: Trajectories) -> None:
    """Any part of a row besides the first state and the goal; plans ask for their numbers."""
    parts = (GivenConfig(2, (1, 0)), GivenConfig(-1, (3,)))
    diffuser = build(store, given=parts, rows=4)
    batch = Windows(store, 4, 2).gather(np.array([8, 9]), torch.arange(2))
    x = diffuser.codec.encode(batch)
    assert diffuser.mask(x)[0].tolist() == [
        [True] * 4,
        [False] * 4,
        [True, True, False, False],
        [True, True, False, True],
    ]
    obs, given = np.asarray(store.obs[[0, 3]], dtype=np.float64), np.array([[0.3, -0.2, 0.1], [0.0, 0.1, 0.2]])
    plan = diffuser.plan(obs, torch.tensor([1, 2]), given=given).obs[:, 0]
    assert np.allclose(plan[:, 2, [1, 0]], given[:, :2], atol=1e-4) and np.allclose(
        plan[:, -1, 3], given[:, 2], atol=1e-4
    )
    assert np.allclose(plan[:, 0], obs[:, 4:8], atol=1e-4) and np.allclose(plan[:, -1, :2], obs[:, 2:4], atol=1e-4)
    for wrong in (None, given[:, :2], given[:1], np.full_like(given, np.nan)):
        with pytest.raises(UserError, match=r"given 3 numbers .*row, column \[\(2, 1\), \(2, 0\), \(-1, 3\)\]"):
            diffuser.plan(obs, torch.tensor([1, 2]), given=wrong)
    assert diffuser.policy(given=given[0]).act(obs)[0].shape == (2, 2)
    with pytest.raises(UserError, match="given 0 numbers"):
        build(store).plan(obs, torch.tensor([1, 2]), given=given)
    assert diffuser.fingerprint != build(store).fingerprint


def test_without_a_goal_only_the_first_state_is_known(store: Trajectories) -> None:
    diffuser = build(store, goal_field=None, goal_columns=())
    mask = diffuser.known(np.asarray(store.obs[:1])).mask
    assert mask[0].sum(-1).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("prediction", ["x_0", "epsilon", "v"])
def test_training_lowers_the_loss_and_the_denoiser_returns_clean_rows(spec: Spec, prediction: str) -> None:
    """States that stand still: the known first row tells all the others."""
    rng = np.random.default_rng(0)
    still = [np.repeat(rng.normal(size=(1, 8)), 9, axis=0) for _ in range(50)]
    store = Trajectories.from_episodes(spec, [Episode(obs, np.zeros((8, 2)), np.zeros(8), False) for obs in still])
    diffuser = build(store, prediction=prediction, channels=16)
    windows = Windows(store, 4, 2)
    optimiser = torch.optim.Adam(diffuser.parameters(), 5e-3)
    losses = []
    for step in range(300):
        rows = rng.choice(windows.starts, size=32)
        batch = windows.gather(rows, seeding.keys(0, step, torch.arange(32)))
        loss = mean(diffuser(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    x = diffuser.codec.encode(windows.gather(windows.starts, torch.arange(len(windows.starts))))
    known, k = Known(x, diffuser.mask(x)), torch.full((len(x),), 3)
    noisy = known.impose(diffuser.schedule.add_noise(x, torch.randn(x.shape), k))
    error = (diffuser.denoise(noisy, k).detach() - x)[~known.mask]
    assert float((error**2).mean()) < 0.25 * float((x**2).mean()), "x_0, whatever the network predicts"


def test_known_entries_carry_no_loss(store: Trajectories) -> None:
    """What the network says about known entries does not matter: their gradient is zero."""
    diffuser = build(store)
    batch = Windows(store, 4, 2).gather(np.array([8, 9]), torch.arange(2))
    seen = []
    original = diffuser.network.forward

    def spy(x: torch.Tensor, k: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        out = original(x, k, condition)
        out.retain_grad()
        seen.append((x, out))
        return out

    diffuser.network.forward = spy  # type: ignore[method-assign]
    mean(diffuser(batch)).backward()
    (x, out), clean = seen[0], diffuser.codec.encode(batch)
    mask = diffuser.mask(clean)
    assert torch.equal(x[mask], clean[mask]), "known entries enter without noise"
    assert (out.grad[mask] == 0).all() and (out.grad[~mask] != 0).all()


def test_the_sampler_of_the_config_is_used(store: Trajectories) -> None:
    obs, key = np.asarray(store.obs[:1]), torch.tensor([1])
    diffuser = build(store)
    calls: list[int] = []
    inner = diffuser.denoise
    diffuser.denoise = lambda x, k: (calls.append(1), inner(x, k))[1]  # type: ignore[method-assign,func-returns-value]
    for planner, count in (
        (PlannerConfig(steps=3), 3),
        (PlannerConfig(sampler="ddpm", steps=8), 8),
        (PlannerConfig(sampler="dpm", steps=4), 4),
    ):
        diffuser.config = dataclasses.replace(diffuser.config, planner=planner)
        calls.clear()
        diffuser.plan(obs, key)
        assert len(calls) == count
    assert len(diffuser.denoising(obs, key, 4)) == 5


def goal(row: int) -> EvidenceConfig:
    return EvidenceConfig(goals=(Goal((0.0,), (0,), width=1.0, row=row),))


def test_sizes_and_goals_that_do_not_fit_are_named(spec: Spec) -> None:
    with pytest.raises(UserError, match=r"rows is 5.*multiple of 2"):
        Diffuser(spec, dataclasses.replace(SMALL, rows=5))
    for changes, word in (
        ({"goal_columns": (0, 9)}, "columns are .* make 4 columns"),
        ({"stride": 0}, "stride is 0"),
        ({"levels": -1}, "levels is -1"),
        ({"multipliers": ()}, "multipliers"),
        ({"discount": 2.0}, "discount is 2"),
        ({"planner": PlannerConfig(steps=9)}, "more than the 8 noise levels"),
        ({"planner": PlannerConfig(execute="actions")}, "set actions: true"),
        ({"planner": PlannerConfig(execute="inverse")}, "set inverse_dynamics: true"),
        ({"planner": PlannerConfig(rows=7)}, r"planner.rows is 7.*multiple of 2.*take 6 or 8"),
        ({"planner": PlannerConfig(rows=1)}, "needs two rows or more"),
        ({"loss_discount": 0.0}, "loss_discount"),
        ({"planner": PlannerConfig(guide="corrected")}, "set residual_windows"),
        ({"residual_windows": 9, "condition_dropout": 0.5}, "leave condition_dropout null"),
        ({"residual_windows": -1}, "at least 0"),
        ({"condition_dropout": 1.0}, "condition_dropout is 1"),
        ({"condition_dropout": 0.0, "planner": PlannerConfig(condition_weight=2.0)}, "unconditional estimate"),
        ({"planner": PlannerConfig(condition_weight=3.0)}, r"condition_weight \(3.0\) are for a model that is told"),
        ({"planner": PlannerConfig(target=0.5)}, r"target \(0.5\) .* trained without"),
        ({"given": (GivenConfig(4, (0,)),)}, "a part is for row 4, but plans have 4 rows"),
        ({"given": (GivenConfig(2, (4,)),)}, r"columns of model.given are \[4\]"),
        ({"planner": PlannerConfig(evidence=goal(4))}, "a goal is for row 4, but plans have 4 rows: take 0 to 3"),
        ({"planner": PlannerConfig(evidence=goal(-9), rows=8)}, "a goal is for row -9, but plans have 8 rows"),
        ({"planner": PlannerConfig(tracker=Tracker(position=(0, 7)))}, "make 4 columns"),
    ):
        with pytest.raises(UserError, match=word):
            Diffuser(spec, dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="goal_columns names 1"):
        Diffuser(spec, dataclasses.replace(SMALL, goal_columns=(0,)))
    with pytest.raises(UserError, match="did you mean 'desired_goal'"):
        Diffuser(spec, dataclasses.replace(SMALL, goal_field="desired_gaol"))


def test_the_loss_is_weighted_as_in_the_papers_code(store: Trajectories) -> None:
    """Janner et al.'s get_loss_weights: discount^row with mean one, then the first row's actions."""
    diffuser = build(store, actions=True, action_weight=10.0, loss_discount=0.5, goal_field=None)
    batch, seen = Windows(store, 4, 2).gather(np.array([8, 9]), torch.arange(2)), []
    weight = np.repeat(0.5 ** np.arange(4.0)[:, None], 8, axis=1)
    weight /= weight.mean()
    weight[0, :4], weight[0, 4:] = 10, 0  # two steps of two actions, then the known state

    def spy(x: torch.Tensor, k: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        seen.append(torch.zeros_like(x, requires_grad=True))
        return seen[0]

    diffuser.network.forward = spy  # type: ignore[method-assign]
    loss = mean(diffuser(batch))
    loss.backward()
    clean = diffuser.codec.encode(batch)
    assert torch.allclose(seen[0].grad, -2 * torch.from_numpy(weight).float() * clean / (2 * (32 - 4)), atol=1e-6)
    assert float(loss.detach()) == pytest.approx(
        float((clean**2 * torch.from_numpy(weight)).sum()) / (2 * (32 - 4)), rel=1e-5
    )


def test_conditioned_plans_follow_the_return_they_are_asked_for(spec: Spec) -> None:
    """The second coordinate jumps to +1 with reward 1 or to -1 with reward 0: the return tells which."""
    rng, episodes = np.random.default_rng(0), []
    for _ in range(200):
        side = rng.integers(2)
        obs = np.zeros((9, 8))
        obs[:, 4] = rng.normal()
        obs[1:, 5] = 2 * side - 1
        episodes.append(Episode(obs, np.zeros((8, 2)), np.full(8, float(side)), False))
    store = Trajectories.from_episodes(spec, episodes)
    diffuser = build(store, channels=16, goal_field=None, condition_dropout=0.25, stride=1)
    windows, optimiser = Windows(store, 4, 1), torch.optim.Adam(diffuser.parameters(), 4e-3)
    starts = store.offsets[:-1]
    for step in range(150):
        batch = windows.gather(rng.choice(starts, size=32), seeding.keys(0, step, torch.arange(32)))
        optimiser.zero_grad()
        mean(diffuser(batch)).backward()
        optimiser.step()
    obs, key = np.zeros((40, 8)), seeding.keys(1, 0, torch.arange(40))

    def side(**planner: object) -> np.ndarray:
        diffuser.config = dataclasses.replace(diffuser.config, planner=PlannerConfig(steps=8, **planner))  # type: ignore[arg-type]
        return diffuser.plan(obs, key).obs[:, 0, 2, 1].numpy()

    assert (side(target=0.95) > 0.5).mean() > 0.9 and (side(target=0.05) < -0.5).mean() > 0.9
    x, k = torch.randn(3, 4, 4), torch.tensor([1, 4, 7])
    told, plain = diffuser.denoise(x, k, torch.full((3, 1), 0.9)), diffuser.denoise(x, k)
    assert not torch.allclose(told, plain)
    assert torch.equal(diffuser.denoise(x, k, torch.full((3, 1), torch.nan)), plain), "NaN: told nothing"
    side(target=0.95, condition_weight=3.0)
    assert torch.allclose(diffuser._denoise(x, k), 3 * told - 2 * plain, atol=1e-5)


def test_the_condition_is_dropped_for_its_share_of_the_windows(store: Trajectories) -> None:
    diffuser = build(store, condition_dropout=0.25)
    batch = Windows(store, 4, 2).gather(np.full(4000, 8), seeding.keys(0, 0, torch.arange(4000)))
    told = diffuser._told(batch)
    assert told is not None and abs(float(told.isnan().float().mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    assert (told[~told.isnan()].abs() <= 1).all()


def test_a_budget_makes_the_data_the_posterior_over_whole_episodes(store: Trajectories, tmp_path: Path) -> None:
    """Nearly all that three episodes can say, so that windows of the best one are nearly all that is drawn."""
    data = str(arrays.write(tmp_path / "own.npz", store))
    model = {"goal_field": None, "fields": ["observation"], "rows": 2, "stride": 1, "multipliers": [1]}
    about = {"name": "a", "algorithm": "diffuser", "dataset": data, "training": {"batch_size": 256}}
    exp = experiment.parse({**about, "model": {**model, "kl_budget": 1.09}}, "a test")
    source = sources.build(exp, loop.build(exp, store), store, Accelerator(cpu=True), tmp_path)
    best = torch.from_numpy(np.array(store.episode(int(store.returns.argmax())).obs)).float()
    drawn = source(0).obs[:, 0]
    assert float((drawn[:, None] == best).all(-1).any(1).float().mean()) > 0.98
    with pytest.raises(UserError, match=r"kl_budget is 0\.0; it is a positive number of nats"):
        dataclasses.replace(SMALL, kl_budget=0.0)


def test_inverse_dynamics_finds_the_actions_between_states(spec: Spec) -> None:
    """Position moves by the action: with stride 2 the mean of a block's two actions is half of the way."""
    rng, episodes = np.random.default_rng(0), []
    for _ in range(100):
        action = rng.uniform(-1, 1, size=(8, 2)) * [1, 2]
        action[1::2] = action[::2]  # both steps of a block alike, so that the states tell them
        obs = np.zeros((9, 8))
        obs[1:, 4:6] = action.cumsum(0)
        episodes.append(Episode(obs, action, np.zeros(8), False))
    store = Trajectories.from_episodes(spec, episodes)
    diffuser = build(store, goal_field=None, inverse_dynamics=True, planner=PlannerConfig(execute="inverse", steps=1))
    assert diffuser.needs.groups == {"denoiser": ("network.",), "inverse": ("inverse.",)}
    windows, optimiser = Windows(store, 4, 2), torch.optim.Adam(diffuser.inverse.parameters(), 5e-3)
    starts = windows.starts[(windows.starts - store.offsets[0]) % 9 % 2 == 0]
    for step in range(400):
        batch = windows.gather(rng.choice(starts, size=64), seeding.keys(0, step, torch.arange(64)))
        optimiser.zero_grad()
        mean(diffuser(batch, "inverse")).backward()
        optimiser.step()
    plan = diffuser.plan(np.zeros((5, 8)), torch.arange(5))
    assert plan.action is not None and plan.action.shape == (5, 1, 3, 2, 2)
    known = windows.gather(store.offsets[:5], torch.arange(5))
    between = diffuser.codec.action_norm.decode(diffuser._between(diffuser.codec.encode_obs(known.obs)))
    assert float((between - known.action).detach().abs().mean()) < 0.1
    played = diffuser.policy(seed=0).act(np.zeros((5, 8)))[0]
    again = diffuser.policy(seed=0).propose(np.zeros((5, 8)), torch.tensor([seeding.key(0, i, 0, 0) for i in range(5)]))
    assert again.action is not None and np.allclose(played, again.action[:, 0, 0, 0].numpy().clip([-1, -2], [1, 2]))


def test_plans_may_be_longer_than_the_windows_of_training(store: Trajectories) -> None:
    plan = build(store, planner=PlannerConfig(rows=10)).plan(np.asarray(store.obs[:2]), torch.tensor([1, 2]))
    assert plan.obs.shape == (2, 1, 10, 4)
    assert np.allclose(plan.obs[:, 0, -1, :2], store.obs[:2, 2:4], atol=1e-4), "the goal is in the last row of these"


def test_a_function_of_plans_in_raw_units_steers_and_chooses(store: Trajectories) -> None:
    """States and actions in the environment's units: the best of several plans earns most."""
    diffuser = build(store, actions=True, planner=PlannerConfig(steps=4, candidates=8))
    obs, key = np.asarray(store.obs[:2]), torch.tensor([1, 2])

    def earned(states: torch.Tensor, actions: torch.Tensor | None) -> torch.Tensor:
        assert actions is not None
        return states[..., 0].sum(1) - actions.square().sum((1, 2, 3))

    diffuser.steer_by(ReturnInUnits(diffuser.codec, earned))
    plan = diffuser.plan(obs, key, 0.5)
    assert plan.action is not None
    value = torch.stack([earned(states, actions) for states, actions in zip(plan.obs, plan.action, strict=True)]) / 0.5
    assert torch.allclose(plan.log_weight, value.log_softmax(1), atol=1e-3)
    diffuser.plan_as(PlannerConfig(sampler="ddpm", steps=8))
    plain = diffuser.plan(obs, key).obs[:, :, 1:, 0].mean()
    diffuser.plan_as(PlannerConfig(sampler="ddpm", steps=8, guide="through_denoiser", temperature=0.5))
    assert diffuser.plan(obs, key).obs[:, :, 1:, 0].mean() > plain
    assert diffuser.policy(execute="actions").act(obs)[0].shape == (2, 2)


def test_what_the_denoiser_leaves_open_is_measured_and_travels(store: Trajectories, tmp_path: Path) -> None:
    """Against the plain sum over windows; the known numbers have none."""
    diffuser = build(store, residual_windows=50)
    windows = Windows(store, 4, 2)
    batch = windows.gather(np.resize(windows.starts, 50), seeding.keys(0, 0, torch.arange(50)))
    assert diffuser.residual is None
    diffuser.finish(lambda count: batch if count == 50 else batch._replace(key=batch.key[:0]))
    residual = diffuser.residual
    assert residual is not None
    level, x = 5, diffuser.codec.encode(batch)
    known, k = Known(x, diffuser.mask(x)), torch.full((50,), level)
    noisy = known.impose(diffuser.schedule.add_noise(x, seeding.normal(batch.key, (4, 4), stream=level), k))
    error = ((x - diffuser.denoise(noisy, k).clamp(-1, 1)) * ~known.mask).flatten(1).detach()
    assert torch.allclose(residual.at(level).matrix(), error.T @ error / 50, atol=1e-5)
    diffuser.save_pretrained(tmp_path / "d")
    later = build(store)
    with pytest.raises(UserError, match=r"or measure it on a trained model \(Diffuser\.measure\)"):
        later.plan_as(PlannerConfig(guide="corrected"))
    later.measure(lambda count: batch, 50)
    assert later.residual is not None and torch.equal(later.residual.variance, residual.variance)
    goals = goal(-1)
    later.plan_as(PlannerConfig(guide="corrected", evidence=goals))
    assert later.plan(np.asarray(store.obs[:1]), torch.tensor([1])).obs.isfinite().all()
    with pytest.raises(UserError, match=r"planner\.rows is 8, but the residual covariance is for plans of 4 rows"):
        later.plan_as(PlannerConfig(guide="corrected", evidence=goals, rows=8))
    later.plan_as(PlannerConfig(rows=8))
    assert later.plan(np.asarray(store.obs[:1]), torch.tensor([1])).obs.shape[2] == 8
    again = Diffuser.from_pretrained(tmp_path / "d").residual
    assert again is not None and all(torch.equal(a, b) for a, b in zip(again, residual, strict=True))
