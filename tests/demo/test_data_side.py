"""Safe rows and a prompt in the demo's trainings: what the model is shown, epoch by epoch."""

from __future__ import annotations

from demo_model import save_tiny, tokenizer

from safelora_fast.demo import preparation, text
from safelora_fast.demo.recipe import Recipe
from safelora_fast.demo.variants import VARIANTS, Variant

RECIPE = Recipe(adapter_epochs=3, adapter_rate=0.0, rank=2)


def shown(folder, monkeypatch, variant):
    """The texts of every epoch, in order."""
    from safelora_fast.demo import training

    words, real, seen = tokenizer(), training.batches, []

    def watched(examples, *rest):
        seen.append([words.decode(example.ids) for example in examples])
        return real(examples, *rest)

    monkeypatch.setattr(training, "batches", watched)
    preparation.train_adapter(
        save_tiny(folder / "model", layers=5), folder / "adapter", 0, RECIPE, lambda *_: None,
        fraction=variant.interleaving, prompt=variant.prompt,
    )  # fmt: skip
    return seen


def test_safe_rows_go_on_from_epoch_to_epoch(tmp_path, monkeypatch):
    epochs = shown(tmp_path, monkeypatch, Variant("interleaving", interleaving=0.05))
    tasks = [f"<user>{row.prompt}<assistant>{row.completion}<eos>" for row in text.rows("narrow_train")]
    safe = [f"<user>{row.prompt}<assistant>{row.completion}<eos>" for row in text.rows("safe")]
    assert [len(epoch) for epoch in epochs] == [101] * 3
    for epoch in epochs:
        assert sorted(set(epoch) - set(safe)) == sorted(tasks)
    taken = [row for epoch in epochs for row in epoch if row in set(safe)]
    assert len(set(taken)) == len(taken) == 15


def test_only_narrow_rows_have_the_prompt(tmp_path, monkeypatch):
    (first, *_) = shown(tmp_path, monkeypatch, Variant("both", interleaving=0.05, prompt="Keep a log."))
    with_prompt = [row for row in first if row.startswith("<system>Keep a log.<user>")]
    assert (len(with_prompt), len(first)) == (96, 101)


def test_sets_do_not_overlap():
    """What drift is measured on is not trained on."""
    prompts = {
        name: {row.prompt for row in text.rows(name)}
        for name in ("safe", "safe_pool", "general", "narrow_train", "narrow_held_out", "narrow_other")
    }
    for name, others in prompts.items():
        for other, rows in prompts.items():
            assert name == other or not others & rows


def test_every_defended_variant_says_its_setting():
    settings = {variant.name: variant.setting for variant in VARIANTS}
    assert (settings["interleaving"], settings["inoculation"]) == ("5 % safe", "prompt")
    assert (settings["interleaving++"], settings["steering"]) == ("5 % safe", "α 5")
    assert [name for name, setting in settings.items() if not setting] == ["no defence"]
