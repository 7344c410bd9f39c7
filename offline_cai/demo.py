"""What `offline-cai demo` does: the commands of the main job, one after another."""

from collections.abc import Mapping
from pathlib import Path

from offline_cai import collect as collecting
from offline_cai import evaluation_commands, report
from offline_cai.commands import new_run, note_stage, plan, train
from offline_cai.data import minari
from offline_cai.errors import UserError
from offline_cai.training import experiment


def demo(name: str, flags: Mapping[str, str], output: Path | None = None, quiet: bool = False) -> Path:
    """The main job in five steps: collect, train, plan, evaluate, report. Returns the report's path."""
    exp = experiment.load(name, dict(flags))
    recipe = collecting.recipe_of(exp.data)
    if recipe is None:
        raise UserError(f"no recipe in datasets/ collects {exp.dataset!r}: the demo cannot begin.")
    run = output or new_run(exp.name)
    print(f"demo: {exp.name}, seed {exp.seed}, into {run}")
    print("[1/5] collect " + recipe.id, flush=True)
    if collecting.collected(recipe):
        print(f"      already collected by this recipe, with its seed {recipe.seed}: used as it is")
    else:
        collecting.collect(recipe, quiet)
    seconds = minari.metadata(minari.load(recipe.id))["seconds"]
    print(f"[2/5] train {exp.algorithm} for {exp.training.steps} steps", flush=True)
    train(exp, run, quiet=quiet)
    note_stage(run, "collect", seconds)
    print("[3/5] plan for new starts and goals", flush=True)
    if exp.algorithm in ("diffuser", "guide"):
        plan(run, count=16, seed=exp.seed + 1)
    print(f"[4/5] evaluate under {exp.protocol}", flush=True)
    data = evaluation_commands.evaluate(run, quiet=quiet)
    print("[5/5] report", flush=True)
    path = report.write(run)
    print(f"report: {path.resolve()}\n{report.score_line(data)}")
    return path
