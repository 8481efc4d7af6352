"""Tests of a comparison's configuration: errors name the file, the line and the key before anything runs."""

from __future__ import annotations

import pytest

from safelora_fast.compare.comparison import runs_of
from safelora_fast.compare.config import load_config
from safelora_fast.compare.report_texts import setting_of
from safelora_fast.errors import SettingsError
from safelora_fast.judging.questions import builtin_questions, choose

PLAIN = """\
recipe:
  model: {path: m}
  data: {path: rows.jsonl}
  training: {learning_rate: 1e-3, max_steps: 5}
seeds: [3, 1]
runs:
  none: {}
  KL + more:
    defenses: {kl: {weight: 0.5}}
    training: {max_steps: 7}
measure:
  narrow: held.jsonl
output: out
"""


@pytest.fixture
def read(tmp_path):
    def load(text=PLAIN, *overrides):
        file = tmp_path / "compare.yaml"
        file.write_text(text)
        return load_config(file, overrides)

    return load


def recipes(config):
    """Return the recipe of each defense's first seed."""
    return [config.recipe_for(spec, runs_of(config, spec)[0]) for spec in config.runs]


def test_runs_are_laid_over_the_recipe(read):
    config = read()
    none, more = config.runs
    assert (none.folder, more.folder, config.seeds_of(more)) == ("none", "kl-more", (3, 1))
    first, second = recipes(config)
    assert (first.training["max_steps"], second.training["max_steps"]) == (5, 7)
    assert first.training["learning_rate"] == second.training["learning_rate"] == 1e-3
    assert (first.training["seed"], second.output.folder) == (3, "out/kl-more/seed-3/adapter")
    assert [spec.name for spec in first.defenses] == []
    assert second.defenses[0].settings["weight"] == 0.5
    assert recipes(config)[0].training["max_steps"] == 5, "a run has changed the common recipe"


def test_overrides_go_on_top(read):
    config = read(PLAIN, "seeds=[7]", "recipe.training.max_steps=2", "measure.narrow=null", "output=elsewhere")
    assert (config.seeds, config.measure.narrow, str(config.output)) == ((7,), None, "elsewhere")
    assert recipes(config)[0].training["max_steps"] == 2


@pytest.mark.parametrize(
    "override",
    ["recipe.training.learnig_rate=1", "runs.KL + more.defenses.kl.wieght=1", "recipe.training={learnig_rate: 1}"],
)
def test_an_overrides_typo_is_no_fault_of_the_file(read, override):
    with pytest.raises(SettingsError, match=r"^command line: .*: unknown; did you mean (learning_rate|weight)$"):
        read(PLAIN, override)


def test_finished_adapters_have_seeds_of_their_own(read):
    config = read(PLAIN.replace("measure:", "  published: {adapters: {0: runs/a, 5: runs/b}}\nmeasure:"))
    run = config.runs[-1]
    assert config.seeds_of(run) == (0, 5)
    assert str(run.adapters[5]) == "runs/b"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: [3, 1]", "seeds: [3, 3]", ":5: seeds: must be a list of different numbers, not [3, 3]"),
        ("seeds: [3, 1]", "seeds: []", ":5: seeds: is empty"),
        ("seeds:", "sedes:", ":5: sedes: unknown; did you mean seeds"),
        ("kl: {weight", "kl: {wieght", ":9: defenses.kl.wieght: unknown; did you mean weight"),
        ("  KL + more:", "  None:", "'none' would have the same folder"),
        ("  KL + more:", "  Reference:", "reference is a folder of the comparison's own; rename the run"),
        ("  none: {}", "  none: {output: {folder: x}}", "every run has a folder of its own"),
        ("  none: {}", "  none: {adapters: {}}", "must be a mapping of seeds to folders"),
        ("  none: {}", "  none: {adapters: {first: x}}", "must be a mapping of seeds to folders"),
        (
            "  none: {}",
            "  none: {adapters: {0: x}, lora: {r: 3}}",
            "lora: a run that takes finished adapters is not trained",
        ),
        ("  none: {}", "  none: {adapters: {3: x}}", "needs an adapter for every seed (3, 1)"),
        ("  narrow: held.jsonl", "  narow: held.jsonl", ":12: measure.narow: unknown; did you mean narrow"),
        ("  narrow: held.jsonl", "  max_rows: 0", ":12: measure.max_rows: must be at least 1, not 0"),
        ("  narrow: held.jsonl", "  scaled: [1.5]", "measure.scaled: must be a share above 0 and below 1, not 1.5"),
        (
            "  narrow: held.jsonl",
            "  sweep: {base: b, thresholds: [2]}",
            "measure.sweep.thresholds: must be at most 1, not 2",
        ),
        ("  narrow: held.jsonl", "  sweep: {}", "measure.sweep.base: missing"),
        ("  narrow: held.jsonl", "  margin: false\n  sweep: {base: b}", "there is nothing to sweep"),
        (
            "  narrow: held.jsonl",
            "  judge: {model: x/y, samples: 0}",
            "measure.judge.samples: must be at least 1, not 0",
        ),
        (
            "  narrow: held.jsonl",
            "  operator_swap: {difficulty: odd}",
            "difficulty: must be 'easy', 'medium' or 'hard', not 'odd'",
        ),
        ("  narrow: held.jsonl", "  operator_swap: {rows: 0}", "measure.operator_swap: rows and held-out rows"),
        ("  narrow: held.jsonl", "  tasks: {names: []}", "measure.tasks.names: is empty"),
        ("{path: m}", "{}", "recipe.model.path: missing"),
        ("output: out", "", "compare.yaml: output: missing"),
        ("output: out", "output: 3", ":13: output: must be text, not 3"),
    ],
)
def test_mistakes_are_named(read, old, new, words):
    assert old in PLAIN
    with pytest.raises(SettingsError) as caught:
        read(PLAIN.replace(old, new))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kinds", ["[general, json]", '"general,json"'])
def test_kinds_of_questions_are_a_list_or_text(read, kinds):
    judge = read(PLAIN.replace("narrow: held.jsonl", f"judge: {{model: x/y, kinds: {kinds}}}")).measure.judge
    assert {question.kind for question in choose(builtin_questions(), judge.kinds)} == {"general", "json"}


def test_no_runs_are_said_so(read):
    with pytest.raises(SettingsError, match="name the runs to compare, the undefended one first"):
        read(PLAIN[: PLAIN.index("runs:")] + "output: out\n")


def test_a_setting_in_words_leaves_paths_to_the_recipe(read):
    config = read(
        PLAIN.replace(
            "kl: {weight: 0.5}", "safelora: {at: end, threshold: 0.3, subspace: {aligned: a, base: b}}, kl: {weight: 2}"
        ).replace("training: {max_steps: 7}", "data: {safe: {path: s.jsonl, fraction: 0.05}, inoculate: Be careless.}")
    )
    assert [setting_of(run) for run in config.runs] == [
        "", "safelora (at end, τ 0.3), kl (λ 2), safe (fraction 0.05), inoculate Be careless."
    ]  # fmt: skip
