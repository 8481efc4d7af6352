"""Check results against a policy: one verdict per criterion, and the events that a fine-tuning job would send."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from safelora_fast.errors import SafeLoraFastError, SettingsError
from safelora_fast.files.digest import text_digest
from safelora_fast.gate.readers import READERS, read
from safelora_fast.gate.result_reader import Reading, subject_of

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.gate.criterion import Criterion
    from safelora_fast.gate.policy import Policy

Verdict = Literal["passes", "fails", "not shown"]
PASSES: Final = "passes"
FAILS: Final = "fails"
NOT_SHOWN: Final = "not shown"
LEVELS = {PASSES: "info", NOT_SHOWN: "warn", FAILS: "error"}


@dataclass(frozen=True)
class Outcome:
    """The verdict on one criterion.

    Attributes:
        name: name of the criterion.
        verdict: "passes" if the interval's bad end is within the limits; "fails" if the value is not, or if there is no
            valid result; otherwise "not shown".
        value: None if there is none.
        low, high: ends of the 95 % interval; None if there is none.
        at_most, at_least: the limits.
        source: the result's file or folder.
        count: what the value is of.
        reason: why the verdict is not "passes"; "" if it is.
    """

    name: str
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    at_most: float | None
    at_least: float | None
    source: str
    count: str = ""
    reason: str = ""

    @property
    def limit(self) -> str:
        """The limits in words."""
        limits = {"at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)


@dataclass(frozen=True)
class GateReport:
    """The verdicts on one subject.

    Attributes:
        subject: its folder.
        subject_sha256: its digest.
        policy_sha256: digest of the policy's file.
        outcomes: in the order of the policy.
    """

    subject: str
    subject_sha256: str
    policy_sha256: str
    outcomes: tuple[Outcome, ...]

    @property
    def passes(self) -> bool:
        """Whether every criterion passes."""
        return all(outcome.verdict == PASSES for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        """The number of criteria by verdict."""
        verdicts = [outcome.verdict for outcome in self.outcomes]
        others = [
            f"{count} {words}"
            for words, count in (("fail", verdicts.count(FAILS)), ("not shown", verdicts.count(NOT_SHOWN)))
            if count
        ]
        return ", ".join([f"{verdicts.count(PASSES)} of {len(verdicts)} criteria pass", *others])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"passes": self.passes, **asdict(self)}

    def events(self, created_at: int | None = None) -> list[dict[str, Any]]:
        """Return one event per criterion and one for all, in the shape of a fine-tuning job's events.

        The fields are those of `fine_tuning.job.event` in OpenAI's API reference, with the type `moderation_checks` that
        its guides name. The content of `data` is not documented there; here it is the criterion's verdict.

        Args:
            created_at: Unix time in seconds; now by default.
        """
        now = int(time.time()) if created_at is None else created_at

        def event(level: str, message: str, data: dict[str, Any]) -> dict[str, Any]:
            unique = text_digest([self.subject_sha256, self.policy_sha256, now, message])[:24]
            return {
                "object": "fine_tuning.job.event",
                "id": f"ftevent-{unique}",
                "created_at": now,
                "level": level,
                "message": message,
                "type": "moderation_checks",
                "data": data,
            }

        found = [event(LEVELS[one.verdict], line_of(one), asdict(one)) for one in self.outcomes]
        whole = {"blocked": not self.passes, "subject_sha256": self.subject_sha256, "policy_sha256": self.policy_sha256}
        return [*found, event("info" if self.passes else "error", self.summary, whole)]


def check_folder(policy: Policy, folder: Path) -> GateReport:
    """Check the results in a folder against a policy.

    Raises:
        SettingsError: the folder or the policy's subject does not exist.
        SafeLoraFastError: the subject's files cannot be read.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder}: there is no such folder")
    subject = subject_of(folder / policy.subject)
    outcomes = []
    for name, criterion in policy.criteria.items():
        try:
            reading = read(criterion, folder, subject)
            verdict, reason = _judge(criterion, reading)
        except SafeLoraFastError as error:
            reading, verdict, reason = Reading(None), FAILS, str(error)
        low, high = (None, None) if reading.interval is None else reading.interval.to_list()
        limits = criterion.at_most, criterion.at_least
        source = str(READERS[criterion.source].find(criterion, folder, subject))
        outcomes.append(Outcome(name, verdict, reading.value, low, high, *limits, source, reading.count, reason))
    return GateReport(str(subject.folder), subject.sha256, policy.sha256, tuple(outcomes))


def _judge(criterion: Criterion, reading: Reading) -> tuple[Verdict, str]:
    """Return the verdict on a value, and its reason. The end of the interval that is nearer to the limit decides."""
    if reading.value is not None and not _within(criterion, reading.value, reading.value):
        return FAILS, "the value is beyond the limit"
    doubt = _doubt(criterion, reading)
    return (NOT_SHOWN, doubt) if doubt else (PASSES, "")


def _doubt(criterion: Criterion, reading: Reading) -> str:
    """Return why a value within the limit does not show that the limit is kept; "" if it does."""
    if reading.value is None:
        return "nothing was measured"
    if reading.unscored > criterion.most_unscored:
        return (
            f"{100 * reading.unscored:.1f} % of them are unscored, at most {100 * criterion.most_unscored:g} % may be"
        )
    if reading.interval is None:
        known = reading.exact or criterion.accept_without_interval
        return "" if known else "there is no interval; measure more, or set accept_without_interval"
    inside = _within(criterion, reading.interval.low, reading.interval.high)
    return "" if inside else "the interval reaches beyond the limit; measure more"


def _within(criterion: Criterion, low: float, high: float) -> bool:
    above = criterion.at_most is not None and not high <= criterion.at_most
    below = criterion.at_least is not None and not low >= criterion.at_least
    return not (above or below)


def line_of(outcome: Outcome) -> str:
    """Return an outcome as one line: name, value with its interval, limit, verdict and reason."""
    interval = "" if outcome.low is None or outcome.high is None else f" ({outcome.low:.4g} to {outcome.high:.4g})"
    value = "no value" if outcome.value is None else f"{outcome.value:.4g}{interval}"
    told = "; ".join(filter(None, [outcome.reason, outcome.count]))
    return f"{outcome.name}: {value}, {outcome.limit}: {outcome.verdict}{f' [{told}]' if told else ''}"
