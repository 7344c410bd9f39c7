import time

import pytest

from offline_cai.training import watch
from offline_cai.training.watch import Clock, Progress


def test_a_clock_tells_shares_and_rate_since_it_was_last_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(10)
    with clock("data"):
        now += 2.0
    with clock("update"):
        now += 1.0
    clock.move(0.5, "data", "environment")
    now += 1.0
    report = clock.report(18)
    assert report["steps_per_second"] == 2.0 and report["share_data"] == 0.375
    assert report["share_environment"] == 0.125 and report["share_update"] == 0.25 and report["share_evaluation"] == 0
    now += 1.0
    assert clock.report(19) == {"steps_per_second": 1.0, **{k: 0.0 for k in report if k.startswith("share_")}}


def test_where_there_is_no_terminal_plain_lines_tell_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    progress = Progress(total=100, start=20, quiet=False)
    for step in range(21, 101):
        now += 0.5
        progress.advance(step, {"loss": 1 / step})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4, "one for more than ten seconds each, and the last"
    assert lines[0] == "train: step 41 of 100, loss 0.0244, 2.0 steps/s, 0:00:30 left"
    assert lines[-1] == "train: step 100 of 100, loss 0.0100, 2.0 steps/s, 0:00:00 left"
    Progress(total=1, start=0, quiet=True).advance(1, {})
    assert capsys.readouterr().err == ""
