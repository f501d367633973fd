"""Texts into tokens: by the tokenizers library, sentencepiece, or tiktoken where its tokens are the same."""

import functools
import json
import os
import unicodedata
from collections.abc import Callable
from typing import Any

LAST = r"|\s+(?!\S)|\s+"  # what the rules of GPT-2, Llama and Qwen end with
# GPT-2's rule, which the ByteLevel pre-tokeniser applies by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + LAST
# What two tokenizers could disagree about: scripts, white space, digits, accents, code, emoji.
SAMPLE = [
    "The quick brown fox's 12345 jumps; don't, I'LL we'd it\u2019s e\u0301 naïve Straße ŒUVRE ǅ ﬁ ½ ² ⅷ",
    "Быстрая лиса, ελληνικά, עברית, العربية ١٢٣, हिन्दी में १२३, ไทย, 한국어 각, 日本語カタカナ ｶﾞ, 中文。",
    "def f(x):\n\tif x:\r\n\r\n        return {'a': [1.5e-3]}  # \u00a0\u2003\u3000\u0085\u2028\n\n\n  \n x",
    " leading, trailing  \t\v\f \n ",
    "🙂👩‍👩‍👧🏽 \U0010ffff \ufeff \x00\x1f ﷽ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯ a\u0338 \u1e9b\u0323 \uac00\u11a8 \u0344",
    "<|endoftext|> <|im_start|>user<|im_end|> <s></s> [INST]",
]


Encoder = Callable[[str], Any]  # a text into its tokens [N]


class Unsuited(Exception):
    """Why tiktoken cannot give the tokens of a tokenizer.json."""


@functools.lru_cache(2)  # forked workers have those of their parent
def of(definition: str | bytes, encode_special_tokens: bool, tiktoken: bool) -> Encoder:
    """The encoder of a tokenizer.json (by tiktoken, else ``Unsuited`` is raised) or sentencepiece model."""
    if isinstance(definition, bytes):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=definition).encode
    if tiktoken:
        return _by_tiktoken(
            json.loads(definition), encode_special_tokens, of(definition, encode_special_tokens, False)
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many processes there are
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = encode_special_tokens

    def encode(text: str) -> list[int]:
        return tokenizer.encode_batch_fast([text])[0].ids  # without the places of characters

    return encode


def _by_tiktoken(content: dict[str, Any], encode_special_tokens: bool, slow: Encoder) -> Encoder:
    """The encoder of a byte-level BPE by tiktoken, several times as fast as ``slow`` by ``tokenizers``.

    tiktoken merges whatever gives a token, lowest number first; ``tokenizers`` merges listed pairs in their
    order. That is the same where numbers rise with the order of merges and every token's own bytes are merged
    into that token: two neighbours that give a token have come about as they do in the token alone.
    """
    import tiktoken
    from tokenizers import normalizers

    if (content["normalizer"] or {}).get("type", "NFC") != "NFC":
        raise Unsuited("its normaliser is not NFC")
    normalizer = normalizers.NFC() if content["normalizer"] else None
    if slow(""):
        raise Unsuited("it puts tokens around a text")
    added = _added(content, encode_special_tokens)
    ranks = _ranks(content, encode_special_tokens)
    # With no special token at all, tiktoken would look for the empty one at every character.
    special = added or {"\0\0none": max(ranks.values()) + 1}
    rule = _rule(content["pre_tokenizer"])
    fast = tiktoken.Encoding("", pat_str=rule, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> Any:
        found: set[str] = set(added)
        if normalizer and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            if any(token in text for token in added):  # only what lies between them is normalised
                return slow(text)
            text, found = normalizer.normalize_str(text), set()
        try:
            return fast.encode_to_numpy(text, allowed_special=found, disallowed_special=())
        except ValueError:  # a million spaces in a row are too many for its regular expressions
            return slow(text)

    if any(list(encode(text)) != slow(text) for text in SAMPLE):
        raise Unsuited("its tokens differ for a sample of text")
    return encode


def _added(content: dict[str, Any], encode_special_tokens: bool) -> dict[str, int]:
    """The tokens that are found in the text before anything else."""
    found = {}
    for token in content["added_tokens"]:
        normalized = token["normalized"] and content["normalizer"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or normalized:
            raise Unsuited(f"its token {token['content']} is looked for otherwise than as it stands")
        if not (token["special"] and encode_special_tokens):
            found[token["content"]] = token["id"]
    if any(one != other and one.startswith(other) for one in found for other in found):
        raise Unsuited("one of its added tokens begins with another")
    return found


def _rule(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression that splits text, of ByteLevel or of a Split before it."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            rule = GPT2
        case [
            {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pass
        case _:
            raise Unsuited("its pre-tokeniser is not a regular expression before bytes")
    # Those before the look ahead in a group of their own: a fifth faster, since they are tried at once.
    return f"(?:{rule.removesuffix(LAST)}){LAST}" if rule.endswith(LAST) else rule


def _ranks(content: dict[str, Any], encode_special_tokens: bool) -> dict[bytes, int]:
    """Bytes of all tokens that merges can give, and their numbers."""
    import tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    model = content["model"]
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in odd):
        raise Unsuited("its model is not a plain BPE")
    vocabulary = model["vocab"]
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    order = [vocabulary["".join(pair)] for pair in merges]
    if order != sorted(order):
        raise Unsuited("its merges are not in the order of its tokens")
    merging = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    added = {token["content"] for token in content["added_tokens"]}
    ranks = {}
    tokens = list(vocabulary)
    for token, merged in zip(tokens, merging.encode_batch(tokens), strict=True):
        if merged.ids == [vocabulary[token]] and byte_of.keys() >= set(token):
            ranks[bytes(byte_of[character] for character in token)] = vocabulary[token]
        elif token not in added or (model.get("ignore_merges") and encode_special_tokens):
            raise Unsuited(f"its merges do not give its token {vocabulary[token]}")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise Unsuited("it lacks tokens for some bytes")
    return ranks
