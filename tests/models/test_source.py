"""Where a model is found, what is fetched from the hub, and what is said when nothing is there."""

from __future__ import annotations

import errno
import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub

from unsloth.models.source import ModelError, locate, missing_weights


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def cached(cache):
    """Put copies of files into the cache, as downloads of `somebody/something` leave them."""

    def put(*files: Path) -> Path:
        repository = cache / "models--somebody--something"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for file in files:
            shutil.copy(file, snapshot)
        return snapshot

    return put


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A hub with one repository, whose files are those of a folder. Returns the names of what was fetched from it."""

    def serve(folder: Path) -> list[str]:
        fetched: list[str] = []

        def snapshot_download(name, *, allow_patterns, **_):
            target = tmp_path / "downloaded"
            target.mkdir(exist_ok=True)
            for file in folder.iterdir():
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, target)
                    fetched.append(file.name)
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    return serve


def fails(monkeypatch, error: Exception) -> None:
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_presets_folders_and_files(checkpoint, tmp_path):
    assert locate("tiny-llama").folder is None
    assert locate(str(checkpoint)).folder == checkpoint
    assert locate(str(checkpoint / "config.json")).folder == checkpoint
    (tmp_path / "weights.gguf").touch()
    for source in (locate(str(tmp_path / "weights.gguf")), locate(str(tmp_path), gguf_file="weights.gguf")):
        assert (source.folder, source.gguf) == (tmp_path, "weights.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama-8b", "no preset 'lama-8b', did you mean 'llama-8b'"),
        ("/no/such/folder", "'/no/such/folder' is no folder with a config.json"),
        ("./nowhere", "'./nowhere' is no folder"),
        ("/no/such/file.gguf", "there is no file '/no/such/file.gguf'"),
        ("a/b/c", "cannot load 'a/b/c': .*no valid id on the hub"),
    ],
)
def test_nothing_there(name, message):
    with pytest.raises(ModelError, match=message):
        locate(name)


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json$"):
        locate(str(tmp_path))


def test_a_folder_of_gguf_files_asks_which(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"gguf_file chooses one of its a\.gguf, b\.gguf"):
        locate(str(tmp_path))
    with pytest.raises(ModelError, match=r"has no file 'c\.gguf', but a\.gguf, b\.gguf"):
        locate(str(tmp_path), gguf_file="c.gguf")


def test_a_cached_model_needs_no_hub(checkpoint, cached, monkeypatch):
    fails(monkeypatch, AssertionError("asked the hub"))
    snapshot = cached(*checkpoint.iterdir())
    assert locate("somebody/something").folder == snapshot


def test_a_cache_with_only_the_tokenizer_is_completed_for_a_model(checkpoint, cached, remote):
    snapshot = cached(checkpoint / "config.json", checkpoint / "tokenizer.json")
    fetched = remote(checkpoint)
    assert locate("somebody/something", tokenizer_only=True).folder == snapshot
    assert fetched == []
    assert locate("somebody/something").folder != snapshot
    assert "model.safetensors" in fetched


def test_a_cached_gguf_file_needs_no_hub(tmp_path, cached, monkeypatch):
    fails(monkeypatch, AssertionError("asked the hub"))
    (tmp_path / "x.gguf").touch()
    snapshot = cached(tmp_path / "x.gguf")
    assert locate("somebody/something", gguf_file="x.gguf").folder == snapshot


@pytest.mark.usefixtures("cache")
def test_what_is_fetched(copy_of, remote):
    folder = copy_of()
    for name in ("pytorch_model.bin", "modeling_own.py", "other.gguf", "README.md"):
        (folder / name).touch()
    tokenizer = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    tokenizer |= {p.name for p in folder.glob("*.jinja")}
    fetched = remote(folder)
    locate("somebody/something", tokenizer_only=True)
    assert set(fetched) == tokenizer
    fetched = remote(folder)
    locate("somebody/something")
    assert set(fetched) == tokenizer | {"model.safetensors"}
    fetched = remote(folder)
    locate("somebody/something", trust_remote_code=True)
    assert set(fetched) == tokenizer | {"model.safetensors", "modeling_own.py"}
    fetched = remote(folder)
    locate("somebody/something", gguf_file="other.gguf")
    assert fetched == ["other.gguf"]


@pytest.mark.usefixtures("cache")
def test_offline():
    with pytest.raises(ModelError) as caught:
        locate("somebody/something")
    message = str(caught.value)
    assert message.startswith("cannot load 'somebody/something': there is no folder of that name, the cache /")
    assert message.endswith("/hub does not hold it whole, and the hub was not asked (HF_HUB_OFFLINE is set)")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub.LocalEntryNotFoundError, "the hub cannot be reached"),
        (hub.GatedRepoError, "accept their terms at https://.*/somebody/something"),
        (hub.RepositoryNotFoundError, "no public model on the hub of that name"),
        (hub.RevisionNotFoundError, "no such revision"),
        (hub.HfHubHTTPError, "the hub cannot be reached"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_the_hub_says(kind, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fails(monkeypatch, kind.__new__(kind))  # their arguments differ from version to version
    with pytest.raises(ModelError, match=f"cannot load 'somebody/something': .*{message}"):
        locate("somebody/something")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "no space left on the disk of /data/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "no permission to use /data/x"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_the_disk(error, message, monkeypatch):
    fails(monkeypatch, error)
    with pytest.raises(ModelError, match=message):
        locate("somebody/something")


def test_missing_shards(tmp_path):
    assert missing_weights(tmp_path) == ["model.safetensors"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[0]).touch()
    assert missing_weights(tmp_path) == shards[1:]
