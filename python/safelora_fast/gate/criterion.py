"""One criterion of a gate's policy: a limit for one metric of one result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from safelora_fast.configuration.yaml_section import Section

Limit = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Criterion(Section):
    """One limit.

    Attributes:
        source: the command that wrote the result, a key of :data:`~safelora_fast.gate.readers.READERS`.
        path: the result's file or folder, relative to the checked folder. The default depends on the source.
        metric: the metric, e.g. "misaligned". The default depends on the source.
        run: for `compare`, the name of the run.
        at_most: the upper limit, inclusive.
        at_least: the lower limit, inclusive.
        judge: for `evaluate`, the judge; required if the answers were judged by several (`rejudge`).
        data: for `screen`, the training data of the subject, relative to the checked folder. By default, the record of
            `train` in the subject's folder says what it was.
        most_unscored: for `evaluate` and `screen`, the share of answers or examples that may be unscored.
        accept_without_interval: compare the value itself if the result has no interval for it.
    """

    source: str
    path: str | None = None
    metric: str | None = None
    run: str | None = None
    at_most: Limit | None = None
    at_least: Limit | None = None
    judge: str | None = None
    data: str | None = None
    most_unscored: Share = 0.05
    accept_without_interval: bool = False
