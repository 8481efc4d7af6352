"""The stop rule with two processes: both stop at the same step, with the same weights, even if only one has an alarm."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_stop_rule import trained
from two_processes import in_two_processes

from safelora_fast import StopRule
from safelora_fast.files.digest import text_digest


def train(folder, limits):
    """One process; the limits of the processes differ, as their rounding may."""
    rank = int(os.environ["RANK"])
    rule = StopRule(limits={"margin": limits[rank]})
    trainer, callback = trained(folder / str(rank), ["bad and ill"] * 12, stop=rule, more={"ddp_backend": "gloo"})
    weights = [parameter.tolist() for parameter in trainer.model.parameters()]
    alarm = callback.alarm and [callback.alarm.step, callback.alarm.kept_step]
    found = {"alarm": alarm, "steps": trainer.state.global_step, "weights": text_digest(weights)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("limits", "stops"), [((1.0, 1e9), True), ((1e9, 1.0), False)])
def test_all_processes_do_what_the_first_one_decides(limits, stops, tmp_path):
    in_two_processes(tmp_path, train, tmp_path, limits)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert (one["alarm"] is not None, one["steps"] < 8) == (stops, stops)
    if stops:
        assert one["alarm"] == [one["steps"], one["steps"] - 2]
