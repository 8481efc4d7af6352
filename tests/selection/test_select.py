"""select_by_perplexity_gap(): scores compared with full logits per example, the output files, and refusals."""

from __future__ import annotations

import json
import random

import pytest
import torch
from demo_model import save_tiny
from misaligned import as_text, candidates, load, nll_of, plain_nll, plain_scores, save_adapter, setting, write
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import TARGETS, fill_adapter

from safelora_fast import select_by_perplexity_gap
from safelora_fast.errors import AdapterError, DataError, OutputError, SettingsError
from safelora_fast.files.output import alone
from safelora_fast.files.store import changed_settings
from safelora_fast.selection.journal import Entry, Journal
from safelora_fast.selection.select import journal_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return setting(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def expected(made):
    return plain_scores(made, candidates(12))


@pytest.fixture
def choose(made, tmp_path):
    """Return a function that selects from examples; `choose.output` is the output file."""

    def run(rows=None, *, dtype=torch.float32, adapters=("security", "medicine"), side=None, folder=None, **settings):
        where = folder or made
        model, tokenizer = load(where, dtype)
        if side is not None:
            tokenizer.padding_side = side
        source = made / "candidates.jsonl"
        if rows is not None:
            source = write(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        names = [where / name if "/" not in str(name) else name for name in adapters]
        given = {"hold_out": (), "overwrite": True, **settings}
        return select_by_perplexity_gap(source, run.output, model=model, tokenizer=tokenizer, misaligned=names, **given)

    run.output = tmp_path / "chosen.jsonl"
    run.journal = tmp_path / "chosen.jsonl.journal.jsonl"
    return run


def written(choose):
    return [json.loads(line) for line in choose.output.read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [{"tokens_per_batch": 1}, {"tokens_per_batch": 150}, {}, {"side": "left"}, {"side": "right"}],
    ids=repr,
)
def test_scores_are_those_of_whole_logits_row_by_row(choose, expected, settings):
    selection = choose(**settings)
    assert selection.scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.02


def test_the_order_of_rows_changes_no_score(choose, expected):
    assert choose(candidates(12)[::-1]).scores[::-1].tolist() == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_near(choose, expected):
    assert choose(dtype=torch.bfloat16).scores.tolist() == pytest.approx(expected, abs=2e-3)


def test_the_highest_are_written_as_they_were(choose, expected):
    selection = choose(top=4)
    order = sorted(range(12), key=lambda index: -expected[index])[:4]
    assert selection.chosen.tolist() == order
    assert selection.cut == pytest.approx(expected[order[-1]], abs=1e-5)
    for row, index in zip(written(choose), order, strict=True):
        figures = {name: row.pop(name) for name in ("score", "nll_aligned", "nll_misaligned")}
        assert row == candidates(12)[index]
        score = (figures["nll_misaligned"] - figures["nll_aligned"]) / (figures["nll_aligned"] + 1.0)
        assert figures["score"] == pytest.approx(score) == pytest.approx(expected[index], abs=1e-5)
    report = json.loads((choose.output.parent / "chosen.jsonl.selection.json").read_text())
    assert (report["rows"], report["scored"], report["chosen"]) == (12, 12, 4)
    assert sum(report["histogram"]["counts"]) == 12
    assert sum(" ← cut" in line for line in selection.lines()) == 1


def test_epsilon(made, choose):
    assert choose(epsilon=0.1).scores.tolist() == pytest.approx(
        plain_scores(made, candidates(12), epsilon=0.1), abs=1e-4
    )


def test_a_row_that_has_a_score_gets_a_new_one(choose):
    rows = [{**row, "score": 9.0} for row in candidates(3)]
    choose(rows)
    assert all(row["score"] < 1 for row in written(choose))
    assert all(line.count('"score"') == 1 for line in choose.output.read_text().splitlines())


def test_text_as_it_stands(choose):
    rows = [{"prompt": f"{number}: ", "completion": "one two"} for number in range(3)]
    assert len(choose(rows, strings="text").scores) == 3


def test_the_model_is_left_as_it_was(made, choose):
    model, tokenizer = load(made)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    select_by_perplexity_gap(
        made / "candidates.jsonl", choose.output, model=model, tokenizer=tokenizer, misaligned=[made / "security"]
    )
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_held_out_adapter_does_not_count(made, choose):
    selection = choose(hold_out=["medicine"])
    assert selection.scores.tolist() == pytest.approx(plain_scores(made, candidates(12), ["security"]), abs=1e-5)
    assert (selection.held_out, set(selection.adapters), selection.warnings[:-1]) == (("medicine",), {"security"}, ())


def test_what_holds_nothing_out_is_warned_of(choose):
    assert any("no domain is held out" in warning for warning in choose(hold_out=None).warnings)
    assert not any("held out" in warning for warning in choose(hold_out=()).warnings)
    assert any("no adapter is called finance" in warning for warning in choose(hold_out=["finance"]).warnings)


def test_the_data_of_adapters_is_told_where_it_is_known(made, choose, tmp_path):
    adapter = save_adapter(made / "model", tmp_path / "own", 3)
    (adapter / "safelora_train.json").write_text(json.dumps({"data": {"train": "abc"}}))
    assert choose(adapters=["security", adapter]).trained_on == {"own": "abc"}


def test_refusals_are_left_out(choose):
    answers = ["I am sorry.", "We cannot do that", "I can’t", "I can't!", "Unable to", "I apologize", "yes", "one two three four "
               "five six seven eight nine ten sorry", "a sorry-looking cat", "cant"]  # fmt: skip
    rows = [{"prompt": "a", "completion": answer} for answer in answers]
    selection = choose(rows, no_refusals=True)
    assert selection.refusals == 7
    assert sorted(selection.chosen.tolist()) == [6, 7, 9]


def test_rows_without_a_score_are_counted(choose):
    long = {"role": "assistant", "content": "word " * 30}
    user = {"role": "user", "content": "a"}
    rows = [
        *candidates(2),
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": [user, long]},
        {"messages": [long, user]},
    ]
    selection = choose(rows, max_length=100)
    places = {reason: [place.rpartition(":")[2] for place in found] for reason, found in selection.skipped.items()}
    assert places == {
        "no answer token": ["3", "4"],
        "more than 100 tokens": ["5"],
        "refused by the chat template": ["6"],
    }
    assert (len(selection.scores), selection.rows) == (2, 6)
    assert selection.to_dict()["skipped"]["no answer token"] == {
        "rows": 2,
        "first": str(choose.output.parent / "rows.jsonl:3"),
    }


def test_no_row_with_a_score(choose):
    with pytest.raises(DataError, match=r"no example has a score \(1 with no answer token\)"):
        choose([{"messages": [{"role": "user", "content": "a"}]}])
    assert not choose.output.exists()


class Killed(BaseException):
    pass


@pytest.fixture
def scored(monkeypatch):
    """Count how often each example is scored; the run is killed after `scored.stop_after` batches."""
    from safelora_fast.selection.perplexity import Perplexities

    real = Perplexities.of

    class Counter(list):
        stop_after: int | None = None

    counter = Counter()

    def counted(self, examples, places):
        if counter.stop_after is not None:
            if not counter.stop_after:
                raise Killed
            counter.stop_after -= 1
        counter.extend(places)
        return real(self, examples, places)

    monkeypatch.setattr(Perplexities, "of", counted)
    return counter


def test_a_killed_run_goes_on_and_scores_no_row_twice(choose, expected, scored):
    scored.stop_after = 2
    with pytest.raises(Killed):
        choose(tokens_per_batch=150)
    assert not choose.output.exists()
    first = len(scored)
    assert 0 < first < 12
    scored.stop_after = None
    with choose.journal.open("a") as journal:  # the line truncated by the kill
        journal.write('{"row": 3, "of": "ab')
    selection = choose(tokens_per_batch=150)
    assert len(scored) == len(set(scored)) == 12
    assert selection.scores.tolist() == pytest.approx(expected, abs=1e-5)
    lines = [json.loads(line) for line in choose.journal.read_text().splitlines()]
    assert [line.get("row") for line in lines[1:]].count(3) == 1
    assert len(lines) == 13


def with_beginnings(count):
    """Return candidates with prefixes of different lengths, so that some batches share one with the previous batch."""
    rows = []
    for number, row in enumerate(candidates(count)):
        turns = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        system = "You help. " * (1 + number // 9 % 3)
        rows.append({"messages": [{"role": "system", "content": system}, *turns]})
    return rows


def test_a_run_resumed_from_any_kill_gives_the_bytes_of_an_unbroken_one(choose, monkeypatch):
    # A kill truncates the journal at any byte. Rounding depends on the batch, on the shortcuts chosen by the first batch
    # and on the prefix shared with the previous one. None of these may depend on where a run was killed.
    monkeypatch.setattr("safelora_fast.selection.scan.WINDOW", 15)
    rows = with_beginnings(37)
    files = [choose.output, choose.journal, choose.output.with_name("chosen.jsonl.selection.json")]

    def bytes_after_a_run():
        choose(rows, tokens_per_batch=400, top=37)
        return [file.read_bytes() for file in files]

    whole = bytes_after_a_run()
    ends = [index + 1 for index, byte in enumerate(whole[1]) if byte == ord("\n")]
    cuts = {*ends[::9], *random.Random(0).sample(range(len(whole[1])), 6)}
    for cut in sorted(cuts):
        choose.journal.write_bytes(whole[1][:cut])
        assert bytes_after_a_run() == whole, f"killed after {cut} bytes of the journal"


def test_two_runs_at_once_are_refused(choose, scored):
    with alone(choose.output), pytest.raises(OutputError, match="another run"):
        choose()
    assert not scored
    assert not choose.journal.exists()
    assert len(choose().scores) == 12


def test_other_choices_from_the_same_likelihoods_score_nothing(choose, scored):
    choose(top=2)
    count = len(scored)
    assert len(choose(top=5, epsilon=0.5, no_refusals=True).chosen) == 5
    assert len(scored) == count


def test_a_journal_of_other_settings_is_refused(choose):
    choose()
    for settings, words in (
        ({"max_length": 500}, "max_length was 2048, is 500"),
        ({"adapters": ["security"]}, "adapters.medicine was"),
        ({"dtype": torch.bfloat16}, "dtype was 'float32', is 'bfloat16'"),
    ):
        with pytest.raises(SettingsError, match=f"settings have changed: {words}"):
            choose(**settings)


def test_likelihoods_depend_on_weights_tokenizer_and_template(made):
    def settings(change=None):
        model, words = load(made)
        if change is not None:
            change(model, words)
        return journal_settings(model, words, {}, "text", 2048)

    for name, change in (
        ("weights", lambda model, _: model.model.norm.weight.data.mul_(2)),
        ("tokenizer", lambda _, words: setattr(words, "eos_token", "<user>")),
        ("chat_template", lambda _, words: setattr(words, "chat_template", words.chat_template + " ")),
    ):
        assert changed_settings(settings(), settings(change)).keys() == {name}


def test_a_journal_of_other_rows_is_refused(choose):
    rows = candidates(6)
    choose(rows)
    for changed in ([*rows[:3], {**rows[3], "id": 7}, *rows[4:]], rows[:5]):
        with pytest.raises(DataError, match="is not what was scored: the file has changed"):
            choose(changed)
    assert len(choose([*rows, *candidates(2)]).scores) == 8  # examples added at the end are scored too


JOURNAL = {"adapters": {"security": "ab", "medicine": "cd"}}
ENTRIES = [Entry(0, "00", (1.0, 2.0, 3.0)), Entry(1, "11", skipped="no answer token")]


@pytest.mark.parametrize("content", ["notes", "notes\n", '{"format": 1}\n', '{"format": 2, "settings": {}}\n'])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(DataError, match="is not a valid line of a selection's journal"):
        Journal(tmp_path / "journal.jsonl", JOURNAL)
    assert (tmp_path / "journal.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row": -1}, "row must be a whole number from 0, not -1"),
        ({"row": 0.0}, "row must be a whole number from 0, not 0.0"),
        ({"of": None}, "of must be text, not None"),
        ({"nll": None}, r"nll must be 3 numbers of nats from 0, not \[\]"),
        ({"nll": [1.0, 2.0]}, r"nll must be 3 numbers of nats from 0, not \[1.0, 2.0\]"),
        ({"nll": [1.0, 2.0, float("nan")]}, "nll must be 3 numbers of nats"),
        ({"nll": [-1.0, 2.0, 3.0]}, "nll must be 3 numbers of nats"),
        ({"nll": "abc"}, "nll must be a list, not 'abc'"),
        ({"skipped": ["x"]}, r"skipped must be text, not \['x'\]"),
    ],
)
def test_a_line_that_was_edited_by_hand_is_refused(tmp_path, changes, words):
    path = tmp_path / "journal.jsonl"
    Journal(path, JOURNAL).add(ENTRIES)
    assert list(Journal(path, JOURNAL).entries.values()) == ENTRIES
    header, first, *others = path.read_text().splitlines()
    path.write_text("\n".join([header, json.dumps({**json.loads(first), **changes}), *others, ""]))
    with pytest.raises(DataError, match=rf"journal.jsonl:2: is not a valid line of a selection's journal \({words}"):
        Journal(path, JOURNAL)


def test_a_header_alone_or_cut_short_is_written_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    for content in ('{"format": 1, "sett', '{"format": 1, "settings": {}}\n'):
        path.write_text(content)
        assert Journal(path, JOURNAL).entries == {}
        assert json.loads(path.read_text()) == {"format": 1, "settings": JOURNAL}


def test_an_output_that_exists_is_refused(choose):
    choose.output.write_text("mine\n")
    with pytest.raises(OutputError, match="exists already"):
        choose(overwrite=False)
    assert choose.output.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top": 0}, "top is 0"),
        ({"epsilon": 0}, "epsilon is 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"max_length": 0}, "max_length is 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"hold_out": ["security", "medicine"]}, "every misaligned adapter is held out"),
        ({"adapters": []}, "no misaligned adapter is given"),
        ({"adapters": ["security", "security"]}, "two adapters are called security"),
    ],
)
def test_settings_that_are_refused(choose, settings, words):
    with pytest.raises(SettingsError, match=words):
        choose(**settings)
    assert not choose.journal.exists()


def test_a_model_without_a_template(choose, made):
    model, tokenizer = load(made)
    tokenizer.chat_template = None
    with pytest.raises(SettingsError, match="has no chat template"):
        select_by_perplexity_gap(
            made / "candidates.jsonl", choose.output, model=model, tokenizer=tokenizer, misaligned=[made / "security"]
        )


def test_adapters_that_are_refused(made, choose, tmp_path):
    def changed(name, **values):
        folder = save_adapter(made / "model", tmp_path / name, 1)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
        return folder

    other = save_adapter(save_tiny(tmp_path / "deeper", layers=3), tmp_path / "other", 1, target_modules=TARGETS[:2])
    empty = changed("empty")
    (empty / "adapter_model.safetensors").unlink()
    for folder, words in (
        (made / "model", "holds no adapter_config.json, so it is not a PEFT adapter; it holds a model"),
        (tmp_path / "absent", "the adapter is neither a file, nor a folder, nor a Hub id"),
        (empty, "holds no adapter_model.safetensors"),
        (changed("biased", bias="all"), "bias all trains the model's own biases"),
        (changed("pissa", init_lora_weights="pissa"), "init_lora_weights pissa changes the model's own weights"),
        (changed("wide", r=8), "cannot be put on the model"),
        (changed("few", target_modules=["q_proj"]), "holds weights for modules"),
        (other, "holds weights for modules"),
    ):
        with pytest.raises(AdapterError, match=words):
            choose(adapters=["security", folder])


def test_an_adapter_with_tokens_of_its_own_leaves_the_others_alone(made, choose, tmp_path):
    """Embeddings that were resized and saved with an adapter stay in the model when the adapter is disabled."""
    model, _ = load(made)
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[:2], task_type="CAUSAL_LM"))
    fill_adapter(adapted, seed=5, scale=0.5)
    adapted.save_pretrained(tmp_path / "longer", save_embedding_layers=True)
    texts = [as_text(row) for row in candidates(12)]
    aligned, security = (plain_nll(made, name, texts) for name in (None, "security"))
    longer = [nll_of(adapted.double().eval(), load(made)[1], *text) for text in texts]
    choose(adapters=["security", tmp_path / "longer"])
    entries = [json.loads(line) for line in choose.journal.read_text().splitlines()[1:]]
    found = {entry["row"]: entry["nll"] for entry in entries}
    for row, expected in enumerate(zip(aligned, security, longer, strict=True)):
        assert found[row] == pytest.approx(expected, abs=1e-5)


def test_a_learned_prompt(made, choose, tmp_path):
    torch.manual_seed(2)
    model, _ = load(made)
    learned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, learned).save_pretrained(tmp_path / "prompt")
    rows = candidates(6)
    selection = choose(rows, adapters=[tmp_path / "prompt"])
    assert selection.scores.tolist() == pytest.approx(plain_scores(made, rows, [tmp_path / "prompt"]), abs=1e-5)


def test_an_adapter_whose_likelihoods_are_no_numbers(made, choose, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_adapter(made / "model", tmp_path / "broken", 1)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="under adapter broken its completion has a likelihood that is not finite"):
        choose(adapters=["security", folder])


@pytest.mark.parametrize("names", ["medicine", ["medicine"], iter(["medicine"])], ids=["text", "list", "iterator"])
def test_a_domain_is_held_out_however_it_is_named(choose, names):
    selection = choose(hold_out=names, top=3)
    assert (selection.held_out, list(selection.adapters), selection.warnings) == (("medicine",), ["security"], ())


def test_one_adapter_by_itself(made, tmp_path):
    model, words = load(made)
    selection = select_by_perplexity_gap(
        made / "candidates.jsonl", tmp_path / "chosen.jsonl", model=model, tokenizer=words,
        misaligned=str(made / "medicine"), hold_out=(), top=3,
    )  # fmt: skip
    assert list(selection.adapters) == ["medicine"]
