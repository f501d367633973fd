"""The weights of a Hugging Face folder: which files hold them, and whether its config.json is of them."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CONFIG, INDEX, SINGLE_FILE, read_json
from megatron_router_upcycling.hf.name_table import BODY, EMBED_TOKENS, LM_HEAD
from megatron_router_upcycling.hf.safetensors_file import DTYPES, Entry, SafetensorsFile, blocks

SHARD = re.compile(r"model-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
IGNORED = ".rotary_emb.inv_freq"  # old versions of transformers saved such tensors, and no version reads them


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies: its file, and its name there."""

    file: SafetensorsFile
    name: str

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows ``start`` .. ``stop``, in the mapped file: to be copied, not kept."""
        return self.file.rows(self.name, start, stop)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a folder, open for reading."""

    folder: Path
    tensors: dict[str, Stored]  # by the names of ``name_table``

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Open all files that belong to the model in ``folder``."""
        shards, promised = _shards(folder)
        files: dict[str, SafetensorsFile] = {}
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard}: missing, though {INDEX} names it; download it again")
            file = SafetensorsFile(folder / shard)
            for tensor in file.entries:
                if tensor in files:
                    raise UserError(f"{file.path}: holds {tensor}, as does {files[tensor].path.name}")
                files[tensor] = file
        for tensor, shard in promised.items():
            if tensor not in files or files[tensor].path != folder / shard:
                raise UserError(
                    f"{folder / shard}: has no {tensor}, though {INDEX} says so; download it again"
                )
        # The body of a model saved by itself (Qwen3-Embedding) has names without the body's own.
        lacks = "" if any(name.startswith(BODY) for name in files) else BODY
        return cls(
            folder,
            {name if name == LM_HEAD else lacks + name: Stored(file, name) for name, file in files.items()},
        )

    @property
    def paths(self) -> list[Path]:
        return sorted({stored.file.path for stored in self.tensors.values()})

    def find(self, tensor: str, model: QwenModel) -> Stored:
        """A tensor of ``model``. For the embedding of a tied one, the output layer may have been saved."""
        if tensor == EMBED_TOKENS and model.tied and tensor not in self.tensors:
            tensor = LM_HEAD
        if tensor not in self.tensors:
            why = f"which {CONFIG} asks for; the model is incomplete"
            if tensor == LM_HEAD and not model.tied:
                why = f"and {CONFIG} does not tie the output layer to the embedding (tie_word_embeddings)"
            raise UserError(f"{self.folder}: has no tensor {tensor}, {why}")
        return self.tensors[tensor]

    def dtypes(self, model: QwenModel) -> dict[str, str]:
        """Compare the tensors with the model; return the dtypes that they have, each with a tensor of it."""
        expected = {}
        for tensor, shape in name_table.hf_tensors(model):
            self.find(tensor, model)  # before config.json has asked for a billion
            expected[tensor] = shape
        if model.tied:
            expected[LM_HEAD] = expected[EMBED_TOKENS]
        found: dict[str, str] = {}
        for tensor, stored in self.tensors.items():
            path, entry = stored.file.path, stored.entry
            if tensor.endswith(IGNORED):
                continue
            if tensor not in expected:
                raise UserError(f"{path}: holds {tensor}, which no {model.family} model of {CONFIG} has")
            if entry.shape != expected[tensor]:
                given = list(expected[tensor])
                raise UserError(f"{path}: {tensor} is {list(entry.shape)} where {CONFIG} gives {given}")
            if entry.dtype not in DTYPES:
                raise UserError(
                    f"{path}: {tensor} is {entry.dtype}, perhaps quantised; covered: {', '.join(DTYPES)}"
                )
            if not (model.tied and tensor == LM_HEAD and EMBED_TOKENS in self.tensors):
                found.setdefault(entry.dtype, tensor)
        return found

    def choose_dtype(self, model: QwenModel, asked: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, or that of all tensors; float32 for float64, which no training is done in."""
        found = self.dtypes(model)
        if asked is None and len(found) > 1:
            both = " and ".join(f"{dtype} ({tensor})" for dtype, tensor in found.items())
            raise UserError(f"{self.folder}: holds {both}; choose one with --dtype")
        stored = DTYPES[next(iter(found))]
        return asked or (torch.float32 if stored is torch.float64 else stored)

    def check_tied(self, model: QwenModel) -> None:
        """Where embeddings are tied and the output layer was saved all the same, it must be the embedding."""
        if not model.tied or not {LM_HEAD, EMBED_TOKENS} <= self.tensors.keys():
            return
        head, embedding = self.tensors[LM_HEAD], self.tensors[EMBED_TOKENS]
        entry = head.entry
        same = entry == embedding.entry
        if same:
            row_bytes = entry.shape[1] * DTYPES[entry.dtype].itemsize
            same = all(
                head.rows(*rows).view(torch.uint8).equal(embedding.rows(*rows).view(torch.uint8))
                for rows in blocks(entry.shape[0], row_bytes)
            )
        if not same:
            raise UserError(
                f"{head.file.path}: {LM_HEAD} differs from {EMBED_TOKENS} though {CONFIG} ties them;"
                " set tie_word_embeddings to false there"
            )


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a folder's files of weights, and what its index promises: tensor -> file."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if (folder / INDEX).is_file():
        promised = _read_index(folder / INDEX)
        return sorted(set(promised.values())), promised
    numbered = [name for path in folder.glob("model-*.safetensors") if (name := SHARD.fullmatch(path.name))]
    if numbered:  # without their index
        last = numbered[0]["count"]
        if sorted(int(name["number"]) for name in numbered) != list(range(1, int(last) + 1)):
            have = ", ".join(sorted(name[0] for name in numbered))
            raise UserError(f"HF_DIR {folder}: holds {have} of {int(last)} files, and no {INDEX}")
        return sorted(name[0] for name in numbered), {}
    raise UserError(f"HF_DIR {folder}: holds neither {SINGLE_FILE} nor {INDEX}; save it as safetensors")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> the name of its file, as an index says."""
    promised = read_json(path).get("weight_map") or {}
    if not isinstance(promised, dict) or not all(isinstance(file, str) for file in promised.values()):
        raise UserError(f"{path}: its weight_map names no files; download it again")
    if not promised:
        raise UserError(f"{path}: has no weight_map; download it again")
    for file in promised.values():
        if Path(file).name != file:
            raise UserError(f"{path}: names {file!r}, which is no file of this folder")
    return promised
