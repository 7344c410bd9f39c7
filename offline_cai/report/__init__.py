"""One self-contained HTML page about runs: what was trained, what it plans and scores, and how it was made."""

from offline_cai.report.compose import write
from offline_cai.report.scores import plus_minus, score_line

__all__ = ["plus_minus", "score_line", "write"]
