"""The weights of a Hugging Face folder: which files hold them, and whether its config.json is of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CONFIG, INDEX, SINGLE_FILE, numbered, read_json
from megatron_router_upcycling.hf.name_table import BODY, EMBED_TOKENS, LM_HEAD
from megatron_router_upcycling.hf.safetensors_file import DTYPES, Stored, blocks, read_header

IGNORED = ".rotary_emb.inv_freq"  # old versions of transformers saved such tensors, and no version reads them


@dataclass(frozen=True)
class Weights:
    """The tensors in a folder's safetensors files."""

    folder: Path
    tensors: dict[str, Stored]  # by the names of ``name_table``

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Read the headers of all files that belong to the model in ``folder``."""
        shards, promised = _shards(folder)
        tensors: dict[str, Stored] = {}
        for shard in shards:
            for name, stored in read_header(folder / shard).items():
                if name in tensors or promised.get(name, shard) != shard:
                    raise UserError(
                        f"{stored.path}: holds {name}, which another file has or {INDEX} gives it"
                    )
                tensors[name] = stored
        if lacking := promised.keys() - tensors:
            name = min(lacking)
            raise UserError(
                f"{folder / promised[name]}: has no {name}, though {INDEX} says so; download it again"
            )
        # The body of a model saved by itself (Qwen3-Embedding) has names without the body's own.
        lacks = "" if any(name.startswith(BODY) for name in tensors) else BODY
        return cls(
            folder,
            {name if name == LM_HEAD else lacks + name: stored for name, stored in tensors.items()},
        )

    @property
    def paths(self) -> list[Path]:
        return sorted({stored.path for stored in self.tensors.values()})

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

    def choose_dtype(self, model: QwenModel, asked: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, or that of all tensors; float32 for float64, which no training is done in.

        All tensors are held against the model on the way.
        """
        found = self._dtypes(model)
        if asked is None and len(found) > 1:
            both = " and ".join(f"{dtype} ({tensor})" for dtype, tensor in found.items())
            raise UserError(f"{self.folder}: holds {both}; choose one with --dtype")
        stored = DTYPES[next(iter(found))]
        return asked or (torch.float32 if stored is torch.float64 else stored)

    def _dtypes(self, model: QwenModel) -> dict[str, str]:
        """Compare the tensors with the model; return the dtypes that they have, each with a tensor of it."""
        expected = {}
        for tensor, shape in name_table.hf_tensors(model):
            self.find(tensor, model)  # before config.json has asked for a billion
            expected[tensor] = shape
        if model.tied:
            expected[LM_HEAD] = expected[EMBED_TOKENS]
        found: dict[str, str] = {}
        for tensor, stored in self.tensors.items():
            if tensor.endswith(IGNORED):
                continue
            what = f"{stored.path}: {tensor} is"
            if tensor not in expected:
                raise UserError(f"{what} in no {model.family} model of this {CONFIG}; is it quantised?")
            if stored.shape != expected[tensor]:
                given = list(expected[tensor])
                raise UserError(f"{what} {list(stored.shape)} where {CONFIG} gives {given}")
            if stored.dtype not in DTYPES:
                raise UserError(f"{what} {stored.dtype}, perhaps quantised; covered: {', '.join(DTYPES)}")
            if not (model.tied and tensor == LM_HEAD and EMBED_TOKENS in self.tensors):
                found.setdefault(stored.dtype, tensor)
        return found

    def check_tied(self, model: QwenModel) -> None:
        """Where embeddings are tied and the output layer was saved all the same, it must be the embedding."""
        if not model.tied or not {LM_HEAD, EMBED_TOKENS} <= self.tensors.keys():
            return
        head, embedding = self.tensors[LM_HEAD], self.tensors[EMBED_TOKENS]
        for rows in blocks(head.shape, DTYPES[head.dtype].itemsize):
            if not head.rows(*rows).view(torch.uint8).equal(embedding.rows(*rows).view(torch.uint8)):
                raise UserError(
                    f"{head.path}: {LM_HEAD} differs from {EMBED_TOKENS} though {CONFIG} ties them;"
                    " set tie_word_embeddings to false there"
                )


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a folder's files of weights, and what its index promises: tensor -> file."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if (folder / INDEX).is_file():
        promised: Any = read_json(folder / INDEX).get("weight_map")
        files = promised.values() if isinstance(promised, dict) else ()
        if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise UserError(
                f"{folder / INDEX}: its weight_map names no files of this folder; download it again"
            )
        return sorted(set(files)), promised
    found = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))  # without their index
    if not found or found != [numbered(number + 1, len(found)) for number in range(len(found))]:
        raise UserError(
            f"HF_DIR {folder}: holds neither {SINGLE_FILE}, {INDEX} nor all of model-...-of-...safetensors;"
            " save or download the model as safetensors, whole"
        )
    return found, {}
