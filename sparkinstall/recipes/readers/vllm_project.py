"""Reader of vllm-project/recipes: arguments in layers, composed for one Spark or several."""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from sparkinstall.recipes import Change, ReadRecipe
from sparkinstall.recipes.readers.assemble import (
    NEVER_RUN,
    Draft,
    Place,
    assembled,
    is_true,
    line,
    mapping,
    number,
    release,
    slug,
    texts,
    words,
)
from sparkinstall.recipes.serve_options import options

FORMAT = "vllm-project/recipes"
_SPARK = "dgx_spark_gb10"
# From the least to the most specific; the last one wins.
_HARDWARE = ("default", "nvidia", "NVIDIA", "blackwell", _SPARK)
_MEMORY_GB = 128
_MOST_NODES = 16


def read(data: Mapping[str, Any], place: Place) -> tuple[ReadRecipe, ...]:
    """Read a file: one recipe for each of its variants that a Spark may use.

    Raises:
        RecipeError: a part of it has the wrong type.
    """
    variants = mapping(data.get("variants"), "variants", place) or {"default": {}}
    found: list[ReadRecipe] = []
    for name in variants:
        variant = mapping(variants[name], f"variants.{line(name)}", place)
        supported = words(variant.get("supported_hardware"), "supported_hardware", place)
        if not supported or _SPARK in supported:
            read = _Variant(data, name, variant, place).recipe()
            if read.recipe.id in [each.recipe.id for each in found]:
                read = replace(read, recipe=replace(read.recipe, id=slug(f"{read.recipe.id}-{name}")))
            found.append(read)
    return tuple(found)


def _image_of(value: Any) -> str:
    """Return the image for a Spark, of a text or of images by maker and CUDA."""
    while isinstance(value, Mapping):
        value = value.get("cu130") or value.get("nvidia")
    return str(value or "")


class _Variant:
    """One variant of a file, and the layers that apply to it on Sparks."""

    def __init__(self, data: Mapping[str, Any], name: str, variant: Mapping[str, Any], place: Place) -> None:
        self._data, self._name, self._variant, self._place = data, name, variant, place
        self._model = mapping(data.get("model"), "model", place)
        self._ranks = self._tensor_parallel()
        self._strategy = "single_node_tp" if self._ranks == 1 else "multi_node_tp"

    def recipe(self) -> ReadRecipe:
        """Compose the recipe. The order of the layers decides which of two options counts."""
        args: list[str] = []
        env: dict[str, str] = {}
        for layer in self._layers():
            args += words(layer.get("extra_args"), "extra_args", self._place)
            env |= texts(layer.get("extra_env"), "extra_env", self._place)
        model = str(self._variant.get("model_id") or self._model.get("model_id") or "")
        least = self._variant.get("min_vllm_version") or self._model.get("min_vllm_version")
        stray, given = options(args)
        draft = Draft(
            format=FORMAT,
            id=model.rpartition("/")[2] + ("" if self._is_named_by_model() else f"-{self._name}"),
            model=model,
            args=given,
            env=env,
            needs_vllm=release(least),
            notes=list(self._notes()),
        )
        if stray:
            draft.changes.append(Change(line(" ".join(stray)), "dropped", "it belongs to no option"))
        if least and not release(least):
            draft.patched.append(f"min_vllm_version {line(least)}, which is no release")
        self._image(draft)
        if self._data.get("dependencies"):
            draft.changes.append(Change("dependencies", "ignored", NEVER_RUN))
        return assembled(draft, self._place)

    def _is_named_by_model(self) -> bool:
        return self._name == "default" or bool(self._variant.get("model_id"))

    def _layers(self) -> Iterator[Mapping[str, Any]]:
        """Yield what adds `extra_args` and `extra_env`, the weakest first."""
        strategies = mapping(self._data.get("strategy_overrides"), "strategy_overrides", self._place)
        strategy = mapping(strategies.get(self._strategy), f"strategy_overrides.{self._strategy}", self._place)
        yield {"extra_args": self._model.get("base_args"), "extra_env": self._model.get("base_env")}
        yield self._variant
        if self._ranks > 1:
            yield {"extra_args": ["--tensor-parallel-size", str(self._ranks)]}
        yield {**strategy, "extra_env": strategy.get("env") or strategy.get("extra_env")}
        own = mapping(strategy.get("hardware_overrides"), "hardware_overrides of the strategy", self._place)
        common = mapping(self._data.get("hardware_overrides"), "hardware_overrides", self._place)
        # A strategy's layer of one generation replaces the common one.
        yield from self._for_spark({**common, **own})
        yield from self._for_spark(mapping(self._variant.get("hardware_overrides"), "hardware_overrides", self._place))
        for feature in self._features():
            yield {"extra_args": feature.get("args"), "extra_env": feature.get("env")}

    def _for_spark(self, overrides: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        for name in _HARDWARE:
            if name in overrides:
                yield mapping(overrides[name], f"hardware_overrides.{name}", self._place)

    def _tensor_parallel(self) -> int:
        """Return the number of ranks, one a node: what the file says, or as many as its figure of memory needs."""
        given = self._variant.get("tp")
        if isinstance(given, Mapping):
            given = next((given[name] for name in reversed(_HARDWARE) if name in given), None)
        if given not in (None, ""):
            return min(number(str(given)) or 1, _MOST_NODES)
        # The file's numbers of ranks without a variant are those of boxes with several GPUs.
        needed, nodes = self._gigabytes(), 1
        while needed > nodes * _MEMORY_GB and nodes < _MOST_NODES and self._scales():
            nodes *= 2
        return nodes

    def _gigabytes(self) -> int:
        return number(str(self._variant.get("vram_minimum_gb") or "")) or 0

    def _scales(self) -> bool:
        """Whether the file divides the model over several nodes."""
        hardware = mapping(self._data.get("strategy_hardware"), "strategy_hardware", self._place)
        of_spark = mapping(hardware.get("multi_node_tp"), "strategy_hardware.multi_node_tp", self._place).get(_SPARK)
        strategies = words(self._data.get("compatible_strategies"), "compatible_strategies", self._place)
        return of_spark != "unsupported" and (of_spark is not None or "multi_node_tp" in strategies)

    def _features(self) -> Iterator[Mapping[str, Any]]:
        """Yield the features that are on."""
        features = mapping(self._data.get("features"), "features", self._place)
        off = self._opt_in()
        for name in features:
            feature = mapping(features[name], f"features.{line(name)}", self._place)
            hardware = mapping(feature.get("hardware"), f"features.{line(name)}.hardware", self._place)
            if name not in off and hardware.get(_SPARK) != "unsupported":
                yield self._replaced(self._mode(name, feature))

    def _opt_in(self) -> set[str]:
        by_hardware = mapping(self._data.get("hardware_opt_in_features"), "hardware_opt_in_features", self._place)
        more = words(by_hardware.get(_SPARK), "hardware_opt_in_features", self._place)
        return {*words(self._data.get("opt_in_features"), "opt_in_features", self._place), *more}

    def _mode(self, name: str, feature: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the mode of a feature that this variant has, or the feature itself if it has no modes."""
        modes = mapping(feature.get("modes"), f"features.{line(name)}.modes", self._place)
        if not modes:
            return feature
        chosen = mapping(self._variant.get("default_modes"), "default_modes", self._place)
        mode = mapping(modes.get(str(chosen.get(name) or feature.get("default_mode") or "")), "modes", self._place)
        fitting = words(mode.get("variants"), "variants of a mode", self._place)
        return mode if not fitting or self._name in fitting else {}

    def _replaced(self, feature: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a feature with the arguments that a Spark has instead of its own."""
        overrides = mapping(feature.get("hardware_overrides"), "hardware_overrides of a feature", self._place)
        for override in self._for_spark(overrides):
            feature = {**feature, **override}
        return feature

    def _image(self, draft: Draft) -> None:
        """Note the image, and whether it has what no release of vLLM has."""
        overrides = mapping(self._variant.get("hardware_overrides"), "hardware_overrides", self._place)
        for layer in (self._model, self._variant, *self._for_spark(overrides)):
            draft.image = _image_of(layer.get("docker_image")) or draft.image
            install = layer.get("install")
            if isinstance(install, Mapping) and str(install.get("pip")).lower() == "false":
                draft.patched.append("install.pip: false: no wheel has what it needs")
            if is_true(layer.get("nightly_required")):
                draft.patched.append("nightly_required: it asks for vLLM's code of a later day than a release")
            if layer.get("docker_serve_command"):
                draft.changes.append(Change("docker_serve_command", "ignored", "it is for the image"))
        if draft.image:
            draft.container.append(f"docker_image {line(draft.image)}")

    def _notes(self) -> Iterator[str]:
        meta = mapping(self._data.get("meta"), "meta", self._place)
        hardware = mapping(meta.get("hardware"), "meta.hardware", self._place)
        yield str(self._variant.get("description") or meta.get("description") or "a variant of the file")
        if _SPARK not in hardware:
            yield "the file does not say that it runs on a Spark"
        elif hardware[_SPARK] == "unsupported":
            yield "the file says that it does not run on a Spark"
        if self._gigabytes() > self._ranks * _MEMORY_GB:
            have = "one Spark has" if self._ranks == 1 else f"{self._ranks} Sparks have"
            yield f"the file asks for {self._gigabytes()} GB of memory, more than {have}"
        if off := sorted(self._opt_in()):
            yield f"off unless asked for: {', '.join(off)}"
        if "spark" in str(self._data.get("guide") or "").lower():
            yield "the guide in the file speaks of the Spark: it may have a better command than the file's data"
