"""Keep the result of a benchmark: `make BENCH | python eval/keep.py "make BENCH" eval/results/BENCH.json`.

Passes on what it reads, and writes its last line, a JSON object, with the command, the date and the versions.
"""

import datetime
import json
import sys
from pathlib import Path

from offline_cai.provenance import versions


def main() -> None:
    command, file = sys.argv[1:]
    line = ""
    for line in sys.stdin:
        print(line, end="", flush=True)
    about = {"command": command, "date": datetime.date.today().isoformat(), "versions": versions()}
    Path(file).write_text(json.dumps({**about, "result": json.loads(line)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
