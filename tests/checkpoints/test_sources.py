"""Sources of checkpoints: files, indices, folders, and a server that stands in for the Hub."""

from __future__ import annotations

import json
import logging

import huggingface_hub.constants
import numpy as np
import pytest
from hub_server import COMMITS, no_network
from plain_pair import module_names, write_adapter, write_model
from safetensors.numpy import load_file, save_file

from safelora_fast import project_adapter
from safelora_fast.checkpoints.provenance import reopen
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import AdapterError, CheckpointError
from safelora_fast.subspace.safe_subspace import SafeSubspace

__all__ = ["no_network"]


def project(tmp_path, aligned, base, output, layers=2):
    adapter = tmp_path / f"adapter-{layers}"
    if not adapter.exists():
        write_adapter(adapter, 3, layers=layers)
    report = project_adapter(adapter, aligned=aligned, base=base, output=tmp_path / output, select="all")
    return report, (tmp_path / output / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("hub")
def test_ids_give_what_folders_give(tmp_path):
    _, local = project(tmp_path, tmp_path / "aligned", tmp_path / "base", "local")
    report, remote = project(tmp_path, "some/aligned", "some/base@v1", "remote")
    assert remote == local
    assert (report.aligned["source"], report.aligned["revision"]) == ("some/aligned", COMMITS["main"])
    assert (report.base["source"], report.base["revision"]) == ("some/base", COMMITS["v1"])


def test_only_shards_that_hold_needed_tensors_are_fetched(hub, tmp_path):
    """The adapter changes layer 0, which is in the first shard."""
    project(tmp_path, "some/aligned", "some/base", "out", layers=1)
    shards = {name for _, _, name in hub.fetched if name.endswith(".safetensors")}
    assert shards == {"model-00001-of-00002.safetensors"}


def test_tensors_that_equal_those_of_a_model_on_the_hub_do_not_bypass(hub, tmp_path):
    """The norm is in the last shard, which lora_A and lora_B do not need."""
    last = hub.folders["some/aligned"] / "model-00002-of-00002.safetensors"
    save_file({**load_file(last), "model.norm.weight": np.ones(16, np.float32)}, last, {"format": "pt"})
    index = last.parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = last.name
    index.write_text(json.dumps(content))
    adapter = write_adapter(tmp_path / "adapter", 3, layers=1)
    path, key = adapter / "adapter_model.safetensors", "base_model.model.model.norm.weight"
    save_file({**load_file(path), key: np.ones(16, np.float32)}, path, {"format": "pt"})
    settings = {"base": "some/base", "select": "all", "strict": True}
    report = project_adapter(adapter, aligned="some/aligned", output=tmp_path / "out", **settings)
    assert [(entry["tensor"], entry["change"]) for entry in report.adapters[0].copied] == [(key, 0.0)]
    last.unlink()
    settings["aligned"] = "some/aligned@v1"
    with pytest.raises(AdapterError, match=r"norm\.weight \(‖W − W_aligned‖ is not known: .*does not hold model-00002"):
        project_adapter(adapter, output=tmp_path / "unknown", **settings)


def test_a_second_run_takes_everything_from_the_cache(hub, tmp_path, monkeypatch):
    _, first = project(tmp_path, "some/aligned", "some/base", "first")
    hub.fetched.clear()
    _, second = project(tmp_path, "some/aligned", "some/base", "second")
    assert hub.fetched == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, offline = project(tmp_path, "some/aligned", "some/base", "offline")
    assert first == second == offline


def single_file(folder, seed):
    """Write the same model in one file, as small models are stored on the Hub."""
    sharded = write_model(folder / f"sharded-{seed}", seed)
    tensors = {name: tensor for shard in sharded.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    (folder / "single").mkdir()
    save_file(tensors, folder / "single" / "model.safetensors", {"format": "pt"})
    return folder / "single"


def test_a_cached_model_in_one_file_can_be_used_offline(hub, tmp_path, monkeypatch):
    """No index was ever requested, so the cache does not record that there is none."""
    for name, seed in (("some/one", 1), ("some/other", 2)):
        (tmp_path / name).mkdir(parents=True)
        hub.folders[name] = single_file(tmp_path / name, seed)
        huggingface_hub.hf_hub_download(name, "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, offline = project(tmp_path, "some/one", "some/other", "offline")
    _, local = project(tmp_path, tmp_path / "aligned", tmp_path / "base", "local")
    assert offline == local


def test_every_file_is_of_the_commit_that_the_report_names(hub, monkeypatch):
    """The main branch moves between the index and the shards."""
    checkpoint = open_checkpoint("some/aligned", role="aligned")
    monkeypatch.setitem(COMMITS, "former", COMMITS["main"])
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    checkpoint.require(checkpoint.names)
    assert checkpoint.revision == "a" * 40
    assert {commit for _, commit, _ in hub.fetched} == {"a" * 40}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models--meta-llama--Llama-2-7b", "neither a local path nor a name that the Hub allows"),
        ("a..b/c", "neither a local path nor a name that the Hub allows"),
        ("nobody/nothing", "nobody/nothing: the base model is neither a local path nor a repository"),
        ("some/base@v9", "some/base: has no revision 'v9'"),
        ("some/old", r"older \.bin checkpoints: load it with transformers"),
    ],
)
def test_ids_that_are_refused(name, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(name, role="base")


def test_a_remote_index_that_promises_too_much(hub, tmp_path):
    (tmp_path / "aligned" / "model-00002-of-00002.safetensors").unlink()
    checkpoint = open_checkpoint("some/aligned", role="aligned")
    with pytest.raises(CheckpointError, match="does not hold model-00002-of-00002"):
        checkpoint.require(checkpoint.names)
    assert hub.fetched


def test_offline_without_a_cache(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"some/aligned.*go online, or give the aligned model as a path"):
        open_checkpoint("some/aligned", role="aligned")
    assert hub.fetched == []


def test_without_a_network_a_mistyped_path_fails_soon_and_without_noise(tmp_path, monkeypatch, no_network, caplog):
    (tmp_path / "models" / "llama-chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint("models/llama-chta", role="aligned")
    assert "models/llama-chta: there is no such path here" in str(refused.value)
    assert str(refused.value).endswith("; did you mean models/llama-chat?")
    assert sum(no_network) <= 2
    assert caplog.records == []


def test_without_a_network_the_cache_serves(hub, tmp_path, monkeypatch):
    _, first = project(tmp_path, "some/aligned", "some/base", "first")
    hub.close()
    monkeypatch.setattr("time.sleep", lambda _: None)
    _, second = project(tmp_path, "some/aligned", "some/base", "second")
    assert first == second


def test_a_hub_that_fails_once_is_tried_again(hub, monkeypatch):
    """One lost connection does not mean that the network is missing."""
    from huggingface_hub import get_hf_file_metadata

    class ConnectError(Exception):
        pass

    tries = []

    def unsteady(*words, **options):
        tries.append(options)
        if len(tries) == 1:
            raise ConnectError
        return get_hf_file_metadata(*words, **options)

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unsteady)
    assert open_checkpoint("some/aligned", role="aligned").revision == COMMITS["main"]
    assert len(tries) == 2
    assert hub.fetched


def test_a_subspace_of_ids_stays_with_their_commits(hub, tmp_path, monkeypatch):
    """The branch moves after the subspace is built. The subspace names the commit, and that commit is read."""
    subspace = SafeSubspace.build(aligned="some/aligned", base="some/base@v1", rank=2, modules=["0.self_attn.q_proj"])
    sources = {role: (described["source"], described["revision"]) for role, described in subspace.sources.items()}
    assert sources == {"aligned": ("some/aligned", COMMITS["main"]), "base": ("some/base", COMMITS["v1"])}
    shards = {name for _, _, name in hub.fetched if name.endswith(".safetensors")}
    assert shards == {"model-00001-of-00002.safetensors"}
    local = SafeSubspace.build(
        aligned=tmp_path / "aligned", base=tmp_path / "base", rank=2, modules=["0.self_attn.q_proj"]
    )
    (ours,), (theirs,) = subspace.modules.values(), local.modules.values()
    assert np.array_equal(ours.left_vectors, theirs.left_vectors)
    monkeypatch.setitem(COMMITS, "former", COMMITS["main"])
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    checkpoint = reopen(subspace.sources["aligned"], role="aligned")
    assert (checkpoint.description, checkpoint.revision) == ("some/aligned", "a" * 40)


@pytest.mark.usefixtures("hub")
def test_a_remote_index_that_escapes(tmp_path):
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../secret"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside the repository"):
        open_checkpoint("some/base", role="base")


def test_every_kind_of_local_source_gives_the_same(tmp_path):
    sharded = write_model(tmp_path / "aligned", 1)
    tensors = {name: tensor for shard in sharded.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    single = single_file(tmp_path, 1)
    unindexed = tmp_path / "unindexed"
    unindexed.mkdir()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, unindexed / "one.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, unindexed / "two.safetensors")
    base = write_model(tmp_path / "base", 2)
    sources = [sharded, sharded / "model.safetensors.index.json", single, single / "model.safetensors", unindexed]
    results = {project(tmp_path, source, base, f"out-{index}")[1] for index, source in enumerate(sources)}
    assert len(results) == 1


def test_a_tensor_in_two_files_without_an_index(tmp_path):
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("one", "two"):
        save_file({f"{module_names()[0]}.weight": np.ones((2, 2), np.float32)}, folder / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"is in one.safetensors and in two.safetensors"):
        open_checkpoint(folder, role="base")


def test_neither_path_nor_id(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a file, nor a folder, nor a Hub id$"):
        open_checkpoint("./no/such/folder", role="base")
    write_model(tmp_path / "base", 2)
    with pytest.raises(CheckpointError, match=rf"nor a Hub id; did you mean {tmp_path}/base\?"):
        open_checkpoint(tmp_path / "bsae", role="base")
