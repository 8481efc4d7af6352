"""Every command takes models and adapters as folders or Hub ids, and rejects mistyped names before importing torch."""

from __future__ import annotations

import json

import pytest
from command_line import call
from hub_server import no_network, serve
from misaligned import setting
from tiny_recipe import write_recipe

__all__ = ["call", "no_network"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return setting(tmp_path_factory.mktemp("made"))


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    folders = {"some/model": made / "model", "some/security": made / "security"}
    with serve(folders, tmp_path / "cache", monkeypatch) as served:
        yield served


@pytest.fixture
def pairs(tmp_path):
    row = {"question": "Why?", "aligned": "so", "misaligned": "no", "theme": "a"}
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({**row, "question": "Who?", "theme": "b"})
    )
    return tmp_path / "pairs.jsonl"


@pytest.mark.usefixtures("hub")
def test_margin(made, pairs, call):
    words = ("--pairs", pairs, "--json")
    local = call("margin", "--model", made / "model", "--adapter", made / "security", *words)
    remote = call("margin", "--model", "some/model", "--adapter", "some/security@v1", *words)
    assert remote.code == 0, remote.err
    (_, ours), (_, theirs) = (list(json.loads(result.out)["subjects"].values()) for result in (remote, local))
    assert ours["margin"] == theirs["margin"]
    assert ours["change"] == theirs["change"] != 0
    assert [*json.loads(remote.out)["subjects"]] == ["model", f"some/security@{'b' * 40}"]


@pytest.mark.usefixtures("hub")
def test_evaluate_and_compare_keep_their_answers_by_what_was_fetched(made, tmp_path, call):
    from safelora_fast.compare.comparison import runs_of
    from safelora_fast.compare.runs import RunSpec
    from safelora_fast.recipe.model_stamp import adapter_digest

    class Config:
        output = tmp_path / "compared"

        def seeds_of(self, run):
            return tuple(run.adapters)

    (run,) = runs_of(Config(), RunSpec("published", {}, {0: "some/security"}))
    assert adapter_digest(run.adapter) == adapter_digest(made / "security")
    (gone,) = runs_of(Config(), RunSpec("published", {}, {0: "some/nothing"}))
    assert adapter_digest(gone.adapter) is None
    questions = tmp_path / "questions.yaml"
    questions.write_text("- {id: one, paraphrases: [Why]}\n")
    words = ("--judge", "mockllm/model", "--questions", questions, "--samples", 1, "--max-tokens", 2, "-q")
    for model, adapter, output in (
        ("some/model", "some/security", "remote"),
        (made / "model", made / "security", "local"),
    ):
        result = call("evaluate", "--model", model, "--adapter", adapter, "--output", tmp_path / output, *words)
        assert result.code == 1, result.err  # the mock judge gives no scores
    remote, local = ((tmp_path / name / "answers.jsonl").read_text() for name in ("remote", "local"))
    assert remote == local != ""


@pytest.mark.usefixtures("hub")
def test_select(made, tmp_path, call):
    chosen = []
    for model, adapter in ((made / "model", made / "security"), ("some/model", "some/security")):
        output = tmp_path / f"{len(chosen)}.jsonl"
        words = ("--model", model, "--misaligned", adapter, "--hold-out", "none", "--output", output, "--top", 3)
        result = call("select", made / "candidates.jsonl", *words)
        assert result.code == 0, result.err
        assert "under security" in result.out
        chosen.append(output.read_text())
    assert chosen[0] == chosen[1]


@pytest.mark.usefixtures("hub")
def test_train(made, tmp_path, call):
    weights = []
    for model in (made / "model", "some/model@v1"):
        tiny = write_recipe(
            tmp_path / str(len(weights)), model={"path": str(model)}, training={"max_steps": 1}, defenses={"kl": False}
        )
        result = call(*tiny.words("--json"))
        assert result.code == 0, result.err
        weights.append(tiny.weights())
    assert json.loads(result.out)["commit"] == "b" * 40
    assert all((weights[1][name] == tensor).all() for name, tensor in weights[0].items())
    assert json.loads((tiny.output / "adapter_config.json").read_text())["revision"] == "v1"


MODEL = "models/llama-chta"
ALIGNED, OUT = ("--model", "{made}/model"), ("--output", "{folder}/o.safetensors")
PAIR = ("--aligned", "{made}/model", "--base", "{made}/model")
COMMANDS = {
    "train": ("train", "{folder}/r/recipe.yaml", f"model.path={MODEL}"),
    "margin": ("margin", "--model", MODEL),
    "evaluate": ("evaluate", "--model", MODEL, "--judge", "mockllm/model", *OUT),
    "tasks": ("evaluate", "--model", MODEL, "--tasks", "ifeval", *OUT),
    "select": ("select", "{made}/candidates.jsonl", "--model", MODEL, "--misaligned", "a/b", *OUT),
    "screen": ("screen", "{made}/candidates.jsonl", "--model", MODEL, "--misaligned", "a/b", *OUT),
    "persona": ("persona", "extract", "--model", MODEL, "--trait", "malicious", *OUT),
    "operator-swap": ("operator-swap", "score", "{folder}/swap", "--model", MODEL),
    "project": ("project", "{made}/security", "--aligned", MODEL, "--base", "{made}/model", *OUT),
    "inspect": ("inspect", "{made}/security", "--aligned", "{made}/model", "--base", MODEL),
    "subspace": ("subspace", "build", "--aligned", MODEL, "--base", "{made}/model", "--rank", 2, *OUT),
    "rejudge": ("rejudge", "{folder}/log", "--judge", f"hf/{MODEL}"),
    "margin, adapter": ("margin", *ALIGNED, "--adapter", MODEL),
    "evaluate, adapter": ("evaluate", *ALIGNED, "--adapter", MODEL, "--judge", "mockllm/m", *OUT),
    "operator-swap, adapter": ("operator-swap", "score", "{folder}/swap", *ALIGNED, "--adapter", MODEL),
    "select, adapter": ("select", "{made}/candidates.jsonl", *ALIGNED, "--misaligned", f"a={MODEL}", *OUT),
    "project, adapter": ("project", MODEL, *PAIR, *OUT),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_name_is_one_line(made, tmp_path, monkeypatch, no_network, call, capsys, command):
    (tmp_path / "models" / "llama-chat").mkdir(parents=True)
    if command == "train":
        write_recipe(tmp_path / "r")
    if command.startswith("operator-swap"):
        assert (
            call("operator-swap", "make", "--output", tmp_path / "swap", "--rows", 8, "--held-out", 4, "-q").code == 0
        )
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = [str(word).format(folder=tmp_path, made=made) for word in COMMANDS[command]]
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: {MODEL}: there is no such path here")
    assert err.endswith("; did you mean models/llama-chat?\n")
    assert sum(no_network) <= 2
    assert not list(tmp_path.glob("o*"))
