from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from offline_cai import config
from offline_cai.errors import UserError
from offline_cai.training import experiment


@dataclass(frozen=True)
class Inner:
    """Inside."""

    gain: float = 1.0
    """Action per metre."""


@dataclass(frozen=True)
class Outer:
    """Outside."""

    steps: int
    """How many
    steps."""
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    sizes: tuple[int, ...] = (1, 2)
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """Fields that hold words."""

    choice: Literal["no", "yes"]
    name: str


def test_build_converts_and_to_dict_inverts_it() -> None:
    data = {"steps": 3, "limit": 2, "sizes": [4], "inner": {"gain": "1e-3"}, "extra": {"x": [1]}}
    built = config.build(Outer, data, "file")
    assert built == Outer(3, limit=2.0, sizes=(4,), inner=Inner(0.001), extra={"x": [1]})
    assert config.build(Outer, config.to_dict(built), "file") == built


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stepz": 3}, ["file", "unknown key 'stepz'", "did you mean 'steps'"]),
        ({"steps": 3, "inner": {"gian": 1}}, ["file: inner", "'gian'", "'gain'"]),
        ({}, ["'steps' is missing", "How many steps."]),
        ({"steps": "many"}, ["file: steps", "expected int", "'many'"]),
        ({"steps": 1.5}, ["expected int", "1.5"]),
        ({"steps": True}, ["expected int", "True"]),
        ({"steps": 1, "flag": 1}, ["expected bool", "1"]),
        ({"steps": 1, "kind": "c"}, ["'c' is not a choice", "a, b"]),
        ({"steps": 1, "sizes": [1, "x"]}, ["sizes[1]", "'x'"]),
        ({"steps": 1, "sizes": 4}, ["sizes", "4"]),
        ({"steps": 1, "limit": "low"}, ["limit", "'low'"]),
        ({"steps": None}, ["steps", "None"]),
        ([1], ["expected a mapping", "[1]"]),
    ],
)
def test_what_does_not_fit_is_named(data: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config.build(Outer, data, "file")
    assert all(word in str(error.value) for word in words), error.value


def test_help_is_the_docstring_of_the_field() -> None:
    assert config.help_texts(Outer) == {"steps": "How many steps."}
    assert ("inner.gain", 1.0, "Action per metre.") in list(config.describe(Outer(1)))


def test_flags_set_nested_keys() -> None:
    flags = {"steps": "3", "inner.gain": "2e0", "sizes": "[4]", "limit": "null", "kind": "b"}
    built = config.build(Outer, config.override({"inner": {"gain": 1.0}}, flags), "file")
    assert built == Outer(3, kind="b", limit=None, sizes=(4,), inner=Inner(2.0))
    yes = config.build(Words, config.override({}, {"choice": "no", "name": "5"}), "file")
    assert yes == Words("no", "5"), "words are not read as YAML"
    with pytest.raises(UserError, match=r"steps: '\{a' is not valid YAML"):
        config.build(Outer, config.override({}, {"steps": "{a"}), "file")
    with pytest.raises(UserError, match="'a' is a value"):
        config.override({"a": 1}, {"a.b": "2"})


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = config.find("debug-bc", "configs")
    assert config.find("configs/debug-bc.yaml", "configs").resolve() == packaged.resolve()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "debug-bc.yaml").write_text("name: mine")
    monkeypatch.chdir(tmp_path)
    assert config.read(config.find("debug-bc", "configs")) == {"name": "mine"}
    with pytest.raises(UserError, match="did you mean 'debug-bc'"):
        config.find("debug-bx", "configs")


@pytest.mark.parametrize(("text", "word"), [("a: [", "not valid YAML"), ("- 1", "mapping"), ("\x00", "not valid YAML")])
def test_a_broken_file_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=word):
        config.read(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", config.names("configs"))
def test_shipped_configs_load_and_survive_a_round_trip(name: str) -> None:
    loaded = experiment.load(name)
    assert experiment.parse(config.to_dict(loaded), name) == loaded
    assert all(text for _, _, text in config.describe(loaded)), "every field has help"


def test_an_experiment_names_the_unknown_key() -> None:
    with pytest.raises(UserError, match=r"unknown key 'chanels'; did you mean 'channels'"):
        experiment.load("debug-diffuser", {"model.chanels": "16"})
    with pytest.raises(UserError, match=r"no algorithm 'difuser'; did you mean 'diffuser'"):
        experiment.load("debug-diffuser", {"algorithm": "difuser"})
    with pytest.raises(UserError, match="steps is 0"):
        experiment.load("debug-diffuser", {"training.steps": "0"})
