"""What the commands are called, take, and say in their help. Nothing here imports anything heavy."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from offline_cai import __version__
from offline_cai.errors import UserError

_INTRO = """\
Offline reinforcement learning and trajectory-diffusion planning as probabilistic inference.

The main job, step by step; each command works on the output of the one before:

  offline-cai collect pointmaze-umaze             a Minari dataset from a simulator
  offline-cai train planner-pointmaze-umaze      a run's folder, runs/NAME/DATE-TIME
  offline-cai plan RUN                            plans for new starts and goals, and a picture
  offline-cai evaluate RUN                        scores in the simulator, beside references
  offline-cai report RUN                          one HTML page about the run
  offline-cai scoreboard RECIPE                   many runs, evaluated, in one table

or all of it at once: offline-cai demo
"""

_DATA = """\
Datasets: what is here, what is inside, from one format to another.

NAME is a Minari id (offline-cai/pointmaze/umaze-v0), a D4RL name (hopper-medium-v2), or the path of a D4RL file
(.hdf5) or of own arrays (.npz). `data ACTION --help` tells more about each.
"""

_FLAGS = """\
A field is set by a flag of its name, nested ones with dots: {example}.
"""


class Parser(argparse.ArgumentParser):
    """Mistakes are UserErrors, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def take_flags(arguments: Sequence[str], commands: dict[str, Parser]) -> tuple[list[str], dict[str, str]]:
    """Takes the flags that set fields of a file, such as "--a.b 1" and "--c=2", out of the arguments.

    They are the ones that the command does not know itself; argparse would take their values for positional arguments.
    """
    command = commands.get(arguments[0]) if arguments else None
    if command is None or not command.get_default("flags"):
        return list(arguments), {}
    kept, flags, queue = [], {}, list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in command._option_string_actions:
            kept.append(word)
            continue
        if not equals and (not queue or queue[0].startswith("--")):
            raise UserError(f"{name} needs a value.")
        flags[name[2:]] = value if equals else queue.pop(0)
    return kept, flags


def build() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and those of the commands by name; what is parsed says which as `command`."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument(
        "--threads",
        type=int,
        help="CPU threads for tensors (default: OMP_NUM_THREADS, or 1; more pays off for large networks only)",
    )
    parser = Parser("offline-cai", description=_INTRO, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, text: str, example: str = "") -> Parser:
        description = textwrap.dedent(text) + (_FLAGS.format(example=example) if example else "")
        formatter = argparse.RawDescriptionHelpFormatter
        first = textwrap.dedent(text).split("\n")[0]
        command = commands.add_parser(
            name,
            help=first,
            description=description,
            parents=[common],
            formatter_class=formatter,
            add_help=name != "train",
        )
        command.set_defaults(command=name, flags=bool(example))
        return command

    collect = add(
        "collect",
        """\
        Collect a dataset in a simulator and write it with Minari.

        RECIPE is a file, or a name in datasets/. The dataset goes to MINARI_DATASETS_PATH (~/.minari/datasets), where
        `minari show ID` and `minari.load_dataset(ID)` find it. An existing dataset is not overwritten. A collection
        that was stopped keeps its finished parts: the same command goes on from there, and gives the same data.
        """,
        "--steps 50000 --id me/pointmaze/small-v0",
    )
    collect.add_argument("recipe", metavar="RECIPE")

    train = add(
        "train",
        """\
        Train an algorithm on a dataset.

        CONFIG is a file, or a name in configs/. The run's folder gets config.yaml, metrics.jsonl, TensorBoard's files
        and checkpoints. Ctrl-C or SIGTERM keeps a checkpoint and says how to resume; a second one ends at once.
        `train CONFIG --output RUN --resume` goes on if RUN is there and begins otherwise: one line for a scheduler that
        stops and restarts jobs. `train CONFIG --help` lists CONFIG's fields.
        """,
        "--training.steps 500 --model.stride 4",
    )
    train.add_argument("config", metavar="CONFIG", nargs="?")
    train.add_argument("-h", "--help", action="store_true", help="show this help, or the fields of CONFIG")
    train.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME/DATE-TIME)")
    train.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="RUN",
        help="go on from the last checkpoint of RUN; without RUN, with CONFIG: of --output, if there is one",
    )
    train.add_argument("--processes", type=int, metavar="N", help="processes that share each batch (default: 1)")
    train.set_defaults(parser=train)

    plan = add(
        "plan",
        """\
        Sample plans for new starts and goals, and draw them.

        RUN is a run's folder or one of its checkpoints. Starts and goals are drawn as the dataset's environment draws
        them. Writes plans.npz and plans.json, and for mazes plans.png and denoising.gif. The planner's fields can be
        set for these plans.
        """,
        "--planner.steps 8 --planner.guide corrected",
    )
    plan.add_argument("folder", metavar="RUN", type=Path)
    plan.add_argument("--count", type=int, default=16, help="number of plans (default: 16)")
    plan.add_argument("--seed", type=int, default=1, help="seed of starts, goals and noise (default: 1)")
    _writes(plan, "RUN/plans")

    evaluate = add(
        "evaluate",
        """\
        Evaluate a run in the simulator, beside references on the same starts.

        RUN is a run's folder or one of its checkpoints. The protocol (environment, episodes, seeds, references) is a
        recipe in eval/; the config names one. Flags set its fields, and those of the planner (--planner.steps 8).
        Instead of a run, RUN may be an actor's .npz file or a reference: random, controller, controller without noise,
        actor:FILE or actor without noise:FILE (a path, or a name in datasets/actors/). It is evaluated alone, unless
        --references names others; so can an actor stand beside a run (--references [actor:hopper-medium]).

        Writes results.json (scores per episode, statistics, versions) and paths.npz; if a run's evaluation is stopped,
        policies that are finished are kept. With --off-policy no simulator is run: fitted Q evaluation and importance
        sampling estimate the discounted return from the dataset (estimates.json), and flags set how (--steps 20000).
        """,
        "--episodes 50 --seed 7 --references []",
    )
    evaluate.add_argument("folder", metavar="RUN", type=Path)
    evaluate.add_argument("--protocol", help="a file, or a name in eval/ (default: what RUN's config names)")
    evaluate.add_argument("--off-policy", action="store_true", help="estimate from the dataset alone")
    evaluate.add_argument("--json", action="store_true", help="print the results as one JSON object")
    _writes(evaluate, "RUN/evaluation, or RUN/off-policy; of a reference runs/references/PROTOCOL/NAME")

    scoreboard = add(
        "scoreboard",
        """\
        Train and evaluate algorithms on datasets over seeds, and make a table of it.

        RECIPE is a file, or a name in eval/scoreboards/. Each cell (an algorithm, a task, a seed) becomes one JSON file
        with its scores, CPU minutes, versions and the commands that make it alone; then table.md and the pictures are
        written. What is there is not made again: the same command goes on after an interruption, makes again what
        failed or what the recipe now asks for differently, and several such processes share the cells.
        """,
    )
    scoreboard.add_argument("recipe", metavar="RECIPE")
    scoreboard.add_argument("--output", type=Path, help="folder of the results (default: runs/scoreboard/NAME/results)")
    scoreboard.add_argument("--runs", type=Path, help="folder of the trained runs (default: runs/scoreboard/NAME)")
    scoreboard.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cells to make, such as 'BC/hopper-*/0'"
    )
    scoreboard.add_argument("--list", action="store_true", help="show what there is and what is left, and stop")
    scoreboard.add_argument("--table", type=Path, metavar="FILE", help="also write the table between FILE's marks")

    report = add(
        "report",
        """\
        Write one self-contained HTML page about runs: RUN/report.html, in the folder of the first.

        It shows what their folders hold: scores with intervals, learning curves, plans, paths and a film of a rollout,
        what the policy does beside its dataset, guidance, configuration and versions. Runs that differ in nothing but
        the seed share a row and a line. What is damaged or unfinished is a sentence, and the rest is written.
        """,
    )
    report.add_argument("folders", metavar="RUN", type=Path, nargs="+")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN)")
    report.add_argument("--overwrite", action="store_true", help="replace an existing report")

    data = commands.add_parser(
        "data",
        help="Datasets: list, show, convert, validate, download, stats.",
        description=_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.set_defaults(command="data", flags=False)
    _add_data_commands(data.add_subparsers(metavar="ACTION", required=True, parser_class=Parser), common)

    demo = add(
        "demo",
        """\
        The main job from start to end: collect, train, plan, evaluate, report.

        CONFIG is a file, or a name in configs/ whose dataset a recipe in datasets/ collects. The default takes about
        five minutes on two CPU cores; `demo debug-diffuser` takes seconds, and its score means nothing.
        """,
        "--training.steps 1000",
    )
    demo.add_argument("config", metavar="CONFIG", nargs="?", default="planner-pointmaze-umaze")
    demo.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME/DATE-TIME)")
    return parser, dict(commands.choices)


def _add_data_commands(commands: Any, common: Parser) -> None:
    """The parsers of `data ACTION`."""

    def add(action: str, text: str, name: str = "NAME") -> Parser:
        description = textwrap.dedent(text)
        formatter = argparse.RawDescriptionHelpFormatter
        first = description.split("\n")[0]
        command = commands.add_parser(
            action, help=first, description=description, parents=[common], formatter_class=formatter
        )
        command.set_defaults(action=action)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if name:
            command.add_argument("name", metavar=name)
        return command

    add("list", "The datasets that are here, and those that a recipe collects.", name="")
    show = add(
        "show",
        """\
        What is inside a dataset: episodes, lengths, returns, ends by kind, duplicates, coverage, ranges by field.

        Coverage is the share of the cells of a 32 x 32 grid over the first two columns of the observation, between
        their lowest and highest values, that some step lies in.
        """,
    )
    show.add_argument("--picture", type=Path, metavar="FILE", help="also draw it to this new file (.png, .pdf, .svg)")
    convert = add(
        "convert",
        """\
        Convert a dataset to the store that training reads, or write it in another format.

        Without --to: the store in the cache (OFFLINE_CAI_CACHE, ~/.cache/offline_cai), which every command makes by
        itself on first use. An existing file or dataset is not overwritten. A Minari dataset made of another keeps its
        spaces, environments, references and authors; one made of a file has no environment. NAME may be the folder of
        a run that keeps a replay (SAC's, say): with --to, what it gathered becomes a dataset ("medium-replay").
        """,
    )
    convert.add_argument(
        "--repair", action="store_true", help="leave damaged episodes out, and say which and why; with --to, for good"
    )
    convert.add_argument(
        "--to", metavar="TARGET", help="a path that ends in .hdf5 (D4RL's format) or .npz (arrays), or a Minari id"
    )
    add(
        "validate",
        """\
        Read every number of a dataset again, with all checks, and compare it with the checksums of its store.

        Exit status 0: it is sound; 2: the first thing that is wrong, in one sentence.
        """,
    )
    add(
        "download",
        """\
        Download a public dataset, whole or not at all, and convert it, which checks it.

        NAME is a Minari id (D4RL/door/human-v2), with a remote before it (hf://farama-minari/D4RL/door/human-v2,
        gcp://BUCKET/...) or without (MINARI_REMOTE, hf://farama-minari by default), or a D4RL name
        (hopper-medium-v2). Minari's go to MINARI_DATASETS_PATH (~/.minari/datasets), D4RL's to the cache.
        """,
    )
    add(
        "stats",
        """\
        What normalisers see: mean, standard deviation, range and quantiles of each column, of returns and of scores.

        Scores are normalised with the references of the dataset's Minari metadata or of D4RL's table; where there are
        none, that is said.
        """,
    )


def _writes(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=Path, help=f"folder to write (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
