"""llama.cpp's converter on a folder whose tokenizer it has no name for: SOURCE FOLDER OUT.

SOURCE is the root of llama-cpp-python's source package.
"""

import sys
from pathlib import Path


def main(source: str, folder: str, out: str) -> None:
    converter = Path(source) / "vendor/llama.cpp"
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
