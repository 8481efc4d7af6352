"""Import modules under their names of 0.1.0, with a DeprecationWarning, until 0.3."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = "safelora_fast."
ROOMS = {"posthoc": "projection", "evaluation": "judging", "comparison": "compare", "integrations": "trainers"}
# Former name = new name, or several names if the module was split. Modules that kept their name in a renamed room are
# found by ROOMS.
MOVED_TEXT = """
comparison.cells=compare.assemble comparison.columns=compare.measures.base
comparison.config=compare.config,compare.comparison,compare.runs comparison.contents=compare.measurements
comparison.costs=compare.assemble comparison.curves=compare.measures.scaled,compare.measures.sweep
comparison.differences=compare.statistics comparison.facts=compare.report_texts comparison.figures_text=compare.words
comparison.flaws=compare.measures.base comparison.gaps=compare.measurements comparison.inputs=compare.compare
comparison.origins=compare.cell_sources comparison.places=compare.runs,compare.comparison
comparison.pooling=compare.statistics comparison.reading=compare.report_texts comparison.sections=compare.config
comparison.svg=plotting comparison.training=compare.train_runs data.best=data.rows data.jsonl=files.jsonl
defenses.vector=defenses.steering_vector demo.comparison=demo.ingredients demo.model=demo.packaged_model
demo.page=demo.pipeline demo.picture=demo.pipeline demo.preparation=demo.fine_tune demo.recipe=demo.ingredients
demo.terminal=files.progress demo.training=demo.fine_tune evaluation.agreement=judging.rates
evaluation.benchmarks=judging.benchmarks,judging.benchmark_results evaluation.callback=scoring.margin_callback
evaluation.drift=scoring.drift evaluation.evaluate=judging.evaluate,judging.rates evaluation.figures=judging.rates
evaluation.folder=judging.evaluation_folder evaluation.generation=models.generate
evaluation.guard=judging.endpoint_guard evaluation.inspect_registry=judging.task
evaluation.intervals=scoring.intervals evaluation.judges=judging.judge_names
evaluation.loading=models.load,models.model_settings evaluation.margin=scoring.margin evaluation.pairs=data.pairs
evaluation.parameters=judging.request_parameters evaluation.patience=judging.retry
evaluation.prompts=judging.judge_prompts evaluation.response_checks=judging.endpoint_guard
evaluation.secrets=judging.redact evaluation.store=judging.judge integrations.sources=trainers.loss_by_source
integrations.task_loss=trainers.trainer_loss ops.backends=ops.base ops.feature_distance.autograd=ops.feature_distance
ops.feature_distance.comparison=ops.feature_distance,ops.feature_distance.torch_impl
ops.feature_distance.eager=ops.feature_distance.torch_impl ops.feature_distance.library=ops.feature_distance
ops.feature_distance.reference=ops.feature_distance.torch_impl
ops.linear_kl.chunked=ops.linear_kl,ops.linear_kl.chunks ops.linear_kl.eager=ops.linear_kl.torch_impl
ops.linear_kl.fused=ops.linear_kl ops.linear_kl.head=ops.linear_kl.chunks ops.linear_kl.library=ops.linear_kl
ops.linear_kl.passes=ops.linear_kl.chunks ops.linear_kl.reference=ops.linear_kl.torch_impl
ops.linear_kl.rows=ops.linear_kl.chunks ops.once=ops.base ops.operands=ops.base
ops.subspace_projection.eager=ops.subspace_projection.torch_impl
ops.subspace_projection.grouped=ops.subspace_projection
ops.subspace_projection.leading=projection.device.leading_vectors
ops.subspace_projection.library=ops.subspace_projection
ops.subspace_projection.penalties=defenses.parts.grouped_penalties
ops.subspace_projection.reference=ops.subspace_projection.torch_impl persona.generation=models.generate
persona.journal=persona.responses persona.judging=persona.response_filter persona.model=persona.source_model
persona.picture=persona.plot persona.prompts=persona.source_model persona.requests=persona.source_model
persona.separation=persona.activations posthoc.adapter=checkpoints.adapter posthoc.bypass=projection.copied_tensors
posthoc.device_damage=projection.device.factors posthoc.device_factors=projection.device.factors
posthoc.device_figures=projection.device.outcomes posthoc.device_reader=projection.device.reader
posthoc.device_stream=projection.device.stream posthoc.device_subspace=projection.device.subspace_stream
posthoc.experts=checkpoints.experts posthoc.finite=projection.copied_tensors posthoc.geometry=checkpoints.geometry
posthoc.hub=checkpoints.hub posthoc.output=files.output posthoc.pairing=checkpoints.pairing
posthoc.places=checkpoints.module_names posthoc.provenance=checkpoints.provenance
posthoc.resident=projection.device.resident posthoc.settings=projection.settings,files.argument_checks
posthoc.shown_models=checkpoints.model_card,projection.report posthoc.sources=checkpoints.sources
posthoc.subspace_plan=subspace.plan
recipe.arguments=recipe.lora_and_trainer_sections,recipe.lora_and_trainer_arguments recipe.callbacks=recipe.trainer
recipe.defenses=configuration.defense_section recipe.digests=models.digests,files.digest
recipe.document=configuration.yaml_document recipe.epochs=data.schedule recipe.folder=recipe.run_folder,files.store
recipe.kinds=configuration.signatures recipe.loading=models.load,models.model_settings,recipe.adapted_model
recipe.memory=recipe.run_metrics recipe.monitors=configuration.defense_section recipe.plan=recipe.run_plan
recipe.quiet=models.quiet_libraries recipe.results=recipe.run_metrics recipe.rows=data.rows
recipe.section=configuration.yaml_section recipe.signatures=configuration.signatures recipe.stopping=recipe.trainer
recipe.synonyms=configuration.synonyms recipe.tokens=data.tokens recipe.words=recipe.summary_text
scoring.answers=scoring.answer_scores scoring.batches=scoring.sequences scoring.head=scoring.label_likelihoods
scoring.positions=scoring.sequences scoring.precision=scoring.answer_scores selection.low_rank=selection.perplexity
selection.plot=selection.report subspace_build=subspace.plan,subspace.safe_subspace
training.adapted=models.lora_factors training.anatomy=models.anatomy training.batch=data.spans
training.capture=models.capture training.distributed=models.distributed training.drift=training.monitors
training.finish=defenses.parts.projection_at_end training.guard=training.loss_terms
training.head_check=defenses.parts.head_check training.held=models.shards
training.optimizers=defenses.parts.optimizers
training.projections=defenses.parts.projection_at_steps,defenses.parts.projection_at_end
training.reference=models.reference_pass training.safe_modules=defenses.parts.safe_modules
training.steered=training.training_passes training.steps=training.optimizer_steps training.terms=training.loss_terms
training.totals=training.loss_terms
"""
MOVED = {former: new for former, _, new in (pair.partition("=") for pair in MOVED_TEXT.split())}


def new_names(name: str) -> list[str]:
    """Return the modules that replaced a former module; none if there was no such module."""
    former = name.removeprefix(PACKAGE)
    if former in MOVED:
        return [PACKAGE + new for new in MOVED[former].split(",")]
    room, dot, rest = former.partition(".")
    if room not in ROOMS:
        return []
    from importlib.util import find_spec  # imported late: it takes a tenth of the command line's start

    new = f"{PACKAGE}{ROOMS[room]}{dot}{rest}"
    return [new] if find_spec(new) is not None else []


class FormerModules:
    """Finds former modules. Their attributes are looked up in the modules that replaced them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a former module; None for any other module."""
        del path, target
        if not name.startswith(PACKAGE) or not new_names(name):
            return None
        from importlib.util import spec_from_loader

        return spec_from_loader(name, self, is_package=name.removeprefix(PACKAGE) in ROOMS)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python create the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Make the module look up attributes in the modules that replaced it."""
        names = new_names(module.__name__)
        if module.__name__.removeprefix(PACKAGE) not in ROOMS:  # the module inside it warns
            warnings.warn(f"{module.__name__} is {' and '.join(names)} now", DeprecationWarning, stacklevel=2)
        became = [importlib.import_module(name) for name in names]

        def look_up(attribute: str) -> Any:
            for one in became:
                if hasattr(one, attribute):
                    return getattr(one, attribute)
            raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
