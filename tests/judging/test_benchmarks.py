"""Benchmarks: small tasks on a tiny model, compared with likelihoods computed directly."""

from __future__ import annotations

import functools
import json
import math
import random
import string
from types import SimpleNamespace

import pytest
import torch
import yaml
from byte_tokens import INST, byte_tokenizer
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import fill_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from safelora_fast.data.chat import Chat
from safelora_fast.errors import EvaluationError, OutputError, SettingsError, how_to_install
from safelora_fast.judging.benchmarks import benchmark

pytest.importorskip("lm_eval", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

DRAW = random.Random(7)
ROWS = [
    {
        "question": f"{number} of {'which' * (number % 4)}?",
        "choices": ["".join(DRAW.sample(string.ascii_lowercase, 6)) for _ in range(2)],
        "answer": number % 2,
    }
    for number in range(24)
]
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    "target_delimiter": " ", "metadata": {"version": 3},
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
TEXT = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}  # fmt: skip
WRITE = {
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "x",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Download nothing, cache nothing outside of the test, and do not collect data about this machine."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)


@pytest.fixture
def tasks(tmp_path):
    """A folder with the tasks `choosing`, `reading` and `writing`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"data_files": {"test": str(data)}}
    source = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "num_fewshot": 0}
    for name, task in (("choosing", CHOICE), ("reading", TEXT), ("writing", WRITE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("benchmarks") / "model")


@pytest.fixture
def adapter(model, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    fill_adapter(adapted, seed=3, scale=0.6)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def likelihood(model, before, after):
    """Log-likelihood of the second text after the first, in float64."""
    words = tokenizer()
    first, then = (words(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    ids = first + then
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(len(first), len(ids)))


def accuracy(model, *, chat):
    """The share of examples whose right choice is the most likely one."""
    right = 0
    for row in ROWS:
        before, space = (f"<user>{row['question']}<assistant>", "") if chat else (row["question"], " ")
        likely = [likelihood(model, before, space + choice) for choice in row["choices"]]
        right += likely.index(max(likely)) == row["answer"]
    return right / len(ROWS)


def perplexity(model):
    """Perplexity per byte of the questions, each without context."""
    total = sum(likelihood(model, "<eos>", row["question"]) for row in ROWS)
    return math.exp(-total / sum(len(row["question"]) for row in ROWS))


@pytest.fixture
def without_defaults(monkeypatch):
    """Leave out the harness's own tasks, because reading them takes ten seconds."""
    from safelora_fast.judging import harness

    manager = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: manager(include_path=include_path))


@pytest.fixture
def run(model, tasks, tmp_path, without_defaults):  # noqa: ARG001
    """Run tasks on the tiny model."""

    def run_(names, adapter=None, output="out", **settings):
        given = None if adapter is None else str(adapter)
        return benchmark(str(model), given, names, tmp_path / output, task_path=tasks, device="cpu", **settings)

    return run_


@pytest.mark.parametrize(("strings", "batch_size"), [(None, 5), ("text", 5), ("text", 1)])
def test_values_are_those_of_the_models_own_likelihoods(run, model, strings, batch_size):
    subject = AutoModelForCausalLM.from_pretrained(model)
    right, surprise = accuracy(subject, chat=strings is None), perplexity(subject)
    choosing, reading = run(["choosing", "reading"], strings=strings, batch_size=batch_size).tasks
    assert (choosing.main.name, choosing.main.value, choosing.main.count) == ("acc", right, len(ROWS))
    assert choosing.main.stderr == pytest.approx(math.sqrt(right * (1 - right) / (len(ROWS) - 1)))
    assert reading.main.value == pytest.approx(surprise, rel=1e-4)
    assert (choosing.main.higher_is_better, reading.main.higher_is_better) == (True, False)
    assert (choosing.version, choosing.chat, choosing.shots) == ("3", strings is None, 0)


def test_the_harness_says_the_same_when_it_loads_the_adapter(run, model, adapter, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["choosing", "reading", "writing"]
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "peft": str(adapter), "dtype": "float32"},
        tasks=names, device="cpu", batch_size=4, apply_chat_template=True,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]  # fmt: skip
    adapted = run(names, adapter).tasks
    for result in adapted:
        key = f"{result.main.name},{result.main.filter}"
        assert result.main.value == pytest.approx(results[result.task][key], rel=1e-5), result.task
    plain = run(["reading"], output="plain").tasks[0].main.value
    assert plain != pytest.approx(adapted[1].main.value, rel=1e-2)  # the adapter has an effect


def rewrite(file, **changes):
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def test_tasks_are_kept_one_by_one(run, tasks, tmp_path, monkeypatch):
    file = tmp_path / "out" / "benchmarks.json"
    (first,) = run(["choosing"], limit=5).tasks
    assert first.main.count == 5
    assert json.loads(file.read_text())["tasks"]["choosing"]["metrics"][0]["value"] == first.main.value
    (tasks / "broken.yaml").write_text((tasks / "writing.yaml").read_text())
    nowhere = {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}
    rewrite(tasks / "broken.yaml", task="broken", dataset_kwargs=nowhere)
    with pytest.raises(EvaluationError, match=r"^task broken: \w+: ") as raised:
        run(["choosing", "broken", "reading"], limit=5)
    assert "\n" not in str(raised.value)
    assert list(json.loads(file.read_text())["tasks"]) == ["choosing", "reading"]
    with monkeypatch.context() as patch:
        patch.setattr("safelora_fast.models.load.load_subject", None)  # no task is left to run
        again = run(["reading", "choosing"], limit=5)
    assert [result.task for result in again.tasks] == ["reading", "choosing"]
    assert again.tasks[1] == first
    assert json.loads(json.dumps(again.to_dict()))["tasks"]["choosing"]["lm_eval"] == first.lm_eval
    for settings, words in (({"limit": 6}, "limit was 5, is 6"), ({"limit": 5, "seed": 1}, "seed was 0, is 1")):
        with pytest.raises(OutputError, match=f"settings have changed: {words}; choose another output"):
            run(["choosing"], **settings)
    before = file.read_text()
    file.write_text("{")
    with pytest.raises(OutputError, match=r"is not JSON: .*; pass --overwrite"):
        run(["choosing"], limit=5)
    file.write_text(before)
    rewrite(tasks / "choosing.yaml", target_delimiter="")
    with pytest.raises(OutputError, match="a task choosing that was defined differently"):
        run(["choosing"], limit=5)
    (anew,) = run(["choosing"], limit=5, overwrite=True).tasks
    assert anew.definition != first.definition
    assert sorted(json.loads(file.read_text())["tasks"]) == ["choosing", "reading"]
    with pytest.raises(SettingsError, match="no task 'chosing'"):
        run(["chosing"], limit=6, overwrite=True)
    assert run(["reading"], limit=5).tasks == again.tasks[:1]
    run(["choosing"], limit=6, overwrite=True)
    assert list(json.loads(file.read_text())["tasks"]) == ["choosing"]


def test_other_rows_of_a_task_or_another_adapter_are_other_results(run, tasks, adapter):
    run(["choosing"], adapter, limit=5)
    rows = tasks / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("a", "e"))
    with pytest.raises(OutputError, match="a task choosing that was defined differently"):
        run(["choosing"], adapter, limit=5)
    rows.write_text(before)
    assert run(["choosing"], adapter, limit=5).tasks
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(OutputError, match="settings have changed: adapter_sha256 was"):
        run(["choosing"], adapter, limit=5)


def test_groups_and_tags(run, tasks):
    group = {"group": "both", "task": ["choosing", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tasks / "group.yaml").write_text(yaml.safe_dump(group))
    rewrite(tasks / "choosing.yaml", tag="mine")
    (tasks / "other.yaml").write_text((tasks / "choosing.yaml").read_text())
    rewrite(tasks / "other.yaml", task="other", doc_to_target=0)
    one, other, both = (result.main for result in run(["mine", "both"]).tasks)
    assert (both.count, both.value) == (2 * len(ROWS), pytest.approx((one.value + other.value) / 2))
    assert one.value != other.value


@pytest.mark.parametrize("name", ["choosing", "reading", "writing"])
def test_a_model_whose_logits_are_nan_has_no_result(run, name, monkeypatch):
    """Without this error, the harness would take the first of equal choices, and half of these are right."""
    from safelora_fast.models import load as models_load

    load = models_load.load_pretrained

    def diverged(section):
        odd = load(section)
        with torch.no_grad():
            odd.model.norm.weight.fill_(math.nan)
        return odd

    monkeypatch.setattr(models_load, "load_pretrained", diverged)
    with pytest.raises(EvaluationError, match=f"^task {name}: the model's logits are NaN"):
        run([name])


def test_what_is_refused(run, tmp_path):
    for names, settings, message in (
        (["chosing"], {}, "there is no task 'chosing' in lm-evaluation-harness .* there is choosing"),
        ([], {}, "no task is named"),
        (["choosing"], {"limit": 0}, "limit is 0, it must be at least 1"),
        (["choosing"], {"batch_size": 0}, "batch_size is 0, it must be at least 1"),
        (["choosing"], {"strings": "poem"}, "strings is 'poem', it must be chat or text"),
        (["choosing"], {"dtype": "int8"}, "dtype is 'int8'"),
    ):
        with pytest.raises(SettingsError, match=message):
            run(names, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_defaults")
def test_the_command(call, model, adapter, tasks, tmp_path, monkeypatch, capsys, caplog):
    capsys.readouterr()  # drop the progress bar of transformers
    words = ("evaluate", "--model", model, "--adapter", adapter, "--output", tmp_path / "out", "--device", "cpu")
    neither = call(*words)
    assert (neither.code, neither.out) == (2, "")
    assert neither.err == "error: nothing is to be evaluated: name a --judge, or --tasks, or both\n"
    named = (*words, "--task-path", tasks, "--tasks", "choosing, writing", "--limit", 9)
    result = call(*named)
    assert result.code == 0, result.err
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")] == []
    content = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    value = content["tasks"]["choosing"]["metrics"][0]["value"]
    lines = {line.split()[0]: line.split() for line in result.out.splitlines()}
    assert lines["choosing"][1:3] == ["acc", f"{value:.4g}"]
    assert lines["writing"][1:3] == ["exact_match,", "first"]
    assert "choosing: 18 of 18" in result.err  # two choices each
    assert json.loads(call(*named, "--json").out)["benchmarks"]["tasks"] == content["tasks"]
    other = call(*named, "--seed", 1)
    assert (other.code, "settings have changed: seed was 0, is 1" in other.err) == (2, True), other.err
    assert call(*named, "--seed", 1, "--overwrite", "--quiet") == (0, "", "")
    unknown = call(*words, "--task-path", tasks, "--tasks", "chosing")
    assert (unknown.code, unknown.out, unknown.err.count("\n")) == (2, "", 1), unknown.err
    assert call(*words, "--task-path", tmp_path / "no", "--tasks", "x").err.endswith(
        "no: there is no such folder of tasks\n"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else name)
    assert call(*named).err == f"error: tasks need lm-eval: {how_to_install('eval')}\n"


def test_the_harness_ends_where_the_template_ends_a_turn(tmp_path, monkeypatch):
    """An adapter learns the end-of-turn token of its template, whatever its base model's generation settings are."""
    from safelora_fast.judging import harness

    folder, words = save_tiny(tmp_path / "model"), tokenizer()
    words.chat_template = words.chat_template.replace("{{ message.content }}", "{{ message.content }}<user>")
    words.save_pretrained(folder)
    seen = []

    def stop(model, *_, **__):
        seen.append(model.model.generation_config.eos_token_id)
        raise EvaluationError("stop")

    monkeypatch.setattr(harness, "measure", stop)
    task = {"task": "own", "dataset_path": "json", "test_split": "test", **WRITE}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    for strings in ("chat", "text"):
        with pytest.raises(EvaluationError, match="stop"):
            benchmark(str(folder), None, "own", tmp_path / strings, task_path=tmp_path / "tasks", strings=strings)
    assert seen == [sorted(words.convert_tokens_to_ids(["<eos>", "<user>"])), 1]


@pytest.mark.parametrize(
    "words", [byte_tokenizer(), byte_tokenizer(INST, bos="<s>", adds_bos=True), byte_tokenizer(bos="<s>", adds_bos=True)],
    ids=["chatml", "inst and bos", "chatml and bos"],
)  # fmt: skip
def test_a_prompt_is_that_of_the_template(words):
    """Only the template adds a beginning-of-text token, and only once."""
    from safelora_fast.judging.harness import CountedModel
    from safelora_fast.models.load import Subject

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **size))
    turns = [{"role": "user", "content": "hello"}]
    for chat in (True, False):
        counted = CountedModel(Subject("model", model, words), 1, None, chat=chat)
        text = counted.apply_chat_template(turns) if chat else "hello"
        wanted = Chat(words).prompt(turns) if chat else words("hello")["input_ids"]
        assert counted.tok_encode(text) == counted.tok_batch_encode([text])[0][0].tolist() == wanted


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            "downloaded on first use: check the network, or HF_HUB_OFFLINE",
        ),
        (
            ValueError("Dataset 'a/b' is a gated dataset on the Hub."),
            "accept the terms of its data on the Hub, and log in",
        ),
    ],
)
def test_data_that_cannot_be_had_are_named_with_what_to_do(error, advice, monkeypatch):
    from safelora_fast.judging import harness

    def unreachable(**_):
        raise error

    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", unreachable)
    with pytest.raises(EvaluationError, match=f"^task x: {type(error).__name__}: .*'a/b' .*; .*{advice}"):
        harness.measure(SimpleNamespace(), SimpleNamespace(manager=None), "x", limit=None, chat=False, seed=0)
