"""What ``prepare-data`` is asked for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """The flags of ``prepare-data``, which say what they mean."""

    output: Path
    tokenizer: Path | None  # or one is trained
    train_tokenizer: int | None
    text_key: str
    held_out: float
    seed: int
    end_of_document: bool
    max_tokens: int | None
    max_bytes: int | None
    max_document_bytes: int
    max_bad: int
    workers: int | None  # at a time: None for one a core, or for Slurm as many as it has room for
    executor: str
    slurm: dict[str, str]  # options of sbatch
    overwrite: bool

    @property
    def held_out_prefix(self) -> Path:
        return self.output.with_name(f"{self.output.name}_held_out")

    @property
    def prefixes(self) -> list[Path]:
        """Of training and, where some are held out, of held-out documents."""
        return [self.output, self.held_out_prefix] if self.held_out else [self.output]

    @property
    def work(self) -> Path:
        """The hidden folder of the parts."""
        return self.output.with_name(f".{self.output.name}.parts")

    def decisive(self) -> dict[str, Any]:
        """The options that change what is written, the tokenizer aside."""
        others = ("output", "tokenizer", "workers", "executor", "slurm", "overwrite")
        return {name: value for name, value in asdict(self).items() if name not in others}
