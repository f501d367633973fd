#!/usr/bin/env bash
# datatrove 0.10.1's JsonlReader gives up a file at a byte that is not UTF-8: the good lines after it are lost, and those
# before it that were read with it, with a warning in the task's log. The task counts as completed, so a second run does
# not read them either. A line that is no JSON costs that line only. Exits 0 while that is so, 1 where it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --target "$work/packages" "datatrove==0.10.1" "orjson==3.13.0"
cat > "$work/show.py" <<'PYTHON'
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils.logging import logger

logger.remove()
lines = [b'{"text": "document %d"}' % number for number in range(1000)]
cases = {
    "all good": lines[10],
    "no JSON": b"document 10",
    "Latin-1": '{"text": "café"}'.encode("latin-1"),
}
found = {}
for name, line in cases.items():
    folder = Path(sys.argv[1]) / name
    (folder / "in").mkdir(parents=True)
    (folder / "in/a.jsonl").write_bytes(b"\n".join([*lines[:10], line, *lines[11:]]))
    kept = folder / "kept"

    def count(data, rank, world_size, kept=kept):
        kept.write_text(str(sum(1 for _ in data)))

    executor = LocalPipelineExecutor([JsonlReader(str(folder / "in")), count], workers=1, logging_dir=str(folder / "logs"))
    executor.run()
    found[name] = (int(kept.read_text()), executor.is_rank_completed(0))
    print(f"line 11 of 1000 is {name}: {found[name][0]} documents read, completed: {found[name][1]}")
expected = {"all good": (1000, True), "no JSON": (999, True)}
good = {name: found[name] for name in expected} == expected and found["Latin-1"][1] and found["Latin-1"][0] < 100
sys.exit(0 if good else f"changed: {found}")
PYTHON
PYTHONPATH=$work/packages "$python" -W ignore "$work/show.py" "$work" 2>/dev/null
