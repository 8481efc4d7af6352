"""Fleets: many adapters of one pair, by workers that share nothing but the markers in the outputs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import signal
import tempfile
import time
from types import SimpleNamespace

import pytest
from command_line import call
from plain_pair import contents, run, start, write_adapter, write_pair

from safelora_fast import project_adapter, project_fleet
from safelora_fast.errors import DataError, OutputError, SettingsError
from safelora_fast.projection.fleet_shard import parse_shard
from safelora_fast.projection.manifest import read_manifest
from safelora_fast.projection.writer import AdapterWriter

__all__ = ["call"]
IDS = ["t0/a0", "t0/a2", "t0/a4", "t1/a1", "t1/a3"]
WEIGHTS = "adapter_model.safetensors"
MARKER = "safelora_made_from.json"


@pytest.fixture
def fleet(tmp_path):
    """Return five adapters of two tenants, and the weights that each adapter's projection has alone."""
    pair = write_pair(tmp_path / "pair")
    folder, out = tmp_path / "fleet", tmp_path / "out"
    options = {"aligned": pair.aligned, "base": pair.base, "select": "all"}
    weights = {}
    for name in IDS:
        adapter = write_adapter(folder / name, int(name[-1]))
        project_adapter(adapter, **options, output=tmp_path / "alone" / name)
        weights[name] = (tmp_path / "alone" / name / WEIGHTS).read_bytes()
    words = ["project", "--from", folder, "--aligned", pair.aligned, "--base", pair.base, "--select", "all"]
    return SimpleNamespace(
        pair=pair,
        folder=folder,
        out=out,
        weights=weights,
        words=[str(word) for word in [*words, "--output", out]],
        project=lambda source=folder, **more: project_fleet(source, **{"output": out, **options, **more}),
    )


def written(folder):
    """Return the weights of every output, by id. Each has a marker."""
    found = {str(path.parent.relative_to(folder)): path.read_bytes() for path in folder.rglob(WEIGHTS)}
    found = {name: content for name, content in found.items() if ".partial-" not in name}
    assert all((folder / name / MARKER).exists() for name in found)
    return found


def test_a_folder_a_list_and_rows_give_what_each_adapter_gives_alone(fleet, tmp_path):
    report = fleet.project(batch=2)
    assert (report.projected, report.skipped, report.failed, report.passes) == (5, 0, {}, 3)
    assert written(fleet.out) == fleet.weights
    rows = [{"id": name, "adapter": str(fleet.folder / name)} for name in IDS]
    rows[0]["output"], rows[1]["output"] = str(tmp_path / "elsewhere"), "other/name"
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)))
    report = fleet.project(listed, output=tmp_path / "listed")
    assert (report.projected, report.passes, report.bytes_read) == (5, 1, 2 * 4 * 2 * (24 * 16 + 8 * 16 + 16 * 40))
    expected = {"other/name": fleet.weights[IDS[1]], **{name: fleet.weights[name] for name in IDS[2:]}}
    assert written(tmp_path / "listed") == expected
    assert (tmp_path / "elsewhere" / WEIGHTS).read_bytes() == fleet.weights[IDS[0]]
    report = fleet.project(iter(rows), output=tmp_path / "listed")
    assert (report.projected, report.skipped, report.passes) == (0, 5, 0)


def test_done_outputs_are_skipped_unless_they_were_made_from_something_else(fleet, caplog):
    fleet.project()
    before = contents(fleet.out)
    report = fleet.project(threads=1)
    assert (report.projected, report.skipped, report.failed) == (0, 5, {})
    write_adapter(fleet.folder / "t0" / "new", 9)
    (fleet.folder / "t1" / "a1" / WEIGHTS).write_bytes((fleet.folder / "t0" / "a0" / WEIGHTS).read_bytes())
    report = fleet.project()
    assert (report.projected, report.skipped, list(report.failed)) == (1, 4, ["t1/a1"])
    assert "was made from something else (adapter was '" in report.failed["t1/a1"]
    assert "t1/a1 failed: " in caplog.text
    assert {name: content for name, content in contents(fleet.out).items() if name in before} == before
    rows = [{"id": "t1/a1", "adapter": str(fleet.folder / "t1" / "a1")}]
    report = fleet.project(rows, overwrite=True)
    assert (report.projected, report.failed) == (1, {})
    after = contents(fleet.out)
    changed = {name for name, content in before.items() if after[name] != content}
    assert {name.rpartition("/")[0] for name in changed} == {"t1/a1"}
    assert after[f"t1/a1/{WEIGHTS}"] == fleet.weights["t0/a0"]
    report = fleet.project(select="threshold", overwrite=False)
    assert len(report.failed) == 6
    assert "settings.select was 'all', is 'threshold'" in report.failed["t0/a0"]


def test_failures_are_listed_until_they_are_mended(fleet, call):
    path = fleet.folder / "t0" / "a2" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    (fleet.out / "t1" / "a3").mkdir(parents=True)
    (fleet.out / "t1" / "a3" / "thesis.txt").write_text("mine")
    code, out, err = call(*fleet.words)
    assert code == 1
    assert "3 adapters projected, 0 there already, 2 failed (see failed.jsonl); 1 pass over V" in out
    failures = [json.loads(line) for line in (fleet.out / "failed.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["t0/a2", "t1/a3"]
    assert all(f"warning: {failure['id']} failed: {failure['error']}\n" in err for failure in failures)
    assert "exists already" in failures[1]["error"]
    code, _, err = call(*fleet.words, "--overwrite")
    assert (code, "holds 'thesis.txt', which no earlier run wrote" in err) == (1, True)
    assert (fleet.out / "t1" / "a3" / "thesis.txt").read_text() == "mine"
    (fleet.out / "t1" / "a3" / "thesis.txt").unlink()
    path.write_bytes(whole)
    assert call(*fleet.words, "--json").code == 0
    assert not (fleet.out / "failed.jsonl").exists()
    assert written(fleet.out) == fleet.weights


def test_every_adapter_belongs_to_one_shard(fleet, call, monkeypatch):
    reports = [fleet.project(shard=f"{index}/3") for index in range(3)]
    assert [report.projected for report in reports] == [2, 2, 1]
    assert written(fleet.out) == fleet.weights
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    code, out, err = call(*fleet.words, "--shard", "/3")
    assert (code, err.splitlines()[0]) == (0, "shard 2/3, from JOB_COMPLETION_INDEX")
    assert "shard 2/3: 0 adapters projected, 1 there already" in out


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "10"}
SHARDS = [
    ("1/4", {"RANK": "3", "WORLD_SIZE": "8"}, "1/4"),
    (None, {}, "0/1"),
    (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "10"}, "6/10"),
    (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, "2/4"),  # --array=1-10:3
    (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "3"}, "not evenly spaced"),
    (None, {"SLURM_ARRAY_TASK_ID": "7"}, "SLURM_ARRAY_TASK_MIN is set, but it is '', not a whole number"),
    ("/4", {"JOB_COMPLETION_INDEX": "3"}, "3/4"),
    (None, {"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX is set, but nothing says how many workers"),
    (None, {"RANK": "3", "WORLD_SIZE": "8"}, "3/8"),
    (None, {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}, "0/2"),
    ("/2", {"RANK": "2", "WORLD_SIZE": "4"}, "counts from 0 to 1"),
    ("/2", {}, "none of SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX, RANK, SKYPILOT_NODE_RANK is set"),
    ("4/4", {}, "shard 4/4: the first number counts from 0 to 3"),
    ("0/0", {}, "shard 0/0"),
    ("-1/4", {}, "shard must be I/N"),
    ("one", {}, "shard must be I/N"),
]


@pytest.mark.parametrize(("text", "environment", "expected"), SHARDS)
def test_the_shard_of_a_worker(text, environment, expected):
    if re.fullmatch(r"\d/\d+", expected):
        assert str(parse_shard(text, environment)) == expected
    else:
        with pytest.raises(SettingsError, match=re.escape(expected)):
            parse_shard(text, environment)


WRONG = [
    ("[1]", "list.jsonl:2: must be an object, not [1]"),
    ("{", "list.jsonl:2: is not JSON"),
    ('{"id": "b"}', "list.jsonl:2: adapter is missing"),
    ('{"id": "", "adapter": "x"}', "list.jsonl:2: id is empty"),
    ('{"id": "b", "adapter": 3}', "list.jsonl:2: adapter must be text, not 3"),
    ('{"id": "b", "adapter": "x", "ouput": "y"}', "list.jsonl:2: unknown key 'ouput'; a row is {"),
    ('{"id": "b\\ud800", "adapter": "x"}', "list.jsonl:2: id 'b\\ud800' holds a character that no path can have"),
    ('{"id": "b", "adapter": "x\\u0000y"}', "list.jsonl:2: adapter 'x\\x00y' holds a character"),
    ('{"id": "../b", "adapter": "x"}', "list.jsonl:2: id '../b' is not a relative path"),
    ('{"id": "/b", "adapter": "x"}', "list.jsonl:2: id '/b' is not a relative path"),
    ('{"id": "b/.x", "adapter": "x"}', "list.jsonl:2: id 'b/.x' is not a relative path"),
    ('{"id": "failed.jsonl", "adapter": "x"}', "'failed.jsonl' is the name of the list of failures"),
    ('{"id": "b", "adapter": "x", "output": "c/../../d"}', "output 'c/../../d' is not a relative path"),
    ('{"id": "b", "adapter": "ADAPTER", "revision": "main"}', "revision belongs to a Hub id"),
    ('{"id": "a", "adapter": "x"}', "the id 'a' occurs twice"),
    ('{"id": "b", "adapter": "x", "output": "a"}', "is the output of 'a' and of 'b'"),
    ('{"id": "a/b", "adapter": "x"}', "lies in the output of 'a'; outputs must not nest"),
    ('{"id": "b", "adapter": "x", "output": "ADAPTER"}', "is, or lies in, the adapter of 'a', which is read"),
    ('{"id": "b", "adapter": "x", "output": "PARENT"}', "contains the adapter of 'a', which is read"),
    ('{"id": "b", "adapter": "x", "output": "MODEL/b"}', "aligned, which is read"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_row_is_named_before_anything_is_read(fleet, tmp_path, line, message):
    adapter = fleet.folder / "t0" / "a0"
    places = {"ADAPTER": adapter, "PARENT": adapter.parent, "MODEL": fleet.pair.aligned}
    for word, path in places.items():
        line = line.replace(word, str(path))
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"id": "a", "adapter": str(adapter)}) + f"\n{line}\n")
    before = contents(tmp_path)
    with pytest.raises((DataError, OutputError)) as refused:
        fleet.project(listed, overwrite=True)
    assert message in str(refused.value)
    assert contents(tmp_path) == before


def test_a_name_that_is_too_long_fails_alone(fleet):
    """With what a temporary name adds, it would be longer than a file system allows."""
    rows = [{"id": name, "adapter": str(fleet.folder / "t0" / "a0")} for name in ("n" * 250, "n" * 238, "n" * 237)]
    report = fleet.project(rows)
    assert (report.projected, list(report.failed)) == (1, [rows[0]["id"], rows[1]["id"]])
    assert "the name has 250 bytes, at most 237 are possible" in report.failed["n" * 250]


@pytest.mark.parametrize(
    "words", [["--join", "parts"], ["--modules-shard", "0/2"], ["--plot", "a.png"], ["--dry-run"]], ids=" ".join
)
def test_options_that_a_fleet_does_not_have_are_refused(fleet, call, words):
    code, _, err = call(*fleet.words, *words)
    assert (code, fleet.out.exists()) == (2, False)
    assert words[0] in err


def test_folders_that_are_no_fleet(fleet, tmp_path):
    for folder, message in (
        (fleet.folder / "t0" / "a0", "is an adapter itself"),
        (fleet.pair.base, "no folder below it holds adapter_config.json"),
        (tmp_path / "absent.jsonl", "absent.jsonl: "),
    ):
        with pytest.raises(DataError) as refused:
            fleet.project(folder)
        assert message in str(refused.value)
    with pytest.raises(OutputError, match="which is read"):
        fleet.project(output=fleet.folder / "safe")
    (fleet.folder / "loop").symlink_to(fleet.folder)
    (fleet.folder / "link").symlink_to(write_adapter(tmp_path / "linked", 7))
    (fleet.folder / "t0" / "a0" / "checkpoint-1").mkdir()
    (fleet.folder / "t0" / "a0" / "checkpoint-1" / "adapter_config.json").write_text("{}")
    assert [row.id for row in read_manifest(fleet.folder, fleet.out)] == ["link", *IDS]


def test_a_fuzzed_list_touches_no_other_tenant(fleet, tmp_path):
    """Lists with random edits: one line, or outputs below the output folder that do not touch one another."""
    chance = random.Random(5)
    values = [
        "t9/a",
        "a",
        "../b",
        "/",
        ".",
        "x" * 300,
        "é",
        "\0",
        "a\\b",
        3,
        None,
        [],
        {},
        "nope://b/a",
        " ",
        "a/" * 40,
    ]
    values += [str(tmp_path / "absolute"), str(fleet.folder / "t0"), str(fleet.out), "failed.jsonl", "t0/a0/x"]
    (fleet.out / "tenant").mkdir(parents=True)
    (fleet.out / "tenant" / "mine").write_text("mine")
    inputs = contents(fleet.folder)
    for trial in range(400):
        rows = [{"id": name, "adapter": str(fleet.folder / name)} for name in IDS[: chance.randint(1, 5)]]
        for _ in range(chance.randint(1, 3)):
            chance.choice(rows)[chance.choice(["id", "adapter", "output", "revision", "other"])] = chance.choice(values)
        text = "\n".join(map(json.dumps, rows))
        if trial % 3 == 0:
            cut = chance.randrange(len(text))
            text = text[:cut] + chance.choice(["", "\n", "}", '"', "\ud800"]) + text[cut + chance.randint(0, 2) :]
        listed = tmp_path / "list.jsonl"
        listed.write_bytes(text.encode(errors="surrogatepass"))
        with contextlib.suppress(DataError, OutputError):
            places = [row.output for row in read_manifest(listed, fleet.out) if not row.output.startswith("nope://")]
            if trial % 3 and trial % 20 == 1:
                fleet.project(listed, overwrite=True, warn=[].append)
            assert all(place.startswith(f"{fleet.out}/") or place in text for place in places)  # a row may name its own
            assert not any(a != b and f"{b}/".startswith(f"{a}/") for a in places for b in places)
    assert (fleet.out / "tenant" / "mine").read_text() == "mine"
    assert contents(fleet.folder) == inputs
    assert {path.name for path in tmp_path.iterdir()} <= {"absolute", "alone", "fleet", "list.jsonl", "out", "pair"}


def test_two_processes_on_one_shard(fleet):
    workers = [start([*fleet.words, "--batch", str(size), "--quiet"]) for size in (1, 2)]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert (worker.returncode, out, err) == (0, "", "")
    assert written(fleet.out) == fleet.weights
    assert sorted(path.name for path in fleet.out.iterdir()) == ["t0", "t1"]


def test_leftovers_of_killed_workers_are_named(fleet, call, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    left = [tmp_path / ".safelora-fast-fleet.partial-abcdefgh", fleet.out / "t0" / ".a0.partial-abcdefgh"]
    for folder in left:
        folder.mkdir(parents=True)
    (fleet.out / "t0" / ".other.partial-abcdefgh").mkdir()
    code, _, err = call(*fleet.words)
    assert (code, f"has left {left[0]} and 1 more: nothing reads it, delete it" in err) == (0, True)
    assert all(folder.exists() for folder in left)


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(fleet, monkeypatch):
    write, count = AdapterWriter.write, [0]

    def full(self, block, values):
        count[0] += 1
        if count[0] > 15:  # six modules of each adapter
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, block, values)

    monkeypatch.setattr(AdapterWriter, "write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        fleet.project(batch=2)
    assert written(fleet.out) == {name: fleet.weights[name] for name in IDS[:2]}
    assert [path.name for path in fleet.out.rglob("*.partial-*")] == []
    monkeypatch.undo()
    assert fleet.project().skipped == 2
    assert written(fleet.out) == fleet.weights


def test_a_disk_that_cannot_hold_the_weights(fleet):
    """A limit on the file size simulates it."""
    size = (fleet.folder / IDS[0] / WEIGHTS).stat().st_size // 2
    code, out, err = run(fleet.words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the disk is full" in err
    assert contents(fleet.out.parent).keys() == {
        name for name in contents(fleet.out.parent) if not name.startswith("out/")
    }


def killed(fleet, kills, batch=1):
    """Kill workers at random times until the fleet is done. Each loses at most the batch in hand, and nothing done."""
    chance, done, left = random.Random(1), set(), 0
    for _ in range(kills):
        worker = start([*fleet.words, "--batch", str(batch), "--quiet"])
        end = time.monotonic() + chance.uniform(0.1, 0.6)
        while worker.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        worker.send_signal(signal.SIGKILL)
        worker.communicate(timeout=60)
        found = written(fleet.out) if fleet.out.exists() else {}
        assert found.items() <= fleet.weights.items()
        assert found.keys() >= done
        partial = len(list(fleet.out.rglob(".*.partial-*")))
        assert partial - left <= batch
        done, left = set(found), partial
        if len(done) == len(IDS):  # start over, with the leftovers there
            for name in IDS[:4]:
                for path in (fleet.out / name).iterdir():
                    path.unlink()
                (fleet.out / name).rmdir()
                done.discard(name)
    assert run(fleet.words)[0] == 0
    assert written(fleet.out) == fleet.weights


def test_a_killed_worker_loses_at_most_the_batch_in_hand(fleet):
    killed(fleet, 6)


@pytest.mark.slow
def test_a_hundred_kills(fleet):
    killed(fleet, 100, batch=2)
