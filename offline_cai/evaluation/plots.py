"""Pictures: mazes with plans and paths, learning curves, and the denoising of a plan as an animation."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as imageio
import matplotlib
import numpy as np

from offline_cai.environments.maze2d import Maze
from offline_cai.evaluation.statistics import performance_profile

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

INK, ACCENT, GOAL, WALL = "#1f2430", "#c2410c", "#15803d", "#d6d3d1"


def png(figure: Figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return buffer.getvalue()


def draw_maze(axes: Axes, maze: Maze) -> None:
    """Walls in metres, with equal axes."""
    for cell in np.argwhere(maze.walls):
        corner = maze.position(cell) - maze.size / 2
        axes.add_patch(Rectangle((corner[0], corner[1]), maze.size, maze.size, color=WALL, linewidth=0))
    reach = np.array(maze.walls.shape[::-1]) / 2 * maze.size
    axes.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]), aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shape(maze: Maze) -> float:
    """Height over width."""
    return maze.walls.shape[0] / maze.walls.shape[1]


def draw_path(axes: Axes, path: np.ndarray, goal: np.ndarray | None, rows: np.ndarray | None = None) -> None:
    """A path [L, 2] with its start, the goal (2) as a star and planned rows [R, 2] as dots."""
    axes.plot(*path.T, color=ACCENT, linewidth=1.6, solid_capstyle="round")
    if rows is not None:
        axes.plot(*rows.T, ".", color=INK, markersize=3.5)
    axes.plot(*path[0], "o", color=INK, markersize=5)
    if goal is not None:
        axes.plot(*goal, "*", color=GOAL, markersize=11)


def grid(
    maze: Maze, paths: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]], columns: int = 4
) -> Figure:
    """Small multiples: one maze for each (path, goal, rows)."""
    lines = -(-len(paths) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.3 * columns, 2.3 * _shape(maze) * lines), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for panel, (path, goal, rows) in zip(axes.flat, paths, strict=False):
        panel.axis("on")
        draw_maze(panel, maze)
        draw_path(panel, path, goal, rows)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return figure


def executed(maze: Maze, paths: Mapping[str, Sequence[np.ndarray]], goal: np.ndarray) -> Figure:
    """One maze per policy with the paths [L, 2] that it took, faint, all to the same goal."""
    lines, columns = -(-len(paths) // 3), min(len(paths), 3)
    size = 2.6 * columns, (2.6 * _shape(maze) + 0.3) * lines
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for panel in axes.flat[len(paths) :]:
        panel.axis("off")
    for panel, (name, some) in zip(axes.flat, paths.items(), strict=False):
        draw_maze(panel, maze)
        for path in some:
            panel.plot(*path.T, color=ACCENT, linewidth=0.7, alpha=0.45)
            panel.plot(*path[0], "o", color=INK, markersize=2.5)
        panel.plot(*goal, "*", color=GOAL, markersize=11)
        panel.set_title(name, fontsize=9, color=INK)
    figure.subplots_adjust(wspace=0.06)
    return figure


class Choice(NamedTuple):
    """The candidates of one plan, what became of it, and why the others were left."""

    rows: np.ndarray  # [n, R, 2]
    weight: np.ndarray  # [n], adding up to one
    reason: np.ndarray  # [n] int, -1 for the chosen one
    walked: np.ndarray  # [L, 2]
    goal: np.ndarray | None  # [2]


def choices(maze: Maze, names: Sequence[str], panels: Sequence[Choice], columns: int = 3) -> Figure:
    """One maze for each plan: its candidates in the colour of what spoke against them, the chosen one and its path."""
    figure, axes = _mazes(maze, len(panels), columns)
    for panel, choice in zip(axes, panels, strict=True):
        for number in range(len(names)):
            some = choice.rows[choice.reason == number]
            if len(some):
                broken = np.pad(some, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(-1, 2)
                panel.plot(*broken.T, color=f"C{number}", linewidth=0.6, alpha=0.5, zorder=1)
        panel.plot(*choice.rows[choice.reason == -1][0].T, color=INK, linewidth=1.6)
        panel.plot(*choice.walked.T, color=ACCENT, linewidth=1.4, linestyle="--")
        _ends(panel, choice)
    lines_of = [Line2D([], [], color=f"C{number}", label=f"rejected for {name}") for number, name in enumerate(names)]
    chosen = [Line2D([], [], color=INK, label="chosen"), Line2D([], [], color=ACCENT, linestyle="--", label="executed")]
    figure.legend(handles=[*chosen, *lines_of], loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.subplots_adjust(wspace=0.06, hspace=0.06, bottom=0.5 / figure.get_figheight())
    return figure


def routes(maze: Maze, panels: Sequence[Choice], columns: int = 3) -> Figure:
    """One maze for each plan: the posterior over its candidates, opaque as they weigh, with the mass of each route.

    Candidates that weigh less than a thousandth are left out; a route is all that are joined by steps of less than a
    cell from one to another, measured where they are furthest apart.
    """
    figure, axes = _mazes(maze, len(panels), columns)
    for panel, choice in zip(axes, panels, strict=True):
        some = choice.weight >= min(1e-3, choice.weight.max())
        rows, weight = choice.rows[some], choice.weight[some]
        label = _together(rows, maze.size)
        mass = np.bincount(label, weight)
        for place, number in enumerate(np.argsort(-mass)):
            own, colour = label == number, f"C{place}"
            for path, share in zip(rows[own], weight[own] / weight.max(), strict=True):
                panel.plot(*path.T, color=colour, linewidth=1.2, alpha=0.15 + 0.85 * share, zorder=1 + share)
            text = f"{100 * mass[number]:.0f} %"
            panel.text(0.03 + 0.2 * place, 1.01, text, color=colour, fontsize=8, transform=panel.transAxes)
        _ends(panel, choice)
    figure.subplots_adjust(wspace=0.06, hspace=0.1, bottom=0.02)
    return figure


def _together(rows: np.ndarray, apart: float) -> np.ndarray:
    """The number [n] of the group that each of the paths [n, R, 2] is in."""
    if len(rows) == 1:
        return np.zeros(1, dtype=int)
    even = np.linspace(0, 1, 64)
    paths = []
    for path in rows:
        along = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
        paths.append(np.stack([np.interp(even * along[-1], along, column) for column in path.T], axis=1))
    flat = np.array(paths)
    furthest = np.linalg.norm(flat[:, None] - flat, axis=-1).max(-1)
    return fcluster(linkage(squareform(furthest, checks=False), "single"), apart, "distance") - 1


def _mazes(maze: Maze, count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """So many mazes, with room for half an inch below them."""
    lines, columns = -(-count // columns), min(count, columns)
    size = 2.9 * columns, 2.9 * _shape(maze) * lines + 0.5
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for panel in axes.flat[count:]:
        panel.axis("off")
    for panel in axes.flat[:count]:
        draw_maze(panel, maze)
    return figure, list(axes.flat[:count])


def _ends(panel: Axes, choice: Choice) -> None:
    panel.plot(*choice.walked[0], "o", color=INK, markersize=4)
    if choice.goal is not None:
        panel.plot(*choice.goal, "*", color=GOAL, markersize=11)


def metric(name: str, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """A metric over steps: for each label the mean over its runs' rows, between lowest and highest.

    A label without runs leaves its colour free, so that labels have the same in all pictures. The axis is logarithmic
    if everything on it is positive.
    """
    figure, panel = pyplot.subplots(figsize=(3.8, 2.6))
    for number, (label, some) in enumerate(runs.items()):
        if some:
            _band(
                panel, [{row["step"]: row[name] for row in rows if name in row} for rows in some], label, f"C{number}"
            )
    if all(row[name] > 0 for some in runs.values() for rows in some for row in rows if name in row):
        panel.set_yscale("log")
    panel.set_xlabel("optimiser steps", fontsize=8)
    _plain(panel, name.replace("_", " "))
    if len(runs) > 1:
        panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _band(panel: Axes, curves: Sequence[Mapping[float, float]], label: str, colour: str | None = None) -> None:
    """The mean of curves (step to value) over the steps that all of them have, between lowest and highest."""
    at = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in at] for curve in curves])
    marker = "." if len(at) < 3 else None
    line = panel.plot(at, values.mean(0), color=colour, linewidth=1.4, label=label, marker=marker)[0]
    panel.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def _plain(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9, color=INK)
    panel.tick_params(labelsize=8, which="both")
    panel.spines[["top", "right"]].set_visible(False)


def histogram(name: str, ours: np.ndarray, data: np.ndarray) -> Figure:
    """Of one number, the values [N] that a policy met and those [M] of a dataset, each as shares of its own."""
    both = np.concatenate([ours, data])
    low, high = np.quantile(both[np.isfinite(both)], [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, panel = pyplot.subplots(figsize=(3.0, 2.0))
    for values, colour, label in ((data, "#78716c", "dataset"), (ours, ACCENT, "policy")):
        shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
        panel.stairs(shares, edges, fill=True, color=colour, alpha=0.45, label=label)
    panel.set_yticks([])
    _plain(panel, name)
    panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def scores(tasks: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per task: a dot for each seed of each label, a bar at their mean; what is not trained is a line."""
    figure, panels = _panels(len(tasks), 3.4, 2.8)
    untrained = dict.fromkeys(r["label"] for r in records if r["seed"] is None)
    styles = dict(zip(untrained, itertools.cycle(["--", ":", "-."]), strict=False))
    for panel, task in zip(panels, tasks, strict=True):
        own = [r for r in records if r["task"] == task]
        labels = list(dict.fromkeys(r["label"] for r in own if r["seed"] is not None))
        for r in own:
            if r["seed"] is None:
                panel.axhline(r["mean"], color=INK, linewidth=0.8, linestyle=styles[r["label"]])
        for place, label in enumerate(labels):
            means = [r["mean"] for r in own if r["label"] == label]
            panel.plot([place - 0.25, place + 0.25], [np.mean(means)] * 2, color=INK, linewidth=1.6)
            panel.plot([place] * len(means), means, "o", color=ACCENT, markersize=4, alpha=0.8, zorder=3)
        crowded = len(labels) > 4
        panel.set_xticks(range(len(labels)), labels, rotation=30 * crowded, ha="right" if crowded else "center")
        middle, half = (len(labels) - 1) / 2, max(len(labels), 3) / 2 + 0.1
        panel.set_xlim(middle - half, middle + half)
        _plain(panel, task)
        _name_scores(panel, all(r["protocol"]["score"] is None for r in own))
    if styles:
        lines = [Line2D([], [], color=INK, linewidth=0.8, linestyle=style) for style in styles.values()]
        figure.legend(lines, list(styles), loc="outside lower center", ncols=len(styles), fontsize=7, frameon=False)
    return figure


def learning(tasks: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per task: scores while training, the mean over the seeds of each label between lowest and highest.

    A label has one colour in all panels.
    """
    figure, panels = _panels(len(tasks), 3.8, 2.8)
    colours = {label: f"C{number}" for number, label in enumerate(dict.fromkeys(r["label"] for r in records))}
    for panel, task in zip(panels, tasks, strict=True):
        own = [r for r in records if r["task"] == task]
        rows = [row for r in own for row in r["curve"]]
        gathered = all("environment_steps" in row for row in rows)
        at = "environment_steps" if gathered else "step"
        for label in dict.fromkeys(r["label"] for r in own):
            some = [{row[at]: row["score"] for row in r["curve"]} for r in own if r["label"] == label]
            _band(panel, some, f"{label} ({len(some)})", colours[label])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlabel("environment steps" if gathered else "optimiser steps", fontsize=8)
        _plain(panel, task)
        _name_scores(panel, all(row["score"] == row["return"] for row in rows))
        panel.legend(fontsize=7, frameon=False, title="label (seeds)", title_fontsize=7)
    return figure


def profile(strata: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """For each label the share of its runs that score above a threshold, averaged over tasks."""
    every = np.unique(np.concatenate([scores for tasks in strata.values() for scores in tasks]))
    thresholds = np.concatenate([[min(0.0, every[0])], every, [every[-1] + 1]])  # the share changes there alone
    figure, (panel,) = _panels(1, 4.6, 3.0)
    for label, tasks in strata.items():
        shares = performance_profile(tasks, thresholds)
        panel.step(thresholds, shares, where="post", linewidth=1.5, label=label)
    panel.set_ylabel("share of runs above it", fontsize=8)
    _plain(panel, "")
    panel.set_xlabel("normalised score", fontsize=8)
    panel.legend(fontsize=7, frameon=False)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Small multiples of that size in inches, at most four in a line."""
    columns = min(count, 4)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[count:]:
        panel.axis("off")
    return figure, list(axes.flat[:count])


def _name_scores(panel: Axes, raw: bool) -> None:
    panel.set_ylabel("return" if raw else "normalised score", fontsize=8)


def animation(path: Path, maze: Maze, trace: np.ndarray, goal: np.ndarray | None, seconds: float = 4.0) -> None:
    """A GIF of the rows [steps, R, 2] of one plan while it is denoised, noise first; the last frame stays a while."""
    titles = [f"denoising step {number} of {len(trace) - 1}" for number in range(len(trace))]
    frames = [_frame(maze, rows, goal, rows, title) for rows, title in zip(trace, titles, strict=True)]
    path.write_bytes(_gif(frames, seconds))


def journey(maze: Maze, path: np.ndarray, goal: np.ndarray | None, frames: int = 40, seconds: float = 4.0) -> bytes:
    """A GIF of a path [L, 2] through a maze as it is walked; the last frame stays a while."""
    ends = np.unique(np.linspace(1, len(path), min(frames, len(path))).astype(int))
    return _gif([_frame(maze, path[:end], goal, path[end - 1 : end], f"step {end - 1}") for end in ends], seconds)


def _frame(maze: Maze, path: np.ndarray, goal: np.ndarray | None, rows: np.ndarray, title: str) -> np.ndarray:
    figure, axes = pyplot.subplots(figsize=(3.2, 3.4))
    draw_maze(axes, maze)
    draw_path(axes, path, goal, rows)
    axes.set_title(title, fontsize=9, color=INK)
    figure.set_dpi(90)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    pyplot.close(figure)
    return pixels


def _gif(frames: Sequence[np.ndarray], seconds: float) -> bytes:
    each = int(1000 * seconds / len(frames))
    duration = [each] * (len(frames) - 1) + [1500]
    return imageio.imwrite("<bytes>", frames, extension=".gif", duration=duration, loop=0)
