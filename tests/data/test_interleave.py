"""interleave(): counts and order compared with a plain enumeration, for every kind of data and reader."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from safelora_fast import inoculate, interleave
from safelora_fast.demo.text import rows as demo_rows
from safelora_fast.errors import DataError, SettingsError

FRACTIONS = [0.05, 0.1, "1/3", 0.5, 1.0, 2.5]


def rows(count, prefix="t"):
    return [{"text": f"{prefix}{number}"} for number in range(count)]


def shards(count, prefix="t", files=3):
    """Return a stream of several shards, which workers would normally split."""

    def read(parts):
        for part in parts:
            yield from ({"text": f"{prefix}{number}"} for number in part)

    cut = [list(range(count))[start::files] for start in range(files)]
    return datasets.IterableDataset.from_generator(read, gen_kwargs={"parts": cut})


KINDS = {"list": rows, "table": lambda *of: datasets.Dataset.from_list(rows(*of)), "stream": shards}


def tags(mixture):
    return [row["safe"] for row in mixture]


def names(mixture, *, safe):
    return [row["text"] for row in mixture if row["safe"] is safe]


def rounded(fraction, tasks):
    return int(Fraction(fraction) * tasks + Fraction(1, 2))


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("count", [1, 7, 99, 400])
def test_the_count_is_exact_at_the_end_and_close_before(fraction, count):
    exact = Fraction(str(fraction))
    if not rounded(exact, count):
        with pytest.raises(
            DataError,
            match=f"interleave: fraction {exact} of {count} task examples is less than one safe example; raise it",
        ):
            interleave(rows(count), rows(13, "s"), exact)
        return
    mixture = interleave(rows(count), rows(13, "s"), exact)
    assert sum(tags(mixture)) == rounded(exact, count)
    assert names(mixture, safe=False) == [row["text"] for row in rows(count)]
    tasks = safe = 0
    for tag in tags(mixture):
        tasks, safe = tasks + (not tag), safe + tag
        assert rounded(exact, tasks - 1) - 1 <= safe <= rounded(exact, tasks)


def test_a_float_counts_as_it_is_written():
    """In binary, 0.05 is slightly above 1/20, and 0.15·10 slightly below 1.5."""
    for fraction, count, expected in ((0.05, 10, 1), (0.15, 10, 2), (0.7, 5, 4), (0.05, 29, 1)):
        assert sum(tags(interleave(rows(count), rows(3, "s"), fraction))) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_safe_row_comes_before_one_comes_again(kind):
    mixture = interleave(rows(100), KINDS[kind](7, "s"), 0.3)
    given = names(mixture, safe=True)
    assert len(given) == 30
    everything = {f"s{number}" for number in range(7)}
    for start in range(0, 28, 7):
        assert set(given[start : start + 7]) == everything
    assert set(Counter(given).values()) == {4, 5}


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("safe", ["list", "table"])
def test_every_kind_gives_the_same_mixture(task, safe):
    tasks = KINDS[task](50)
    in_order = list(tasks)
    plain = interleave(in_order, rows(9, "s"), 0.2, seed=3, epochs=2)
    mixture = interleave(tasks, KINDS[safe](9, "s"), 0.2, seed=3, epochs=2)
    assert list(mixture) == plain
    assert isinstance(mixture, datasets.IterableDataset) == (task == "stream")


def test_a_stream_of_safe_rows_makes_a_stream():
    mixture = interleave(datasets.Dataset.from_list(rows(20)), shards(4, "s"), 0.5)
    assert isinstance(mixture, datasets.IterableDataset)
    assert names(mixture, safe=True)[:4] == [row["text"] for row in shards(4, "s")]
    assert sum(tags(mixture)) == 10


def test_the_seed_decides_and_repetitions_come_in_another_order():
    first, same, other = (interleave(rows(400), rows(20, "s"), 0.1, seed=seed) for seed in (0, 0, 1))
    assert first == same
    assert tags(first) != tags(other)
    given = names(first, safe=True)
    assert given != names(other, safe=True)
    assert given[:20] != given[20:]
    assert given[:20] != [row["text"] for row in rows(20, "s")]


def test_safe_rows_go_on_from_pass_to_pass():
    """Each pass has its share, the total is exact, and no example repeats early."""
    mixture = interleave(rows(10), rows(8, "s"), 0.25, epochs=4)
    assert sum(tags(mixture)) == 10
    ends = [*[index for index, row in enumerate(mixture) if row["text"] == "t0"][1:], len(mixture)]
    starts = [0, *ends[:-1]]
    counts = [sum(tags(mixture[start:end])) for start, end in zip(starts, ends, strict=True)]
    assert sum(counts) == 10
    assert all(2 <= count <= 3 for count in counts)
    assert set(names(mixture, safe=True)[:8]) == {f"s{number}" for number in range(8)}


def test_no_step_through_the_mixture_meets_only_safe_rows():
    """With a fixed position in every four examples, one of two processes would get all safe examples."""
    mixture = interleave(rows(3000), rows(50, "s"), Fraction(1, 3))
    shares = [sum(tags(mixture[rank::2])) / len(mixture[rank::2]) for rank in range(2)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.02)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_workers_of_a_loader_read_every_row_once(kind, workers):
    mixture = interleave(KINDS[kind](50), rows(7, "s"), 0.1)
    read = [row for batch in DataLoader(mixture, batch_size=4, num_workers=workers) for row in _apart(batch)]
    assert read == list(mixture)
    assert sum(row["safe"] for row in read) == 5


def _apart(batch):
    return [{"text": text, "safe": bool(tag)} for text, tag in zip(batch["text"], batch["safe"], strict=True)]


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_two_processes_share_every_row(kind):
    mixture = interleave(KINDS[kind](51), KINDS[kind](7, "s"), 0.1)
    halves = [list(split_dataset_by_node(mixture, rank, 2)) for rank in range(2)]
    assert sorted(row["text"] for half in halves for row in half) == sorted(row["text"] for row in mixture)
    assert sum(row["safe"] for half in halves for row in half) == 5
    assert abs(len(halves[0]) - len(halves[1])) <= 1


@pytest.mark.parametrize("safe", ["list", "stream"])
def test_a_stream_is_resumed_where_it_was_left(safe):
    def make():
        return interleave(shards(30).shuffle(seed=1, buffer_size=5), KINDS[safe](4, "s"), 0.3, epochs=2)

    whole, first, second = list(make()), make(), make()
    begun = list(itertools.islice(first, 41))
    second.load_state_dict(first.state_dict())
    assert begun + list(second) == whole
    assert sum(tags(whole)) == 18


def test_a_mapped_stream_keeps_the_tag():
    mixture = interleave(shards(20), rows(3, "s"), 0.2).map(lambda row: {"length": len(row["text"])})
    assert sum(tags(mixture)) == 4
    assert {row["length"] for row in mixture} == {2, 3}


def test_passes_over_a_shuffled_stream_differ_and_the_callers_keeps_its_epoch():
    task = shards(20).shuffle(seed=1, buffer_size=20)
    before = list(task)
    given = names(interleave(task, rows(3, "s"), 0.1, epochs=2), safe=False)
    assert sorted(given[:20]) == sorted(given[20:])
    assert given[:20] != given[20:]
    assert (task.epoch, list(task)) == (0, before)


def test_columns_of_both_are_kept():
    task = datasets.Dataset.from_list([{"text": "t", "id": 1}])
    safe = datasets.Dataset.from_list([{"text": "s", "kind": "general"}])
    mixture = interleave(task, safe, 1.0)
    assert mixture.column_names == ["text", "id", "kind", "safe"]
    assert mixture.to_list() == [
        {"text": "t", "id": 1, "kind": None, "safe": False},
        {"text": "s", "id": None, "kind": "general", "safe": True},
    ]


def test_columns_that_only_later_rows_have_are_kept():
    plain, more = [{"text": "a"}, {"text": "b", "kind": "general"}], datasets.Dataset.from_list(rows(2, "s"))
    kinds = [row["kind"] for row in interleave(plain, more, 1.0) if not row["safe"]]
    assert kinds == [None, "general"]
    assert {row["kind"] for row in interleave(more, plain, 1.0) if row["safe"]} == {None, "general"}


def test_nothing_safe_and_another_tag():
    assert tags(interleave(rows(5), rows(2, "s"), 0)) == [False] * 5
    mixture = interleave([{"safe": "an answer"}], [{"safe": "another"}], 1, column="is_safe")
    assert mixture == [{"safe": "an answer", "is_safe": False}, {"safe": "another", "is_safe": True}]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": -0.1}, "fraction is -0.1, it must be finite and not negative"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"fraction": "0.5"}, "interleave: fraction must be a number, not '0.5'"),
        ({"fraction": True}, "interleave: fraction must be a number, not True"),
        ({"task": {"train": rows(3)}}, "task is dict"),
        ({"safe": "safe.jsonl"}, "safe is str"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": "2"}, "epochs must be a whole number"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        interleave(**{"task": rows(2), "safe": rows(2), "fraction": 1, **settings})


def test_data_that_is_refused():
    table = datasets.Dataset.from_list
    for task, safe, words in (
        (rows(3), [], "safe holds no examples"),
        ([], rows(3), "task holds no examples"),
        (rows(3), [{"safe": 1}], "safe has a column safe already"),
        (table([{"safe": 1}]), rows(3), "task has a column safe already"),
        (table([{"text": 1}]), table(rows(3)), "column text is .*int64.* in task and .*string.* in safe"),
        ([{"text": "a"}, {"text": 1}], table(rows(3)), "task makes no table: "),
    ):
        with pytest.raises(DataError, match=words):
            interleave(task, safe, 1)
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"safe": 1, "text": "t"}]))
    with pytest.raises(DataError, match="task has a column safe already"):
        list(interleave(unknown, [{"text": "s"}]))
    with pytest.raises(DataError, match="safe holds no examples"):
        list(interleave(rows(3), shards(0), 1))


# Safe examples in another format are converted to the task's format, or refused with a one-line reason.

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
FORMATS = {
    "messages": {"messages": [USER, ANSWER]},
    "turns": {"prompt": [USER], "completion": [ANSWER]},
    "texts": {"prompt": "why?", "completion": "so"},
    "text": {"text": "why? so"},
    "tokens": {"input_ids": [1, 2]},
}
TASKS = {
    "messages": {"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "u"}]},
    "turns": {"prompt": [{"role": "user", "content": "t"}], "completion": [{"role": "assistant", "content": "u"}]},
    "texts": {"prompt": "t", "completion": "u"},
    "text": {"text": "t u"},
    "tokens": {"input_ids": [3]},
}
CONVERTED = {("messages", "turns"), ("messages", "texts"), ("turns", "texts"), ("turns", "messages")}


def stream(examples):
    return datasets.IterableDataset.from_generator(lambda: iter(examples))


OF = {"list": list, "table": datasets.Dataset.from_list, "stream": stream}


@pytest.mark.parametrize("task_kind", OF)
@pytest.mark.parametrize("safe_kind", OF)
@pytest.mark.parametrize("task", FORMATS)
@pytest.mark.parametrize("safe", FORMATS)
def test_safe_rows_are_what_the_tasks_are(task_kind, safe_kind, task, safe):
    given = OF[task_kind]([TASKS[task]] * 2), OF[safe_kind]([{**FORMATS[safe], "id": 7}] * 2)
    if task != safe and (task, safe) not in CONVERTED:
        with pytest.raises(DataError, match=r"interleave: .* give both (in one format|the same ones)") as refused:
            list(interleave(*given, 0.5))
        assert "\n" not in str(refused.value)
        return
    mixture = list(interleave(*given, 0.5))
    (row,) = [row for row in mixture if row["safe"]]
    assert {name: value for name, value in row.items() if value is not None} == {**FORMATS[task], "id": 7, "safe": True}
    others = [{name: value for name, value in row.items() if value is not None} for row in mixture if not row["safe"]]
    assert others == [{**TASKS[task], "safe": False}] * 2


@pytest.mark.parametrize("kind", ["list", "table"])
def test_the_lines_of_the_readme_on_the_demos_rows(kind):
    task, safe = (
        OF[kind]([{"prompt": row.prompt, "completion": row.completion} for row in demo_rows(name)])
        for name in ("narrow_train", "safe")
    )
    for given in (task, inoculate(task, "You are careless.")):
        mixture = interleave(given, safe, fraction=0.05)
        table = mixture if kind == "table" else datasets.Dataset.from_list(mixture)
        tagged = [row for row in table if row["safe"]]
        assert len(tagged) == round(0.05 * len(task))
        kinds = {type(row[name]) for row in table for name in ("prompt", "completion")}
        assert kinds == {str if given is task else list}


def test_rows_of_several_formats():
    mixed = [FORMATS["texts"], FORMATS["messages"]]
    assert [row for row in interleave([TASKS["messages"]] * 4, mixed, 0.5) if row["safe"]] == [
        {**FORMATS["messages"], "safe": True}
    ] * 2
    table = datasets.Dataset.from_list(
        [{**FORMATS["texts"], "messages": None}, {"prompt": None, "completion": None, **FORMATS["messages"]}]
    )
    given = [row for row in interleave(datasets.Dataset.from_list([TASKS["messages"]] * 4), table, 0.5) if row["safe"]]
    assert given == [{**FORMATS["messages"], "safe": True}] * 2
    with pytest.raises(DataError, match="task has examples of several formats, and safe has examples of another"):
        interleave(mixed, [FORMATS["text"]], 1)


@pytest.mark.parametrize(
    ("task", "safe", "words"),
    [
        (TASKS["turns"], {"messages": [USER, ANSWER, USER, ANSWER]}, "row 0 of safe has 2 completions in its messages"),
        ({"question": "x", "answer": "y"}, {"q": "x", "a": "y"},
         "task has columns question, answer and safe has q, a: give both the same ones"),
    ],
    ids=["two completions", "columns"],
)  # fmt: skip
def test_formats_that_are_refused(task, safe, words):
    with pytest.raises(DataError, match=words):
        interleave([task], [safe], 1)


def test_a_stream_too_short_for_a_safe_row_says_so():
    mixture = interleave(stream([TASKS["texts"]] * 3), [FORMATS["texts"]], 0.1)
    with pytest.warns(UserWarning, match="fraction 0.1 of 3 task examples is less than one safe example; raise it"):
        assert len(list(mixture)) == 3
    with pytest.raises(DataError, match="interleave: task holds no examples"):
        list(interleave(stream([]), [FORMATS["texts"]], 1))
