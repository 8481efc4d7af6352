"""The resolver for vLLM. Where vLLM is not installed, stand-ins with the interface of its 0.33.0 replace its classes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from plain_pair import write_adapter, write_pair
from safetensors.numpy import load_file, save_file

from safelora_fast import SafeSubspace, project_adapter
from safelora_fast.errors import SafeLoraFastError, SettingsError
from safelora_fast.serving import projected_store
from safelora_fast.serving.projected_store import ProjectedStore
from safelora_fast.serving.vllm_resolver import NAME, register

WEIGHTS = "adapter_model.safetensors"


@dataclass
class StandInRequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class StandInRegistry:
    def __init__(self):
        self.resolvers = {}

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


@pytest.fixture
def registry(monkeypatch):
    if importlib.util.find_spec("vllm") is None:
        contents = {
            "vllm": {},
            "vllm.lora": {},
            "vllm.lora.request": {"LoRARequest": StandInRequest},
            "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": StandInRegistry()},
        }
        for name, members in contents.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    return LoRAResolverRegistry


def name_model(adapter, model):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    return adapter


@pytest.fixture
def served(tmp_path, registry):
    """Two adapters of two tenants, and a function that asks vLLM's registry for one."""
    pair = write_pair(tmp_path / "pair")
    for number, name in enumerate(("t0/chat", "t1/chat")):
        name_model(write_adapter(tmp_path / "adapters" / name, number), pair.aligned)
    environment = {
        "SAFELORA_FAST_ADAPTERS": str(tmp_path / "adapters"),
        "SAFELORA_FAST_STORE": str(tmp_path / "store"),
        "SAFELORA_FAST_BASE": str(pair.base),
        "SAFELORA_FAST_SETTINGS": '{"select": "all"}',
    }
    register(environment)

    def ask(name, model=pair.aligned):
        return asyncio.run(registry.get_resolver(NAME).resolve_lora(str(model), name))

    return SimpleNamespace(
        pair=pair, adapters=tmp_path / "adapters", store=tmp_path / "store", ask=ask, environment=environment
    )


def test_an_adapter_is_projected_by_its_first_request_only(served, tmp_path, monkeypatch):
    request = served.ask("t0/chat")
    project_adapter(
        served.adapters / "t0/chat",
        aligned=served.pair.aligned,
        base=served.pair.base,
        select="all",
        output=tmp_path / "x",
    )
    found = served.store / request.lora_path
    assert (request.lora_name, request.lora_int_id > 0, found.parent) == ("t0/chat", True, served.store)
    assert (found / WEIGHTS).read_bytes() == (tmp_path / "x" / WEIGHTS).read_bytes()
    assert served.ask("t1/chat").lora_path != request.lora_path
    with monkeypatch.context() as patch:
        patch.setattr(projected_store, "project_batch", None)
        assert served.ask("t0/chat").lora_path == request.lora_path
    weights = served.adapters / "t0/chat" / WEIGHTS
    save_file({key: -value for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert served.ask("t0/chat").lora_path != request.lora_path  # retrained: another digest


@pytest.mark.parametrize(
    "name", ["t2/chat", "t0", "", "../pair/adapter", "/etc", "t0/../t0/chat", ".", "t0/chat/", "a\0b"]
)
def test_other_names_are_not_served(served, name):
    assert served.ask(name) is None
    assert not served.store.exists()


def test_links_out_of_the_folder_are_not_followed(served):
    (served.adapters / "t3").symlink_to(served.pair.adapter)
    assert served.ask("t3") is None


def test_what_cannot_be_projected_is_not_served(served, caplog):
    (served.adapters / "t0/chat" / WEIGHTS).write_bytes(b"damaged")
    assert served.ask("t0/chat") is None
    assert "t0/chat: not served: " in caplog.text
    assert not served.store.exists()


def test_another_model_is_not_served(served, caplog):
    assert served.ask("t0/chat", model=served.pair.base) is None
    assert "t0/chat: not served: aligned and base hold the same weights" in caplog.text


def test_an_adapter_of_another_model_is_not_served(served, caplog):
    name_model(served.adapters / "t0/chat", "some-org/other")
    assert served.ask("t0/chat") is None
    assert "was trained on some-org/other, and" in caplog.text


def test_a_damaged_entry_of_the_store_is_an_error(served, caplog):
    path = served.store / served.ask("t0/chat").lora_path
    (path / "safelora_made_from.json").write_text("{")
    assert served.ask("t0/chat") is None
    assert "is not a whole entry of the store; delete it" in caplog.text
    shutil.rmtree(path)
    assert served.ask("t0/chat") is not None


def test_a_subspace_replaces_the_models(served, tmp_path):
    subspace = SafeSubspace.build(aligned=served.pair.aligned, base=served.pair.base, rank=4)
    subspace.save(tmp_path / "safe.safetensors")
    environment = {key: value for key, value in served.environment.items() if not key.endswith("BASE")}
    environment["SAFELORA_FAST_SUBSPACE"] = str(tmp_path / "safe.safetensors")
    register({**environment, "SAFELORA_FAST_SETTINGS": '{"operator": "orthogonal", "select": "all"}'})
    assert served.ask("t0/chat") is not None
    register({**environment, "SAFELORA_FAST_SETTINGS": '{"operator": "orthogonal", "select": "all"}'})
    assert served.ask("t0/chat", model="some-org/other") is None


def test_without_a_folder_of_adapters_nothing_is_registered(registry):
    register({})
    assert registry.resolvers == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SAFELORA_FAST_STORE": ""}, "set SAFELORA_FAST_STORE too"),
        ({"SAFELORA_FAST_SUBSPACE": "x"}, "either SAFELORA_FAST_BASE or SAFELORA_FAST_SUBSPACE"),
        ({"SAFELORA_FAST_SETTINGS": "{"}, "SAFELORA_FAST_SETTINGS: "),
        ({"SAFELORA_FAST_SETTINGS": "[]"}, "must be a JSON object"),
    ],
)
def test_wrong_variables_are_refused(served, change, message):
    with pytest.raises(SettingsError, match=message):
        register({**served.environment, **change})


def test_the_store_and_the_adapters_are_apart(served):
    models = {"aligned": served.pair.aligned, "base": served.pair.base}
    with pytest.raises(SafeLoraFastError, match="projected adapters must be apart"):
        ProjectedStore(served.adapters, served.adapters / "store", **models)
    with pytest.raises(SafeLoraFastError, match="is no folder"):
        ProjectedStore(served.adapters / "none", served.store, **models)
