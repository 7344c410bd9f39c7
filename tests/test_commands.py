"""The steps after training, on a run of the debug Diffuser."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offline_cai import algorithms, cli, commands, config, demo, evaluation_commands, report
from offline_cai.core import Discrete, Episode, Spec
from offline_cai.data import minari
from offline_cai.data.cache import fingerprint
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation.offpolicy import Importance
from offline_cai.training import experiment


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, planned, evaluated and reported."""
    copy = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(run, copy)
    commands.plan(copy, count=3, seed=1)
    evaluation_commands.evaluate(copy, quiet=True)
    report.write(copy)
    return copy


def test_plans_are_new_and_written(done: Path) -> None:
    with np.load(done / "plans" / "plans.npz", allow_pickle=False) as data:
        assert data["rows"].shape == (3, 16, 4) and data["paths"].shape == (3, 15 * 8 + 1, 2)
        assert np.allclose(data["rows"][:, 0], data["obs"][:, 4:8], atol=1e-4), "each begins at its start"
        assert np.allclose(data["rows"][:, -1, :2], data["obs"][:, 2:4], atol=1e-4), "and ends at its goal"
        assert len(np.unique(data["obs"][:, 2])) == 3
    facts = json.loads((done / "plans" / "plans.json").read_text())
    assert facts["plans"] == 3 and 0 <= facts["share of plans that cross a wall"] <= 1


def test_results_carry_their_protocol_and_their_references(done: Path) -> None:
    data = json.loads((done / "evaluation" / "results.json").read_text())
    assert list(data["results"]) == ["planner", "controller", "controller without noise", "occupancy path", "random"]
    assert all(len(r["returns"]) == 4 for r in data["results"].values())
    assert data["protocol"]["kwargs"]["max_episode_steps"] == 40 and data["planner"]["tracker"]["kp"] == 10
    assert data["planner"]["horizon in steps"] == 128 and data["versions"]["torch"]
    ours, other = (np.array(data["results"][name]["normalised"]) for name in ("planner", "random"))
    assert data["paired"]["random"]["mean"] == pytest.approx((ours - other).mean())
    assert data["paired"]["random"]["se"] == pytest.approx((ours - other).std(ddof=1) / 2)
    line = report.score_line(data)
    number = r"-?\d+\.\d ± \d+\.\d"
    pattern = rf"score: planner {number} · controller {number} · occupancy path {number} · random {number} "
    assert re.fullmatch(pattern + r"\(D4RL normalised, 4 episodes\)", line)


def test_the_report_is_one_file_with_everything_in_it(done: Path) -> None:
    text = (done / "report.html").read_text()
    assert text.count("data:image/gif;base64,") == 2, "denoising and rollout"
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing outside the file is needed"
    parts = ("score: planner", "occupancy path", "Policy beside dataset", "wall time", "algorithm: diffuser", "mujoco")
    for part in parts:
        assert part in text, part


def test_a_report_of_a_bare_run_leaves_out_what_is_not_there(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    text = report.write(tmp_path / "r").read_text()
    assert "has no evaluation" in text and "Training" in text and "score:" not in text and "gif" not in text


def test_nothing_is_overwritten_silently(done: Path) -> None:
    for again in (
        lambda: commands.plan(done, count=1, seed=1),
        lambda: evaluation_commands.evaluate(done, quiet=True),
        lambda: report.write(done),
    ):
        with pytest.raises(UserError, match=r"exists already and is not overwritten: pass --overwrite"):
            again()
    before = (done / "plans" / "plans.json").read_text()
    commands.plan(done, count=2, seed=1, overwrite=True)
    assert (done / "plans" / "plans.json").read_text() != before


def test_evaluation_repeats_and_follows_its_flags(run: Path, tmp_path: Path) -> None:
    flags = {"episodes": "2", "references": "[]"}
    one = evaluation_commands.evaluate(run, flags=flags, output=tmp_path / "one", quiet=True)
    two = evaluation_commands.evaluate(run, flags=flags, output=tmp_path / "two", quiet=True)
    assert list(one["results"]) == ["planner"]
    with np.load(tmp_path / "one" / "paths.npz") as a, np.load(tmp_path / "two" / "paths.npz") as b:
        assert np.array_equal(a["planner"], b["planner"]) and len(np.unique(a["planner"])) > 100
    assert one["results"]["planner"]["returns"] == two["results"]["planner"]["returns"]


def test_overwriting_replaces_only_what_the_command_writes(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    for target in (precious, run, tmp_path):
        with pytest.raises(UserError, match="nothing is replaced"):
            commands.plan(run, count=1, seed=0, output=target, overwrite=True)
    with pytest.raises(UserError, match="nothing is replaced"):
        evaluation_commands.evaluate(run, output=precious / "thesis.tex", overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years" and (run / "config.yaml").is_file()
    with pytest.raises(UserError, match="cannot write"):
        commands.plan(run, count=1, seed=0, output=precious / "thesis.tex" / "x")


def test_a_failed_replacement_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.v2"
    target.mkdir()
    (target / "a").write_text("old")
    real, calls = commands.os.replace, []

    def replace(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(commands.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), commands.new_folder(target, True, {"a"}) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.v2"]


def test_runs_that_begin_in_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({commands.new_run("x") for _ in range(5)}) == 5


def test_results_name_the_checkpoint_they_are_of(run: Path, tmp_path: Path) -> None:
    first = run / "checkpoints" / "step-00000010"
    data = evaluation_commands.evaluate(
        first, flags={"episodes": "2", "references": "[]"}, output=tmp_path / "e", quiet=True
    )
    assert data["checkpoint"] == "step-00000010" and data["run"] == str(run.resolve())


def test_behaviour_cloning_goes_the_same_way(dataset: str, tmp_path: Path) -> None:
    bc = commands.train(experiment.load("debug-bc"), tmp_path / "bc", quiet=True)
    data = evaluation_commands.evaluate(bc, quiet=True)
    assert next(iter(data["results"])) == "bc" and data["planner"] == {}
    assert "score: bc" in report.write(bc).read_text()
    with pytest.raises(UserError, match="bc does not plan"):
        commands.plan(bc, count=1, seed=0)


def test_the_demo_runs_all_steps_and_uses_a_dataset_that_is_there(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(minari.dataset_root() / dataset)
    path = demo.demo("debug-diffuser", {}, tmp_path / "demo", quiet=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("score: planner ") and lines[-1].endswith("(D4RL normalised, 4 episodes)")
    assert lines[-2] == f"report: {path}" and "used as it is" in "\n".join(lines)
    assert fingerprint(minari.dataset_root() / dataset) == before
    assert set(json.loads((tmp_path / "demo" / "stages.json").read_text())) == {"collect", "train", "plan", "evaluate"}


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluation_commands.evaluate(tmp_path)
    with pytest.raises(UserError, match=r"no config\.yaml"):
        report.write(tmp_path)
    with pytest.raises(UserError, match=r"no config\.yaml"):
        commands.resumed(tmp_path, {})


def test_a_run_that_goes_away_is_not_said_to_be_unwritable(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "r")
    real = evaluation_commands.open_run

    def opened(*args: Any) -> commands.Run:
        found = real(*args)
        shutil.rmtree(tmp_path / "r")
        return found

    monkeypatch.setattr(evaluation_commands, "open_run", opened)
    assert cli.main(["evaluate", str(tmp_path / "r"), "--quiet"]) == 2
    assert re.fullmatch(r"error: .*manifest\.json: No such file or directory\.\n", capsys.readouterr().err)
    assert not (tmp_path / "r").exists()


def test_an_interrupted_evaluation_goes_on_after_the_policies_that_are_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "r")
    flags = {"references": "[random, controller]", "episodes": "2"}
    whole = evaluation_commands.evaluate(tmp_path / "r", flags=flags, output=tmp_path / "whole", quiet=True)
    real, made = evaluation_commands.references.controller, []

    def controller(setting: Any) -> Any:
        made.append(setting)
        if len(made) == 1:
            raise KeyboardInterrupt
        return real(setting)

    monkeypatch.setitem(evaluation_commands.references.REFERENCES, "controller", controller)  # type: ignore[arg-type]
    with pytest.raises(
        Interrupted, match="2 of 3 policies are evaluated and kept: the same command goes on after them"
    ):
        evaluation_commands.evaluate(tmp_path / "r", flags=flags, quiet=True)
    assert not (tmp_path / "r" / "evaluation").exists()
    monkeypatch.setattr(evaluation_commands.references, "random", None)
    data = evaluation_commands.evaluate(tmp_path / "r", flags=flags, quiet=True)
    for name, result in whole["results"].items():
        assert data["results"][name]["returns"] == result["returns"]
    assert not (tmp_path / "r" / ".evaluation").exists()
    assert data["planner"]["plans"] == whole["planner"]["plans"] > 0, "what it says of its plans is kept with them"


def test_an_actor_s_file_and_a_reference_are_evaluated_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(config.find("hopper-medium", "datasets/actors"), tmp_path / "mine.npz")
    how = ["--protocol", "hopper", "--episodes", "2", "--environments", "2", "--kwargs", "{max_episode_steps: 20}"]
    assert cli.main(["evaluate", "mine.npz", *how, "--references", "[random]", "--quiet"]) == 0
    assert "score: actor:mine.npz " in capsys.readouterr().out
    folder = tmp_path / "runs" / "references" / "hopper"
    data = json.loads((folder / "actor-mine.npz" / "results.json").read_text())
    assert data["policy"] == "actor:mine.npz" and list(data["paired"]) == ["random"]
    alone = evaluation_commands.evaluate_reference("actor:hopper-medium", "hopper", dict(_flags(how)), quiet=True)
    mean = evaluation_commands.evaluate_reference(
        "actor without noise:mine.npz", "hopper", dict(_flags(how)), quiet=True
    )
    assert list(alone["results"]) == ["actor:hopper-medium"]
    returns = [d["results"][d["policy"]]["returns"] for d in (data, alone, mean)]
    assert returns[0] == returns[1] != returns[2], "the same actor, with its noise and without"
    assert cli.main(["evaluate", "random", *how, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["random"]["returns"] == data["results"]["random"]["returns"]
    for words, said in (
        (["mine.npz"], "choose one with --protocol"),
        (["actor:nobody", *how], "no file and no recipe 'nobody' in datasets/actors/"),
        (["random", *how, "--references", "[actr:x]", "--output", "elsewhere"], "did you mean 'actor:FILE'"),
        (["random", *how], "exists already"),
    ):
        assert cli.main(["evaluate", *words, "--quiet"]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == [
        *("actor-hopper-medium", "actor-mine.npz", "actor-without-noise-mine.npz", "random")
    ]


def _flags(words: list[str]) -> list[tuple[str, str]]:
    """What stands behind the protocol."""
    return [(name.removeprefix("--"), value) for name, value in zip(words[2::2], words[3::2], strict=True)]


def test_estimates_from_data_are_marked_as_such_and_need_no_simulator(
    dataset: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bc = commands.train(experiment.load("debug-bc"), tmp_path / "bc", quiet=True)
    monkeypatch.setattr(evaluation_commands.evaluation, "evaluate", None)
    assert cli.main(["evaluate", str(bc), "--off-policy", "--steps", "20", "--hidden", "[8]", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "no simulator" in said and "importance sampling   none: the dataset keeps no log-probabilities" in said
    facts = json.loads((bc / "off-policy" / "estimates.json").read_text())
    store = minari.trajectories(dataset)
    assert facts["fitted Q"]["n"] == store.num_episodes and facts["discount"] == 0.99
    assert facts["data"]["mean"] == pytest.approx(store.return_to_go(0.99)[store.offsets[:-1]].mean())
    page = report.write(bc).read_text()
    assert "Estimated without a simulator" in page and "fitted Q evaluation, over first states alone" in page
    assert f"{facts['fitted Q']['mean']:.1f}" in page and "keeps no log-probabilities" in page
    with pytest.raises(UserError, match="diffuser acts by plans"):
        evaluation_commands.off_policy(run)
    planner = commands.open_run(run).algorithm
    assert (
        evaluation_commands._importance(planner, store, 0.99) == "none: the algorithm has no distribution over actions"
    )
    with pytest.raises(UserError, match="unknown key 'stepz'; did you mean 'steps'"):
        evaluation_commands.off_policy(bc, {"stepz": "1"}, tmp_path / "x")
    order: list[str] = []
    monkeypatch.setattr(evaluation_commands, "_importance", lambda *_: order.append("importance") or "none: .")
    monkeypatch.setattr(evaluation_commands.offpolicy, "fitted_q", lambda *_: order.append("fitted Q"))
    with pytest.raises(TypeError):
        evaluation_commands.off_policy(bc, {}, tmp_path / "x")
    assert order == ["importance", "fitted Q"], "what takes a second before what takes minutes"
    assert cli.main(["evaluate", str(bc), "--off-policy", "--protocol", "debug-umaze"]) == 2


def test_a_policy_s_own_data_weigh_alike_in_importance_sampling(spec: Spec) -> None:
    """Episodes that the distribution itself acted: all ratios are 1, whatever the units of the actions."""
    algorithm = algorithms.find("sac")(spec, algorithms.find("sac").Config())
    rng, episodes = np.random.default_rng(0), []
    for number in range(6):
        obs = rng.normal(size=(5, spec.obs_width))
        action, log_prob = algorithm.explore(obs[:-1], torch.arange(4) + 10 * number)
        episodes.append(Episode(obs, action, rng.normal(size=4), False, log_prob))
    data = Trajectories.from_episodes(spec, episodes)
    found = evaluation_commands._importance(algorithm, data, 0.9)
    assert isinstance(found, Importance) and found.effective == pytest.approx(6, abs=1e-3)
    assert found.episodes.value == pytest.approx(data.return_to_go(0.9)[data.offsets[:-1]].mean(), abs=1e-3)
    bare = Trajectories.from_episodes(spec, [e._replace(log_prob=None) for e in episodes])
    assert evaluation_commands._importance(algorithm, bare, 0.9) == (
        "none: the dataset keeps no log-probabilities of the policy that collected it"
    )
    for name, why in (
        ("soft_q", "none: its distribution over actions is known by samples alone"),
        ("bc", "none: it acts deterministically"),
    ):
        other = algorithms.find(name)
        assert evaluation_commands._importance(other(spec, other.Config()), data, 0.9) == why
    choices = Spec(spec.obs, Discrete((3,), (0,)))
    assert algorithms.find("bc")(choices, algorithms.find("bc").Config()).no_density is None
