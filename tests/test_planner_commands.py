"""Plans that last as long as they take, from training to the report; and that they reach their goals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from offline_cai import commands, evaluation_commands, report
from offline_cai.algorithms.diffuser import Diffuser, DiffuserConfig
from offline_cai.core import Spec
from offline_cai.errors import UserError
from offline_cai.planning.config import EvidenceConfig, PlannerConfig
from offline_cai.planning.support import SupportConfig
from offline_cai.training import experiment

pytestmark = pytest.mark.filterwarnings(
    "ignore:no candidate of:offline_cai.errors.Notice"
)  # so small a model may find none


@pytest.fixture(scope="module")
def planned(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = {"training.steps": "600", "training.batch_size": "128"}
    return commands.train(experiment.load("debug-planner", flags), tmp_path_factory.mktemp("runs") / "run", quiet=True)


def test_a_short_training_reaches_every_goal(planned: Path, tmp_path: Path) -> None:
    """Under D4RL's protocol on the U-maze, from 4,000 steps of data; random actions score 10 ± 5."""
    flags = {"episodes": "10", "references": "[random]", "planner.replan": "null", "planner.keep": "false"}
    flags |= {"planner.candidates": "16", "planner.detours": "16"}
    data = evaluation_commands.evaluate(planned, "maze2d-umaze", flags, tmp_path / "evaluation", quiet=True)
    assert data["results"]["planner"]["mean"] > 100 and min(data["results"]["planner"]["returns"]) > 0
    assert data["paired"]["random"]["mean"] > 4 * data["paired"]["random"]["se"]


def test_it_explains_how_it_chose(planned: Path) -> None:
    commands.plan(planned, 3, 1)
    evaluation_commands.evaluate(planned, flags={"references": "[occupancy path]"}, quiet=True)
    data = json.loads((planned / "evaluation" / "results.json").read_text())
    found = data["planner"]
    assert found["plans"] == 4 * 2, "40 steps, a plan every 20, four episodes"
    shares = [found[f"rejected for {name}, share"] for name in ("length", "support")]
    assert sum(shares) == pytest.approx(1) and 0 <= found["feasible candidates, share"] <= 1
    assert 0 < found["deviation from the plan, mean"] < 0.3 and found["milliseconds per plan"] > 0
    assert "horizon in steps" not in found and found["pursuit"]["lookahead"] == 1.1
    rows = np.load(planned / "plans" / "plans.npz")["rows"]
    assert rows.shape == (3, 32, 2), "two legs of 16 rows"
    page = report.write(planned).read_text()
    assert "Candidates of the first plans" in page and "The posterior over these" in page
    assert page.count("data:image/png") >= 4
    assert (planned / "evaluation" / "choices.png").stat().st_size > 10_000
    assert (planned / "evaluation" / "routes.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stride": 2}, "segments have no fixed stride"),
        ({"actions": True}, "segments have no fixed stride"),
        ({"planner": PlannerConfig()}, "set planner.execute: pursue"),
        ({"segments": False, "planner": PlannerConfig(evidence=EvidenceConfig(duration=1.0))}, "set segments: true"),
        ({"planner": PlannerConfig(execute="pursue", rows=8)}, "plans the 16 rows it was made for"),
        ({"support": SupportConfig(columns=(0, 7))}, "the support's columns"),
        ({"planner": PlannerConfig(execute="pursue", candidates=2)}, "candidates or particles need evidence"),
        ({"planner": PlannerConfig(execute="pursue", evidence=EvidenceConfig(support=1.0))}, "set model.support"),
    ],
)
def test_what_does_not_fit_is_named(spec: Spec, changes: dict, words: str) -> None:
    fitting = {
        "rows": 16,
        "stride": 1,
        "segments": True,
        "fields": ("observation",),
        "network": "mlp",
        "hidden": 8,
        "blocks": 1,
        "planner": PlannerConfig(execute="pursue"),
    }
    with pytest.raises(UserError, match=words):
        diffuser = Diffuser(spec, DiffuserConfig(**{**fitting, **changes}))
        diffuser.plan(np.zeros((1, spec.obs_width)), torch.tensor([1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": True}, "set planner.replan"),
        ({"warm_start": 0.5, "replan": 4, "execute": "actions"}, "planner.execute to track or pursue"),
        ({"warm_start": 2.0, "replan": 4}, "take a share above 0"),
        ({"warm_start": 0.5, "replan": 4, "detours": 2}, "neither detours nor particles"),
        ({"detours": -1}, "detours is -1"),
    ],
)
def test_a_planner_that_cannot_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        PlannerConfig(**changes)


def test_an_environment_without_the_fields_that_plans_need_is_named(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="observation"):
        evaluation_commands.evaluate(planned, "hopper", {"episodes": "10"}, tmp_path / "evaluation", quiet=True)
