"""Pictures: mazes with plans and paths, learning curves, and the denoising of a plan as an animation."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import matplotlib
import numpy as np

from offline_cai.environments.maze2d import Maze
from offline_cai.evaluation.statistics import performance_profile

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.3 * columns, 2.3 * lines), squeeze=False)
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
    figure, axes = pyplot.subplots(1, len(paths), figsize=(2.6 * len(paths), 2.9), squeeze=False)
    for panel, (name, some) in zip(axes.flat, paths.items(), strict=True):
        draw_maze(panel, maze)
        for path in some:
            panel.plot(*path.T, color=ACCENT, linewidth=0.7, alpha=0.45)
            panel.plot(*path[0], "o", color=INK, markersize=2.5)
        panel.plot(*goal, "*", color=GOAL, markersize=11)
        panel.set_title(name, fontsize=9, color=INK)
    figure.subplots_adjust(wspace=0.06)
    return figure


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Metrics over steps, one panel each; positive ones on a logarithmic axis."""
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 2.5), squeeze=False)
    for panel, name in zip(axes.flat, names, strict=True):
        values = np.array([row[name] for row in rows if name in row])
        panel.plot([row["step"] for row in rows if name in row], values, color=ACCENT, linewidth=1.2)
        if (values > 0).all():
            panel.set_yscale("log")
        panel.set_xlabel("optimiser step", fontsize=8)
        panel.set_title(name.replace("_", " "), fontsize=9, color=INK)
        panel.tick_params(labelsize=7, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def scores(tasks: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per task: a dot for each seed of each label, a bar at their mean; what is not trained is a line."""
    columns = min(len(tasks), 4)
    figure, axes = pyplot.subplots(
        -(-len(tasks) // columns), columns, figsize=(3.4 * columns, 2.6 * -(-len(tasks) // columns)), squeeze=False
    )
    for panel in axes.flat[len(tasks) :]:
        panel.axis("off")
    for panel, task in zip(axes.flat, tasks, strict=False):
        own = [r for r in records if r["task"] == task]
        labels = list(dict.fromkeys(r["label"] for r in own if r["seed"] is not None))
        for place, label in enumerate(labels):
            means = [r["mean"] for r in own if r["label"] == label]
            panel.plot([place] * len(means), means, "o", color=ACCENT, markersize=4, alpha=0.6)
            panel.plot([place - 0.25, place + 0.25], [np.mean(means)] * 2, color=INK, linewidth=1.6)
        for number, r in enumerate(r for r in own if r["seed"] is None):
            panel.axhline(
                r["mean"], color=INK, linewidth=0.8, linestyle=["--", ":", "-."][number % 3], label=r["label"]
            )
        panel.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        panel.set_title(task, fontsize=9, color=INK)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def learning(tasks: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per task: scores while training, the mean over the seeds of each label between lowest and highest."""
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.8 * len(tasks), 2.8), squeeze=False)
    for panel, task in zip(axes.flat, tasks, strict=True):
        own = [r for r in records if r["task"] == task]
        gathered = all("environment_steps" in row for r in own for row in r["curve"])
        for label in dict.fromkeys(r["label"] for r in own):
            curves = [{row["step"]: row for row in r["curve"]} for r in own if r["label"] == label]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            at = [curves[0][step]["environment_steps" if gathered else "step"] for step in steps]
            values = np.array([[curve[step]["score"] for step in steps] for curve in curves])
            line = panel.plot(at, values.mean(0), linewidth=1.4, label=f"{label} ({len(curves)})")[0]
            panel.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_title(task, fontsize=9, color=INK)
        panel.set_xlabel("environment steps" if gathered else "optimiser steps", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False, title="label (seeds)", title_fontsize=7)
    figure.tight_layout()
    return figure


def profile(strata: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """For each label the share of its runs that score above a threshold, averaged over tasks."""
    every = np.concatenate([scores for tasks in strata.values() for scores in tasks])
    thresholds = np.linspace(min(0.0, every.min()), every.max() + 1, 200)
    figure, panel = pyplot.subplots(figsize=(4.6, 3.0))
    for label, tasks in strata.items():
        panel.plot(thresholds, performance_profile(tasks, thresholds), linewidth=1.5, label=label)
    panel.set_xlabel("score", fontsize=8)
    panel.set_ylabel("share of runs above it", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def animation(path: Path, maze: Maze, trace: np.ndarray, goal: np.ndarray | None, seconds: float = 4.0) -> None:
    """A GIF of the rows [steps, R, 2] of one plan while it is denoised, noise first; the last frame stays a while."""
    frames = []
    for number, rows in enumerate(trace):
        figure, axes = pyplot.subplots(figsize=(3.2, 3.4))
        draw_maze(axes, maze)
        draw_path(axes, rows, goal, rows)
        axes.set_title(f"denoising step {number} of {len(trace) - 1}", fontsize=9, color=INK)
        figure.set_dpi(90)
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())  # type: ignore[attr-defined]
        pyplot.close(figure)
    each = int(1000 * seconds / len(frames))
    imageio.imwrite(path, frames, extension=".gif", duration=[each] * (len(frames) - 1) + [1500], loop=0)
