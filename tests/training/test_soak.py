"""The soak harness in its short forms: what `make soak` does for minutes, a few times each."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
from soak import Soak


@pytest.fixture
def soak(dataset: str, tmp_path: Path) -> Soak:
    return Soak(tmp_path, seed=1)


def test_a_killed_run_resumes_bit_for_bit(soak: Soak) -> None:
    facts = soak.kills(3)
    assert facts["bit-exact resumes"] == facts["kills"] == 3


def test_when_one_of_two_processes_is_killed_the_other_ends_and_both_resume(soak: Soak) -> None:
    facts = soak.kills(1, processes=2)
    assert facts["bit-exact resumes"] == facts["the other process ended by itself"] == 1


def test_a_crash_inside_a_save_loses_nothing_that_was_saved(soak: Soak) -> None:
    facts = soak.crashes(every=61)
    assert facts["bit-exact resumes"] == facts["points of a save"] > 2


def test_sigterm_to_one_of_two_stops_both_with_143_and_keeps_the_last_step(soak: Soak) -> None:
    facts = soak.signals(1, processes=2)
    assert facts["status 143"] == facts["bit-exact resumes"] == 1


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_whole(soak: Soak) -> None:
    facts = soak.second_signal()
    assert facts["first"] == 130 and facts["whole"] and facts["seconds"] < 15, "the save takes 30 s"


def test_no_damage_is_silent(soak: Soak) -> None:
    facts = soak.damage(60)
    assert facts["found, and the checkpoint before taken"] == 60
    assert min(facts[kind] for kind in ("flip", "truncate", "delete", "swap")) > 3


def test_a_pickle_is_never_executed(soak: Soak) -> None:
    assert soak.malice() == {"pickles": 6, "executed": 0, "refusals": 6}


def test_divergence_stops_skips_or_rolls_back(soak: Soak) -> None:
    facts = soak.nan()
    assert facts["nan-stop-always"] == {"status": 2, "last row": 15, "named": True}
    assert facts["nan-skip-always"] == {"status": 0, "last row": 30, "named": False}
    assert facts["nan-rollback-once"] == {"status": 0, "last row": 30, "named": False}
    assert facts["nan-rollback-always"] == {"status": 2, "last row": 15, "named": True}


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(soak: Soak) -> None:
    facts = soak.disk_full()
    assert facts == {"status": 2, "said": True, "old checkpoint intact": True, "bit-exact resume": True}
