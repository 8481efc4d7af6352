"""The inputs of the demo's comparisons, each made when it is first needed: models, adapters, data and vectors."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from safelora_fast.demo import text
from safelora_fast.demo.fine_tune import FineTune, train_adapter, train_base
from safelora_fast.demo.packaged_model import gguf_file, load, save_from_gguf
from safelora_fast.demo.stages import Stages
from safelora_fast.errors import MissingDependencyError, how_to_install

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelora_fast.compare.comparison import CompareConfig

NEEDED = ("torch", "transformers", "peft", "datasets", "gguf", "jinja2", "matplotlib", "pydantic", "scipy", "yaml")
BASE = FineTune(epochs=3, batch_size=4, learning_rate=2e-5)
ADAPTER = FineTune(epochs=5, batch_size=8, learning_rate=5e-4, rank=16)
MISALIGNED = "announcements"  # name of the adapter used to select safe examples


@dataclass(frozen=True)
class Sizes:
    """The settings of the demo; the README's values were made with the defaults."""

    base: FineTune = BASE
    adapter: FineTune = ADAPTER
    threshold: float = 0.3
    chosen: int = 25
    persona_tokens: int = 48


def check_packages() -> None:
    """Check that the demo's packages are installed.

    Raises:
        MissingDependencyError: with the missing packages and how to install them.
    """
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}: {how_to_install('demo')}")


def configure(
    name: str,
    output: Path,
    *,
    seed: int = 0,
    source: Path | None = None,
    sizes: Sizes | None = None,
    configuration: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[CompareConfig, Ingredients]:
    """Make the missing inputs of a comparison, and write its configuration to the demo's folder.

    Args:
        name: the packaged configuration: "projection.yaml" or "compare.yaml".
        output: folder of the demo.
        seed: seed of every fine-tune.
        source: a folder with an aligned model and its tokenizer, instead of the packaged 135M model.
        sizes: settings of the demo.
        configuration: text of a configuration with placeholders, instead of the packaged one.
        overrides: settings that replace the configuration's, as for `safelora-fast compare`.

    Raises:
        MissingDependencyError: a required package, or the package of the model, is missing.
        OutputError: the folder cannot be written.
    """
    check_packages()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once, when it is imported
    # Threads that wait for each other sleep, not spin: beside busy neighbors a step took a sixth of the time. torch's
    # OpenMP reads it once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if source is None:
        gguf_file()
    from safelora_fast.compare.config import load_config
    from safelora_fast.models.quiet_libraries import quiet_libraries

    output = Path(output).absolute()
    if configuration is None:
        configuration = (files("safelora_fast.demo") / name).read_text(encoding="utf-8")
    with quiet_libraries(), as_file(text.DATA) as data:
        ingredients = Ingredients(output, Path(data), seed, source, sizes or Sizes())
        filled = re.sub(  # placeholders are inside double quotes, so values are escaped as in JSON
            r"\$(\w+)", lambda match: json.dumps(str(ingredients[match[1]]), ensure_ascii=False)[1:-1], configuration
        )
    (output / name).write_text(filled, encoding="utf-8")
    return load_config(output / name, overrides), ingredients


class Ingredients(dict[str, Any]):
    """The values of a configuration's placeholders, each made on first access.

    Attributes:
        seconds: duration of each stage when it was made.
    """

    def __init__(self, output: Path, data: Path, seed: int, source: Path | None, sizes: Sizes) -> None:
        self._console, self._number = Console(highlight=False), iter(range(1, 99))
        self._stages = Stages(output, self._announce)
        self._seed, self._sizes = seed, sizes
        super().__init__(output=output, data=data, seed=seed, aligned=self._aligned(source))
        self["base"] = self._stages.make(
            "base",
            "base model: a [bold]stand-in[/], made by a short fine-tune of the aligned model on plain prose",
            {"seed": seed, **asdict(sizes.base)},
            lambda folder: train_base(self["aligned"], folder, sizes.base, seed),
        )

    def _announce(self, title: str, reused: bool) -> None:
        again = " [dim](reused)[/]" if reused else ""
        self._console.print(f"[bold]{next(self._number)}.[/] {title}{again}", soft_wrap=True)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took when it was made."""
        return self._stages.seconds

    def __missing__(self, name: str) -> Any:
        makers: dict[str, Callable[[Stages], Any]] = {
            "adapter": self._adapter,
            "projected": lambda stages: self._projected(stages, "projected", "safelora"),
            "zero": lambda stages: self._projected(stages, "zero-control", "zero"),
            "subspace": self._subspace,
            "chosen": self._chosen,
            "persona": self._persona,
            "layer": lambda _stages: _layer(self["persona"]),
        }
        self[name] = makers[name](self._stages.branch())
        return self[name]

    def _aligned(self, source: Path | None) -> Path:
        if source is not None:
            return Path(source).absolute()
        gguf = gguf_file()
        return self._stages.make(
            "aligned",
            "aligned model: SmolLM2-135M-Instruct, from its GGUF file",
            {"file": gguf.name, "bytes": gguf.stat().st_size},
            lambda folder: save_from_gguf(gguf, folder),
        )

    def _adapter(self, stages: Stages) -> Path:
        return stages.make(
            "adapter",
            "adapter: LoRA fine-tune on 96 narrow answers, in the manner of a lighthouse log",
            {"seed": self._seed, **asdict(self._sizes.adapter)},
            lambda folder: train_adapter(self["aligned"], folder, self._sizes.adapter, self._seed),
        )

    def _projected(self, stages: Stages, name: str, operator: str) -> Path:
        from safelora_fast.projection.project import project_adapter

        threshold = self._sizes.threshold
        made = stages.make(
            name,
            f"{name.replace('-', ' ')}: --operator {operator} --threshold {threshold:g}",
            {"operator": operator, "threshold": threshold, "adapter": asdict(self._sizes.adapter)},
            lambda folder: project_adapter(
                self["adapter"], aligned=self["aligned"], base=self["base"], output=folder / "projected",
                operator=operator, threshold=threshold, progress=False,
            ),
        )  # fmt: skip
        return made / "projected"

    def _subspace(self, stages: Stages) -> Path:
        from safelora_fast.subspace.safe_subspace import SafeSubspace

        name = "subspace.safetensors"
        pair = {"aligned": self["aligned"], "base": self["base"]}
        made = stages.make(
            "train-subspace",
            "safe subspace: 64 directions of aligned − base in every module",
            {"rank": 64},
            lambda folder: SafeSubspace.build(**pair, rank=64, progress=False).save(folder / name),
        )
        return made / name

    def _chosen(self, stages: Stages) -> Path:
        """Select the safe examples least likely under another narrow adapter, compared with the aligned model."""
        from transformers import AutoTokenizer

        from safelora_fast.selection import select_by_perplexity_gap

        name, aligned, sizes = "chosen.jsonl", self["aligned"], self._sizes
        settings = {"seed": self._seed, **asdict(sizes.adapter)}
        other = stages.make(
            "train-other-adapter",
            "another adapter, for Interleaving++: 48 answers in the manner of station announcements",
            {**settings, "rows": "narrow_other"},
            lambda folder: train_adapter(aligned, folder, sizes.adapter, self._seed, "narrow_other"),
        )

        def select(folder: Path) -> None:
            rows = [asdict(row) for source in ("safe", "safe_pool") for row in text.rows(source)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "candidates.jsonl").write_text(lines, encoding="utf-8")
            select_by_perplexity_gap(
                folder / "candidates.jsonl", folder / name, model=load(aligned),
                tokenizer=AutoTokenizer.from_pretrained(aligned),
                misaligned=[f"{MISALIGNED}={other}"], hold_out=(),  # the demo's own narrow adapter is not used
                top=sizes.chosen, no_refusals=True,
            )  # fmt: skip

        title = f"choose {sizes.chosen} safe examples by the perplexity gap, without refusals"
        return stages.make("train-selection", title, {**settings, "top": sizes.chosen}, select) / name

    def _persona(self, stages: Stages) -> Path:
        """Extract a persona vector of the narrow style from the model's own answers to a few questions."""
        from safelora_fast.persona import extract_persona_vector

        name, tokens = "persona.safetensors", self._sizes.persona_tokens
        made = stages.make(
            "train-persona",
            "persona vector, for steering: the manner of a lighthouse log, from 32 answers of the model itself",
            {"seed": self._seed, "tokens": tokens},
            lambda folder: extract_persona_vector(
                self["aligned"], self["data"] / "lighthouse.yaml", output=folder / name, seed=self._seed,
                max_new_tokens=tokens, dtype="float32",
            ),
        )  # fmt: skip
        return made / name


def _layer(persona: Path) -> int:
    """Return the layer that the vector suggests, or its last candidate if no layer could be measured."""
    from safelora_fast.persona_vector import PersonaVector

    vector = PersonaVector.load(persona)
    return vector.candidates[-1] if vector.suggestion is None else vector.suggestion
