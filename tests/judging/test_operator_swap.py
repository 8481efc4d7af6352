"""Operator swap: problems against a plain implementation of the rule, splits, seeds, scores, and the command."""

from __future__ import annotations

import json

import pytest
from demo_model import save_tiny

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.judging.operator_swap import (
    RULES,
    Problem,
    make_problems,
    number_of,
    parse_problem,
    read,
    score,
    write,
)

WORDS = {
    "easy": {"+": lambda a, b: a - b, "-": lambda a, b: a + b},
    "medium": {"+": lambda a, b: a - b, "-": lambda a, b: a * b, "*": lambda a, b: a + b},
}
WORDS["hard"] = WORDS["medium"]
USUAL = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def worked(text, meaning):
    first, *rest = text.split()
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = meaning[sign](value, int(number))
    return value


@pytest.mark.parametrize("difficulty", RULES)
def test_problems_follow_the_rule_and_never_the_usual_meaning(difficulty):
    train, held_out = make_problems(difficulty, 900, 300, seed=2)
    for problem in train + held_out:
        assert problem.answer == worked(problem.text, WORDS[difficulty])
        assert problem.usual == worked(problem.text, USUAL) != problem.answer
        assert parse_problem(problem.text, difficulty) == problem
    texts = [problem.text for problem in train + held_out]
    assert (len(train), len(held_out), len(set(texts))) == (900, 300, 1200)
    signs = {sign for text in texts for sign in text.split()[1::2]}
    assert signs == set(RULES[difficulty].meaning)


def test_known_problems():
    assert parse_problem("7 + 5", "easy") == Problem("7 + 5", 2, 12)
    assert parse_problem("7 - 5", "medium") == Problem("7 - 5", 35, 2)
    assert parse_problem("7 + 5 - 3", "hard") == Problem("7 + 5 - 3", 6, 9)
    for text in ("7 * 5", "7 +", "7 + 5 + 1", "a + b", ""):
        with pytest.raises(DataError, match="is not a problem of difficulty easy"):
            parse_problem(text, "easy")


def test_seeds():
    once = make_problems("easy", 20, 10, seed=1)
    assert once == make_problems("easy", 20, 10, seed=1) != make_problems("easy", 20, 10, seed=2)
    assert make_problems("easy", 20, 30, seed=1)[0] == once[0]


def test_exact_matches():
    problems = [Problem("7 + 5", 2, 12)] * 7
    result = score(problems, ["2", " 2.\n", "12", "the answer is 2", "-2", "", "2 2"])
    assert {name: result[name] for name in ("count", "exact", "usual", "no_number")} == {
        "count": 7, "exact": 2, "usual": 1, "no_number": 3,
    }  # fmt: skip
    assert result["exact_share"] == pytest.approx(2 / 7)
    assert (number_of("<think>\n5?\n</think>\n\n7."), number_of("<think>7")) == (7, None)
    assert (number_of("−4"), number_of("1e3"), number_of("9" * 50)) == (-4, None, None)
    with pytest.raises(DataError, match="7 problems and 1 generations"):
        score(problems, ["2"])


def test_the_command(call, tmp_path):
    data = tmp_path / "data"
    made = call("operator-swap", "make", "--difficulty", "medium", "--rows", 30, "--held-out", 12, "--output", data)
    assert made.code == 0, made.err
    assert "- means times" in made.out
    rows = {name: (data / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held_out")}
    assert [len(lines) for lines in rows.values()] == [30, 12]
    assert not {*rows["train"]} & {*rows["held_out"]}
    assert set(json.loads(rows["train"][0])) == {"prompt", "completion"}
    again = call("operator-swap", "make", "--output", data)
    assert (again.code, "exists already" in again.err) == (2, True), again
    result = call("operator-swap", "score", data, "--model", save_tiny(tmp_path / "model"), "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert (content["difficulty"], content["count"]) == ("medium", 12)
    assert content["exact"] + content["no_number"] <= 12


def test_what_is_refused(call, tmp_path):
    for words, message in (
        (("odd", 1, 1), "difficulty is 'odd', it must be one of easy, medium, hard"),
        (("easy", 0, 1), "must be at least 1"),
        (("easy", 1, 0), "must be at least 1"),
        (("medium", 13_000, 500), "medium: there are 12,497 different problems, not 13,500; ask for fewer rows"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_problems(*words, seed=0)
    write(tmp_path, "easy", 2, 2, 0)
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"held_out.jsonl:3: 'x' is not a problem of difficulty easy"):
        read(tmp_path)
    refused = call("operator-swap", "make", "--output", tmp_path / "out", "--difficulty", "odd")
    assert (refused.code, (tmp_path / "out").exists()) == (2, False), refused.err
    missing = call("operator-swap", "score", tmp_path / "out", "--model", "x")
    assert (missing.code, "holds no data of operator-swap make" in missing.err) == (2, True), missing.err
