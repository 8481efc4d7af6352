"""What `safelora-fast project` prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from plain_pair import contents, module_names, run, write_adapter, write_pair
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


def dense(pair, adapter=None):
    """Return cosine and C·B of every module in float64, by the formulas of the paper."""
    weights = [{}, {}]
    for model, folder in zip(weights, (pair.aligned, pair.base), strict=True):
        for shard in folder.glob("*.safetensors"):
            model.update(load_file(shard))
    factors = load_file((adapter or pair.adapter) / "adapter_model.safetensors")
    truth = {}
    for name in module_names():
        v = weights[0][f"{name}.weight"].astype(np.float64) - weights[1][f"{name}.weight"]
        b, a = (factors[f"base_model.model.{name}.lora_{factor}.weight"].astype(np.float64) for factor in "BA")
        projected = v @ v.T @ b / np.linalg.norm(v)
        update, after = b @ a, projected @ a
        truth[name] = (update * after).sum() / np.linalg.norm(update) / np.linalg.norm(after), projected
    return truth


def test_report_and_tensors(pair, call):
    truth = dense(pair)
    cosines = sorted(cosine for cosine, _ in truth.values())
    threshold = round((cosines[2] + cosines[3]) / 2, 4)
    code, out, err = call(*pair.command("--threshold", threshold))
    assert code == 0, err
    report = json.loads((pair.output / "safelora_report.json").read_text())
    (adapter,) = report["adapters"]
    chosen = {name for name, (cosine, _) in truth.items() if cosine <= threshold}
    assert len(chosen) == 3
    assert {module["name"] for module in adapter["modules"] if module["projected"]} == chosen
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (pair.adapter, pair.output))
    for module in adapter["modules"]:
        cosine, projected = truth[module["name"]]
        assert module["cosine"] == pytest.approx(cosine, abs=1e-6)
        key = f"base_model.model.{module['name']}.lora_B.weight"
        original = before[key].astype(np.float64)
        assert module["gain"] == pytest.approx(np.linalg.norm(projected) / np.linalg.norm(original), rel=1e-6)
        assert module["b_norm"] == pytest.approx(np.linalg.norm(original), rel=1e-6)
        source = module["sources"][0]
        assert source["aligned"] == source["base"] == f"{module['name']}.weight"
        assert source["aligned_file"] == f"model-0000{1 if '.0.' in module['name'] else 2}-of-00002.safetensors"
        if module["projected"]:
            assert np.linalg.norm(after[key] - projected) <= 1e-6 * np.linalg.norm(projected)
        else:
            assert after[key].tobytes() == before[key].tobytes()
    for key in before:
        if "lora_A" in key:
            assert after[key].tobytes() == before[key].tobytes()
    assert adapter["counts"] == {"modules": 6, "projected": len(chosen), "without_cosine": 0, "copied_tensors": 0}
    assert report["bytes_read"] == 2 * 4 * 2 * (24 * 16 + 8 * 16 + 16 * 40)
    assert report["settings"]["threshold"] == threshold
    assert report["seconds"] > 0
    assert {"safelora-fast", "python"} <= set(report["versions"])
    assert f"{len(chosen)} of 6 modules selected" in out
    assert str(pair.output) in out.replace("\n", "")


def test_keys_dtypes_and_metadata_are_kept(pair, call):
    call(*pair.command("--select", "all"))
    with (
        safe_open(pair.adapter / "adapter_model.safetensors", "numpy") as before,
        safe_open(pair.output / "adapter_model.safetensors", "numpy") as after,
    ):
        assert after.metadata() == before.metadata() == {"format": "pt", "note": "kept"}
        assert list(after.keys()) == list(before.keys())
    assert (pair.output / "adapter_config.json").read_bytes() == (pair.adapter / "adapter_config.json").read_bytes()
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (pair.adapter, pair.output)]
    assert sizes[0] == sizes[1]


def test_model_card(pair, call):
    call(*pair.command("--select", "number", "--num-layers", "2"))
    text = (pair.output / "README.md").read_text()
    assert text.startswith("---\n")
    assert "2405.16833" in text
    for words in ("| aligned model | `aligned` |", "| base model | `base` |", "safelora", "self_attn.q_proj", "2 of 6"):
        assert words in text
    assert "base_model" not in text  # the Hub rejects a path there, and nothing here is from the Hub
    for file in pair.output.glob("*.[jm]*"):
        assert str(pair.aligned.parent) not in file.read_text(), file


@pytest.mark.parametrize(
    ("trained_on", "line"),
    [
        ("some-org/aligned", "base_model: some-org/aligned"),
        ("/home/somebody/aligned", None),
        ("aligned", None),
        (None, None),
    ],
)
def test_the_card_names_a_model_of_the_hub_or_none(pair, call, trained_on, line):
    config = pair.adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": trained_on}))
    assert call(*pair.command()).code == 0
    text = (pair.output / "README.md").read_text()
    assert f"from_pretrained('{'aligned' if line is None else trained_on}')" in text
    front = text.split("---")[1].splitlines()
    assert [found for found in front if found.startswith("base_model")] == ([] if line is None else [line])
    assert config.read_bytes() == (pair.output / "adapter_config.json").read_bytes()


def test_the_card_knows_a_folder_of_the_hubs_cache(pair, call):
    snapshot = pair.aligned.parent / "models--some-org--aligned" / "snapshots" / "a1b2"
    snapshot.parent.mkdir(parents=True)
    pair.aligned.rename(snapshot)
    words = ["--aligned", snapshot, "--base", pair.base, "--output", pair.output]
    assert call("project", pair.adapter, *words).code == 0
    text = (pair.output / "README.md").read_text()
    assert "\nbase_model: some-org/aligned\n" in text
    assert "AutoModelForCausalLM.from_pretrained('some-org/aligned')" in text


def bypassing(pair, **tensors):
    """Add full tensors next to lora_A and lora_B. In the aligned model, `model.norm.weight` is all ones."""
    path = pair.adapter / "adapter_model.safetensors"
    more = {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **more}, path, {"format": "pt"})


def test_what_goes_around_the_projection_is_named_and_strict_refuses_it(pair, call):
    norm, bias = np.full(16, 1.5, np.float32), np.array([3, 4], np.float32)
    bypassing(pair, model__norm__weight=norm, lm_head__weight=bias)
    code, out, err = call(*pair.command("--quiet", "--select", "all", "--normalize", "spectral"))
    assert (code, out) == (0, "")
    assert "2 tensors trained beside the LoRA factors" in err
    assert "base_model.model.lm_head.weight (norm 5)" in err
    assert "base_model.model.model.norm.weight (‖W − W_aligned‖ 2)" in err
    report = json.loads((pair.output / "safelora_report.json").read_text())
    copied = {entry["tensor"]: (entry["norm"], entry["change"]) for entry in report["adapters"][0]["copied"]}
    assert copied == {
        "base_model.model.lm_head.weight": (5.0, None),
        "base_model.model.model.norm.weight": (6.0, 2.0),
    }
    code, _, err = call(*pair.command("--strict", "--overwrite"))
    assert code == 2
    assert "bypassed the projection" in err
    assert err.count("\n") == 1


def test_tensors_of_the_aligned_model_do_not_go_around(pair, call):
    bypassing(pair, model__norm__weight=np.ones(16, np.float32), x__lora_B__bias=np.zeros(3, np.float32))
    result = call(*pair.command("--strict", "--quiet", "--select", "all", "--normalize", "spectral"))
    assert (result.code, result.err) == (0, "")


def test_swapped_models_give_the_same_bytes(pair, call, tmp_path):
    """C is the same for V and −V."""
    call(*pair.command("--select", "all"))
    swapped = tmp_path / "swapped"
    words = ["--aligned", pair.base, "--base", pair.aligned, "--output", swapped, "--select", "all"]
    assert call("project", pair.adapter, *words).code == 0
    name = "adapter_model.safetensors"
    assert (swapped / name).read_bytes() == (pair.output / name).read_bytes()


def test_several_adapters_in_one_pass(pair, call, tmp_path):
    others = [write_adapter(tmp_path / "in" / name, seed, rank=rank) for name, seed, rank in (("b", 8, 2), ("c", 9, 7))]
    words = ["--aligned", pair.aligned, "--base", pair.base, "--select", "all", "--output"]
    assert call("project", pair.adapter, *others, *words, pair.output).code == 0
    assert sorted(path.name for path in pair.output.iterdir()) == ["adapter", "b", "c"]
    for adapter in [pair.adapter, *others]:
        alone = tmp_path / "alone" / adapter.name
        assert call("project", adapter, *words, alone).code == 0
        together, single = (contents(folder) for folder in (pair.output / adapter.name, alone))
        assert together["adapter_model.safetensors"] == single["adapter_model.safetensors"]
        (part,) = json.loads(together["safelora_report.json"])["adapters"]
        assert part["modules"] == json.loads(single["safelora_report.json"])["adapters"][0]["modules"]


def test_adapters_of_one_name_are_told_apart_by_their_paths(pair, call, tmp_path):
    other = write_adapter(tmp_path / "elsewhere" / "adapter", 8)
    words = ["--aligned", pair.aligned, "--base", pair.base, "--output", pair.output]
    assert call("project", pair.adapter, other, *words).code == 0
    assert sorted(str(path.parent.relative_to(pair.output)) for path in pair.output.rglob("*.safetensors")) == [
        "elsewhere/adapter",
        "in/adapter",
    ]
    code, _, err = call("project", other, other, *words, "--overwrite")
    assert code == 2
    assert err == "error: the adapter '.' was given twice; their outputs would share a name\n"


def test_overwrite_replaces_only_the_named_outputs(pair, call, tmp_path):
    """A second batch into the same folder leaves the first alone, and no output replaces a folder of outputs."""
    first, second, third = (write_adapter(tmp_path / "in" / f"a{seed}", seed) for seed in (7, 8, 9))
    words = ["--aligned", pair.aligned, "--base", pair.base, "--overwrite", "--output", pair.output]
    assert call("project", first, second, *words, "--select", "all").code == 0
    before = contents(pair.output)
    assert call("project", second, third, *words).code == 0
    after = contents(pair.output)
    assert {name: after[name] for name in before if name.startswith("a7/")} == {
        name: content for name, content in before.items() if name.startswith("a7/")
    }
    assert after["a8/adapter_model.safetensors"] != before["a8/adapter_model.safetensors"]
    code, _, err = call("project", third, *words)
    assert (code, "holds the folder 'a7', which would be deleted" in err) == (2, True)
    assert call("project", third, *words[:-1], pair.output / "a9").code == 0
    (pair.output / "a9" / "inner").mkdir()
    code, _, err = call("project", third, *words[:-1], pair.output / "a9")
    assert (code, "holds the folder 'inner', which would be deleted" in err) == (2, True)
    assert contents(pair.output).keys() == after.keys()


def damage(adapter, how):
    """Make an adapter that fails when it is opened, paired, read, or written."""
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    key = f"base_model.model.{module_names()[3]}.lora_B.weight"
    match how:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-8])
            return
        case "shape":
            factors[key] = factors[key][:-1]
        case "nan":
            factors[key][2, 1] = np.nan
        case "range":
            factors[key] = np.full_like(factors[key], 3e38)
        case "overflow":
            factors[key] = np.full(factors[key].shape, 6e4, np.float16)
    save_file(factors, path, {"format": "pt"})


@pytest.mark.parametrize("how", ["truncated", "shape", "nan", "range", "overflow"])
def test_a_damaged_adapter_does_not_stop_the_others(pair, call, tmp_path, how):
    adapters = [write_adapter(tmp_path / "in" / f"a{seed}", seed) for seed in range(5)]
    for number in (1, 2):  # far from the base, so that projected factors are larger
        weights = load_file(pair.shard("aligned", number))
        save_file({name: 1000 * weight for name, weight in weights.items()}, pair.shard("aligned", number))
    words = ["--aligned", pair.aligned, "--base", pair.base, "--select", "all", "--output"]
    assert call("project", *adapters, *words, tmp_path / "whole").code == 0
    damage(adapters[2], how)
    alone = call("project", adapters[2], *words, tmp_path / "alone")
    assert (alone.code, (tmp_path / "alone").exists()) == (2, False)
    code, _, err = call("project", *adapters, *words, pair.output)
    assert code == 2
    assert err == alone.err.rstrip("\n") + " (1 of 5 adapters failed, the others are done)\n"
    assert sorted(path.name for path in pair.output.iterdir()) == ["a0", "a1", "a3", "a4"]
    for name in ("a0", "a1", "a3", "a4"):
        written = [folder / name / "adapter_model.safetensors" for folder in (pair.output, tmp_path / "whole")]
        assert written[0].read_bytes() == written[1].read_bytes()


def test_what_v_is_made_of_is_required(pair, call):
    for words, message in (
        (
            ["--aligned", pair.aligned],
            "error: --base is missing: give both models, or a subspace with --subspace FILE\n",
        ),
        (["--base", pair.base], "error: --aligned is missing: give both models, or a subspace with --subspace FILE\n"),
    ):
        assert call("project", pair.adapter, *words, "--output", pair.output)[::2] == (2, message)


def test_damaged_checkpoints_stop_the_run(pair, call, tmp_path):
    shard = pair.shard("aligned", 2)
    weights = load_file(shard)
    next(iter(weights.values()))[0, 0] = np.inf
    save_file(weights, shard, {"format": "pt"})
    other = write_adapter(tmp_path / "in" / "other", 8)
    code, _, err = call("project", pair.adapter, other, *pair.command()[2:])
    assert (code, err.startswith(f"error: {shard}: ")) == (2, True)
    assert not pair.output.exists()


def test_overwrite_spares_what_no_run_wrote(pair, call):
    (pair.output / "chapter").mkdir(parents=True)
    (pair.output / "notes.txt").write_text("mine")
    code, _, err = call(*pair.command("--overwrite"))
    assert code == 2
    assert "holds 'chapter', which no earlier run wrote" in err
    assert (pair.output / "notes.txt").read_text() == "mine"


def test_a_terminal_that_lacks_signs(pair):
    code, out, err = run(pair.command("--threshold", "1"), env={"PYTHONIOENCODING": "cp1252"})
    assert (code, err) == (0, "")
    assert "6 of 6 modules selected" in out


def test_paths_that_are_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    pair = write_pair(folder)
    pair = replace(pair, aligned=pair.aligned.rename(folder / os.fsdecode(b"mod\xe9le")))
    code, out, err = run(pair.command("--select", "all"))
    assert (code, err) == (0, "")
    assert "6 of 6 modules selected" in out
    report = json.loads((pair.output / "safelora_report.json").read_text(encoding="utf-8"))
    assert report["aligned"]["source"] == pair.aligned.name
    assert r"mod\udce9le" in (pair.output / "README.md").read_text(encoding="utf-8")


def test_copied_tensors_are_counted(pair, call):
    path = pair.adapter / "adapter_model.safetensors"
    for number, words in ((1, "1 tensor, e.g. base_model.model.head_0.weight"), (2, "2 tensors, e.g. ")):
        save_file({**load_file(path), f"base_model.model.head_{number - 1}.weight": np.ones(3, np.float32)}, path)
        _, out, _ = call("inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base)
        assert f"copied through, not projected: {words}" in out


def test_paths_with_brackets(tmp_path, call):
    pair = write_pair(tmp_path / "[red]a[" / "b]")
    code, out, err = call(*pair.command())
    assert code == 0
    assert f"{pair.adapter}: 0 of 6 modules selected" in out
    assert f"written to {pair.output}" in out
    assert err.startswith(f"warning: {pair.adapter}: ")


def test_a_picture_that_fails_leaves_the_output(pair, call, tmp_path):
    (tmp_path / "p.png").mkdir()
    code, _, err = call(*pair.command("--plot", tmp_path / "p.png"))
    assert code == 2
    assert "the picture failed, the projection is done" in err
    assert len(contents(pair.output)) == 4


def test_tables_in_a_pipe_hold_whole_names(pair, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, _ = run(["inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base], env={"COLUMNS": ""})
    assert code == 0
    assert all(name in out for name in module_names())


def test_another_model_than_the_adapter_names(pair, call):
    config = pair.adapter / "adapter_config.json"
    for name, warns in (("org/other", True), (str(pair.aligned), False), ("org/aligned", False)):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        _, _, err = call(*pair.command("--overwrite"))
        assert ("says that it was trained on" in err) == warns


def test_dry_run_writes_nothing(pair, call, tmp_path):
    before = contents(tmp_path)
    code, out, _ = call(*pair.command("--dry-run", output=False))
    assert code == 0
    assert "nothing was written" in out
    assert call(*pair.command("--dry-run")).code == 0
    assert contents(tmp_path) == before


def test_json_alone_on_standard_output(pair, call):
    code, out, _ = call(*pair.command("--json"))
    assert code == 0
    written, printed = json.loads((pair.output / "safelora_report.json").read_text()), json.loads(out)
    assert printed.keys() == written.keys()
    assert printed["settings"] == written["settings"]
    assert printed["adapters"][0]["output"] == str(pair.output)  # printed output is for users of this machine
    assert written["adapters"][0]["output"] == pair.output.name


def test_quiet(pair, call):
    code, out, err = call(*pair.command("--quiet", "--select", "all", "--normalize", "spectral"))
    assert (code, out, err) == (0, "", "")


def test_overwrite_replaces_everything(pair, call):
    assert call(*pair.command()).code == 0
    (pair.output / "old.txt").write_text("old")
    assert call(*pair.command("--overwrite")).code == 0
    assert not (pair.output / "old.txt").exists()
    assert [path.name for path in pair.output.parent.iterdir()] == ["safe"]


def test_an_empty_folder_may_be_filled(pair, call):
    pair.output.mkdir(parents=True)
    assert call(*pair.command()).code == 0
    assert (pair.output / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(pair, call, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"picture.{suffix}"
    assert call(*pair.command("--plot", picture)).code == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)


def test_inspect_writes_nothing_and_shows_every_module(pair, call, tmp_path):
    before = contents(tmp_path)
    words = ["inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base]
    code, out, _ = call(*words)
    assert code == 0
    assert all(name[-20:] in out for name in module_names())
    code, out, _ = call(*words, "--sweep", "--json")
    (adapter,) = json.loads(out)["adapters"]
    cosines = [cosine for cosine, _ in dense(pair).values()]
    for point in adapter["sweep"]:
        assert point["projected"] == sum(cosine <= point["threshold"] for cosine in cosines)
    assert len(adapter["sweep"]) == 21
    assert contents(tmp_path) == before


def test_inspect_selects_as_project_does(pair, call):
    words = [pair.adapter, "--aligned", pair.aligned, "--base", pair.base, "--json"]
    for selection in (["--select", "number", "--num-layers", "2"], ["--threshold", "0.7"], ["--select", "all"]):
        outcomes = []
        for command in (["inspect"], ["project", "--dry-run"]):
            report = json.loads(call(*command, *words, *selection).out)
            outcomes.append((report["settings"], report["adapters"]))
        assert outcomes[0] == outcomes[1]
        assert any(module["projected"] for module in outcomes[0][1][0]["modules"])


def test_modules_are_listed_in_the_order_of_the_blocks(tmp_path, call):
    pair = write_pair(tmp_path, layers=12)
    _, out, _ = call("inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base)
    blocks = [int(line.split(".")[2]) for line in out.splitlines() if "q_proj" in line]
    assert blocks == list(range(12))
    assert call(*pair.command()).code == 0
    rows = [line for line in (pair.output / "README.md").read_text().splitlines() if line.startswith("| `model.layers")]
    assert [int(row.split(".")[2]) for row in rows if "q_proj" in row] == list(range(12))


COMMANDS = ["", "project", "inspect", "subspace", "subspace build", "subspace show", "train", "select", "persona"]
COMMANDS += ["persona extract", "persona show", "margin", "evaluate", "rejudge", "operator-swap", "operator-swap make"]
COMMANDS += ["operator-swap score", "env", "demo", "gate", "screen"]


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_errors_are_one_line(call, command):
    code, out, err = call(*command.split(), "--xyzzy")
    assert (code, out) == (2, "")
    assert err == f"error: No such option: --xyzzy; see {f'safelora-fast {command}'.strip()} --help\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(call, command):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Usage: safelora-fast {command}".strip() in out
    assert "-h" in out
    assert "<bool>" not in out


def test_help_says_how_a_revision_of_an_adapter_is_named(call):
    """Words in brackets would be taken for markup and disappear."""
    assert "ID or ID@REV" in " ".join(call("project", "--help").out.replace("│", " ").split())
    assert "HUB_ID@REV" in " ".join(call("select", "--help").out.replace("│", " ").split())


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    pair = write_pair(tmp_path / "in")
    program = (
        "import sys; from safelora_fast.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, *pair.command("--quiet", "--select", "all")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert (pair.output / "adapter_model.safetensors").exists()


def test_lines_fit_into_eighty_columns(tmp_path):
    pair = write_pair(tmp_path / "in")
    code, out, _ = run(pair.command("--select", "all"), env={"COLUMNS": "80"})
    assert code == 0
    table = [line for line in out.splitlines() if "proj" in line and "written" not in line and "selected" not in line]
    assert len(table) >= 6
    assert max(map(len, table)) <= 80
