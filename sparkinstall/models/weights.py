"""The weights of a model, by the headers of its safetensors files: nothing else of them is read.

A header is 8 bytes (its length, little endian) and JSON: dtype, shape and byte offsets of each tensor.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from sparkinstall import schema
from sparkinstall.downloads import in_parallel
from sparkinstall.models import ModelError
from sparkinstall.models.files import Files, Part, read_object

INDEX = "model.safetensors.index.json"
_ENDING = ".safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
# Headers are mostly shorter, so that a file takes one request.
_FIRST = 128 << 10
# What the format allows.
_LONGEST = 100_000_000
_LENGTH = 8
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_WIDE = ("F32", "F64")
_RESTORE = "download the file again"

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
# Encoders of pictures and sound, and layers that only draft tokens.
_ASIDE = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector|mm_projector|mtp)\."
)
_LAYER = re.compile(r"(?:(?:language_model|model)\.)*layers\.(\d+)\.")
_EXPERT = re.compile(r"(^|\.)experts\.")


class Tensor(Struct, frozen=True):
    """A tensor in a file. `size` in bytes, `count` the number of its elements."""

    name: str
    dtype: str
    size: int
    count: int


class Weights(Struct, frozen=True):
    """The tensors of a model; `files` were read, `left_out` are further safetensors files that vLLM does not need."""

    tensors: Sequence[Tensor]
    files: Sequence[str]
    left_out: Sequence[str] = ()

    @property
    def size(self) -> int:
        """The bytes of all tensors in the files."""
        return sum(each.size for each in self.tensors)

    def by_dtype(self) -> dict[str, int]:
        """Return the bytes of each dtype, most first."""
        found: dict[str, int] = {}
        for each in self.tensors:
            found[each.dtype] = found.get(each.dtype, 0) + each.size
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def read_weights(files: Files) -> Weights:
    """Read the headers of a model's weights.

    Raises:
        ModelError: there are no safetensors files, one is missing, or a header is damaged.
        NotDownloaded: the hub does not give one.
    """
    names = files.names()
    wanted, left_out = _wanted(files, names)
    if files.workers > 1:
        each_file = in_parallel(partial(_tensors, files), wanted, at_once=files.workers)
    else:
        each_file = [_tensors(files, name) for name in wanted]
    return Weights([each for of_file in each_file for each in of_file], wanted, left_out)


def _wanted(files: Files, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files that have the weights, and the others."""
    every = [name for name in names if name.endswith(_ENDING)]
    if INDEX in names:
        wanted = _shards(read_object(files, INDEX))
        if missing := [name for name in wanted if name not in names]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ModelError(f"{INDEX} names {missing[0]}{more}, but {files.place} does not have it", hint=_RESTORE)
    else:
        # Beside a whole model there may be the same weights in the format of Mistral's own library.
        wanted = ["model.safetensors"] if "model.safetensors" in every else every
    if not wanted:
        others = sorted({end for name in names for end in _OTHER_FORMATS if name.endswith(end)})
        has = f" (it has {schema.either(others)} files)" if others else ""
        raise ModelError(f"{files.place} has no safetensors files{has}", hint="name a model with safetensors files")
    return wanted, [name for name in every if name not in wanted]


def _shards(index: Mapping[str, Any]) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{INDEX} has no `weight_map`: it must be a mapping of tensors to files", hint=_RESTORE)
    for name in shards.values():
        if not isinstance(name, str) or "/" in name or not name.endswith(_ENDING):
            raise ModelError(f"{INDEX} names {schema.show(name)}, which is no safetensors file", hint=_RESTORE)
    return sorted(set(shards.values()))


def _tensors(files: Files, name: str) -> list[Tensor]:
    first = files.part(name, 0, _FIRST)
    end = _LENGTH + _length(first, name)
    header = first.data[_LENGTH:end]
    if len(first.data) < end:
        header += files.part(name, len(first.data), end - len(first.data)).data
    tensors = _parsed(header, name)
    declared = end + sum(each.size for each in tensors)
    if declared > first.size:
        raise _damaged(name, f"is truncated: it has {first.size:,} bytes, its header declares {declared:,}")
    if declared < first.size:
        raise _damaged(name, f"has {first.size:,} bytes, but its header declares only {declared:,}")
    return tensors


def _length(first: Part, name: str) -> int:
    if len(first.data) < _LENGTH:
        raise _damaged(name, f"has {first.size} bytes, too few for a header")
    length = int.from_bytes(first.data[:_LENGTH], "little")
    if length > _LONGEST:
        raise _damaged(name, "is no safetensors file: its header would be longer than the format allows")
    if _LENGTH + length > first.size:
        raise _damaged(name, f"is truncated: its header has {length:,} bytes, the file {first.size:,}")
    return length


def _parsed(header: bytes, name: str) -> list[Tensor]:
    try:
        found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        found.pop("__metadata__", None)
        return [_tensor(key, msgspec.json.decode(raw, type=_Entry)) for key, raw in found.items()]
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _damaged(name, f"has a damaged header: {error}") from error


class _Entry(Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _tensor(name: str, entry: _Entry) -> Tensor:
    begin, end = entry.data_offsets
    count = math.prod(entry.shape)
    bits = _BITS.get(entry.dtype)
    if begin < 0 or end < begin or any(each < 0 for each in entry.shape):
        raise ValueError(f"the tensor {schema.show(name)} has a negative size")
    if bits and (end - begin) * 8 != count * bits:
        raise ValueError(f"the tensor {schema.show(name)} has {end - begin} bytes, which is not what its shape needs")
    return Tensor(name, entry.dtype, end - begin, count)


def _damaged(name: str, what: str) -> ModelError:
    return ModelError(f"{name} {what}", hint=_RESTORE)


def loaded_size(tensors: Iterable[Tensor], layers: int, tied: bool) -> int:
    """Estimate the bytes of the weights of a model that is not quantized, once vLLM has loaded them.

    vLLM takes 32-bit weights as 16-bit ones, and neither loads layers that only draft nor a tied head.
    """
    return sum(
        _narrow(each) for each in tensors if not _drafts(each, layers) and not (tied and _HEAD.search(each.name))
    )


def _narrow(tensor: Tensor) -> int:
    return 2 * tensor.count if tensor.dtype in _WIDE else tensor.size


def _drafts(tensor: Tensor, layers: int) -> bool:
    """Whether a tensor is in a layer after the model's own, or in a part of that name; 0 layers: only the latter."""
    at, aside = _LAYER.match(tensor.name), _ASIDE.search(tensor.name)
    return bool(aside and aside[2] == "mtp") or bool(at and layers and int(at[1]) >= layers)


class Read(Struct, frozen=True):
    """Bytes of weights that one token reads: `always`, and those of all `experts`, of which it reads a share."""

    always: int
    experts: int


def read_by_token(tensors: Sequence[Tensor], layers: int, *, narrow: bool) -> Read:
    """Return the bytes of the weights that decoding one token of text reads.

    Args:
        layers: the number of the model's layers; further ones draft.
        narrow: 32-bit weights are loaded as 16-bit ones.
    """
    has_head = any(_HEAD.search(each.name) for each in tensors)
    always = experts = 0
    for each in tensors:
        # Of an embedding one row is read, unless it is the output's matrix too.
        looked_up = has_head and _EMBEDDING.search(each.name)
        if looked_up or _ASIDE.search(each.name) or _drafts(each, layers):
            continue
        size = _narrow(each) if narrow else each.size
        if _EXPERT.search(each.name):
            experts += size
        else:
            always += size
    return Read(always, experts)
