"""Adapters at several thresholds from one pass: each equals the result of a projection at its threshold."""

from __future__ import annotations

import pytest
from demo_model import save_tiny
from misaligned import save_adapter

from safelora_fast import project_adapter
from safelora_fast.errors import OutputError, PairingError, SettingsError
from safelora_fast.projection.sweep import sweep_thresholds

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny(folder / "aligned", 0)
    save_tiny(folder / "base", 1)
    save_adapter(folder / "aligned", folder / "adapter", 3)
    return folder


def swept(pair, output, thresholds, **settings):
    return sweep_thresholds(
        pair / "adapter", aligned=pair / "aligned", base=pair / "base", thresholds=thresholds, output=output, **settings
    )


def test_each_adapter_is_that_of_its_threshold(pair, tmp_path):
    cosines = sorted(
        module.cosine
        for module in project_adapter(pair / "adapter", aligned=pair / "aligned", base=pair / "base", output=None)
        .adapters[0]
        .modules
    )
    middle = (cosines[len(cosines) // 2] + cosines[len(cosines) // 2 - 1]) / 2
    found = swept(pair, tmp_path / "sweep", [1.0, middle, -1.0, middle])
    assert [one.threshold for one in found] == [-1.0, middle, 1.0]
    assert [one.projected for one in found] == [0, len(cosines) // 2, len(cosines)]
    assert {one.modules for one in found} == {len(cosines)}
    for number, one in enumerate(found):
        alone = tmp_path / f"alone-{number}"
        project_adapter(
            pair / "adapter", aligned=pair / "aligned", base=pair / "base", output=alone, threshold=one.threshold
        )
        assert (one.folder / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()
    assert (found[0].folder / WEIGHTS).read_bytes() == (pair / "adapter" / WEIGHTS).read_bytes()


def test_the_checkpoints_are_read_once(pair, tmp_path):
    class Progress:
        total = done = 0

        def start(self, total_bytes, _modules):
            self.total += total_bytes

        def advance(self, done_bytes, _module):
            self.done = done_bytes

    progress = Progress()
    swept(pair, tmp_path / "sweep", [0.1, 0.2, 0.3, 0.4], progress=progress)
    single = Progress()
    project_adapter(pair / "adapter", aligned=pair / "aligned", base=pair / "base", output=None, progress=single)
    assert progress.total == progress.done == single.total


def test_another_output_is_replaced_only_where_a_sweep_made_it(pair, tmp_path):
    output = tmp_path / "sweep"
    swept(pair, output, [0.5])
    with pytest.raises(OutputError, match="exists already"):
        swept(pair, output, [0.5])
    swept(pair, output, [0.1, 0.2], overwrite=True)
    assert sorted(path.name for path in output.glob("threshold-*")) == ["threshold-0.1", "threshold-0.2"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no earlier run wrote"):
        swept(pair, tmp_path / "mine", [0.5], overwrite=True)


def test_what_cannot_be_swept_is_refused_and_leaves_nothing(pair, tmp_path):
    with pytest.raises(SettingsError, match="between -1 and 1"):
        swept(pair, tmp_path / "sweep", [0.5, 2.0])
    with pytest.raises(PairingError, match="V = aligned - base is zero"):
        sweep_thresholds(
            pair / "adapter",
            aligned=pair / "aligned",
            base=pair / "aligned",
            thresholds=[0.5],
            output=tmp_path / "sweep",
        )
    assert list(tmp_path.iterdir()) == []
