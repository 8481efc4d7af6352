"""A resolver for vLLM that serves projected adapters only, and projects an adapter on its first request.

vLLM calls :func:`register` in each of its processes (entry point `vllm.general_plugins`). It does nothing unless
`SAFELORA_FAST_ADAPTERS` is set. docs/serve.md lists the variables.
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import SafeLoraFastError, SettingsError
from safelora_fast.files.json_reader import parse_json
from safelora_fast.printable import one_line
from safelora_fast.projection.report import alike

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safelora_fast.serving.projected_store import ProjectedStore

ADAPTERS, STORE, BASE = "SAFELORA_FAST_ADAPTERS", "SAFELORA_FAST_STORE", "SAFELORA_FAST_BASE"
SUBSPACE, SETTINGS = "SAFELORA_FAST_SUBSPACE", "SAFELORA_FAST_SETTINGS"
NAME = "safelora_fast"
logger = logging.getLogger(f"vllm.plugins.{NAME}")


def register(environment: Mapping[str, str] = os.environ) -> None:
    """Register the resolver with vLLM if the environment names a folder of adapters.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    if not environment.get(ADAPTERS):
        return
    if not environment.get(STORE) or bool(environment.get(BASE)) == bool(environment.get(SUBSPACE)):
        raise SettingsError(f"{ADAPTERS} is set: set {STORE} too, and either {BASE} or {SUBSPACE}")
    try:
        settings = parse_json(environment.get(SETTINGS) or "{}")
    except ValueError as error:
        raise SettingsError(f"{SETTINGS}: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f'{SETTINGS} must be a JSON object of settings of project, e.g. {{"threshold": 0.5}}')
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # type: ignore[import-not-found]

    class ProjectedResolver(LoRAResolver):  # type: ignore[misc]
        """Finds adapters in a store of projected ones."""

        def __init__(self) -> None:
            self.store: ProjectedStore | None = None  # opened by the first request, which knows the served model

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """Return the request for a projected adapter; None if there is none, or it cannot be projected."""
            try:
                path = await asyncio.to_thread(self.find, base_model_name, lora_name)
            except SafeLoraFastError as error:
                logger.error("%s: not served: %s", one_line(lora_name), error)
                return None
            if path is None:
                return None
            number = zlib.crc32(str(path).encode()) or 1  # vLLM gives it a number of its own
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

        def find(self, served: str, name: str) -> Path | None:
            self.store = self.store or _open(served, environment, settings)
            return self.store.find(name)

    LoRAResolverRegistry.register_resolver(NAME, ProjectedResolver())


def _open(served: str, environment: Mapping[str, str], settings: dict[str, Any]) -> ProjectedStore:
    from safelora_fast.serving.projected_store import ProjectedStore
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    def warn(warning: str) -> None:
        logger.warning("%s", warning)

    place = (environment[ADAPTERS], environment[STORE])
    if not environment.get(SUBSPACE):
        settings = {"aligned": served, "base": environment[BASE], **settings}
        return ProjectedStore(*place, served=served, warn=warn, **settings)
    subspace = SafeSubspace.load(environment[SUBSPACE])
    source = subspace.sources.get("aligned", {}).get("source")
    if not isinstance(source, str) or not alike(source, served):
        raise SettingsError(f"{environment[SUBSPACE]}: was built from {source}, and {served} is served")
    return ProjectedStore(*place, subspace=subspace, served=served, warn=warn, **settings)
