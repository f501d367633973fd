#!/usr/bin/env bash
# transformers 5.24 splits text by Qwen's own rule in every folder of model_type qwen2, whatever tokenizer.json says and
# tokenizer_config.json names; beside qwen2_moe the same two files give the tokens of the file. transformers 4.57.6 gives
# those of the file in both. Exits 0 while that is so, 1 where it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --target "$work/new" "transformers==5.24.0" "tokenizers==0.23.3"
"$python" -m pip install -q --target "$work/old" "transformers==4.57.6" "tokenizers==0.22.2"
cat > "$work/show.py" <<'PYTHON'
import json, sys
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
text = "12345"
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {character: number for number, character in enumerate([*alphabet, "12", "123", "45"])}
own = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("12", "3"), ("4", "5")]))
rule = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
own.pre_tokenizer = pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(False, use_regex=False)])
own.decoder = decoders.ByteLevel()
found = {"file": own.encode(text).tokens}
for kind in ("qwen2", "qwen2_moe"):
    folder = Path(sys.argv[1]) / kind
    folder.mkdir(exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    found[kind] = loaded.tokenize(text)
    print(f"transformers {transformers.__version__}, {kind}: {type(loaded).__name__} {found[kind]}")
print(f"tokenizer.json itself: {found['file']}")
other = [kind for kind in ("qwen2", "qwen2_moe") if found[kind] != found["file"]]
expected = ["qwen2"] if transformers.__version__.startswith("5.") else []
sys.exit(0 if other == expected else f"changed: other tokens than the file's for {other or 'none'}, not {expected or 'none'}")
PYTHON
for version in new old; do
  PYTHONPATH=$work/$version "$python" "$work/show.py" "$work" || exit 1
done
