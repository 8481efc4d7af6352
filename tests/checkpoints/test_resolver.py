"""Names of models and adapters: existing paths, ids on a server that stands in for the Hub, and mistyped names."""

from __future__ import annotations

import shutil

import huggingface_hub.constants
import pytest
from hub_server import COMMITS, no_network, serve
from plain_pair import write_adapter, write_model
from safetensors.numpy import load_file

from safelora_fast import project_adapter
from safelora_fast.checkpoints.resolver import adapter_folder, did_you_mean, find_model, label, named_adapter
from safelora_fast.errors import AdapterError, CheckpointError

__all__ = ["no_network"]

TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", 3)
    for name in (*TOKENIZER, "README.md", "training_args.bin"):
        (adapter / name).write_text("{}")
    model = write_model(tmp_path / "model", 1)
    (tmp_path / "empty").mkdir()
    folders = {"some/adapter": adapter, "some/model": model, "some/empty": tmp_path / "empty"}
    with serve(folders, tmp_path / "cache", monkeypatch) as served:
        yield served


def test_an_adapter_of_the_hub_is_its_files(hub, tmp_path):
    folder = adapter_folder("some/adapter@v1")
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert label(folder) == f"some/adapter@{COMMITS['v1']}"
    assert {commit for _, commit, _ in hub.fetched} == {COMMITS["v1"]}
    fetched = {file.name for file in adapter_folder("some/adapter@v1", tokenizer=True).iterdir()}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", *TOKENIZER}
    for name in fetched:
        assert (folder / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_an_adapter_of_the_hub_is_projected_as_its_folder(hub, tmp_path):
    models = {"aligned": tmp_path / "model", "base": write_model(tmp_path / "base", 2)}
    local = project_adapter(tmp_path / "adapter", **models, output=tmp_path / "local", select="all")
    remote = project_adapter("some/adapter", **models, output=tmp_path / "remote", select="all")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("local", "remote")]
    assert all((weights[1][key] == tensor).all() for key, tensor in weights[0].items())
    assert remote.adapters[0].adapter == f"some/adapter@{COMMITS['main']}"
    assert [module.cosine for module in remote.adapters[0].modules] == [m.cosine for m in local.adapters[0].modules]
    hub.folders["other/another"] = hub.folders["some/adapter"]
    project_adapter(["some/adapter", "other/another"], **models, output=tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["adapter", "another"]


@pytest.mark.usefixtures("hub")
def test_offline_the_cache_serves_what_was_fetched(monkeypatch):
    online = adapter_folder("some/adapter", tokenizer=True)
    model = find_model("some/model")
    assert not model.offline
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("some/adapter", tokenizer=True) == online
    assert find_model("some/model").arguments() == {
        "pretrained_model_name_or_path": "some/model",
        "revision": COMMITS["main"],
        "local_files_only": True,
    }
    assert model.commit == COMMITS["main"]


@pytest.mark.usefixtures("hub")
def test_offline_a_tokenizer_that_may_be_missing_is_no_guess(monkeypatch):
    """If an adapter was downloaded in another way, it is unknown whether it has its own tokenizer."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        huggingface_hub.hf_hub_download("some/adapter", name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("some/adapter")
    with pytest.raises(
        AdapterError, match=r"tokenizer_config.json is neither in the Hub's cache nor within reach; go online"
    ):
        adapter_folder("some/adapter", tokenizer=True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/model", "the repository holds no adapter_config.json, so it is not a PEFT adapter"),
        ("some/adapter@v9", "has no revision 'v9'; check what follows the @ of the adapter"),
        ("some/nothing", "the adapter is neither a local path nor a repository that you may read"),
        ("a..b/c", "the adapter is neither a local path nor a name that the Hub allows"),
        ("a/b/c", "the adapter is neither a file, nor a folder, nor a Hub id"),
    ],
)
def test_what_is_no_adapter_of_the_hub(name, message):
    with pytest.raises(AdapterError, match=message):
        adapter_folder(name)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/adapter", "this is a PEFT adapter, not a model; give the model that it was trained on"),
        ("some/empty", "holds no model: there is no config.json"),
        ("some/nothing", "the model is neither a local path nor a repository"),
    ],
)
def test_what_is_no_model_of_the_hub(name, message):
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        find_model(name)


def test_a_gated_repository_says_what_to_do(hub):
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(
        CheckpointError, match=rf"some/model: the model is gated: accept its terms on {hub.address}/some/model"
    ):
        find_model("some/model")


def test_without_a_network_every_name_is_refused_soon(tmp_path, monkeypatch, no_network):
    """The first name shows that no server listens; the others do not wait again."""
    (tmp_path / "runs" / "llama-chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"runs/llama-chta: there is no such path here.*did you mean runs/llama-chat\?$"
    ):
        find_model("runs/llama-chta")
    waited = sum(no_network)
    with pytest.raises(
        AdapterError, match=r"go online, or give the adapter as a path; did you mean runs/llama-chat\?$"
    ):
        adapter_folder("rnus/llama-chat")
    assert sum(no_network) == waited <= 2


def test_paths(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", 3)
    for path in (adapter, str(adapter), adapter / "adapter_config.json", adapter / "adapter_model.safetensors"):
        assert adapter_folder(path) == adapter
    assert named_adapter(str(adapter)) == ("adapter", adapter)
    assert named_adapter(f"evil={adapter}") == ("evil", adapter)
    model = write_model(tmp_path / "model", 1)
    (model / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"model: holds no model: there is no config.json"):
        find_model(model)
    (tmp_path / "config.json").rename(model / "config.json")
    index = model / "model.safetensors.index.json"
    assert find_model(index).name == find_model(model).name == str(model)
    shutil.copy(next(model.glob("*.safetensors")), model / "model.safetensors")
    assert find_model(model / "model.safetensors").name == str(model)
    refused = rf"is a file that transformers does not load; give the model's folder, {model}$"
    with pytest.raises(CheckpointError, match=refused):
        find_model(index)  # transformers loads the single file next to it
    (model / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with pytest.raises(CheckpointError, match=refused):
        find_model(model / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").rename(folder / "config.json"), "; it holds a model"),
        (lambda folder: folder.rename(folder.parent / "adaptor"), r"did you mean .*/adaptor\?"),
    ],
)
def test_folders_that_hold_no_adapter(tmp_path, change, message):
    folder = write_adapter(tmp_path / "adapter", 3)
    change(folder)
    with pytest.raises(AdapterError, match=message):
        adapter_folder(folder)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_name_at_all(name):
    """An empty name does not mean the current folder."""
    with pytest.raises(CheckpointError, match=r"the model is '.*'; give its path or its Hub id"):
        find_model(name)
    with pytest.raises(AdapterError, match=r"the adapter is '.*'; give its path or its Hub id"):
        adapter_folder(name)


def test_the_hint_names_what_exists(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean(tmp_path / "modles" / "llama") == f"; did you mean {tmp_path}/models/llama?"
    assert did_you_mean(tmp_path / "modles" / "mistral") == ""
    assert did_you_mean(tmp_path / "nothing" / "alike") == ""
