"""A multiple-choice task made from text that every machine has: docstrings of Python's standard library.

The question is which of four passages follows a function's signature and summary. The right one is the
docstring's next paragraph; the others come from functions of other modules, so chance is 25%. The records
depend on the version of Python. A model that was trained on the library, like the demonstration's, has seen
the answers: the task only shows that evaluation works end to end, and whether a model gets better or worse.
"""

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS, EXAMPLES, CHOICES = 500, 20, 4
SHORTEST, LONGEST = 40, 240  # characters of a passage


def records() -> dict[str, list[dict[str, Any]]]:
    """``QUESTIONS`` records to ask (``test``) and ``EXAMPLES`` to show as few-shot examples (``train``): each
    with ``context`` (text), ``choices`` (``CHOICES`` texts) and ``answer`` (the right one's index)."""
    draw = random.Random(0)
    passages = list(_passages())
    draw.shuffle(passages)
    made = []
    for module, context, continuation in passages[: QUESTIONS + EXAMPLES]:
        others = sorted({text for other, _, text in passages if other != module and text != continuation})
        choices = [continuation, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        made.append({"context": context, "choices": choices, "answer": choices.index(continuation)})
    return {"test": made[:QUESTIONS], "train": made[QUESTIONS:]}


def _passages() -> Iterator[tuple[str, str, str]]:
    """(module, signature and summary, next paragraph) of the functions of the library's top modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef):
                continue
            paragraphs = [" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")]
            if len(paragraphs) < 2 or len(paragraphs[1]) < SHORTEST or ">>>" in paragraphs[0] + paragraphs[1]:
                continue  # no second paragraph, a short one, or an interpreter session instead of text
            following = textwrap.shorten(paragraphs[1], LONGEST, placeholder="")
            context = f"def {node.name}({ast.unparse(node.args)}): {paragraphs[0]}"
            yield path.stem, context, following
