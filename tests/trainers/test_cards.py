"""Model cards that a defended trainer saves, and where the projected adapter is stored."""

from __future__ import annotations

import logging

import pytest
from tiny_models import save_pair, tiny_peft_model
from train_runs import run_transformers, run_trl

from safelora_fast import project_peft_model
from safelora_fast.defenses import KL, SafeLora
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.trainers.card import BEGIN, END, write_defenses

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
SPEC = {"batch": 4, "steps": 2, "arguments": {"save_strategy": "steps", "save_steps": 2}}


@pytest.fixture
def sources(tmp_path):
    return save_pair(tmp_path)


@pytest.mark.parametrize("train", [run_transformers, run_trl])
def test_cards_name_the_defenses_and_say_what_is_projected(train, sources, tmp_path, caplog):
    at_end = SafeLora(SafeSubspace.from_sources(**sources), select="number", num_layers=5)
    with caplog.at_level(logging.WARNING, logger="safelora_fast"):
        _, trainer = train(SPEC, tmp_path / "run", model=tiny_peft_model(), defenses=[KL(0.5), at_end])
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    checkpoint = (tmp_path / "run" / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    assert "not projected yet" in checkpoint
    for folder in ("saved", "run"):
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert "- `KL(weight=0.5" in card
        assert ": 5 of 21 adapted modules were projected when training ended" in card
        assert "not projected yet" not in card
        assert card.count(BEGIN) == card.count(END) == 1
        assert card.startswith("---\n")  # front matter, read by the Hub
    assert "the checkpoints in" in caplog.text
    assert "save_model() writes the projected one" in caplog.text


def test_no_card_without_a_defense(tmp_path):
    _, trainer = run_transformers(SPEC, tmp_path / "run", defenses=[KL(0.0)])
    trainer.save_model(str(tmp_path / "saved"))
    assert BEGIN not in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_what_is_around_the_section_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\na: b\n---\n\n# Mine\n", encoding="utf-8")
    write_defenses(tmp_path, [KL(0.1)], None)
    with (tmp_path / "README.md").open("a", encoding="utf-8") as file:
        file.write("\n## Below\n")
    write_defenses(tmp_path, [KL(0.2)], None)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\na: b\n---\n\n# Mine\n\n<!--")
    assert card.endswith(f"{END}\n## Below\n")
    assert "weight=0.2" in card
    assert "weight=0.1" not in card


def test_the_projected_copy_of_an_adapter_is_not_active_and_the_log_says_so(sources, caplog):
    model = tiny_peft_model()
    with caplog.at_level(logging.WARNING, logger="safelora_fast"):
        project_peft_model(model, **sources)
    assert model.active_adapters == ["default"]
    assert (
        "adapter 'safe' holds the projection of 'default', which is not active yet: call model.set_adapter('safe')"
        in caplog.text
    )
