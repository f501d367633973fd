#!/usr/bin/env bash
# transformers 5.24 saves the config.json of a Qwen-MoE without rope_theta (and Qwen3-MoE's without num_experts), though
# both were in the file that it read. transformers 4.57.6 then takes its own defaults without a word: rotary base 10000,
# and 128 experts in Qwen3-MoE. Exits 0 while that is so, 1 where it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --target "$work/new" "transformers==5.24.0"
"$python" -m pip install -q --target "$work/old" "transformers==4.57.6"
cat > "$work/show.py" <<'PYTHON'
import json, sys
from pathlib import Path

import transformers

transformers.logging.set_verbosity_error()
work, found = Path(sys.argv[1]), []
for kind in ("qwen2_moe", "qwen3_moe"):
    first, again = work / kind, work / f"{kind}_again"
    if transformers.__version__.startswith("5."):
        first.mkdir()
        rope = {"rope_type": "default", "rope_theta": 1000000.0}
        entries = {"model_type": kind, "num_experts": 8, "rope_theta": 1000000.0, "rope_parameters": rope}
        (first / "config.json").write_text(json.dumps(entries))
        transformers.AutoConfig.from_pretrained(first).save_pretrained(again)
        kept = json.loads((again / "config.json").read_text())
        print(f"saved by {transformers.__version__}, {kind}:", {name: kept.get(name) for name in entries})
        continue
    for folder in (first, again):
        config = transformers.AutoConfig.from_pretrained(folder)
        print(f"read by {transformers.__version__}, {folder.name}: {config.num_experts} experts, base {config.rope_theta}")
        found.append((config.num_experts, config.rope_theta))
expected = [(8, 1000000.0), (8, 10000.0), (8, 1000000.0), (128, 10000.0)]
sys.exit(0 if found in ([], expected) else f"changed: {found}, not {expected}")
PYTHON
for version in new old; do
  PYTHONPATH=$work/$version "$python" "$work/show.py" "$work" || exit 1
done
