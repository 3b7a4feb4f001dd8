"""The step `model`: brings the model that `serve` names, and takes away only what it has brought."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparkinstall.core import catalogue, models
from sparkinstall.core.model_step import ModelStep, Snapshot, remove
from sparkinstall.core.serve_settings import wanted
from sparkinstall.errors import Problem
from sparkinstall.resources import Drift, Ok
from sparkinstall.system import Undo
from tests.support.model_hub import COMMIT, ModelHub, served
from tests.support.nodes import node_of
from tests.support.recording import RecordingSystem

MODEL = "org/tiny-model"
INDEX = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
FILES = {
    "config.json": b'{"model_type": "x", "max_position_embeddings": 2048}',
    "one.safetensors": b"1" * 70_000,
    "two.safetensors": b"2" * 70_000,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}
SNAPSHOT = Snapshot(MODEL, COMMIT)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(models, "_PAUSES", (0.01,))
    with served(ModelHub(MODEL, dict(FILES))) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "hf/hub/models--org--tiny-model"


def records(system: RecordingSystem, there: bool) -> list[Undo]:
    kind, _, subject = system.changed[0].removeprefix("promise ").partition(" ")
    assert (kind, Path(subject).name) == ("model", "models--org--tiny-model")
    return [Undo("model", subject, {"there": there}, {"commit": COMMIT})]


def test_name_of_the_hub_is_pinned_to_its_commit(hub: ModelHub) -> None:
    found = wanted(MODEL)
    assert (found.served.settings["serving.revision"], found.files) == (COMMIT, None)
    SNAPSHOT.apply(RecordingSystem())
    hub.requests.clear()
    here = wanted(MODEL)
    assert here.files is not None
    assert here.files.revision == COMMIT
    assert here.served.settings["serving.max_model_len"] == 2048


def test_step_is_for_models_of_the_hub_that_serve_has_pinned(tmp_path: Path) -> None:
    def steps(**settings: str) -> list[str]:
        return [step.name for step in catalogue.of(node_of(tmp_path, **settings))]

    assert "model" in steps(serving__model=MODEL, serving__revision=COMMIT)
    assert "model" not in steps(serving__model=MODEL)
    assert "model" not in steps(serving__model="/srv/model", serving__revision=COMMIT)


def test_draft_of_a_recipe_is_pinned_and_must_be_whole_too(hub: ModelHub, folder: Path, tmp_path: Path) -> None:
    hub.others = ("org/draft",)
    config = {"method": "dflash", "model": "org/draft", "num_speculative_tokens": 3}
    recipe = {"id": "mine", "model": MODEL, "args": [["--speculative-config", json.dumps(config)]]}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    settings = wanted(str(tmp_path / "mine.yaml")).served.settings
    assert json.loads(settings["serving.arguments"][1]) == {**config, "revision": COMMIT}
    own = {name.replace(".", "__"): value for name, value in settings.items()}
    resources = list(ModelStep().resources(node_of(tmp_path, **own)))
    assert resources == [SNAPSHOT, Snapshot("org/draft", COMMIT)]
    system = RecordingSystem()
    for each in (SNAPSHOT, Snapshot("org/draft", COMMIT)):
        each.apply(system)
        assert isinstance(each.check(system), Ok)
    (folder.with_name("models--org--draft") / "snapshots" / COMMIT / "two.safetensors").resolve().unlink()
    assert Snapshot("org/draft", COMMIT).check(system) == Drift(
        f"download what org/draft at {COMMIT[:12]} lacks: two.safetensors"
    )
    # What the user sets instead of it is theirs to bring.
    by_hand = {**own, "serving__arguments": ("--speculative-config", json.dumps(config))}
    assert list(ModelStep().resources(node_of(tmp_path, **by_hand))) == [SNAPSHOT]


def test_model_is_downloaded_and_removed_again(hub: ModelHub, folder: Path) -> None:
    del hub
    system = RecordingSystem()
    assert SNAPSHOT.check(system) == Drift(f"download {MODEL} at {COMMIT[:12]}")
    SNAPSHOT.apply(system)
    assert isinstance(SNAPSHOT.check(system), Ok)
    assert (folder / "snapshots" / COMMIT / "two.safetensors").is_file()
    assert remove(records(system, there=False), system).outcome == "removed"
    assert not folder.exists()
    assert remove(records(system, there=False), system).outcome == "nothing"


def test_incomplete_model_is_drift_that_names_its_files_and_is_completed(hub: ModelHub, folder: Path) -> None:
    del hub
    SNAPSHOT.apply(RecordingSystem())
    (folder / "snapshots" / COMMIT / "two.safetensors").resolve().unlink()
    system = RecordingSystem()
    assert SNAPSHOT.check(system) == Drift(f"download what {MODEL} at {COMMIT[:12]} lacks: two.safetensors")
    SNAPSHOT.apply(system)
    assert isinstance(SNAPSHOT.check(system), Ok)
    found = remove(records(system, there=True), system)
    assert (found.outcome, folder.exists()) == ("nothing", True), "some of it was there before"


def test_incomplete_model_without_the_hub_is_an_error_that_names_its_files(
    hub: ModelHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub
    SNAPSHOT.apply(RecordingSystem())
    (folder / "snapshots" / COMMIT / "two.safetensors").resolve().unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Problem) as error:
        SNAPSHOT.apply(RecordingSystem())
    assert "still missing: two.safetensors" in error.value.cause


def test_model_with_another_revision_is_kept(hub: ModelHub, folder: Path) -> None:
    del hub
    SNAPSHOT.apply(system := RecordingSystem())
    (folder / "snapshots" / ("b" * 40)).mkdir()
    found = remove(records(system, there=False), system)
    assert (found.outcome, "bbbbbbbbbbbb" in found.note) == ("kept", True)
    assert (folder / "snapshots" / COMMIT).is_dir()


def test_same_model_in_the_cache_of_who_undoes_it_is_kept(
    hub: ModelHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub
    SNAPSHOT.apply(system := RecordingSystem())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    SNAPSHOT.apply(RecordingSystem())
    assert remove(records(system, there=False), system).outcome == "removed"
    assert not folder.exists()
    assert (tmp_path / "other/models--org--tiny-model/snapshots" / COMMIT).is_dir()


def test_model_that_was_moved_and_linked_is_kept_whole(hub: ModelHub, folder: Path, tmp_path: Path) -> None:
    del hub
    SNAPSHOT.apply(system := RecordingSystem())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert remove(records(system, there=False), system).outcome == "kept"
    assert (tmp_path / "elsewhere/snapshots" / COMMIT / "two.safetensors").is_file()
