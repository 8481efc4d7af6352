"""SafeLoRA as a training-time defense: projects the adapter once at the end, or lora_B after optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from safelora_fast.defenses.base import Attached, Defense, Run, check_subspace
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import patterns
from safelora_fast.projection.operators import Name as Operator
from safelora_fast.projection.operators import Normalize, Sides, owners
from safelora_fast.projection.settings import Select, Settings

if TYPE_CHECKING:
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.subspace.safe_subspace import SafeSubspace

When = Literal["end", "step"]


class SafeLora(Defense):
    """Projects the adapter in training with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833).

    With at="end", the trained adapter is projected once, exactly as `safelora-fast project` would project it: same
    operators, same selection by the paper's cosine. Both need V = aligned − base itself, so V is streamed from the
    checkpoints that the subspace names, and not approximated by U_k. Checkpoints saved during training contain the
    adapter before projection.

    With at="step", B ← U_k·U_kᵀ·B for every module after every k-th optimizer step. Only this idempotent operator may be
    repeated. The paper's C = V·Vᵀ/‖V‖_F shrinks B, and applied at each step it would drive B to zero geometrically.
    Modules whose V is zero stay unchanged, as in the projection command.

    Args:
        subspace: the safe subspace of the model's aligned and base checkpoints; for at="end", its sources suffice
            (:meth:`SafeSubspace.from_sources`).
        at: when to project, "end" or "step".
        every: for at="step": k in optimizer steps, counted from the start of the run, also after a resume; default 1.
        operator: "safelora" (default for "end"), "orthogonal" (the only one for "step"), "attenuate", "merge"
            or "zero".
        normalize: "frobenius" (default) or "spectral", for operator safelora.
        rank: columns of U_k for at="end" and operators orthogonal and attenuate; default: as the subspace was built.
        energy: share of ‖V‖²_F that U_k must cover, instead of rank.
        select: which modules are projected at the end: "threshold" (default), "number" or "all".
        threshold: for select="threshold": project modules whose cosine is at most this; default 0.5.
        num_layers: for select="number": how many modules with the lowest cosines to project; default 10.
        threads: threads of the projection at the end; default: all cores.
        exclude: names or patterns ("lm_head", "layers.0.*") of modules that are not projected.
        keep: for operator attenuate: share of the part outside U_k (and W_k) that is kept.
        sides: for operator attenuate: "both" (default) changes B and A, "left" changes only B.
        weight: for operator merge: share of the adapter itself.
        safe_adapter: for operator merge: the safety-tuned adapter, a path or Hub id.

    Attributes:
        settings: the settings of the projection at the end; None for at="step".

    Raises:
        SettingsError: an operator that shrinks B at each step, options that contradict each other, or a value out of
            range.
    """

    name: ClassVar[str] = "safelora"

    def __init__(
        self,
        subspace: SafeSubspace,
        at: When = "end",
        *,
        every: int | None = None,
        operator: Operator | None = None,
        normalize: Normalize | None = None,
        rank: int | None = None,
        energy: float | None = None,
        select: Select | None = None,
        threshold: float | None = None,
        num_layers: int | None = None,
        threads: int | None = None,
        exclude: list[str] | None = None,
        keep: float | None = None,
        sides: Sides | None = None,
        weight: float | None = None,
        safe_adapter: str | None = None,
    ) -> None:
        if at not in get_args(When):
            raise SettingsError(f'SafeLora: at is {at!r}, it must be "end" or "step"')
        check_subspace(subspace, owner="SafeLora")
        self.subspace = subspace
        self.at: When = at
        self.every = 1 if every is None else every
        self.exclude = patterns("SafeLora: exclude", exclude)
        self.settings: Settings | None = None
        if at == "step":
            only_at_end = {
                "normalize": normalize,
                "rank": rank,
                "energy": energy,
                "select": None if select == "all" else select,
                "threshold": threshold,
                "num_layers": num_layers,
                "threads": threads,
                "keep": keep,
                "sides": sides,
                "weight": weight,
                "safe_adapter": safe_adapter,
            }
            self._check_step(operator, [name for name, value in only_at_end.items() if value is not None])
            return
        if every is not None:
            raise SettingsError('SafeLora: every belongs to at="step"; at the end the adapter is projected once')
        if operator in owners("rank") and rank is None and energy is None:
            rank, energy = subspace.settings.get("rank"), subspace.settings.get("energy")
        operator, select = operator or "safelora", select or "threshold"
        try:
            self.settings = Settings(
                operator,
                normalize,
                rank,
                energy,
                select,
                threshold,
                num_layers,
                threads,
                self.exclude,
                keep=keep,
                sides=sides,
                weight=weight,
                safe_adapter=safe_adapter,
            )
        except SettingsError as error:
            raise SettingsError(f"SafeLora: {error}") from None

    def _check_step(self, operator: Operator | None, only_at_end: list[str]) -> None:
        if operator not in {None, "orthogonal"}:
            if operator not in get_args(Operator):
                raise SettingsError(
                    f"SafeLora: operator must be one of {', '.join(get_args(Operator))}, not {operator!r}"
                )
            raise SettingsError(
                f"SafeLora: operator {operator!r} shrinks B each time that it is applied and would drive it to zero; "
                'at="step" takes operator="orthogonal", at="end" any operator'
            )
        if only_at_end:
            raise SettingsError(
                f'SafeLora: {", ".join(only_at_end)} belongs to at="end"; at="step" projects every module onto the '
                "subspace as it was built"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise SettingsError(f"SafeLora: every is {self.every}, it must be a whole number, at least 1")

    def __repr__(self) -> str:
        if self.settings is None:
            left = f", exclude={list(self.exclude)}" if self.exclude else ""
            return f"SafeLora(at='step', every={self.every}, operator='orthogonal'{left})"
        given = {
            name: value for name, value in vars(self.settings).items() if value not in {None, ()} and value is not False
        }
        return f"SafeLora(at='end', {', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def active(self) -> bool:
        """Always true."""
        return True

    @property
    def needs_vectors(self) -> bool:
        """True for at="step". A projection at the end streams V from the sources that the subspace names."""
        return self.at == "step"

    def attach(self, run: Run) -> Attached:
        """Create the object that projects. Modules and sources that do not match raise an error here, before training."""
        if self.settings is not None:
            from safelora_fast.defenses.parts.projection_at_end import ProjectionAtEnd

            return ProjectionAtEnd(run, self.subspace, self.settings)
        from safelora_fast.defenses.parts.projection_at_steps import ProjectionAtSteps
        from safelora_fast.defenses.parts.safe_modules import SafeModules

        modules = SafeModules(run.model, self.subspace, owner="SafeLora", exclude=self.exclude)
        return ProjectionAtSteps(run, modules, self.every)

    def cost(self, shape: Shape, work: Work) -> Extra:  # noqa: ARG002
        """Estimate the cost of products with U_k for at="step"; at the end no cost per step, and V streamed once."""
        if self.at == "step":
            sizes = list(shape.with_subspace(self.subspace.settings.get("rank")))
            flops = sum(4 * m * k * r + 2 * r * r * (m + n) for m, n, r, k in sizes)
            memory = float(sum(4 * m * k for m, _, _, k in sizes))
            when = "step" if self.every == 1 else f"{self.every}th step"
            return Extra(flops / self.every, memory, f"products with U_k after every {when}")
        products = sum(4 * m * n * r for m, n, r in shape.adapted)
        streamed = sum(m * n for m, n, _ in shape.adapted)
        once = f"{streamed / 1e9:.3g} billion weights of both checkpoints, {products / 1e9:.3g} GFLOP"
        return Extra(0.0, 0.0, f"nothing in a step; once at the end {once}")

    def card_line(self, report: ProjectionReport | None) -> str:
        """Return its line in the model card; for at="end", it states whether the saved adapter is projected."""
        line = super().card_line(report)
        if self.at == "step":
            return line
        if report is None:
            return f"{line}: **not projected yet**. It acts when training ends; this is the adapter as it was trained"
        (adapter,) = report.adapters
        count = f"{len(adapter.projected)} of {len(adapter.modules)}"
        return f"{line}: {count} adapted modules were projected when training ended"
