"""The debug scoreboard: made, interrupted, failing and resumed."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_cai import cli, config, scoreboard
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation import board
from offline_cai.training import loop

TIMES = ("cpu_minutes", "planner")


@pytest.fixture(scope="module")
def made(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug scoreboard as the command makes it, undisturbed."""
    folder = tmp_path_factory.mktemp("board")
    assert call(folder) == 0
    return folder


def call(folder: Path, *more: str) -> int:
    places = ["--output", str(folder / "results"), "--runs", str(folder / "runs")]
    return cli.main(["scoreboard", "debug", "--quiet", *places, *more])


def cells(folder: Path, recipe: scoreboard.Scoreboard | None = None) -> list[scoreboard.Cell]:
    return scoreboard.cells(recipe or scoreboard.load("debug"), "debug", folder / "runs")


def timeless(path: Path) -> dict[str, Any]:
    text = path.read_text().replace(str(path.parent.parent), "")
    return {key: value for key, value in json.loads(text).items() if key not in TIMES}


def test_every_cell_has_a_file_and_the_table_a_place_for_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cells(made)
    assert [cell.name for cell in found] == [
        *("random/umaze", "controller/umaze", "random/pendulum"),
        *("BC/umaze/0", "BC/umaze/1", "Diffuser/umaze/0", "SAC/pendulum/0"),
    ]
    records = [scoreboard.record(cell, made / "results") for cell in found]
    for r in records:
        assert r is not None and len(r["returns"]) == r["n"] == r["protocol"]["episodes"] and r["versions"]["torch"]
        assert r["error"] is None and (r["kind"] == "reference" or r["protocol"]["references"] == [])
    bc, diffuser, sac = records[3], records[5], records[6]
    assert sac and [(row["step"], row["environment_steps"]) for row in sac["curve"]] == [(10, 60), (20, 80)]
    assert bc and diffuser and bc["cpu_minutes"]["train"] > 0 and diffuser["planner"]["steps"] == 3
    assert [row["step"] for row in bc["curve"]] == [10, 20]
    means = [r["mean"] for r in records[3:5] if r]
    se = np.std(means, ddof=1) / np.sqrt(2)
    text = (made / "results" / "table.md").read_text()
    assert f"| BC | {np.mean(means):.1f} ± {se:.1f} (2 × 2) | – |" in text
    assert f"| Diffuser | {diffuser['mean']:.1f} ± {diffuser['se']:.1f}† (1 × 2) | – |" in text
    assert "| | umaze | pendulum (return) | CPU minutes |" in text
    assert all((made / "results" / name).stat().st_size > 5000 for name in ("scores.png", "curves.png"))
    assert call(made, "--list", "--only", "BC/*/1") == 0
    line, commands = capsys.readouterr().out.splitlines()
    assert line.startswith("BC/umaze/1: ") and "2 episodes" in line and "train debug-bc" in commands


def test_nothing_is_made_twice_and_a_changed_recipe_is_made_anew(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "copy")
    assert call(tmp_path / "copy") == 0
    assert "[" not in capsys.readouterr().out.splitlines()[0], "no cell is made again"
    recipe = scoreboard.load("debug")
    longer = replace(recipe, entries=(replace(recipe.entries[0], flags={"training.steps": 5}), recipe.entries[1]))
    todo = [scoreboard.record(cell, made / "results") is None for cell in cells(made, longer)]
    assert todo == [False, False, False, True, True, False]


def test_cells_that_differ_in_their_evaluation_alone_share_a_training(made: Path, tmp_path: Path) -> None:
    recipe = scoreboard.load("debug")
    entry = recipe.entries[1]
    again = replace(entry, label="again", evaluate={"planner.steps": 2})
    longer = replace(entry, label="longer", flags={"training.steps": 5})
    some = cells(made, replace(recipe, entries=(entry, again, longer)))[-3:]
    assert [cell.run == some[0].run for cell in some] == [True, True, False]
    metrics = (some[0].run / "metrics.jsonl").read_text()
    assert scoreboard.run(recipe, [some[1]], tmp_path, quiet=True) == 0
    record = scoreboard.record(some[1], tmp_path)
    assert record and record["planner"]["steps"] == 2 and record["cpu_minutes"]["train"] > 0
    assert (some[0].run / "metrics.jsonl").read_text() == metrics, "it was not trained again"


def test_the_commands_of_a_cell_make_it_alone(made: Path, tmp_path: Path) -> None:
    cell = cells(made)[5]
    assert cell.name == "Diffuser/umaze/0"
    for command in cell.commands:
        words = shlex.split(command.replace(str(cell.run), str(tmp_path / "run")))
        assert words[0] == "offline-cai" and cli.main([*words[1:], "--quiet"]) == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["results"]
    record = scoreboard.record(cell, made / "results")
    assert record and results["planner"]["returns"] == record["returns"]


def test_an_interrupted_scoreboard_goes_on_at_the_step_it_was_at(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at step 15 of the second seed; then the same results as undisturbed, without training anything twice."""
    real, steps = loop._Run.record, list[int]()

    def record(run: Any, step: int, values: Any) -> None:
        real(run, step, values)
        steps.append(step)
        if len(steps) == 35:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "record", record)
    assert call(tmp_path, "--only", "BC/*") == 130
    assert "stopped in the cell BC/umaze/1. The same command goes on from there." in capsys.readouterr().err
    assert call(tmp_path, "--only", "BC/*") == 0
    assert len(steps) <= 2 * 20 + 1, "the training went on, from the step that was not complete"
    for name in ("bc-umaze-0.json", "bc-umaze-1.json"):
        assert timeless(tmp_path / "results" / name) == timeless(made / "results" / name), name


def test_a_cell_that_fails_is_a_sentence_and_the_others_are_made(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_cai.data import minari

    monkeypatch.setattr(minari, "online", lambda *args: False)
    recipe = scoreboard.load("debug")
    broken = replace(recipe.tasks["umaze"], dataset="offline-cai/pointmaze/debug-v7", references=())
    only_bc = (replace(recipe.entries[0], tasks=("gone", "umaze")),)
    tasks = {"gone": broken, "umaze": replace(recipe.tasks["umaze"], references=("random",))}
    recipe = replace(recipe, tasks=tasks, entries=only_bc, seeds=(0,))
    some = cells(tmp_path, recipe)
    assert scoreboard.run(recipe, some, tmp_path / "results", quiet=True) == 1
    text = scoreboard.write(recipe, some, tmp_path / "results")
    assert "| BC | 1 failed | " in text and "- BC/gone/0 failed: " in text and "debug-v7" in text
    again = scoreboard.status(some, tmp_path / "results")
    assert "BC/gone/0: failed: there is no dataset" in again and "BC/umaze/0: -" in again
    capsys.readouterr()
    assert scoreboard.run(recipe, some, tmp_path / "results", quiet=True) == 1, "what failed is tried again"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == ["[2/3] BC/gone/0"]


def test_a_second_process_leaves_a_cell_that_is_being_made(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, one = scoreboard.load("debug"), cells(tmp_path)[:1]
    with scoreboard._claimed(one[0].run.with_name(f".{one[0].run.name}.lock")) as ours:
        assert ours and scoreboard.run(recipe, one, tmp_path / "results", quiet=True) == 0
    assert "another process is at it" in capsys.readouterr().out and not (tmp_path / "results").exists()


def test_the_table_goes_between_its_marks(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scoreboard debug -->\nold\n<!-- /scoreboard debug -->\nafter\n")
    recipe = scoreboard.load("debug")
    text = scoreboard.write(recipe, cells(made), made / "results", page)
    assert page.read_text() == f"before\n<!-- scoreboard debug -->\n{text}<!-- /scoreboard debug -->\nafter\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match=r"page\.md has no lines <!-- scoreboard debug -->"):
        scoreboard.write(recipe, cells(made), made / "results", page)


def test_the_datasets_own_score_and_raw_returns(dataset: str, tmp_path: Path) -> None:
    from offline_cai.data import catalogue

    raw = tmp_path / "raw.yaml"
    raw.write_text(config.dump({**config.read(config.find("debug-umaze", "eval")), "score": None}))
    task = scoreboard.Task(str(raw), dataset, references=())
    recipe = scoreboard.Scoreboard("own", {"umaze": task}, ())
    some = cells(tmp_path, recipe)
    assert scoreboard.run(recipe, some, tmp_path / "results", quiet=True) == 0
    record = scoreboard.record(some[0], tmp_path / "results")
    returns = catalogue.trajectories(dataset).returns
    assert record and record["n"] == len(returns) and record["mean"] == pytest.approx(returns.mean())
    assert "raw return" in board.line(record)
    text = scoreboard.write(recipe, some, tmp_path / "results")
    assert "umaze (return)" in text and f"| dataset | {returns.mean():.1f} ± " in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": [{"label": "BC", "config": "debug-bc", "tasks": ["umace"]}]}, "names the task 'umace'"),
        ({"entries": [{"label": "BC", "config": "debug-bd", "tasks": ["umaze"]}]}, "did you mean 'debug-bc'"),
        ({"entries": [{"label": "BC", "config": "debug-bc", "tasks": ["umaze"], "flags": {"modle.x": 1}}]}, "modle"),
        ({"entries": [{"label": "BC", "config": "debug-bc", "tasks": ["umaze", "umaze"]}]}, "two cells 'BC/umaze/0'"),
        ({"tasks": {"umaze": {"protocol": "debug-umace"}}}, "did you mean 'debug-umaze'"),
        ({"seedz": [0]}, "did you mean 'seeds'"),
    ],
)
def test_mistakes_in_a_recipe_are_found_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(config.dump({**config.read(config.find("debug", "eval/scoreboards")), **change}))
    with pytest.raises(UserError, match=words):
        scoreboard.cells(scoreboard.load(str(path)), str(path), tmp_path)


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cell is called 'BD/\*'; .* such as 'SAC/pendulum/0'"):
        scoreboard.chosen(cells(tmp_path), ["BD/*"])


@pytest.mark.parametrize("name", config.names("eval/scoreboards"))
def test_shipped_scoreboards_are_sound(name: str, tmp_path: Path) -> None:
    assert scoreboard.cells(scoreboard.load(name), name, tmp_path)


def test_a_damaged_record_is_to_do_again_and_named(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "random/*")
    assert call(tmp_path, *only) == 0
    paths = [tmp_path / "results" / f"random-{task}.json" for task in ("umaze", "pendulum")]
    sound, made = json.loads(paths[0].read_text()), [timeless(path) for path in paths]
    damaged = [{**sound, **damage} for damage in ({"protocol": None}, {"curve": [{}]}, {"error": 5})]
    for text in ("{", *map(json.dumps, damaged)):
        paths[0].write_text(text)
        assert call(tmp_path, "--list", *only) == 0
        said = capsys.readouterr()
        assert said.out.count(": to do") == 1 and "random/umaze: to do" in said.out
        assert said.err.startswith(f"warning: the cell random/umaze is to do again: {paths[0]}")
    paths[1].unlink()
    assert call(tmp_path, *only) == 0
    assert [timeless(path) for path in paths] == made


def test_interrupted_is_no_failure(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Interrupted("stopped", 143)

    monkeypatch.setattr(scoreboard.commands, "train", stop)
    with pytest.raises(Interrupted, match="stopped in the cell BC/umaze/0") as caught:
        scoreboard.run(scoreboard.load("debug"), cells(tmp_path)[3:], tmp_path / "results", quiet=True)
    assert caught.value.status == 143 and not (tmp_path / "results" / "bc-umaze-0.json").exists()


def test_ctrl_c_in_a_cell_that_is_not_trained_names_it_too(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoreboard.evaluation, "evaluate", stop)
    assert call(tmp_path, "--only", "random/*") == 130
    said = "interrupted: stopped in the cell random/umaze. The same command goes on from there.\n"
    assert said in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_the_benchmark_makes_what_is_missing_and_the_page_s_tables(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make bench-scoreboards` on all recipes but the debug one; a dataset that is here is not collected again."""
    path = Path(__file__).parents[1] / "eval/bench_scoreboards.py"
    spec = importlib.util.spec_from_file_location("bench_scoreboards", path)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    called: list[list[str]] = []
    collected: list[str] = []
    monkeypatch.setattr(bench.cli, "main", lambda words: called.append(words) or 2 * ("online" in words))
    monkeypatch.setattr(bench.collect, "collect", lambda recipe: collected.append(recipe.id))
    monkeypatch.setattr("sys.argv", [str(path)])
    assert bench.main() == 2, "one failed, and the others were made"
    names = [name for name in config.names("eval/scoreboards") if name != "debug"]
    assert [words[1] for words in called] == names
    assert [words[1] for words in called if words[-2:] == ["--table", "README.md"]] == names, "it has a place for all"
    assert {"offline-cai/pointmaze/umaze-v0", "offline-cai/hopper/medium-v0"} <= set(collected)
    called.clear()
    monkeypatch.setattr(bench.cli, "main", lambda words: called.append(words) or 130)
    assert bench.main() == 130 and len(called) == 1, "stopped in one, it begins no other"
    monkeypatch.setattr(bench.cli, "main", lambda words: 0)
    collected.clear()
    monkeypatch.setattr("sys.argv", [str(path), "debug"])
    assert bench.main() == 0 and collected == []
