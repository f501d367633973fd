"""The weights of a Hugging Face folder: which files hold them, and whether its config.json is of them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CONFIG, INDEX, SINGLE_FILE, numbered, read_json
from megatron_router_upcycling.hf.name_table import BODY, EMBED_TOKENS, LM_HEAD
from megatron_router_upcycling.hf.safetensors_file import DTYPES, Stored, blocks, read_header

IGNORED = ".rotary_emb.inv_freq"  # old versions of transformers saved such tensors, and no version reads them


class Weights(NamedTuple):
    """The files of a folder, and the tensors of its model in them, by the names of ``name_table``."""

    paths: list[Path]
    tensors: dict[str, Stored]


def read_weights(folder: Path, model: QwenModel) -> Weights:
    """Read the headers of all files in ``folder``, and hold what they say against ``model``."""
    found = _all_tensors(folder)
    paths = sorted({stored.path for stored in found.values()})
    if model.tied and EMBED_TOKENS not in found and LM_HEAD in found:
        found[EMBED_TOKENS] = found.pop(LM_HEAD)
    shapes = {}
    for name, shape in name_table.hf_tensors(model):
        if name not in found:  # before config.json has asked for a billion
            why = f"which {CONFIG} asks for; the model is incomplete"
            if name == LM_HEAD:
                why = f"and {CONFIG} does not tie the output layer to the embedding (tie_word_embeddings)"
            raise UserError(f"{folder}: has no tensor {name}, {why}")
        shapes[name] = shape
    tied_head = {LM_HEAD} & found.keys() if model.tied else set()
    for name in sorted(found.keys() - shapes.keys() - tied_head):
        if not name.endswith(IGNORED):
            path = found[name].path
            raise UserError(
                f"{path}: {name} is in no {model.family} model of this {CONFIG}; is it quantised?"
            )
    for name in (*shapes, *tied_head):
        stored, shape = found[name], shapes.get(name, shapes[EMBED_TOKENS])
        what = f"{stored.path}: {name} is"
        if stored.shape != shape:
            raise UserError(f"{what} {list(stored.shape)} where {CONFIG} gives {list(shape)}")
        if stored.dtype not in DTYPES:
            raise UserError(f"{what} {stored.dtype}, perhaps quantised; covered: {', '.join(DTYPES)}")
    if tied_head:
        _check_tied(found[LM_HEAD], found[EMBED_TOKENS])
    return Weights(paths, {name: found[name] for name in shapes})


def _check_tied(head: Stored, embedding: Stored) -> None:
    """Where embeddings are tied and the output layer was saved all the same, it must be the embedding."""
    for rows in blocks(head.shape, DTYPES[head.dtype].itemsize):
        if not head.rows(*rows).view(torch.uint8).equal(embedding.rows(*rows).view(torch.uint8)):
            raise UserError(
                f"{head.path}: {LM_HEAD} differs from {EMBED_TOKENS} though {CONFIG} ties them;"
                " set tie_word_embeddings to false there"
            )


def choose_dtype(weights: Weights, asked: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or that of all tensors; float32 for float64, which no training is done in."""
    found = {stored.dtype: stored for stored in weights.tensors.values()}
    if asked is None and len(found) > 1:
        both = " and ".join(f"{dtype} ({stored.name} in {stored.path})" for dtype, stored in found.items())
        raise UserError(f"HF_DIR: holds {both}; choose one with --dtype")
    stored = DTYPES[next(iter(found))]
    return asked or (torch.float32 if stored is torch.float64 else stored)


def _all_tensors(folder: Path) -> dict[str, Stored]:
    """What the files of weights hold, by the names of ``name_table``."""
    files, promised = _files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(folder / file).items():
            if name in found or promised.get(name, file) != file:
                raise UserError(f"{stored.path}: holds {name}, which another file has or {INDEX} gives it")
            found[name] = stored
    if lacking := promised.keys() - found:
        name = min(lacking)
        raise UserError(
            f"{folder / promised[name]}: has no {name}, though {INDEX} says so; download it again"
        )
    # The body of a model saved by itself (Qwen3-Embedding) has names without the body's own.
    lacks = "" if any(name.startswith(BODY) for name in found) else BODY
    return {name if name == LM_HEAD else lacks + name: stored for name, stored in found.items()}


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files of weights, and what their index promises: tensor -> file."""
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
