"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offline_cai import parsers
from offline_cai.errors import Interrupted, Notice, UserError
from offline_cai.training import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after a mistake, 130 if interrupted (143: a training by SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = parsers.build()
    try:
        arguments, flags = parsers.take_flags(arguments, commands)
        args = parser.parse_args(arguments)
        args.words = list(sys.argv[1:] if argv is None else argv)
        _use_threads(args.threads)
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        return _COMMANDS[args.command](args, flags) or 0
    except UserError as error:
        if "--debug" in arguments:
            raise
        launch.tell(str(error))
        return 2
    except Interrupted as stop:
        if launch.is_first():
            print(f"interrupted: {stop}", file=sys.stderr)
        return stop.status
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if "--debug" in arguments:
            raise
        launch.tell(f"{error.filename or 'the system'}: {error.strerror or error}.")
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing that was complete is lost.", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Our own warnings are sentences for the user; those of other packages are not for him."""
    if category is Notice and launch.is_first():
        print(f"warning: {message}", file=sys.stderr)


def _use_threads(threads: int | None) -> None:
    """OpenMP reads its number of threads when torch is imported, which happens after this."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; it has to be at least 1.")
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads or 1)


def _collect(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import collect

    recipe = collect.load(args.recipe, flags)
    folder = collect.collect(recipe, args.quiet)
    print(f"dataset: {recipe.id} in {folder}\nlook at it: minari show {recipe.id}")


def _data(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import data_commands

    facts: dict[str, Any] = {
        "list": lambda: data_commands.entries(),
        "show": lambda: data_commands.show(args.name, args.picture),
        "convert": lambda: data_commands.convert(args.name, args.to, args.repair),
        "validate": lambda: data_commands.validate(args.name),
        "download": lambda: data_commands.download(args.name, args.quiet),
        "stats": lambda: data_commands.show_stats(args.name),
    }[args.action]()
    print(json.dumps(facts) if args.json else data_commands.text(args.action, facts))


def _train(args: argparse.Namespace, flags: dict[str, str]) -> int:
    if args.help and args.config is None:
        args.parser.print_help()
        return 0
    here = args.resume is True  # --resume without RUN
    if args.resume is not None and not here and (args.config is not None or args.output is not None):
        raise UserError("--resume RUN takes config and output folder from the run; leave CONFIG and --output out.")
    if (args.resume is None or here) and args.config is None:
        raise UserError("name a CONFIG to train (a file, or a name in configs/), or --resume RUN.")
    if here and args.output is None:
        raise UserError("--resume after a CONFIG needs --output: the folder of the run to go on with.")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}; it has to be at least 1.")
    if args.processes not in (None, 1) and not args.help and not launch.is_worker():
        return launch.launch(args.processes, args.words)
    from offline_cai import commands
    from offline_cai.training import experiment

    exp = experiment.load(args.config, flags) if args.config else commands.resumed(args.resume, flags)
    if args.help:
        _print_fields(args.config, exp)
        return 0
    run = commands.train(
        exp, args.output if args.config else args.resume, args.resume is not None, args.quiet, args.processes
    )
    if launch.is_first():
        print(f"run: {run}\nnext: offline-cai evaluate {run}")
    return 0


def _print_fields(name: str, exp: Any) -> None:
    from offline_cai import config

    print(
        f"usage: offline-cai train {name} [--FIELD VALUE ...]\n\nFields of {name}, their values, and what they mean:\n"
    )
    for flag, value, text in config.describe(exp):
        print(f"  --{flag} {json.dumps(value)}\n      {text}")


def _plan(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import commands

    facts = commands.plan(args.folder, args.count, args.seed, flags, args.output, args.overwrite)
    for name, value in facts.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _evaluate(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import evaluation_commands

    if args.off_policy and args.protocol is not None:
        raise UserError("--off-policy runs no protocol: leave --protocol out.")
    quiet = args.quiet or args.json
    if args.off_policy:
        facts = evaluation_commands.off_policy(args.folder, flags, args.output, args.overwrite, quiet)
        print(json.dumps(facts) if args.json else evaluation_commands.off_policy_text(facts))
        return
    how = (args.protocol, flags, args.output, args.overwrite, quiet)
    if who := evaluation_commands.reference(args.folder):
        data = evaluation_commands.evaluate_reference(who, *how)
        after = f"results: {data['written to']}"
    else:
        data = evaluation_commands.evaluate(args.folder, *how)
        after = f"next: offline-cai report {data['run']}"
    print(json.dumps(data) if args.json else f"{evaluation_commands.text(data)}\n{after}")


def _scoreboard(args: argparse.Namespace, flags: dict[str, str]) -> int:
    from offline_cai import scoreboard

    recipe = scoreboard.load(args.recipe)
    runs = args.runs or Path("runs/scoreboard") / recipe.name
    output = args.output or Path("runs/scoreboard") / recipe.name / "results"
    cells = scoreboard.cells(recipe, args.recipe, runs)
    chosen = scoreboard.chosen(cells, args.only)
    if args.list:
        print(scoreboard.status(chosen, output))
        return 0
    failed = scoreboard.run(recipe, chosen, output, args.quiet)
    print(scoreboard.write(recipe, cells, output, args.table), end="")
    if failed:
        raise UserError(f"{failed} of the cells failed (see above): mend what they name, and run the same command.")
    return 0


def _report(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import report

    path = report.write(*args.folders, output=args.output, overwrite=args.overwrite)
    print(f"report: {path.resolve()}")


def _demo(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from offline_cai import demo

    demo.demo(args.config, flags, args.output, args.quiet)


_COMMANDS: dict[str, Callable[..., int | None]] = {
    "collect": _collect,
    "data": _data,
    "train": _train,
    "plan": _plan,
    "evaluate": _evaluate,
    "scoreboard": _scoreboard,
    "report": _report,
    "demo": _demo,
}
