"""Models as folders: config.json and safetensors files with real headers, and data that takes no space on the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[str, Sequence[int]]]
BITS = {"F4": 4, "U8": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
TENSORS: Shapes = {
    "model.embed_tokens.weight": ("BF16", (1000, 512)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (2048, 512)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (2048, 512)),
    "lm_head.weight": ("BF16", (1000, 512)),
}


def size_of(tensors: Shapes) -> int:
    """The bytes of the tensors."""
    return sum(math.prod(shape) * BITS[dtype] // 8 for dtype, shape in tensors.values())


def write_shard(path: Path, tensors: Shapes) -> int:
    """Write a safetensors file with a hole for its data; return the bytes of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return end


def write_model(folder: Path, config: Mapping[str, Any] = LLAMA, *shards: Shapes) -> Path:
    """Write a model: one file without an index, or several with one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = shards or (TENSORS,)
    if len(shards) == 1:
        write_shard(folder / "model.safetensors", shards[0])
        return folder
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
