"""Embeddings and heads that share one tensor on disk under another name, and heads that a base lacks."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families import adapt, check_projection, project, rewrite, save
from safetensors.torch import load_file
from small_models import linears, read, small_model

from safelora_fast import project_adapter
from safelora_fast.checkpoints.geometry import matrix_of
from safelora_fast.checkpoints.pairing import TensorNames
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import PairingError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn about tied weights in several ways

TIED = {
    "bart": ("BartForConditionalGeneration", ["lm_head", "embed_tokens", "shared"]),
    "mbart": ("MBartForConditionalGeneration", ["lm_head", "embed_tokens"]),
    "t5": ("T5ForConditionalGeneration", ["lm_head", "embed_tokens", "shared"]),
    "umt5": ("UMT5ForConditionalGeneration", ["embed_tokens"]),
    "pegasus": ("PegasusForConditionalGeneration", ["lm_head", "embed_tokens"]),
    "m2m_100": ("M2M100ForConditionalGeneration", ["lm_head", "embed_tokens"]),
    "led": ("LEDForConditionalGeneration", ["lm_head"]),
    "gpt2": ("GPT2LMHeadModel", ["lm_head"]),
    "bloom": ("BloomForCausalLM", ["lm_head"]),
    "opt": ("OPTForCausalLM", ["lm_head"]),
    "gemma": ("GemmaForCausalLM", ["lm_head"]),
    "mamba": ("MambaForCausalLM", ["lm_head"]),
}
BY_TRANSFORMERS = {  # transformers 5 lists the tied weights
    "whisper": ("WhisperForConditionalGeneration", ["proj_out"]),
    "bert": ("BertForMaskedLM", ["cls.predictions.decoder"]),
    "electra": ("ElectraForMaskedLM", ["generator_lm_head"]),
}


def loaded(tmp_path, model_type, class_name):
    save(small_model(model_type, class_name, 1), tmp_path / "model")
    model = getattr(transformers, class_name).from_pretrained(tmp_path / "model")
    return model, TensorNames(open_checkpoint(tmp_path / "model", role="aligned"), "aligned")


def check(model, names, leaves):
    found = set()
    for name, weight, embedding in linears(model):
        if any(f".{name}".endswith(f".{leaf}") for leaf in leaves):
            matrix = matrix_of(names, names.weight(name), name, tuple(weight.shape), embedding=embedding)
            assert torch.equal(read(matrix), weight), name
            found.add(next(leaf for leaf in leaves if name.endswith(leaf)))
    assert found == set(leaves)


@pytest.mark.parametrize("model_type", TIED)
def test_tied_weights_are_found(tmp_path, model_type):
    class_name, leaves = TIED[model_type]
    check(*loaded(tmp_path, model_type, class_name), leaves)


@pytest.mark.parametrize("model_type", BY_TRANSFORMERS)
def test_tied_weights_of_other_names(tmp_path, model_type):
    pytest.importorskip("transformers.conversion_mapping")
    class_name, leaves = BY_TRANSFORMERS[model_type]
    check(*loaded(tmp_path, model_type, class_name), leaves)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
@pytest.mark.parametrize("leaf", ["lm_head", "decoder.embed_tokens", "encoder.embed_tokens", "embed_tokens"])
def test_adapters_of_tied_weights(tmp_path, model_type, leaf):
    class_name, _ = TIED[model_type]
    target = {"target_modules": rf".*\.q(_proj)?|(.*\.)?{leaf}"}
    models = small_model(model_type, class_name, 1), small_model(model_type, class_name, 2)
    if not any(name.endswith(leaf) for name, _ in models[0].named_modules()):
        pytest.skip("in this transformers the embeddings are one module, of which PEFT sees the first name")
    result = check_projection(tmp_path, models, target)
    assert sum(name.endswith(leaf) for name in result.cosines) == (2 if leaf == "embed_tokens" else 1)


def test_an_untied_head_is_not_taken_for_the_embeddings(tmp_path):
    save(small_model("bart", TIED["bart"][0], 1), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    names = TensorNames(open_checkpoint(tmp_path / "model", role="aligned"), "aligned")
    with pytest.raises(PairingError, match=r"lm_head: the aligned model .* has no tensor"):
        names.weight("lm_head")


def test_a_head_that_the_base_does_not_have(tmp_path):
    """The adapter adapts a classifier; the base is a language model without the classifier's head."""
    aligned = small_model("llama", "LlamaForSequenceClassification", 1)
    base = small_model("llama", "LlamaForCausalLM", 2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    adapted = adapt(aligned, target_modules=["q_proj", "score"], task_type="FEATURE_EXTRACTION")
    adapter = save(adapted, tmp_path / "adapter")
    refusal = r"score: the base model .* has no tensor score\.weight.*project the others: --exclude score"
    with pytest.raises(PairingError, match=refusal):
        project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out")
    project_adapter(
        adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out", exclude="score", select="all"
    )

    def without_head(tensors):
        return {key: tensor for key, tensor in tensors.items() if ".score." not in key}

    query = rewrite(adapter, tmp_path / "query", without_head, file="adapter_model.safetensors")
    (result,) = project([query], *folders, tmp_path / "projected")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", result.folder))
    before = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(ours[key], theirs.get(key, before[key])) for key in before)
