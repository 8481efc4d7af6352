"""Safe subspaces of every family, compared with dense float64 decompositions of the weights in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from families import EXPERTS, FAMILIES, PROJECTIONS, Family, adapt, rewrite, save, weights

from safelora_fast.errors import CheckpointError, PairingError
from safelora_fast.subspace.safe_subspace import SafeSubspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]
RANK = 4


def pair(tmp_path, family, **settings):
    """Return V as (out, in) for the weights that an adapter of the family changes, and the folders."""
    made = FAMILIES[family] if isinstance(family, str) else family
    models = made.make(1, **settings), made.make(2, **settings)
    folders = {role: save(model, tmp_path / role) for role, model in zip(("aligned", "base"), models, strict=True)}
    ours, theirs = (weights(adapt(model, **made.target)) for model in models)
    return {name: (ours[name] - theirs[name]).numpy() for name in ours}, folders


def check(subspace, name, v):
    """Compare U_k, σ_k and ‖V‖ of a module, which is found by its name in the loaded model."""
    module = subspace.find(name)
    left, values, _ = np.linalg.svd(v)
    assert (len(module.left_vectors), module.columns) == v.shape, name
    assert module.v_norm == pytest.approx(np.linalg.norm(v), rel=1e-6), name
    assert np.allclose(module.singular_values, values[: module.rank], rtol=1e-5), name
    cosines = np.linalg.svd(left[:, : module.rank].T @ module.left_vectors, compute_uv=False)
    assert np.sqrt(1 - np.minimum(cosines, 1) ** 2).max() < 5e-3, name


def of_experts(name):
    return ".experts." in name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_every_family(tmp_path, family):
    differences, folders = pair(tmp_path, family)
    subspace = SafeSubspace.build(**folders, rank=RANK)
    for name, v in differences.items():
        if not of_experts(name):
            check(subspace, name, v)
    assert not any(of_experts(name) for name in subspace.modules)
    assert {module.rank for module in subspace.modules.values()} <= {RANK, 3, 1}  # a router has one row per expert


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_where_they_are_named(tmp_path, family):
    differences, folders = pair(tmp_path, family)
    leaves = [name.rpartition(".")[2] for name in EXPERTS]
    subspace = SafeSubspace.build(**folders, rank=RANK, modules=leaves)
    experts = [name for name in differences if of_experts(name)]
    assert len(experts) == 2 * 2 * 3
    for name in experts:
        check(subspace, name, differences[name])


def test_experts_kept_as_modules_of_their_own(tmp_path):
    """Older releases of transformers hold Mixtral like this in memory, and its checkpoints still do."""
    differences, folders = pair(tmp_path, "mixtral")
    subspace = SafeSubspace.build(**folders, rank=RANK, modules=["w1", "w2", "up_proj"])
    fused = differences["model.layers.1.mlp.experts.2.gate_up_proj"]
    check(subspace, "model.layers.1.block_sparse_moe.experts.2.w1", fused[: len(fused) // 2])
    check(subspace, "model.layers.1.mlp.experts.2.up_proj", fused[len(fused) // 2 :])
    check(subspace, "model.layers.1.mlp.experts.2.w2", differences["model.layers.1.mlp.experts.2.down_proj"])


@pytest.mark.parametrize(("family", "name"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("llama", "lm_head")])
def test_embeddings_and_head(tmp_path, family, name):
    made = FAMILIES[family]
    conv1d = {"fan_in_fan_out": True} if family == "gpt2" else {}
    made = Family(made.config, [name], made.settings, common=made.common, lora=conv1d)
    differences, folders = pair(tmp_path, made)
    subspace = SafeSubspace.build(**folders, rank=RANK, modules=[name])
    (module,) = subspace.modules
    (v,) = differences.values()
    check(subspace, module, v)


def test_square_conv1d_is_transposed(tmp_path):
    differences, folders = pair(tmp_path, "gpt2", n_inner=32)
    subspace = SafeSubspace.build(**folders, rank=RANK)
    square = [name for name, v in differences.items() if v.shape[0] == v.shape[1]]
    assert len(square) == 6
    for name in square:
        check(subspace, name, differences[name])


def fuse(tensors):
    """Fuse queries, keys and values into one tensor, and gate and up into another."""
    result = dict(tensors)
    for name in tensors:
        for first, others, fused in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name:
                parts = [name, *(name.replace(first, other) for other in others)]
                result[name.replace(first, fused)] = torch.cat([result.pop(part) for part in parts])
    return result


@pytest.fixture
def llama(tmp_path):
    _, folders = pair(tmp_path, "llama")
    fused = {role: rewrite(folder, tmp_path / f"fused-{role}", fuse) for role, folder in folders.items()}
    return folders, fused


@pytest.mark.parametrize(("aligned", "base"), [(True, True), (True, False), (False, True)])
def test_fused_weights_are_cut_as_in_a_projection(llama, aligned, base):
    folders, fused = llama
    expected = SafeSubspace.build(**folders, rank=RANK)
    given = {"aligned": (fused if aligned else folders)["aligned"], "base": (fused if base else folders)["base"]}
    found = SafeSubspace.build(**given, rank=RANK, modules=PROJECTIONS)
    assert len(found.modules) == len(expected.modules) == 14
    for name, module in expected.modules.items():
        assert np.array_equal(found.find(name).left_vectors, module.left_vectors)
        assert found.find(name).v_norm == module.v_norm


def test_fused_modules_of_separate_weights(llama):
    folders, fused = llama
    expected = SafeSubspace.build(**fused, rank=RANK)
    found = SafeSubspace.build(**folders, rank=RANK, modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])
    assert len(found.modules) == len(expected.modules) == 8
    for name, module in expected.modules.items():
        assert np.allclose(found.find(name).singular_values, module.singular_values, rtol=1e-6)
        assert found.find(name).v_norm == pytest.approx(module.v_norm, rel=1e-7)


def test_a_fused_weight_without_a_configuration_is_not_guessed(llama):
    _, fused = llama
    (fused["aligned"] / "config.json").write_text("{}")
    with pytest.raises(
        PairingError, match=r"does not tell how many rows of .*qkv_proj.weight are queries; name qkv_proj"
    ):
        SafeSubspace.build(**fused, modules=["q_proj"])
    assert len(SafeSubspace.build(**fused, rank=1, modules=["qkv_proj", "up_proj"]).modules) == 4


def test_shapes_that_differ_are_named(llama, tmp_path):
    folders, _ = llama
    wider = save(FAMILIES["llama"].make(2, intermediate_size=28), tmp_path / "wider")
    with pytest.raises(
        PairingError, match=r"down_proj: the weights differ in shape: aligned \[32, 24\].*5 more modules"
    ):
        SafeSubspace.build(aligned=folders["aligned"], base=wider)


def test_the_tensors_tell_whether_a_model_is_quantized(llama, tmp_path, caplog):
    folders, _ = llama
    declared = {"quantization_config": {"quant_method": "gptq"}}
    plain = rewrite(folders["base"], tmp_path / "plain", config=declared)
    truth, subspace = (SafeSubspace.build(aligned=folders["aligned"], base=base) for base in (folders["base"], plain))
    assert subspace.modules.keys() == truth.modules.keys()
    for name, module in truth.modules.items():
        assert np.array_equal(module.left_vectors, subspace.modules[name].left_vectors)
    assert f"{plain}: config.json holds a quantization_config (gptq)" in caplog.text
    name = "model.layers.0.self_attn.q_proj.weight"

    def integers(tensors):
        return {**tensors, name: tensors[name].to(torch.int8)}

    with pytest.raises(CheckpointError, match="is I8; weights must be F32, BF16 or F16, not quantized"):
        SafeSubspace.build(aligned=folders["aligned"], base=rewrite(plain, tmp_path / "packed", integers))


def test_a_family_without_its_own_class_of_names(tmp_path):
    family = Family(transformers.GPTNeoXConfig, ["query_key_value", "dense"], {"num_attention_heads": 4})
    differences, folders = pair(tmp_path, family)
    subspace = SafeSubspace.build(**folders, rank=RANK)
    for name, v in differences.items():
        check(subspace, name, v)
