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


def test_the_band_of_several_runs_is_over_the_steps_that_all_have() -> None:
    rows = [[{"step": s, "loss": s + seed} for s in (1, 2, 3)] for seed in (0, 2)]
    panel = plots.metric("loss", {"none": [], "a": [rows[0], rows[1][:2]]}).axes[0]
    (line,) = panel.lines
    assert line.get_xydata().tolist() == [[1, 2], [2, 3]] and line.get_color() == "C1"
    assert panel.collections[0].get_datalim(panel.transData).intervaly.tolist() == [1, 4]
    assert panel.get_yscale() == "log" and panel.get_legend() is not None


def test_a_journey_is_walked_to_its_end() -> None:
    film = imageio.imread(io.BytesIO(plots.journey(MAZE, PATH, PATH[-1])), index=None, extension=".gif")
    assert len(film) == 3 and (film[0] != film[-1]).any()


def test_the_animation_has_a_frame_per_step_and_rests_on_the_last(tmp_path: Path) -> None:
    trace = np.stack([PATH + shift for shift in (0.2, 0.1, 0.0)])
    plots.animation(tmp_path / "x.gif", MAZE, trace, PATH[-1])
    frames = imageio.imread(tmp_path / "x.gif", index=None)
    assert len(frames) == 3 and (frames[0] != frames[-1]).any()
    assert imageio.immeta(tmp_path / "x.gif", index=2)["duration"] == 1500
