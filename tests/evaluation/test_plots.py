import io
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from offline_cai.environments.maze2d import Maze
from offline_cai.evaluation import plots

MAZE = Maze(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool), 1.0)
PATH = np.array([[0.0, 0.0], [0.2, 0.1], [0.3, -0.2]])


def pixels(png: bytes) -> np.ndarray:
    return imageio.imread(io.BytesIO(png), extension=".png")


def test_pictures_show_what_they_are_given() -> None:
    empty = pixels(plots.png(plots.executed(MAZE, {"a": []}, PATH[0])))
    drawn = pixels(plots.png(plots.executed(MAZE, {"a": [PATH]}, PATH[0])))
    assert empty.shape == drawn.shape and (empty != drawn).any()
    one = pixels(plots.png(plots.grid(MAZE, [(PATH, PATH[-1], PATH)])))
    assert one.std() > 5
    rows = [{"step": 1, "loss": 2.0, "grad": 0.0}, {"step": 2, "loss": 1.0, "grad": -1.0}]
    assert pixels(plots.png(plots.metric("loss", {"a": [rows, rows[:1]], "b": []}))).std() > 5
    assert pixels(plots.png(plots.histogram("x", np.array([1.0, 1.0]), np.array([0.0, 2.0, np.inf])))).std() > 5


def test_routes_that_part_by_more_than_a_cell_have_masses_of_their_own() -> None:
    """Two ways round a block: three candidates on one side, two on the other, and one that weighs nothing."""
    above, below = (np.array([[-1.5, 0], [-1.5, y], [1.5, y], [1.5, 0]]) for y in (1.0, -1.0))
    rows = np.stack([above, above + 0.1, below, above + 0.2, below + 0.1, np.zeros((4, 2))])
    weight = np.array([0.2, 0.3, 0.1, 0.25, 0.1499, 0.0001])
    walls = np.ones((5, 5), dtype=bool)
    walls[1:4, 1:4] = False
    walls[2, 2] = True
    choice = plots.Choice(rows, weight, np.array([0, -1, 0, 0, 0, 0]), above, above[-1])
    figure = plots.routes(Maze(walls, 1.0), [choice, choice._replace(rows=rows[:1], weight=np.ones(1))])
    assert [[text.get_text() for text in panel.texts] for panel in figure.axes[:2]] == [["75 %", "25 %"], ["100 %"]]
    assert len(figure.axes[0].lines) == 5 + 2, "five candidates, the start and the goal"
    alike = choice._replace(rows=np.tile(rows[:2], (1000, 1, 1)), weight=np.full(2000, 1 / 2000))
    assert [text.get_text() for text in plots.routes(Maze(walls, 1.0), [alike]).axes[0].texts] == ["100 %"]


def test_the_band_of_several_runs_is_over_the_steps_that_all_have() -> None:
    rows = [[{"step": s, "loss": s + seed} for s in (1, 2, 3)] for seed in (0, 2)]
    panel = plots.metric("loss", {"none": [], "a": [rows[0], rows[1][:2]]}).axes[0]
    (line,) = panel.lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 3]] and line.get_color() == "C1"
    assert panel.collections[0].get_datalim(panel.transData).intervaly.tolist() == [1, 4]
    assert panel.get_yscale() == "log" and panel.get_legend() is not None


def test_a_label_has_one_colour_in_all_panels_and_axes_say_what_they_count() -> None:
    def record(task: str, label: str, score: float) -> dict[str, object]:
        row = {"environment_steps": 5000.0, "step": 1, "score": score, "return": 12.0}
        return {"task": task, "label": label, "curve": [row, {**row, "environment_steps": 20000.0}]}

    first, second = plots.learning(
        ["x", "y"], [record("x", "A", 12.0), record("x", "B", 12.0), record("y", "B", 1.0)]
    ).axes
    assert [line.get_color() for line in first.lines] == ["C0", "C1"] and second.lines[0].get_color() == "C1"
    assert (first.get_ylabel(), second.get_ylabel()) == ("return", "normalised score")
    assert first.xaxis.get_major_formatter()(20000.0) == "20k"


def test_what_is_not_trained_has_one_line_style_in_all_panels_and_one_legend() -> None:
    def record(task: str, label: str, seed: int | None) -> dict[str, object]:
        return {"task": task, "label": label, "seed": seed, "mean": 1.0, "protocol": {"score": "t"}}

    some = [record("x", "A", 0), record("x", "random", None), record("y", "A", 0), record("y", "data", None)]
    figure = plots.scores(["x", "y"], [*some, record("y", "random", None)])
    styles = [[line.get_linestyle() for line in panel.lines if line.get_linewidth() < 1] for panel in figure.axes]
    assert styles == [["--"], [":", "--"]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["random", "data"]


def test_a_profile_steps_down_at_the_scores() -> None:
    (line,) = plots.profile({"A": [np.array([10.0, 30.0])]}).axes[0].lines
    assert line.get_xydata().tolist() == [[0, 1], [10, 0.5], [30, 0], [31, 0]] and line.get_drawstyle() == "steps-post"


def test_a_journey_is_walked_to_its_end() -> None:
    film = imageio.imread(io.BytesIO(plots.journey(MAZE, PATH, PATH[-1])), index=None, extension=".gif")
    assert len(film) == 3 and (film[0] != film[-1]).any()


def test_the_animation_has_a_frame_per_step_and_rests_on_the_last(tmp_path: Path) -> None:
    trace = np.stack([PATH + shift for shift in (0.2, 0.1, 0.0)])
    plots.animation(tmp_path / "x.gif", MAZE, trace, PATH[-1])
    frames = imageio.imread(tmp_path / "x.gif", index=None)
    assert len(frames) == 3 and (frames[0] != frames[-1]).any()
    assert imageio.immeta(tmp_path / "x.gif", index=2)["duration"] == 1500
