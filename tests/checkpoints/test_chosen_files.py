"""Which files of a folder or repository are the model: those that transformers loads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from plain_pair import module_names, write_adapter, write_model
from safetensors.numpy import load_file, save_file

from safelora_fast import project_adapter
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def tensors_of(folder):
    return {name: tensor for shard in folder.glob("model-*.safetensors") for name, tensor in load_file(shard).items()}


def beside_stale_shards(folder, *, seed=1):
    """Write a whole model in one file, next to the index and shards of an earlier save of another model."""
    write_model(folder, seed + 10)
    newer = tensors_of(write_model(folder.parent / f"{folder.name}-newer", seed))
    save_file(newer, folder / "model.safetensors", {"format": "pt"})
    return folder, newer


def norms_of_v(tmp_path, aligned, base):
    """Return ‖V‖_F of each module from the projection's report."""
    if not (tmp_path / "adapter").exists():
        write_adapter(tmp_path / "adapter", 3)
    report = project_adapter(tmp_path / "adapter", aligned=aligned, base=base, output=None)
    return {module.name: module.v_norm for module in report.adapters[0].modules}, report


def truth(aligned, base):
    """Return ‖V‖_F of each module, computed densely in float64."""
    return {
        name: np.linalg.norm(aligned[f"{name}.weight"].astype(float) - base[f"{name}.weight"].astype(float))
        for name in module_names()
    }


@pytest.mark.parametrize("shards", ["there", "gone"])
@pytest.mark.parametrize("role", ["aligned", "base"])
def test_a_whole_file_wins_over_an_index(tmp_path, role, shards):
    stale, tensors = beside_stale_shards(tmp_path / "stale")
    if shards == "gone":
        for shard in stale.glob("model-*.safetensors"):
            shard.unlink()
    other = write_model(tmp_path / "other", 2)
    models = {"aligned": other, "base": other, role: stale}
    norms, report = norms_of_v(tmp_path, **models)
    assert norms == pytest.approx(truth(tensors, tensors_of(other)), rel=1e-6)
    assert getattr(report, role)["files"] == [str(stale / "model.safetensors")]


def test_a_whole_file_wins_over_an_index_on_the_hub(hub, tmp_path):
    hub.folders["some/stale"], tensors = beside_stale_shards(tmp_path / "stale")
    norms, _ = norms_of_v(tmp_path, "some/stale", "some/base")
    assert norms == pytest.approx(truth(tensors, tensors_of(tmp_path / "base")), rel=1e-6)
    assert {name for repository, _, name in hub.fetched if repository == "some/stale"} == {
        "config.json",
        "model.safetensors",
    }


def test_an_index_that_is_given_is_read(tmp_path):
    stale, _ = beside_stale_shards(tmp_path / "stale")
    other = write_model(tmp_path / "other", 2)
    norms, report = norms_of_v(tmp_path, stale / INDEX, other)
    assert norms == pytest.approx(truth(tensors_of(stale), tensors_of(other)), rel=1e-6)
    assert report.aligned["source"] == str(stale / INDEX)  # this opens the same files again


@pytest.mark.parametrize(
    "kind", ["stale", "single", "sharded", "variant beside", "consolidated beside", "adapter beside", "named"]
)
def test_a_folder_is_what_transformers_loads(tmp_path, kind):
    """The chosen files hold the tensors of the model that from_pretrained returns."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path / "model"

    def save(seed, **options):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder, **options)

    if kind in {"stale", "sharded"}:
        save(1, max_shard_size="5KB")
    if kind == "stale":
        kept = tmp_path / "kept"
        shutil.copytree(folder, kept)
        save(2)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    if kind not in {"stale", "sharded"}:
        save(2)
    others = {"variant": "model.fp16.safetensors", "consolidated": "consolidated.safetensors"}
    if (first := kind.partition(" ")[0]) in others:
        wrong = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(wrong, folder / others[first], {"format": "pt"})
    if kind == "adapter beside":
        shutil.copy(write_adapter(tmp_path / "adapter", 3) / "adapter_model.safetensors", folder)
    if kind == "named":
        moved = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(moved, folder / "other.safetensors", {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": "other.safetensors"}))
    checkpoint = open_checkpoint(folder, role="aligned")
    checkpoint.require(checkpoint.names)
    ours = {name: tensor for file in checkpoint.files for name, tensor in load_file(file.path).items()}
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name].numpy()) for name in ours)


def test_an_adapter_beside_a_model_is_told(tmp_path):
    aligned, base = write_model(tmp_path / "aligned", 1), write_model(tmp_path / "base", 2)
    expected, _ = norms_of_v(tmp_path, aligned, base)
    for path in write_adapter(tmp_path / "left", 4).iterdir():
        shutil.copy(path, aligned)
    norms, report = norms_of_v(tmp_path, aligned, base)
    assert norms == expected
    assert any("holds an adapter" in warning for warning in report.warnings)
    (aligned / "config.json").unlink()  # then transformers loads the model that the adapter names
    with pytest.raises(CheckpointError, match="is a PEFT adapter, not a model"):
        open_checkpoint(aligned, role="aligned")


def test_a_repository_of_an_adapter(hub, tmp_path):
    (tmp_path / "aligned" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"some/aligned: holds an adapter_config\.json"):
        open_checkpoint("some/aligned", role="aligned")
    assert not any(name.endswith(".safetensors") for _, _, name in hub.fetched)


@pytest.mark.parametrize("stray", ["adapter_model.safetensors", "model.fp16.safetensors"])
def test_a_pickle_is_not_passed_over_for_a_stray_file(tmp_path, stray):
    """transformers loads pytorch_model.bin here."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"{module_names()[0]}.weight": np.ones((2, 2), np.float32)}, folder / stray)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"its model is pytorch_model\.bin.*to convert it"):
        open_checkpoint(folder, role="base")


def test_a_model_in_a_folder_within(tmp_path):
    write_model(tmp_path / "above" / "unwrapped", 1)
    with pytest.raises(CheckpointError, match="there is a model in unwrapped: give that folder"):
        open_checkpoint(tmp_path / "above", role="base")


@pytest.mark.parametrize("named", ["../other.safetensors", "adapter_model.bin", 3, "gone.safetensors"])
def test_a_named_file_that_cannot_be_read(tmp_path, named):
    folder = write_model(tmp_path / "model", 1)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(CheckpointError, match="as transformers_weights"):
        open_checkpoint(folder, role="base")
