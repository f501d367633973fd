"""The weights of a Hugging Face folder: which files hold them, and whether its config.json is of them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CONFIG, INDEX, SINGLE_FILE, read_json
from megatron_router_upcycling.hf.name_table import EMBED_TOKENS, LM_HEAD
from megatron_router_upcycling.hf.safetensors_file import DTYPES, SafetensorsFile
from megatron_router_upcycling.hf.values import blocks

IGNORED = ".rotary_emb.inv_freq"  # old versions of transformers saved such tensors, and no version reads them


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a folder, open for reading."""

    folder: Path
    files: dict[str, SafetensorsFile]  # tensor -> the file that holds it

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Open all files that belong to the model in ``folder``.

        Raises:
            UserError: one is missing or damaged, or is not what the index says.
        """
        promised: dict[str, str] = {}
        if (folder / SINGLE_FILE).is_file():
            shards = [SINGLE_FILE]
        elif (folder / INDEX).is_file():
            promised = _read_index(folder / INDEX)
            shards = sorted(set(promised.values()))
        else:
            raise UserError(
                f"HF_DIR {folder}: holds neither {SINGLE_FILE} nor {INDEX}; save it as safetensors"
            )
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
        return cls(folder, files)

    @property
    def paths(self) -> list[Path]:
        return sorted({file.path for file in self.files.values()})

    def dtypes(self, model: QwenModel) -> dict[str, str]:
        """Compare the tensors with the model; return the dtypes that they have, each with a tensor of it.

        Raises:
            UserError: one is missing, not expected, of another shape, or of a dtype that is not covered.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for tensor, shape in name_table.hf_tensors(model):
            expected[tensor] = shape
            if tensor not in self.files:
                raise UserError(
                    f"{self.folder}: has no tensor {tensor}, which {CONFIG} asks for; the model is incomplete"
                )
        found: dict[str, str] = {}
        for tensor, file in self.files.items():
            path, entry = file.path, file.entries[tensor]
            if tensor.endswith(IGNORED) or (model.tied and tensor == LM_HEAD):
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
            found.setdefault(entry.dtype, tensor)
        return found

    def choose_dtype(self, model: QwenModel, asked: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, or that of all tensors.

        Raises:
            UserError: they have several, or are not those of ``model``.
        """
        found = self.dtypes(model)
        if asked is None and len(found) > 1:
            both = " and ".join(f"{dtype} ({tensor})" for dtype, tensor in found.items())
            raise UserError(f"{self.folder}: holds {both}; choose one with --dtype")
        return asked or DTYPES[next(iter(found))]

    def check_tied(self, model: QwenModel) -> None:
        """Where embeddings are tied and the output layer was saved all the same, it must be the embedding.

        Raises:
            UserError: it is not.
        """
        if not model.tied or LM_HEAD not in self.files:
            return
        head, embedding = self.files[LM_HEAD], self.files[EMBED_TOKENS]
        entry = head.entries[LM_HEAD]
        same = entry == embedding.entries[EMBED_TOKENS]
        if same:
            row_bytes = entry.shape[1] * DTYPES[entry.dtype].itemsize
            same = all(
                head.rows(LM_HEAD, *rows)
                .view(torch.uint8)
                .equal(embedding.rows(EMBED_TOKENS, *rows).view(torch.uint8))
                for rows in blocks(entry.shape[0], row_bytes)
            )
        if not same:
            raise UserError(
                f"{head.path}: {LM_HEAD} differs from {EMBED_TOKENS} though {CONFIG} ties them;"
                " set tie_word_embeddings to false there"
            )


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
