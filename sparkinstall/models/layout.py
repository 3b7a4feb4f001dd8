"""What config.json says of a model: its layers as vLLM caches them, its experts, its dtype. Nothing in it is run."""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.models import ModelError
from sparkinstall.models.kv_cache import Layers

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_MANY_LAYERS, _MANY_HEADS, _WIDE, _LONG = 4096, 4096, 1 << 24, 1 << 32

# Every layer attends to the whole context, or to the window of config.json.
_ATTENTION = {
    "apertus", "arcee", "cohere", "ernie4_5", "ernie4_5_moe", "gemma", "glm", "glm4", "glm4_moe", "granite",
    "granitemoe", "granitemoeshared", "internlm3", "llama", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "phi3", "phimoe", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text",
    "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
# Every nth layer attends to the whole context, the others to a window.
_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4, "olmo3": 4}
# These may say of each layer what it attends to; of the others vLLM does not ask it.
_BY_LAYER = {*_EVERY, "llama", "ministral", "ministral3", "mistral"}
_MLA = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"}
# config.json leaves out what is the default of the type.
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": {**_GEMMA, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128},
    "cohere2": {"sliding_window": 4096},
    "olmo3": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
}
_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2")

_STATE = "they keep a state, for which fit has no formula"
_HYBRIDS = {
    "bailing_hybrid": "linear attention", "bamba": "Mamba2", "falcon_h1": "Mamba2", "falcon_mamba": "Mamba",
    "granitemoehybrid": "Mamba2", "jamba": "Mamba", "kimi_linear": "KDA", "lfm2": "short convolutions",
    "lfm2_moe": "short convolutions", "mamba": "Mamba", "mamba2": "Mamba2", "minimax": "linear attention",
    "minimax_m1": "linear attention", "minimax_text_01": "linear attention", "nemotron_h": "Mamba2",
    "olmo_hybrid": "GatedDeltaNet", "plamo2": "Mamba", "qwen3_5": "GatedDeltaNet", "qwen3_5_moe": "GatedDeltaNet",
    "qwen3_5_moe_text": "GatedDeltaNet", "qwen3_5_text": "GatedDeltaNet", "qwen3_next": "GatedDeltaNet",
    "zamba2": "Mamba2",
}  # fmt: skip
_MARKS = {
    "hybrid_override_pattern": f"it has layers of Mamba2: {_STATE}",
    "layers_block_type": f"it has layers of Mamba: {_STATE}",
    "mamba_d_state": f"it has layers of Mamba: {_STATE}",
    "ssm_state_size": f"it has layers of Mamba: {_STATE}",
    "linear_num_value_heads": f"it has layers of GatedDeltaNet: {_STATE}",
    "linear_attn_config": f"it has layers of KDA: {_STATE}",
    "index_topk": "its sparse attention keeps an index beside the cache, for which fit has no formula",
    "compress_ratios": "it compresses its cache, for which fit has no formula",
    "attention_chunk_size": "it attends in chunks, for which fit has no formula",
    "attn_window_size": "it has windows of its own, for which fit has no formula",
    "num_kv_shared_layers": "some layers share the cache of others, for which fit has no formula",
    "block_configs": "its layers differ, for which fit has no formula",
    "is_encoder_decoder": "it has an encoder, for which fit has no formula",
}


class Layout(Struct, frozen=True):
    """What config.json says.

    Attributes:
        type: the `model_type` of the part that writes text.
        layers: those that keep a cache; empty if the layout is unknown, with the reason in `why`.
        depth: the number of layers.
        context: the longest sequence, None if it does not say.
        kv_dtype: "fp8" if the checkpoint asks for such a cache, "auto" if not, another name if fit does not know it.
        quantization: the method, "" if the weights are not quantized.
        experts, experts_by_token: of each layer with experts; 0 if it has none, or does not say.
        tied: the embedding is the output's matrix too.
        remote_code: what `auto_map` names.
    """

    type: str
    layers: tuple[Layers, ...]
    why: str
    depth: int
    heads: int
    context: int | None
    kv_dtype: str
    quantization: str
    experts: int
    experts_by_token: int
    tied: bool
    remote_code: tuple[str, ...]


def layout_of(config: Mapping[str, Any], quantized_by: Mapping[str, Any] | None = None) -> Layout:
    """Read config.json; `quantized_by`: hf_quant_config.json, where a model has it.

    Raises:
        ModelError: a number in it cannot be.
    """
    text = next((config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict)), config)
    kind = text.get("model_type", config.get("model_type"))
    kind = kind if isinstance(kind, str) else ""
    # Only what is left out has the default: null is a value.
    whole = {key: value for key, value in {**_DEFAULTS.get(kind, {}), **text}.items() if value is not None}
    layers, why = _layers(kind, whole)
    quantization = config.get("quantization_config") or text.get("quantization_config") or quantized_by
    experts, by_token = _experts(whole)
    return Layout(
        type=kind,
        layers=layers,
        why=why,
        depth=_single(whole, ("num_hidden_layers", "n_layer", "n_layers"), _MANY_LAYERS),
        heads=_single(whole, ("num_attention_heads", "n_head"), _MANY_HEADS),
        context=_number(whole, ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"), _LONG),
        kv_dtype=_kv_dtype(quantization),
        quantization=_method(quantization),
        experts=experts,
        experts_by_token=by_token,
        tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings", kind in _TIED)) is True,
        remote_code=_remote_code(config),
    )


def _layers(kind: str, text: Mapping[str, Any]) -> tuple[tuple[Layers, ...], str]:
    """Return the layers, or why they are unknown."""
    if why := _why_unknown(kind, text):
        return (), why
    missing = [key for key in ("num_hidden_layers", "num_attention_heads") if key not in text]
    if missing:
        return (), f"config.json has no `{missing[0]}`"
    if kind in _MLA:
        return _latent(text)
    if "head_dim" not in text and "hidden_size" not in text:
        return (), "config.json has neither `head_dim` nor `hidden_size`"
    return _attention(kind, text), ""


def _why_unknown(kind: str, text: Mapping[str, Any]) -> str:
    """Return why fit has no formula for a layout, "" if it has one."""
    if kind in _HYBRIDS:
        return f"it has layers of {_HYBRIDS[kind]}: {_STATE}"
    for key, why in _MARKS.items():
        if text.get(key):
            return why
    if any(each != 1 for each in _list(text, "attn_type_list")):
        return f"it has layers of linear attention: {_STATE}"
    if types := _list(text, "layer_types"):
        strange = [each for each in types if each not in ("full_attention", "sliding_attention")]
        if strange:
            return f"it has layers of the type {schema.show(strange[0])}, for which fit has no formula"
        if "sliding_attention" in types and kind not in _BY_LAYER:
            return f"it has sliding layers, which fit does not know of the type {schema.show(kind)}"
    if kind.startswith("qwen") and text.get("use_sliding_window"):
        return "only some of its layers have a sliding window, for which fit has no formula"
    if kind not in {*_ATTENTION, *_EVERY, *_MLA}:
        return f"fit does not know the layers of the type {schema.show(kind)}" if kind else "it has no `model_type`"
    return ""


def _list(text: Mapping[str, Any], key: str) -> list[Any]:
    found = text.get(key)
    return found if isinstance(found, list) else []


def _latent(text: Mapping[str, Any]) -> tuple[tuple[Layers, ...], str]:
    """Return layers of MLA: one compressed vector and the rotated part of a key, for all heads."""
    rank, rotated = (_number(text, (key,), _WIDE) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    if not rank or not rotated:
        return (), "it has no `kv_lora_rank` or no `qk_rope_head_dim`, so fit does not know how it attends"
    return (Layers("mla", _needed(text, "num_hidden_layers", _MANY_LAYERS), 1, rank + rotated),), ""


def _attention(kind: str, text: Mapping[str, Any]) -> tuple[Layers, ...]:
    depth = _needed(text, "num_hidden_layers", _MANY_LAYERS)
    heads = _needed(text, "num_attention_heads", _MANY_HEADS)
    kv_heads = _number(text, ("num_key_value_heads",), _MANY_HEADS) or heads
    if heads % kv_heads:
        raise _absurd("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    size = _number(text, ("head_dim",), _WIDE) or max(1, _needed(text, "hidden_size", _WIDE) // heads)
    width = size + (_number(text, ("v_head_dim",), _WIDE) or size)
    sliding, window = _sliding(kind, text, depth)
    full = Layers("full", depth - sliding, kv_heads, width)
    return tuple(each for each in (full, Layers("sliding", sliding, kv_heads, width, window)) if each.count)


def _sliding(kind: str, text: Mapping[str, Any], depth: int) -> tuple[int, int]:
    """Return how many layers attend to a window, and its tokens."""
    # Qwen's types have a window in config.json that is not used.
    if kind.startswith("qwen") or text.get("use_sliding_window") is False:
        return 0, 0
    window = _number(text, ("sliding_window",), _LONG, least=0) or 0
    if types := _list(text, "layer_types"):
        if len(types) != depth:
            raise _absurd("layer_types", len(types), f"a list of {depth} words, one for each layer")
        count = types.count("sliding_attention")
        if count and not window:
            raise _absurd("sliding_window", text.get("sliding_window"), "a number from 1")
        return count, window
    if kind in _EVERY and window:
        every = _number(text, ("sliding_window_pattern", "_sliding_window_pattern"), _MANY_LAYERS) or _EVERY[kind]
        return depth - depth // every, window
    return (depth, window) if window else (0, 0)


def _experts(text: Mapping[str, Any]) -> tuple[int, int]:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    by_token = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "top_k_experts", "moe_k")
    count, used = (_single(text, keys, 1 << 20, least=0) for keys in (names, by_token))
    if count and used > count:
        raise _absurd("num_experts_per_tok", used, f"at most the {count} experts")
    return count, used


def _method(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return ""
    inner = quantization.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    found = quantization.get("quant_method") or inner.get("quant_algo") or quantization.get("quant_algo")
    return schema.show(found).strip("'") if isinstance(found, str) and found else "a method that it does not name"


def _kv_dtype(quantization: Any) -> str:
    """Return the dtype of the cache that a checkpoint asks for: vLLM follows it unless told otherwise."""
    if not isinstance(quantization, dict):
        return "auto"
    inner = quantization.get("quantization")
    places = [quantization, inner] if isinstance(inner, dict) else [quantization]
    asked = [each.get(key) for each in places for key in ("kv_cache_scheme", "kv_cache_quant_algo")]
    found = next((each for each in asked if each), None)
    if isinstance(found, dict):
        return "fp8" if (found.get("num_bits"), found.get("type")) == (8, "float") else schema.show(found)
    if isinstance(found, str):
        return "fp8" if found.lower() in ("fp8", "fp8_e4m3") else schema.show(found)
    return "auto"


def _remote_code(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what `auto_map` names: code in the model's own repository."""
    found = config.get("auto_map")
    if not isinstance(found, dict):
        return ()
    named = [each for value in found.values() for each in (value if isinstance(value, list) else [value])]
    return tuple(sorted({schema.show(each).strip("'") for each in named if isinstance(each, str)}))


def _needed(text: Mapping[str, Any], key: str, most: int) -> int:
    found = _number(text, (key,), most)
    if found is None:
        raise ModelError(f"config.json has no `{key}`", hint="restore the model's own config.json")
    return found


def _single(text: Mapping[str, Any], keys: Sequence[str], most: int, least: int = 1) -> int:
    """Return a number that some types have for each layer: 0 then, and if there is none."""
    return _number({key: text[key] for key in keys if not isinstance(text.get(key, []), list)}, keys, most, least) or 0


def _number(text: Mapping[str, Any], keys: Sequence[str], most: int, least: int = 1) -> int | None:
    """Return the first of the numbers that config.json has.

    Raises:
        ModelError: it is not a whole number of a possible size.
    """
    for key in keys:
        if (found := text.get(key)) is not None:
            if type(found) is not int or not least <= found <= most:
                raise _absurd(key, found, f"a whole number from {least} to {most}")
            return found
    return None


def _absurd(key: str, found: object, wanted: str) -> ModelError:
    return ModelError(
        f"config.json: `{key}` must be {wanted}, not {schema.show(found)}", hint="restore the model's own config.json"
    )
