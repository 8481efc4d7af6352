"""Fleets whose adapters and outputs are in remote stores: fsspec's memory, and a real S3 server where one is installed."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from command_line import call
from fsspec.core import url_to_fs
from plain_pair import contents, write_adapter, write_pair

from safelora_fast import project_adapter, project_fleet
from safelora_fast.errors import DataError, MissingDependencyError, OutputError, SettingsError, StoreError
from safelora_fast.files import remote
from safelora_fast.projection.fleet_places import Places

__all__ = ["call"]
IDS = ["t0/a0", "t0/a2", "t1/a1"]
WEIGHTS = "adapter_model.safetensors"
MARKER = "safelora_made_from.json"


@pytest.fixture(scope="session")
def s3_server():
    """Return the address of a server of moto."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request, monkeypatch, tmp_path):
    """Return the URL of an empty bucket."""
    if request.param == "s3":
        for name, value in (
            ("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server")),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
    url = f"{request.param}://{tmp_path.name.replace('_', '-').lower()}"
    files, path = url_to_fs(url)
    files.mkdir(path)
    return url


@pytest.fixture
def fleet(store, tmp_path, monkeypatch):
    """Return three adapters in the store, and the weights that each adapter's projection has alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pair = write_pair(tmp_path / "pair")
    options = {"aligned": pair.aligned, "base": pair.base, "select": "all"}
    weights = {}
    for name in IDS:
        adapter = write_adapter(tmp_path / "fleet" / name, int(name[-1]))
        project_adapter(adapter, **options, output=tmp_path / "alone" / name)
        weights[name] = (tmp_path / "alone" / name / WEIGHTS).read_bytes()
        for path in adapter.iterdir():
            remote.write(f"{store}/fleet/{name}/{path.name}", path.read_bytes())
    words = ["--from", f"{store}/fleet", "--aligned", pair.aligned, "--base", pair.base, "--select", "all", "--output"]
    return SimpleNamespace(
        url=store,
        out=f"{store}/safe",
        weights=weights,
        words=["project", *words, f"{store}/safe"],
        project=lambda source=f"{store}/fleet", **more: project_fleet(
            source, **{"output": f"{store}/safe", **options, **more}
        ),
        temporary=tmp_path / "temporary",
    )


def written(fleet):
    """Return the weights of the outputs whose marker has content."""
    whole = [name for name in remote.find(fleet.out, MARKER) if remote.read_document(f"{fleet.out}/{name}/{MARKER}")]
    return {name: remote.read(f"{fleet.out}/{name}/{WEIGHTS}") for name in whole}


def test_a_remote_folder_and_a_remote_list(fleet, call, monkeypatch):
    code, out, err = call(*fleet.words, "--batch", 2)
    assert (code, out.partition(",")[0]) == (0, "3 adapters projected"), err
    assert written(fleet) == fleet.weights
    names = ["README.md", "adapter_config.json", WEIGHTS, MARKER, "safelora_report.json"]
    assert remote.names(f"{fleet.out}/t0/a2") == names
    card = remote.read(f"{fleet.out}/t0/a2/README.md").decode()
    assert "| input adapter | `a2` |" in card
    assert "tmp" not in card
    assert list(fleet.temporary.iterdir()) == []
    rows = [{"id": name, "adapter": f"{fleet.url}/fleet/{name}"} for name in IDS]
    remote.write(f"{fleet.url}/list.jsonl", "\n".join(map(json.dumps, rows)).encode())
    if fleet.url.startswith("s3"):  # the store says that the adapters are the same: they are not read again
        monkeypatch.setattr(remote, "fetch", None)
    report = fleet.project(f"{fleet.url}/list.jsonl")
    assert (report.projected, report.skipped, report.failed) == (0, 3, {})


def test_failures_and_other_tenants(fleet, call):
    remote.write(f"{fleet.url}/fleet/t0/a0/{WEIGHTS}", b"damaged")
    remote.remove(f"{fleet.url}/fleet/t0/a2/{WEIGHTS}")
    remote.write(f"{fleet.out}/t1/a1/thesis.txt", b"mine")
    code, _, err = call(*fleet.words, "--overwrite")
    assert code == 1
    failed = [json.loads(line) for line in remote.read(f"{fleet.out}/failed.jsonl").splitlines()]
    assert {row["id"]: row["error"].partition(";")[0] for row in failed} == {
        "t0/a0": f"{fleet.url}/fleet/t0/a0/{WEIGHTS}: truncated: a safetensors file has at least 8 bytes, this one has 7",
        "t0/a2": f"{fleet.url}/fleet/t0/a2: holds no adapter_config.json with {WEIGHTS}",
        "t1/a1": f"{fleet.out}/t1/a1: holds 'thesis.txt', which no earlier run wrote",
    }
    assert str(fleet.temporary) not in err
    assert remote.names(f"{fleet.out}/t1/a1") == ["thesis.txt"]
    assert written(fleet) == {}
    remote.remove(f"{fleet.out}/t1/a1/thesis.txt")
    report = fleet.project([{"id": "t1/a1", "adapter": f"{fleet.url}/fleet/t1/a1"}])
    assert (report.projected, remote.read(f"{fleet.out}/failed.jsonl")) == (1, None)


def test_a_store_that_is_lost_in_the_middle(fleet, monkeypatch):
    """The upload of the second adapter breaks off after its weights. The next run completes it."""
    files, _ = url_to_fs(fleet.url, use_listings_cache=False)  # fsspec returns the same object again
    put, count = files.put_file, [0]

    def lost(*arguments, **options):
        count[0] += 1
        if count[0] == 7:  # four files of each adapter
            raise ConnectionError("connection reset by peer")
        return put(*arguments, **options)

    monkeypatch.setattr(files, "put_file", lost)
    with pytest.raises(StoreError, match="the store failed: connection reset by peer; check the network"):
        fleet.project()
    assert written(fleet) == {IDS[0]: fleet.weights[IDS[0]]}
    assert remote.read_document(f"{fleet.out}/{IDS[1]}/{MARKER}") == {}
    assert list(fleet.temporary.iterdir()) == []
    monkeypatch.setattr(files, "put_file", put)
    report = fleet.project()
    assert (report.projected, report.skipped) == (2, 1)
    assert written(fleet) == fleet.weights


def test_the_temporary_folder_holds_one_batch(fleet, monkeypatch):
    """Copies of adapters that are done or damaged are deleted at once."""
    most, commit, fetched = [], Places.commit, Places.fetched

    def counted(self, row, item):
        most.append(len(list(fleet.temporary.rglob(WEIGHTS))))
        commit(self, row, item)

    monkeypatch.setattr(Places, "commit", counted)
    fleet.project(batch=1)
    assert most == [2, 2, 2]  # an adapter and its output
    assert written(fleet) == fleet.weights
    most.clear()

    def seen(self, row):
        most.append(len(list(fleet.temporary.rglob(WEIGHTS))))
        return fetched(self, row)

    monkeypatch.setattr(Places, "fetched", seen)
    monkeypatch.setattr(remote, "content_stamp", lambda *_: None)
    remote.write(f"{fleet.url}/fleet/t0/a0/{WEIGHTS}", b"damaged")
    assert fleet.project().skipped == 2
    assert most == [0, 0, 0]


def test_changed_adapters_and_overwrite(fleet):
    fleet.project()
    content = remote.read(f"{fleet.url}/fleet/t0/a0/{WEIGHTS}")
    remote.write(f"{fleet.url}/fleet/t1/a1/{WEIGHTS}", content)
    report = fleet.project()
    assert (report.skipped, list(report.failed)) == (2, ["t1/a1"])
    assert "was made from something else (adapter was '" in report.failed["t1/a1"]
    report = fleet.project(overwrite=True)
    assert (report.projected, report.skipped) == (1, 2)
    assert written(fleet)["t1/a1"] == fleet.weights["t0/a0"]


def test_urls_that_lead_nowhere(tmp_path):
    pair = write_pair(tmp_path / "pair")
    options = {"aligned": pair.aligned, "base": pair.base}
    row = {"id": "a", "adapter": str(pair.adapter)}
    for source, output, kind, message in (
        ("memory://nowhere", tmp_path / "out", DataError, "is no folder with adapters below it"),
        ("memory://nowhere/list.jsonl", tmp_path / "out", DataError, "there is no such list"),
        ([row], "nope://bucket", SettingsError, "Protocol not known: nope"),
        ([{**row, "adapter": "file:///a"}], tmp_path / "out", DataError, "is on this machine: give its path"),
        ([row, {"id": "b", "adapter": "memory://x/out/a/b"}], "memory://x/out", OutputError, "contains the adapter of"),
    ):
        with pytest.raises(kind, match=message) as refused:
            project_fleet(source, output=output, **options)
        assert "\n" not in str(refused.value)
    assert "out" not in {path.partition("/")[0] for path in contents(tmp_path)}


def test_a_missing_package_is_named(tmp_path):
    if find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    pair = write_pair(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"gs://: .*gcsfs"):
        project_fleet("gs://bucket/fleet", aligned=pair.aligned, base=pair.base, output=tmp_path / "out")
