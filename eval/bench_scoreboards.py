"""All scoreboards, made anew or from where they were left: data, trainings, evaluations, and the tables of README.

    python eval/bench_scoreboards.py [NAME ...]

Results go to eval/results/scoreboard/NAME and trained runs to runs/scoreboard/NAME. What is there is not made again.
From nothing it takes hours of CPU time; a second process beside it takes the cells that nobody is making.
"""

import sys
from pathlib import Path

from offline_cai import cli, collect, config, scoreboard
from offline_cai.data import minari

PAGE = Path("README.md")


def collect_data(name: str) -> None:
    """Collect the datasets of a scoreboard that a recipe makes and that are not here."""
    for dataset in sorted({task.dataset for task in scoreboard.load(name).tasks.values() if task.dataset}):
        recipe = collect.recipe_of(dataset)
        if recipe is not None and not minari.exists(dataset):
            collect.collect(recipe)


def command(name: str) -> list[str]:
    """What makes a scoreboard, and its table on README where that has a place for it."""
    words = ["scoreboard", name, "--output", f"eval/results/scoreboard/{name}"]
    marked = f"<!-- scoreboard {name} -->" in PAGE.read_text(encoding="utf-8")
    return [*words, "--table", str(PAGE)] if marked else words


def main() -> int:
    names = sys.argv[1:] or [name for name in config.names("eval/scoreboards") if name != "debug"]
    failed = 0
    for name in names:
        collect_data(name)
        print("offline-cai " + " ".join(command(name)), flush=True)
        status = cli.main(command(name))
        if status > 128:  # stopped by a signal
            return status
        failed = failed or status
    return failed


if __name__ == "__main__":
    sys.exit(main())
