"""The pair of models that a projection refers to: what V of each module is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safelora_fast.checkpoints.provenance import describe, same_content
from safelora_fast.checkpoints.sources import A_MODEL, Checkpoint, open_checkpoint, same_place
from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.digest import text_digest
from safelora_fast.projection.jobs import refuse_equal, start_stream
from safelora_fast.projection.merge import starting
from safelora_fast.projection.plan import plan_projection
from safelora_fast.projection.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.projection.jobs import Plan, Stream


class ModelPair:
    """Two checkpoints, V = aligned − base.

    A subclass may have V, or a part of it, from elsewhere: it overrides `plan`, `start` and `identity`. Its checkpoints
    then have names of tensors only.
    """

    def __init__(self, aligned: Checkpoint, base: Checkpoint) -> None:
        self.aligned, self.base = aligned, base

    def settings(self, kind: type[Settings] = Settings, **given: Any) -> Settings:
        """Return checked settings of a projection.

        Raises:
            SettingsError: the settings contradict each other, or do not fit the pair.
        """
        return kind(**given)

    def plan(self, adapters: Sequence[Adapter]) -> Plan:
        """Pair the modules of adapters with V.

        Raises:
            PairingError: a module has no unique counterpart.
        """
        return plan_projection(adapters, self.aligned, self.base)

    def start(self, plan: Plan, settings: Settings, *, keep_projected: bool) -> Stream:
        """Start the stream over a plan."""
        return starting(start_stream)(plan, settings, keep_projected=keep_projected)

    def identity(self) -> dict[str, str]:
        """Return what identifies the pair on every machine: commits on the Hub, or digests of the files.

        Raises:
            PairingError: the two models have the same content.
        """
        described = {"aligned": describe(self.aligned), "base": describe(self.base)}
        if same_content(described["aligned"], described["base"]):
            refuse_equal([0.0])
        return {role: _identity(source) for role, source in described.items()}


class Vectors(Protocol):
    """A subspace: vectors of V that stand for the pair of models."""

    def as_pair(self) -> ModelPair:
        """Return the pair."""


def settings_and_pair(
    subspace: Vectors | None, aligned: str | Path | None, base: str | Path | None, given: Mapping[str, Any]
) -> tuple[Settings, ModelPair | None]:
    """Return checked settings, and the pair of a subspace; without a subspace None, since nothing is opened yet.

    Raises:
        SettingsError: a setting is wrong, or a subspace is given beside models.
    """
    if subspace is None:
        return Settings(**given), None
    if aligned is not None or base is not None:
        raise SettingsError("a subspace replaces both checkpoints: give either the subspace, or aligned and base")
    pair = subspace.as_pair()
    return pair.settings(**given), pair


def local_models(aligned: str | Path | None, base: str | Path | None) -> list[Path]:
    """Return those of the two models that are paths here.

    Raises:
        SettingsError: one of them cannot be the path of a model or its Hub id.
    """
    for role, model in {"aligned": aligned, "base": base}.items():
        check_path(role, model, A_MODEL)
    return [path for path in map(Path, (str(aligned), str(base))) if path.exists()]


def open_pair(aligned: str | Path | None, base: str | Path | None) -> ModelPair:
    """Open both checkpoints.

    Raises:
        SettingsError, CheckpointError: a checkpoint cannot be read.
        PairingError: the two are the same place.
    """
    pair = ModelPair(
        *(open_checkpoint(model or "", role=role) for role, model in (("aligned", aligned), ("base", base)))
    )
    if same_place(pair.aligned, pair.base):
        refuse_equal([0.0])
    return pair


def _identity(described: Mapping[str, Any]) -> str:
    if described["revision"] is not None:
        return f"{described['source']}@{described['revision']}"
    return text_digest(sorted(str(file["fingerprint"]) for file in described["files"]))
