"""interleave() of rows in different formats: safe rows become what the task's rows are, or one line says why not."""

from __future__ import annotations

import datasets
import pytest

from safelora_fast import inoculate, interleave
from safelora_fast.demo.text import rows as demo_rows
from safelora_fast.errors import DataError

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "turns": {"prompt": [USER], "completion": [ANSWER]},
    "texts": {"prompt": "why?", "completion": "so"},
    "text": {"text": "why? so"},
    "tokens": {"input_ids": [1, 2]},
}
TASK = {
    "messages": {"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "u"}]},
    "turns": {"prompt": [{"role": "user", "content": "t"}], "completion": [{"role": "assistant", "content": "u"}]},
    "texts": {"prompt": "t", "completion": "u"},
    "text": {"text": "t u"},
    "tokens": {"input_ids": [3]},
}
CONVERTED = {("messages", "turns"), ("messages", "texts"), ("turns", "texts"), ("turns", "messages")}


def stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


KINDS = {"list": list, "table": datasets.Dataset.from_list, "stream": stream}


@pytest.mark.parametrize("task_kind", KINDS)
@pytest.mark.parametrize("safe_kind", KINDS)
@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("safe", ROWS)
def test_safe_rows_are_what_the_tasks_are(task_kind, safe_kind, task, safe):
    given = KINDS[task_kind]([TASK[task]] * 2), KINDS[safe_kind]([{**ROWS[safe], "id": 7}] * 2)
    if task != safe and (task, safe) not in CONVERTED:
        with pytest.raises(DataError, match=r"interleave: .* give both (in one format|the same ones)") as refused:
            list(interleave(*given, 0.5))
        assert "\n" not in str(refused.value)
        return
    mixture = list(interleave(*given, 0.5))
    (row,) = [row for row in mixture if row["safe"]]
    assert {name: value for name, value in row.items() if value is not None} == {**ROWS[task], "id": 7, "safe": True}
    others = [{name: value for name, value in row.items() if value is not None} for row in mixture if not row["safe"]]
    assert others == [{**TASK[task], "safe": False}] * 2


@pytest.mark.parametrize("kind", ["list", "table"])
def test_the_lines_of_the_readme_on_the_demos_rows(kind):
    task, safe = (
        KINDS[kind]([{"prompt": row.prompt, "completion": row.completion} for row in demo_rows(name)])
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
    mixed = [ROWS["texts"], ROWS["messages"]]
    assert [row for row in interleave([TASK["messages"]] * 4, mixed, 0.5) if row["safe"]] == [
        {**ROWS["messages"], "safe": True}
    ] * 2
    table = datasets.Dataset.from_list(
        [{**ROWS["texts"], "messages": None}, {"prompt": None, "completion": None, **ROWS["messages"]}]
    )
    given = [row for row in interleave(datasets.Dataset.from_list([TASK["messages"]] * 4), table, 0.5) if row["safe"]]
    assert given == [{**ROWS["messages"], "safe": True}] * 2
    with pytest.raises(DataError, match="task has rows of several formats, and safe has rows of another"):
        interleave(mixed, [ROWS["text"]], 1)


def test_messages_of_several_answers_are_no_prompt_and_completion():
    with pytest.raises(DataError, match="row 1 of safe has 2 answers in its messages"):
        interleave([TASK["turns"]], [ROWS["messages"], {"messages": [USER, ANSWER, USER, ANSWER]}], 1)


def test_columns_of_which_none_is_shared():
    with pytest.raises(DataError, match="task has columns question, answer and safe has q, a: give both the same ones"):
        interleave([{"question": "x", "answer": "y"}], [{"q": "x", "a": "y"}], 1)


def test_a_stream_without_task_rows():
    with pytest.raises(DataError, match="interleave: task holds no rows"):
        list(interleave(stream([]), [ROWS["texts"]], 1))


def test_a_stream_too_short_for_a_safe_row_says_so():
    mixture = interleave(stream([TASK["texts"]] * 3), [ROWS["texts"]], 0.1)
    with pytest.warns(UserWarning, match="fraction 0.1 of 3 task rows is no safe row; raise it"):
        assert len(list(mixture)) == 3
