"""The page about runs: two of behaviour cloning that differ in their seed, and a planner."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest

from offline_cai import cli, commands, config, evaluation_commands, report
from offline_cai.errors import Notice, UserError
from offline_cai.report import compose, runs, scores, sections
from offline_cai.training import experiment

WHILE_TRAINING = {"training.evaluate_every": "10", "training.evaluate_episodes": "2"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def cloned(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds, evaluated on the same starts."""
    folder, found = tmp_path_factory.mktemp("cloned"), []
    for seed in ("0", "1"):
        found.append(
            commands.train(experiment.load("debug-bc", {"seed": seed, **WHILE_TRAINING}), folder / seed, quiet=True)
        )
        evaluation_commands.evaluate(found[-1], flags={"references": "[random]"}, quiet=True)
    return found


@pytest.fixture(scope="module")
def written(run: Path, cloned: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about both and about a planner that was not evaluated."""
    copy = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(run, copy)
    commands.plan(copy, 2, 1)
    with pytest.warns(Notice, match="has no evaluation"):
        return report.write(*cloned, copy, output=copy.parent / "page.html")


def test_the_page_holds_every_picture_and_needs_nothing_else(written: Path) -> None:
    tags = Page(written.read_text()).tags
    pictures = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(pictures) > 12 and all(attributes["alt"] for tag, attributes in tags if tag == "img")
    for source in pictures:
        kind, data = re.fullmatch(r"data:image/(png|gif);base64,(.*)", source).groups()  # type: ignore[union-attr]
        assert imageio.imread(io.BytesIO(base64.b64decode(data)), extension=f".{kind}").std() > 1
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object")]
    addresses = [a[name] or "" for _, a in tags for name in ("src", "href", "srcset") if name in a]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in written.read_text() and "@import" not in written.read_text()
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_seeds_share_a_row_with_one_score_each(written: Path, cloned: list[Path]) -> None:
    text = written.read_text()
    results = [json.loads((path / "evaluation" / "results.json").read_text())["results"]["bc"] for path in cloned]
    means = np.array([r["mean"] for r in results])
    cells = f"{means.mean():.1f} ± {means.std(ddof=1) / np.sqrt(2):.1f}"
    assert f'debug-bc, 2 seeds</td><td class="n">2 × 4</td><td class="n">{cells}' in text
    difference = np.subtract(results[0]["normalised"], results[1]["normalised"])
    paired = f"{difference.mean():+.1f} ± {difference.std(ddof=1) / 2:.1f}"
    row = re.search(r"<tr><td>debug-bc, seed 1</td>.*?</tr>", text)
    assert row is not None and row[0].endswith(f'<td class="n">{paired}</td></tr>')
    assert text.count("<td>random</td>") == 1, "a reference on the same starts is one row"
    assert "n = 2: from so few scores" in text and "Scores of evaluations while training" in text


def test_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    def made(seed: int, steps: int, name: str = "a") -> runs.Run:
        return runs.Run(tmp_path, {"name": name, "seed": seed, "training": {"steps": steps}}, [], None)

    found = runs.groups([made(0, 1), made(1, 1), made(0, 2), made(0, 2, "b")])
    assert {label: len(some) for label, some in found.items()} == {
        "a (training.steps 1)": 2,
        "a (training.steps 2)": 1,
        "b": 1,
    }


def test_bad_runs_are_sentences_and_the_rest_is_written(
    cloned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "film", lambda *_: (_ for _ in ()).throw(UserError("no screen.")))
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    shutil.copy(cloned[0] / "config.yaml", empty)
    shutil.copytree(cloned[1], damaged)
    (damaged / "evaluation" / "results.json").write_text("{")
    (damaged / "metrics.jsonl").write_text("nonsense\n{}\n")
    words = [str(path) for path in (cloned[0], empty, damaged, tmp_path / "typo")]
    assert cli.main(["report", *words, "--output", str(tmp_path / "page.html")]) == 0
    said, text = capsys.readouterr().err, (tmp_path / "page.html").read_text()
    for sentence in (
        f"{empty} holds no checkpoint",
        f"the evaluation of {damaged} is left out: ",
        f"the learning curves of {damaged} are left out: ",
        f"left out: {tmp_path / 'typo'} holds no config.yaml",
    ):
        assert said.count(sentence) == 1 and text.count(sentence) == 1, sentence
    assert "Policy beside dataset" in text and "debug-umaze" in text
    assert "drawn from its positions: no screen." in text, "a maze needs none"
    assert cli.main(["report", *words, "--output", str(tmp_path / "page.html")]) == 2
    assert "is not overwritten: pass --overwrite" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "typo"), str(tmp_path)]) == 2, "no run at all"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"results": []}, "results: expected dict, not []"),
        ({"protocol": None}, "protocol: expected dict, not None"),
        ({"policy": "nobody"}, "no results of its policy 'nobody'"),
        ({"protocol": {"name": "p"}}, "protocol: the key 'environment' is missing"),
        ({"results": {"bc": {"n": 4}}}, "results.bc: the key 'mean' is missing"),
    ],
)
def test_a_damaged_evaluation_takes_its_own_run_s_results_alone(
    cloned: list[Path], tmp_path: Path, damage: dict[str, Any], words: str
) -> None:
    (tmp_path / "evaluation").mkdir()
    shutil.copy(cloned[1] / "config.yaml", tmp_path)
    sound = json.loads((cloned[1] / "evaluation" / "results.json").read_text())
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps({**sound, **damage}))
    notes: list[str] = []
    some = [runs.read(folder, notes) for folder in (cloned[0], tmp_path)]
    assert some[1].results is None and "debug-umaze" in scores.tables(runs.groups(some))
    (said,) = (note for note in notes if "evaluation" in note and "has no" not in note)
    assert said.startswith(f"the evaluation of {tmp_path} is left out: ") and words in said


def test_episodes_that_are_lost_are_noticed(cloned: list[Path], tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    shutil.copy(cloned[1] / "config.yaml", tmp_path)
    data = json.loads((cloned[1] / "evaluation" / "results.json").read_text())
    data["results"]["bc"]["returns"].pop()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(data))
    notes: list[str] = []
    assert runs.read(tmp_path, notes).results is None
    assert "results.bc are not of the protocol's 4 episodes" in notes[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("training", 5, "training: expected dict, not 5"),
        ("seed", "x", "seed: expected int, not 'x'"),
        ("training", {"steps": "many"}, "training: steps: expected int, not 'many'"),
        ("name", ["a"], "name: expected str"),
    ],
)
def test_a_damaged_config_leaves_its_own_run_out(
    cloned: list[Path], tmp_path: Path, field: str, value: Any, words: str
) -> None:
    settings = config.read(cloned[1] / "config.yaml")
    (tmp_path / "config.yaml").write_text(config.dump({**settings, field: value}))
    notes: list[str] = []
    found, refused = compose._read([cloned[0], tmp_path], notes)
    assert [run.folder for run in found] == [cloned[0]] and len(refused) == 1
    assert f"{tmp_path / 'config.yaml'} is damaged: {words}" in notes[-1]


def test_what_cannot_be_drawn_is_said(cloned: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def film(*_: Any) -> None:
        raise UserError("nothing here can draw.")

    run, kept = runs.read(cloned[0], []), sections._kept
    monkeypatch.setattr(sections, "film", film)
    monkeypatch.setattr(sections, "_kept", lambda run: kept(run)._replace(maze=None))
    assert "There is no film: nothing here can draw." in sections._rollout(run)
    (copy := cloned[0].with_name("copy")).mkdir()
    with pytest.raises(UserError, match="kept no episodes: evaluate it again"):
        kept(run._replace(folder=copy))


def test_a_section_with_damaged_files_is_left_out(cloned: list[Path], tmp_path: Path) -> None:
    shutil.copytree(cloned[0], tmp_path / "r")
    (tmp_path / "r" / "evaluation" / "episodes.npz").write_bytes(b"PK no more")
    with pytest.warns(Notice) as caught:
        text = report.write(tmp_path / "r").read_text()
    said = [str(warning.message) for warning in caught if warning.category is Notice]
    assert [line.split(" of /")[0] for line in said] == ["the pictures of a rollout", "the distributions"]
    assert "Executed paths" in text and "Policy beside dataset" not in text


def test_the_effective_sample_size_is_of_weights_by_episode(tmp_path: Path) -> None:
    number = {"value": 1.5, "low": 1.0, "high": 2.0}
    found = {"n": 40, "effective": 12.3, "episodes": number, "decisions": number}
    facts = {"discount": 0.9, "data": {"mean": 1.0, "se": 0.1}, "fitted Q": {"mean": 1.0, "se": 0.1}}
    (tmp_path / "off-policy").mkdir()
    (tmp_path / "off-policy" / "estimates.json").write_text(json.dumps({**facts, "importance sampling": found}))
    text = sections._off_policy(runs.Run(tmp_path, {}, [], None))
    assert text.count("12.3 of 40") == 1 and "by decisions</td>" in text


# No package brings a browser. Without one all else about the page is tested; what it looks like in a window is not.
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to open the page in")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_all_without_errors_and_without_scrolling_sideways(
    written: Path, tmp_path: Path, width: int
) -> None:
    """A copy of the page, in a frame of this width, tells its pictures that did not load and whether it is too wide."""
    script = (
        "<script>onload = () => parent.postMessage(['found', [...document.images].filter(i => !i.naturalWidth).length, "
        "document.documentElement.scrollWidth <= innerWidth, innerWidth].join(' '), '*')</script></body>"
    )
    (tmp_path / "page.html").write_text(written.read_text().replace("</body>", script))
    frame = f'<iframe src="page.html" width="{width}" height="1600" frameborder="0"></iframe>'
    listen = "<script>onmessage = (event) => { document.title = event.data }</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{listen}{frame}")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1300,1600", "--virtual-time-budget=20000",
        "--dump-dom", f"file://{tmp_path / 'frame.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr
    assert f"<title>found 0 true {width}</title>" in done.stdout
