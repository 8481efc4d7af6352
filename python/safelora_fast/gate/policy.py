"""The policy of a gate: one YAML file with criteria, each a limit for one metric of one result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import create_model

from safelora_fast.configuration.yaml_document import read_document
from safelora_fast.configuration.yaml_section import Section, check, read_section
from safelora_fast.files.digest import digest
from safelora_fast.gate.criterion import Criterion
from safelora_fast.gate.readers import READERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class PolicyFile(Section):
    """The keys of the file; criteria are checked one at a time."""

    subject: str
    criteria: Any


KEYS_OF_SOURCES = {key for reader in READERS.values() for key in reader.own_keys}
SOURCE: Any = (Literal[tuple(READERS)], ...)
CheckedCriterion = create_model("Criterion", __base__=Criterion, source=SOURCE)


@dataclass(frozen=True)
class Policy:
    """A checked policy.

    Attributes:
        subject: the folder of the adapter or model that all results must be of, relative to the checked folder.
        criteria: by name, in the order of the file.
        sha256: digest of the file.
    """

    subject: str
    criteria: Mapping[str, Criterion]
    sha256: str


def read_policy(path: Path) -> Policy:
    """Read and check a policy; no result is read.

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    document = read_document(path, what="policy")
    file = read_section(document, (), PolicyFile)
    names = document.section("criteria")
    if not names:
        raise document.problem(("criteria",), "is empty")
    criteria = {}
    for name in names:
        keys = ("criteria", name)
        criterion = criteria[name] = check(document, keys, CheckedCriterion, document.section(*keys))
        if criterion.at_most is None and criterion.at_least is None:
            raise document.problem(keys, "has no limit: set at_most, at_least, or both")
        reader = READERS[criterion.source]
        low, high = criterion.at_least, criterion.at_most
        for key, limit in {"at_least": low, "at_most": high}.items():
            if limit is not None and not 0 <= limit <= 1 and reader.is_share(criterion):
                raise document.problem(
                    (*keys, key), f"must be between 0 and 1, since this metric is a share, not {limit:g}"
                )
        if low is not None and high is not None and low > high:
            raise document.problem(keys, "no value is within its limits: at_least is above at_most")
        if reader.has_runs != (criterion.run is not None):
            why = f"is {'required' if reader.has_runs else 'unknown'} for the source {criterion.source}"
            raise document.problem((*keys, "run"), why)
        for key in KEYS_OF_SOURCES & criterion.model_fields_set - {*reader.own_keys}:
            raise document.problem((*keys, key), f"is unknown for the source {criterion.source}")
        if criterion.metric is None and reader.metric is None:
            raise document.problem((*keys, "metric"), f"is required for the source {criterion.source}")
    return Policy(file.subject, criteria, digest(path))
