"""Arguments from Python: a wrong type gives a clear one-line error, and NumPy numbers are accepted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plain_pair import write_pair

from safelora_fast import SafeSubspace, project_adapter
from safelora_fast.errors import SettingsError


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def project(pair, **options):
    given = {"adapter": pair.adapter, "aligned": pair.aligned, "base": pair.base, "output": pair.output, **options}
    return project_adapter(given.pop("adapter"), **given)


WRONG = [
    ({"threshold": "0.3"}, "threshold must be a number, not '0.3'"),
    ({"threshold": True}, "threshold must be a number, not True"),
    ({"operator": "orthogonal", "rank": True}, "rank must be a whole number, not True"),
    ({"operator": "orthogonal", "rank": 4.0}, "rank must be a whole number, not 4.0"),
    ({"operator": "orthogonal", "energy": "all"}, "energy must be a number, not 'all'"),
    ({"select": "number", "num_layers": 2.5}, "num_layers must be a whole number, not 2.5"),
    ({"threads": "2"}, "threads must be a whole number, not '2'"),
    ({"operator": None}, "operator must be one of safelora, orthogonal, attenuate, merge, zero, not None"),
    ({"select": ["all"]}, "select must be one of threshold, number, all, not ['all']"),
    ({"adapter": None}, "adapter must be the folder of a PEFT adapter, or several, not None"),
    ({"adapter": [None]}, "adapter must be the folder of a PEFT adapter, or several, not None"),
    ({"adapter": b"adapter"}, "adapter must be the folder of a PEFT adapter, or several, not b'adapter'"),
    ({"adapter": ""}, "adapter is empty; give the folder of a PEFT adapter, or several"),
    ({"aligned": None}, "aligned must be the path of a model or its Hub id, not None"),
    ({"aligned": ""}, "aligned is empty; give the path of a model or its Hub id"),
    ({"base": 7}, "base must be the path of a model or its Hub id, not 7"),
    ({"base": "a\0b"}, "'a\\x00b' holds a zero byte"),
    ({"output": 3}, "output must be the folder to make, or None, not 3"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_one_line_about_the_argument(pair, options, message):
    with pytest.raises(SettingsError) as refused:
        project(pair, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not pair.output.exists()


def test_numbers_of_numpy_are_plain_in_the_report(pair):
    project(pair, select="number", num_layers=np.int64(2), threads=np.int32(1))
    settings = json.loads((pair.output / "safelora_report.json").read_text())["settings"]
    assert (settings["num_layers"], settings["threads"]) == (2, 1)
    report = project(pair, output=None, threshold=np.float32(0.5))
    assert report.settings["threshold"] == 0.5
    assert type(report.settings["threshold"]) is float


def test_a_subspace_checks_its_sources_and_its_seed(pair):
    with pytest.raises(SettingsError, match="aligned must be the path of a model"):
        SafeSubspace.build(aligned=None, base=pair.base)
    with pytest.raises(SettingsError, match="base is empty"):
        SafeSubspace.from_sources(aligned=pair.aligned, base="")
    with pytest.raises(SettingsError, match="seed must be a whole number, not '0'"):
        SafeSubspace.build(aligned=pair.aligned, base=pair.base, seed="0")
