import numpy as np
import pytest

from offline_cai.evaluation import board, statistics

SCORES = {("BC", "a"): [10.0, 20.0], ("BC", "b"): [30.0, 40.0], ("IQL", "a"): [15.0, 60.0], ("IQL", "b"): [35.0, 90.0],
          ("IQL", "raw"): [-300.0]}  # fmt: skip


def records() -> list[dict]:  # type: ignore[type-arg]
    return [
        {
            "cell": f"{label}/{task}/{seed}",
            "kind": "trained",
            "label": label,
            "task": task,
            "seed": seed,
            "mean": mean,
            "se": 1.0,
            "n": 20,
            "protocol": {"score": None if task == "raw" else "t", "seed": 1000, "environment": "E-v1"},
            "cpu_minutes": {"train": 2.0, "evaluate": 0.5},
            "error": None,
        }
        for (label, task), means in SCORES.items()
        for seed, mean in enumerate(means)
    ]


def test_seeds_are_averaged_and_missing_cells_are_dashes() -> None:
    text = board.table(["a", "b", "raw"], ["BC", "IQL"], records())
    assert "| | a | b | raw (return) | CPU minutes |" in text
    assert "| BC | 15.0 ± 5.0 (2 × 20) | 35.0 ± 5.0 (2 × 20) | – | 10.0 |" in text
    assert "| IQL | 37.5 ± 22.5 (2 × 20) | 62.5 ± 27.5 (2 × 20) | -300.0 ± 1.0† (1 × 20) | 12.5 |" in text
    assert "Training seeds: 0, 1; evaluation seed: 1000" in text


def test_over_tasks_only_what_all_have_and_normalised_ones_count() -> None:
    text = board.table(["a", "b", "raw"], ["BC", "IQL"], records())
    assert "Over a, b:" in text
    a, b = ([np.array(SCORES[label, task]) for task in "ab"] for label in ("IQL", "BC"))
    better = statistics.probability_of_improvement(a, b)
    assert better.value == pytest.approx((3 / 4 + 3 / 4) / 2)
    iqm = np.mean([35, 60])
    assert f"| IQL | {iqm:.1f} [" in text and f"| 0.75 [{better.low:.2f}, {better.high:.2f}] | 4 |" in text
    assert "With 2 seeds a task, intervals that say 95 % hold the truth about 70 % of the time" in text
    assert set(board.pictures(["a", "b", "raw"], records())) == {"scores.png", "profile.png"}


def test_one_seed_and_one_task_are_not_dressed_up() -> None:
    one = [r for r in records() if r["seed"] == 0]
    text = board.table(["a", "b"], ["BC", "IQL"], one)
    assert "these are too narrow, and with one on all there is none" in text
    assert "| BC | 20.0 |  | 2 |" in text and "| IQL | 25.0 | 1.00 | 2 |" in text
    mixed = board.table(["a", "b"], ["BC", "IQL"], [r for r in records() if r["seed"] == 0 or r["label"] == "IQL"])
    assert "| BC | 20.0 |  | 2 |" in mixed and "| IQL | 47.5 [" in mixed and "] | 4 |" in mixed
    assert "Over " not in board.table(["a"], ["BC", "IQL"], [r for r in records() if r["task"] == "a"])
    assert "Over " not in board.table(["a", "b"], ["BC"], [r for r in records() if r["label"] == "BC"])


def test_a_task_that_nothing_was_trained_on_has_no_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(board.plots, "scores", lambda tasks, _: drawn.append(tasks))
    monkeypatch.setattr(board.plots, "png", lambda figure: b"")
    alone = {**records()[0], "task": "empty", "kind": "reference", "seed": None}
    board.pictures(["empty", "a", "b", "raw"], [*records(), alone])
    assert drawn == [["a", "b", "raw"]]
