"""What the pages name is there: files, sections, tests, make targets, commands and recipes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_cai import algorithms, config, parsers

REPOSITORY = Path(__file__).parent.parent
NAMES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md"))]
FOLDERS = r"(offline_cai(?!/recipes)|tests|eval|configs|datasets|docs)/"  # the recipes are there in a wheel alone


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def code(name: str) -> Iterator[str]:
    """What stands between backticks, and the lines of code blocks."""
    prose = re.sub(r"```\w*\n(.*?)```", "", text(name), flags=re.DOTALL)
    yield from (" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose))
    for block in re.findall(r"```\w*\n(.*?)```", text(name), re.DOTALL):
        yield from (line.strip() for line in block.splitlines())


def anchors(page: Path) -> set[str]:
    """The sections of a page, as links name them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_sections(name: str) -> None:
    page = REPOSITORY / name
    for link in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        if "://" not in link:
            target, _, section = link.partition("#")
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{name}: {link}"
            assert not section or section in anchors(there), f"{name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_tests_that_are_named_exist(name: str) -> None:
    file = ""
    for word in (word for words in code(name) for word in words.split()):
        if re.fullmatch(FOLDERS + r"[\w./-]+", word) and "NAME" not in word:
            assert (REPOSITORY / word).exists(), f"{name}: {word}"
        if found := re.fullmatch(r"([\w/]+\.py)?::(\w+)", word):
            file = found[1] or file  # "::test" alone is of the file before it
            path = REPOSITORY / (file if "/" in file else f"tests/algorithms/{file}")
            assert f"def {found[2]}(" in path.read_text(encoding="utf-8"), f"{name}: {word}"


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_that_are_named_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = {words.split()[1] for words in code(name) if words.startswith("make ")}
    assert named <= targets, name


def test_make_bench_runs_all_benchmarks() -> None:
    makefile = text("Makefile")
    (all_of_them,) = re.findall(r"^bench:(.*?)##", makefile, re.MULTILINE)
    assert set(all_of_them.split()) == set(re.findall(r"^(bench-[a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_are_named_take_what_they_are_given(name: str) -> None:
    parser, commands = parsers.build()
    for words in code(name):
        arguments = shlex.split(words, comments=True)[1:] if words.startswith("offline-cai ") else []
        if arguments and not arguments[0].startswith("-"):
            assert arguments[0] in commands, f"{name}: {words}"
        if len(arguments) > 1 and "--help" not in arguments:
            parser.parse_args(parsers.take_flags(arguments, commands)[0])


def test_all_algorithms_are_in_the_readme_s_table() -> None:
    for name in algorithms.names():
        assert f"algorithms/{name}.py" in text("README.md"), f"{name} is missing from the algorithm table"


def test_configs_that_the_algorithm_table_names_exist() -> None:
    rows = [line.split("|") for line in text("README.md").splitlines() if "algorithms/" in line and line[0] == "|"]
    named = [name for row in rows for name in re.findall(r"`([a-z_]+(?:-[\w-]+)+)`", row[4])]
    assert named and set(named) <= set(config.names("configs"))
