"""The `lora:` and `training:` sections, whose keys are the arguments of PEFT's LoraConfig and TRL's SFTConfig.

Both are checked against the installed versions of the classes. The defaults are from Kaczér et al. (arXiv 2508.06249).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model

from safelora_fast.configuration.signatures import dataclass_fields, read_annotation
from safelora_fast.configuration.yaml_section import Arguments, check
from safelora_fast.recipe.sections import Count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.configuration.yaml_document import Document

NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class ForeignSection:
    """A section whose keys are the arguments of a dataclass in another package.

    Attributes:
        section: its name in the recipe.
        package: the package that contains the class.
        name: the name of the class.
        defaults: our defaults, which replace those of the class.
        elsewhere: arguments that must not be given, each with what to do instead.
        types: stricter types for arguments whose annotation allows too much.
    """

    section: str
    package: str
    name: str
    defaults: Mapping[str, Any]
    elsewhere: Mapping[str, str]
    types: Mapping[str, Any] = field(default_factory=dict)

    def read(self, document: Document) -> dict[str, Any]:
        """Read and check the section, and add our defaults.

        Raises:
            SettingsError: an argument is unknown, must be set elsewhere, or has the wrong type.
        """
        given = document.section(self.section)
        for name in given:
            if name in self.elsewhere:
                raise document.problem((self.section, name), self.elsewhere[name])
        fields = dataclass_fields(self.package, self.name)
        kinds: dict[str, Any] = {
            name: (self.types.get(name, read_annotation(annotation)), None)
            for name, annotation in fields.items()
            if name not in self.elsewhere
        }
        check(document, (self.section,), create_model(self.name, __base__=Arguments, **kinds), given)
        return {**{name: value for name, value in self.defaults.items() if name in fields}, **given}


_AUTOMATIC = "is set by the command; leave it out"
_BY_DATA = "rows are made into tokens before the trainer sees them (see the data section); leave it out"

LORA = ForeignSection(
    section="lora",
    package="peft",
    name="LoraConfig",
    defaults={"r": 32, "lora_alpha": 64, "use_rslora": True, "lora_dropout": 0.0, "target_modules": "all-linear"},
    elsewhere={
        **dict.fromkeys(
            ("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"), _AUTOMATIC
        ),
        "base_model_name_or_path": "model.path says it",
        "revision": "say it in model.path, after an @",
    },
)

TRAINING = ForeignSection(
    section="training",
    package="trl",
    name="SFTConfig",
    defaults={
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_length": 2048,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "completion_only_loss": True,
        "seed": 0,
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": "none",
    },
    types={
        "num_train_epochs": Annotated[float, Field(gt=0)],
        "learning_rate": NotNegative,
        "per_device_train_batch_size": Count,
        "gradient_accumulation_steps": Count,
        "max_length": Count | None,
        "warmup_steps": NotNegative,
        "weight_decay": NotNegative,
        "seed": Annotated[int, Field(ge=0)],
    },
    elsewhere={
        "output_dir": "output.folder says it",
        "overwrite_output_dir": "pass --overwrite",
        "resume_from_checkpoint": "pass --resume",
        "use_cpu": "say model.device: cpu",
        "no_cuda": "say model.device: cpu",
        "model_init_kwargs": "the model section says how the model is loaded",
        "trust_remote_code": "say model.trust_remote_code",
        "chat_template_path": "say model.chat_template",
        "max_seq_length": "the argument is called max_length",
        "assistant_only_loss": "completion_only_loss covers rows of messages too: their assistant turns",
        "truncation_mode": "rows are cut at their end; see data.too_long",
        "auto_find_batch_size": "it would change the run behind your back: say per_device_train_batch_size",
        "save_only_model": "--resume needs the optimizer's state; save_strategy: no writes no checkpoints at all",
        "push_to_hub": "upload the finished folder, e.g. with `hf upload`",
        **dict.fromkeys(
            ("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "eos_token", "pad_token"), _BY_DATA
        ),
        **dict.fromkeys(
            ("do_train", "do_eval", "do_predict", "disable_tqdm", "remove_unused_columns", "local_rank", "label_names"),
            _AUTOMATIC,
        ),
    },
)
