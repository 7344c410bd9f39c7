"""What is to be seen of one run: plans, paths, a film, distributions, guidance, and how it was made."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offline_cai import config
from offline_cai.core import Spec
from offline_cai.data import catalogue
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import UserError
from offline_cai.evaluation import plots
from offline_cai.evaluation.evaluate import Protocol
from offline_cai.evaluation.film import film
from offline_cai.files import read_json
from offline_cai.report import page
from offline_cai.report.runs import Run
from offline_cai.report.scores import plus_minus

ROWS = 20_000
"""Rows of a dataset that a histogram is made of, evenly spaced."""
COLUMNS = {"action": 4, "observation": 8}
"""How many columns of each are shown, the first ones."""
_STEERING = ("guide", "temperature", "effective sample size", "log-evidence")
_STAGES = ("collect", "train", "plan", "evaluate", "off-policy")


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _plans(run: Run) -> str:
    folder = run.folder / "plans"
    facts = _json(folder / "plans.json")
    if not facts:
        return ""
    parts = [page.heading(3, "Plans")]
    if (folder / "plans.png").is_file():
        caption = "Plans for new starts (dot) and goals (star): planned rows and the path that the tracker follows."
        parts.append(page.wide(page.picture((folder / "plans.png").read_bytes(), caption)))
    shown = page.pairs({name: value for name, value in facts.items() if not name.startswith(_STEERING)})
    if (folder / "denoising.gif").is_file():
        caption = "The denoising of the first of these, in more steps than planning takes and slowed down for the eye."
        shown = page.grid([page.picture((folder / "denoising.gif").read_bytes(), caption), shown])
    return "".join([*parts, shown])


_PATHS = {
    "choices.png": "Candidates of the first plans, in the colour of the evidence that spoke most against each; the "
    "chosen plan, and what was executed.",
    "routes.png": "The posterior over these candidates, as opaque as they weigh, and the mass of each route that they "
    "take, in its colour.",
    "paths.png": "Paths executed in the simulator; dots are starts, the star is the goal.",
}


def _paths(run: Run) -> str:
    found = {run.folder / "evaluation" / name: caption for name, caption in _PATHS.items()}
    pictures = [page.wide(page.picture(p.read_bytes(), caption)) for p, caption in found.items() if p.is_file()]
    return page.heading(3, "Executed paths") + "".join(pictures) if pictures else ""


class _Kept(NamedTuple):
    """The first episodes of the policy, one after another."""

    protocol: Protocol
    spec: Spec
    maze: Maze | None
    obs: np.ndarray  # [sum of L + 1, O]
    action: np.ndarray  # [sum of L, A]
    length: np.ndarray  # [episodes]


def _episodes(run: Run) -> Path:
    return run.folder / "evaluation" / "episodes.npz"


def _kept(run: Run) -> _Kept:
    assert run.results is not None
    path = _episodes(run)
    if not path.is_file():
        raise UserError(f"the evaluation of {run.folder} kept no episodes: evaluate it again, with --overwrite.")
    protocol = config.build(Protocol, run.results["protocol"], "the evaluation's protocol")
    env = protocol.make()
    try:
        spec, maze = env_spec(env), Maze.of(env) if hasattr(env.unwrapped, "maze") else None
    finally:
        env.close()
    with np.load(path, allow_pickle=False) as data:
        return _Kept(protocol, spec, maze, data["obs"], data["action"], data["length"])


def _rollout(run: Run) -> str:
    """A film of the first episode; on a maze a drawing if there can be none."""
    if run.results is None:
        return ""
    kept = _kept(run)
    steps, heading = kept.length[0], page.heading(3, "Rollout")
    about = f"The beginning of the first of the evaluation's episodes, which has {steps} steps"
    try:
        data, how = film(run.results["protocol"], kept.action[:steps])
        return heading + page.picture(data, f"{about}; drawn by its environment, off-screen through {how}.", "film")
    except UserError as error:
        if kept.maze is None:
            return heading + page.paragraph(f"There is no film: {error}")
        first = kept.obs[: steps + 1]
        path, goal = (first[:, kept.spec.columns(name)] for name in ("achieved_goal", "desired_goal"))
        caption = f"The first of the evaluation's episodes, {steps} steps, drawn from its positions: {error}"
        return heading + page.picture(plots.journey(kept.maze, path, goal[0]), caption)


def _distributions(run: Run) -> str:
    if run.results is None or run.settings["dataset"] is None or not _episodes(run).is_file():
        return ""
    kept, obs, action = _kept(run), *_sampled(run.settings["dataset"])
    spec = kept.spec
    names = {
        "action": [f"action {i}" for i in range(spec.action_width)],
        "observation": [f"{field.name} {i}" for field in spec.obs for i in range(field.width)],
    }
    drawn = []
    for what, ours, theirs in (("action", kept.action, action), ("observation", kept.obs, obs)):
        for i, name in enumerate(names[what][: COLUMNS[what]]):
            figure = plots.histogram(name, ours[:, i], theirs[:, i])
            drawn.append(page.picture(plots.png(figure), "", alt=f"{name} of policy and dataset"))
    left = [f"{len(some) - COLUMNS[what]} more {what}s" for what, some in names.items() if len(some) > COLUMNS[what]]
    more = f" Not shown: {' and '.join(left)}." if left else ""
    caption = (
        f"The policy's {len(kept.action)} steps ({len(kept.length)} episodes of the evaluation) beside {len(action)} "
        f"steps of {run.settings['dataset']}; each histogram adds up to one, and its outermost bins hold what lies "
        f"beyond.{more}"
    )
    return page.heading(3, "Policy beside dataset") + page.grid(drawn) + page.paragraph(caption)


def _sampled(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Observations and actions of some steps of a dataset, evenly spaced."""
    data = catalogue.trajectories(dataset)
    every = max(1, data.num_steps // ROWS)
    some = [(obs[::every], action[::every]) for obs, action, _ in data.chunks()]
    return np.concatenate([obs for obs, _ in some]), np.concatenate([action for _, action in some])


def _guidance(run: Run) -> str:
    """How plans were steered: those of `plan`, and those that the evaluation executed."""
    planned = {k: v for k, v in _json(run.folder / "plans" / "plans.json").items() if k.startswith(_STEERING)}
    executed = (run.results or {}).get("guidance", {})
    if not planned and not executed:
        return ""
    rows = [[name, *(_cell(facts, name) for facts in (planned, executed))] for name in {**planned, **executed}]
    note = "The effective sample size is of the candidates or particles of a plan: 1 says that one holds all weight."
    return page.heading(3, "Guidance") + page.table(["", "plan", "evaluate"], rows) + page.paragraph(note)


def _off_policy(run: Run) -> str:
    """What was estimated from the dataset alone, marked as that."""
    facts = _json(run.folder / "off-policy" / "estimates.json")
    if not facts:
        return ""
    found, fitted = facts["importance sampling"], facts["fitted Q"]
    rows = [
        ["the data themselves", plus_minus(facts["data"]), "", ""],
        ["fitted Q evaluation, over first states alone", plus_minus(fitted), "", ""],
    ]
    said = f"Estimates from the dataset with discount {facts['discount']}, in raw return; no simulator was run."
    if isinstance(found, str):
        said += f" Importance sampling: {found}."
    else:
        effective = f"{found['effective']:.1f} of {found['n']}"
        for name in ("episodes", "decisions"):
            e = found[name]
            interval = f"{page.number(e['low'])} to {page.number(e['high'])}"
            rests = effective if name == "episodes" else ""
            rows.append([f"importance sampling, by {name}", page.number(e["value"]), interval, rests])
        if found["effective"] < 10:
            said += " So few effective samples leave importance sampling without meaning."
    head = ["estimate", "discounted return", "95 % interval of its samples", "effective episodes"]
    return page.heading(3, "Estimated without a simulator") + page.table(head, rows) + page.paragraph(said)


def _cell(facts: Mapping[str, Any], name: str) -> str:
    return page.number(facts[name]) if name in facts else ""


def _making(run: Run) -> str:
    parts = []
    if run.results is not None and run.results["planner"]:
        parts.append(page.details("Planner of the evaluation", page.pairs(run.results["planner"])))
    if stages := _json(run.folder / "stages.json"):
        rows = [[name, f"{stages[name]:.1f} s"] for name in sorted(stages, key=_STAGES.index)]
        together = ["together", f"{sum(stages.values()):.1f} s"]
        parts.append(page.details("Time", page.table(["stage", "wall time"], [*rows, together])))
    parts.append(page.details("Configuration", page.code((run.folder / "config.yaml").read_text(encoding="utf-8"))))
    versions = _versions(_json(run.folder / "versions.json"), (run.results or {}).get("versions", {}))
    return page.heading(3, "How it was made") + "".join([*parts, page.details("Versions", versions)])


def _versions(trained: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """In two columns if they differ."""
    if not trained or not evaluated or trained == evaluated:
        return page.pairs(trained or evaluated)
    rows = [[name, _cell(trained, name), _cell(evaluated, name)] for name in {**trained, **evaluated}]
    return page.table(["", "trained with", "evaluated with"], rows)


ALL: Mapping[str, Callable[[Run], str]] = {
    "the plans": _plans,
    "the paths": _paths,
    "the pictures of a rollout": _rollout,
    "the distributions": _distributions,
    "the facts about guidance": _guidance,
    "the estimates from data": _off_policy,
    "the facts about its making": _making,
}
"""The sections by what they are called when they have to be left out."""
