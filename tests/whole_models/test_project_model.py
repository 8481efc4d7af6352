"""Whole models: every operator against dense float64, families, selection, resuming, and input that is refused."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_pair import contents, module_names, run, start, write_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from safelora_fast import SafeSubspace, project_model
from safelora_fast.errors import SafeLoraFastError, SettingsError
from safelora_fast.whole_models import project_model as room
from safelora_fast.whole_models import shard_writer

OPERATORS = {
    "frobenius": {},
    "spectral": {"normalize": "spectral"},
    "orthogonal": {"operator": "orthogonal", "rank": 3},
    "energy": {"operator": "orthogonal", "energy": 0.7},
    "attenuate": {"operator": "attenuate", "rank": 3, "keep": 0.25},
    "attenuate left": {"operator": "attenuate", "rank": 3, "keep": 0.25, "sides": "left"},
    "zero": {"operator": "zero"},
    "restore": {"operator": "restore", "weight": 0.5},
    "extrapolate": {"operator": "extrapolate", "rank": 2, "weight": 1.5},
}


def dense(folder):
    """Return the weights of a model in float64."""
    shards = [load_torch(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.double().numpy() for shard in shards for name, tensor in shard.items()}


def oracle(finetuned, aligned, base, settings):
    """Return the projected weight [m, n] and the paper's cosine, in float64."""
    update, v = finetuned - aligned, aligned - base
    applied = v @ v.T @ update / np.linalg.norm(v)
    cosine = (applied * update).sum() / np.linalg.norm(applied) / np.linalg.norm(update)
    u, values, w = np.linalg.svd(v, full_matrices=False)
    count = settings.get("rank") or 1 + int(
        np.argmax(np.cumsum(values**2) >= settings.get("energy", 0) * (values**2).sum())
    )
    u, w, keep = u[:, :count], w[:count].T, settings.get("keep", 0)
    match settings.get("operator", "safelora"):
        case "safelora" if "normalize" in settings:
            return aligned + v @ v.T @ update / values[0] ** 2, cosine
        case "safelora":
            return aligned + applied, cosine
        case "restore":
            return finetuned + settings["weight"] * v, cosine
        case "extrapolate":
            return finetuned + settings["weight"] * u @ u.T @ v, cosine
        case "attenuate" if "sides" not in settings:
            update = (1 - keep) * update @ w @ w.T + keep * update
    update = (1 - keep) * u @ u.T @ update + keep * update
    return aligned + (0 if settings["operator"] == "zero" else update), cosine


def write_finetuned(folder, aligned, *, size=0.01, seed=5):
    """Write a fine-tune of a model: every matrix and norm moved, other files beside the weights."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for path in sorted(aligned.iterdir()):
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        moved = {
            name: (weight + (size * random.standard_normal(weight.shape)).astype(weight.dtype))
            for name, weight in load_file(path).items()
        }
        save_file(moved, folder / path.name, {"format": "pt", "note": "kept"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("another form of the weights")
    return folder


@pytest.fixture
def models(tmp_path):
    aligned, base = write_model(tmp_path / "aligned", 1), write_model(tmp_path / "base", 2)
    finetuned = write_finetuned(tmp_path / "finetuned", aligned)
    return {"finetuned": finetuned, "aligned": aligned, "base": base, "output": tmp_path / "out"}


def close(found, expected, reference):
    """Whether a weight equals its oracle, as far as the rounding of float32 products allows."""
    return np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize("settings", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_against_dense_float64(models, settings):
    report = project_model(**models, select="all", threads=2, **settings)
    before, aligned, base, after = (dense(models[role]) for role in ("finetuned", "aligned", "base", "output"))
    (model,) = report.adapters
    assert sorted(module.name for module in model.projected) == sorted(module_names())
    for module in model.modules:
        name = f"{module.name}.weight"
        expected, cosine = oracle(before[name], aligned[name], base[name], settings)
        update = before[name] - aligned[name]
        scale = aligned[name] if settings.get("operator") else expected
        assert close(after[name], expected, scale)
        assert module.v_norm == pytest.approx(np.linalg.norm(aligned[name] - base[name]), rel=1e-5)
        assert module.update_norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
        moved = expected - aligned[name]
        assert module.update_norm_after == pytest.approx(np.linalg.norm(moved), rel=1e-3, abs=1e-9)
        if settings.get("operator", "safelora") == "safelora":
            assert module.cosine == pytest.approx(cosine, abs=1e-5)
        else:
            assert np.isnan(module.cosine)
    untouched = before.keys() - {f"{name}.weight" for name in module_names()}
    assert all(np.array_equal(after[name], before[name]) for name in untouched)
    assert (models["output"] / "tokenizer.json").exists()
    assert not (models["output"] / "pytorch_model.bin").exists()
    assert not list(models["output"].glob("*.record.json"))


@pytest.mark.parametrize("select", ["threshold", "number"])
@pytest.mark.parametrize("operator", ["frobenius", "orthogonal"])
def test_only_selected_modules_change(models, select, operator):
    before, aligned, base = (dense(models[role]) for role in ("finetuned", "aligned", "base"))
    cosines = {}
    for name in module_names():
        weights = [one[f"{name}.weight"] for one in (before, aligned, base)]
        cosines[name] = oracle(*weights, OPERATORS[operator])[1]
    lowest = sorted(cosines, key=cosines.get)
    given = {"num_layers": 2} if select == "number" else {"threshold": (cosines[lowest[2]] + cosines[lowest[3]]) / 2}
    report = project_model(**models, select=select, **given, **OPERATORS[operator])
    after, chosen = dense(models["output"]), lowest[: 2 if select == "number" else 3]
    for module in report.adapters[0].modules:
        assert module.cosine == pytest.approx(cosines[module.name], abs=1e-5)
    changed = {name for name in cosines if not np.array_equal(before[f"{name}.weight"], after[f"{name}.weight"])}
    assert changed == set(chosen) == {module.name for module in report.adapters[0].projected}


def save_as(folder, dtype):
    """Store a model in another dtype."""
    for path in folder.glob("*.safetensors"):
        save_torch({name: tensor.to(dtype) for name, tensor in load_torch(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_rounded_once_to_the_dtype_of_the_input(models, dtype):
    save_as(models["finetuned"], getattr(torch, dtype))
    save_as(models["aligned"], torch.bfloat16)
    project_model(**models, select="all", normalize="spectral")
    before, aligned, base, after = (dense(models[role]) for role in ("finetuned", "aligned", "base", "output"))
    for name in (f"{module}.weight" for module in module_names()):
        expected = oracle(before[name], aligned[name], base[name], {"normalize": "spectral"})[0]
        rounded = torch.tensor(expected).float().to(getattr(torch, dtype)).double().numpy()
        assert (after[name] != rounded).mean() < 0.01  # sums in float32 may fall on the other side of a tie
        assert np.abs(after[name] - expected).max() <= np.abs(expected).max() * 2.0 ** (
            -10 if dtype == "float16" else -8
        )
    for source in models["finetuned"].glob("*.safetensors"):
        both = [load_torch(folder / source.name) for folder in (models["finetuned"], models["output"])]
        kinds = [{name: (tensor.dtype, tensor.shape) for name, tensor in one.items()} for one in both]
        assert kinds[0] == kinds[1]


def write_tensors(folder, tensors, config):
    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FAMILIES = {
    # name: (tensors of the aligned model, config, base spelling, (out, in) matrices of a tensor)
    "gpt2": ({"h.0.attn.c_attn.weight": (16, 48), "h.0.mlp.c_proj.weight": (64, 16), "wte.weight": (40, 16)},
             {"model_type": "gpt2"}),
    "fused": ({"model.layers.0.self_attn.qkv_proj.weight": (32, 16), "model.layers.0.mlp.down_proj.weight": (16, 40)},
              {"model_type": "phi3", "num_attention_heads": 4, "hidden_size": 16}),
    "experts": ({"model.layers.0.mlp.experts.gate_up_proj": (3, 24, 16), "model.layers.0.mlp.experts.down_proj": (3, 16, 12),
                 "model.layers.0.mlp.gate.weight": (3, 16)}, {"model_type": "qwen3_moe", "hidden_size": 16}),
    "tied": ({"model.embed_tokens.weight": (40, 16), "model.layers.0.mlp.up_proj.weight": (40, 16),
              "model.layers.0.mlp.up_proj.bias": (40,)}, {"model_type": "llama", "tie_word_embeddings": True}),
}  # fmt: skip


def split_fused(tensors):
    """Return the tensors with queries, keys and values apart."""
    found = dict(tensors)
    for name in tensors:
        if "qkv_proj" in name:
            q, k, v = np.split(found.pop(name), [16, 24])
            found |= {name.replace("qkv", part): weight for part, weight in zip("qkv", (q, k, v), strict=True)}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"operator": "attenuate", "rank": 2, "keep": 0.5}], ids=["C", "attenuate"])
def test_families(tmp_path, family, settings):
    shapes, config = FAMILIES[family]
    random = np.random.default_rng(3)
    aligned, base, finetuned = (
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)
    )
    finetuned |= {"extra.table": np.arange(4.0), "masked.bias": np.ones((2, 2))}  # unknown to the aligned model
    folders = {
        "finetuned": write_tensors(tmp_path / "finetuned", finetuned, config),
        "aligned": write_tensors(tmp_path / "aligned", aligned, config),
        "base": write_tensors(tmp_path / "base", split_fused(base), config),
    }
    report = project_model(**folders, output=tmp_path / "out", select="all", embeddings=True, **settings)
    after = load_file(tmp_path / "out" / "model.safetensors")
    modules = 0
    for name, weight in finetuned.items():
        if name not in shapes or len(shapes[name]) == 1:
            assert np.array_equal(after[name], weight)
            continue
        stacked = [one[name].reshape(-1, *shapes[name][-2:]) for one in (finetuned, aligned, base, after)]
        for before, ours, theirs, found in zip(*(one.astype(float) for one in stacked), strict=True):
            turn = (lambda matrix: matrix.T) if family == "gpt2" or "embed" in name else (lambda matrix: matrix)
            expected = oracle(turn(before), turn(ours), turn(theirs), settings)[0]
            assert close(turn(found), expected, expected)
            modules += 1
    assert len(report.adapters[0].projected) == modules
    reasons = {item["tensor"]: item["reason"] for item in report.adapters[0].copied}
    assert reasons["extra.table"] == "the aligned model has no tensor of this name and shape: kept"


@pytest.mark.parametrize("settings", [{}, OPERATORS["orthogonal"], OPERATORS["restore"]], ids=["C", "U", "V"])
def test_the_bytes_do_not_depend_on_threads(models, settings):
    outputs = []
    for threads in (1, 3):
        project_model(**models, overwrite=True, select="all", threads=threads, **settings)
        outputs.append(contents(models["output"])["model-00001-of-00002.safetensors"])
    assert outputs[0] == outputs[1]


def test_a_subspace_replaces_the_base(models, tmp_path, call):
    SafeSubspace.build(aligned=models["aligned"], base=models["base"], rank=5).save(tmp_path / "safe.safetensors")
    given = {"select": "all", "operator": "orthogonal"}
    whole = project_model(**models, rank=3, **given)
    expected = dense(models["output"].rename(tmp_path / "with-base"))
    base = models.pop("base").rename(tmp_path / "gone")
    words = ["--subspace", tmp_path / "safe.safetensors", "--operator", "orthogonal", "--select", "all", "--rank", "3"]
    assert call(*command(models, *words, roles=("aligned", "output")), "--quiet").code == 0
    found = dense(models["output"])
    assert all(close(found[name], expected[name], expected[name]) for name in expected)
    report = json.loads((models["output"] / room.REPORT).read_text())
    for module, former in zip(report["adapters"][0]["modules"], whole.adapters[0].modules, strict=True):
        metrics = (module["v_norm"], module["v_rank"], module["v_energy"], module["update_norm_after"])
        assert metrics == pytest.approx((former.v_norm, 3, former.v_energy, former.update_norm_after), rel=1e-4)
    assert report["bytes_read"] == whole.bytes_read * 2 // 3
    subspace = SafeSubspace.load(tmp_path / "safe.safetensors")
    models |= {"output": tmp_path / "other", "subspace": subspace}
    (first, _), *others = subspace.modules.items()
    less = dict(others)
    for more, message in (
        ({"base": base}, "give either base, or a subspace"),
        ({"operator": "zero"}, "operator zero needs both checkpoints; with a subspace, use orthogonal"),
        ({"aligned": base}, "is not the aligned model that the subspace was built from"),
        ({"subspace": replace(subspace, modules=less)}, f"module {first} is not in the subspace.*--exclude {first}"),
    ):
        with pytest.raises(SafeLoraFastError, match=message):
            project_model(**{**models, **given, **more})


def test_others_come_from_the_aligned_model_if_asked(models):
    report = project_model(**models, select="all", others="aligned")
    aligned, after = dense(models["aligned"]), dense(models["output"])
    assert np.array_equal(after["model.norm.weight"], aligned["model.norm.weight"])
    assert report.adapters[0].copied == [{"tensor": "model.norm.weight", "reason": "taken from the aligned model"}]


def command(models, *more, roles=("aligned", "base", "output")):
    words = [word for role in roles for word in (f"--{role}", models[role])]
    return ["project-model", models["finetuned"], *words, *more]


def without_seconds(folder):
    found = contents(folder)
    report = json.loads(found.pop("safelora_report.json"))
    return found, {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.parametrize("select", ["threshold", "number"])
def test_a_failed_run_goes_on_at_the_first_unfinished_shard(models, monkeypatch, select):
    given = {"select": select, **({"num_layers": 2} if select == "number" else {"threshold": 0.8})}
    project_model(**models, **given)
    expected = without_seconds(models["output"])
    target = models["output"].rename(models["output"].with_name("whole"))
    done = []

    def stop_in_the_second_shard(module, settings, output, real=shard_writer.project_module):
        done.append(module.name)
        if len(done) == 5:
            raise OSError(28, "No space left on device")
        return real(module, settings, output)

    monkeypatch.setattr(shard_writer, "project_module", stop_in_the_second_shard)
    with pytest.raises(SafeLoraFastError, match=r"No space left on device; finished shards stay in .*out.unfinished"):
        project_model(**models, **given)
    assert not models["output"].exists()
    monkeypatch.undo()
    with pytest.raises(
        SafeLoraFastError, match=r"settings have changed: .*operator was 'safelora', is 'zero'.*--overwrite"
    ):
        project_model(**models, operator="zero", **given)
    monkeypatch.setattr(shard_writer, "project_module", lambda *given, real=shard_writer.project_module: (
        done.append(given[0].name), real(*given))[1])  # fmt: skip
    project_model(**models, **given)
    assert sorted(done[5:]) == sorted(module_names()[3:])
    assert without_seconds(models["output"]) == expected
    assert not list(target.parent.glob(".out*"))


def test_an_interrupted_run_says_what_stays(models, monkeypatch, call):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_writer, "project_module", interrupt)
    code, _, err = call(*command(models))
    assert (code, "interrupted; finished shards stay in" in err) == (130, True)
    monkeypatch.undo()
    assert call(*command(models)).code == 0


def test_a_killed_process_is_resumed(models):
    """A separate process, because it is killed."""
    project_model(**models, select="all")
    expected = without_seconds(models["output"])
    models["output"].rename(models["output"].with_name("whole"))
    process = start(command(models, "--select", "all"))
    unfinished = models["output"].with_name(".out.unfinished")
    while process.poll() is None and not list(unfinished.glob("*.record.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = run(command(models, "--select", "all", *(["--overwrite"] if models["output"].exists() else [])))
    assert (code, err) == (0, "")
    assert "6 of 6 modules selected (all modules)" in out
    assert without_seconds(models["output"]) == expected


def lacks_a_layer(models):
    path = models["finetuned"] / "model-00002-of-00002.safetensors"
    index = models["finetuned"] / "model.safetensors.index.json"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path)
    places = json.loads(index.read_text())
    del places["weight_map"][gone]
    index.write_text(json.dumps(places))


def other_shape(models):
    path = models["finetuned"] / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.ones((16, 39), np.float32)
    save_file(tensors, path)


def quantized(models):
    path = models["finetuned"] / "model-00001-of-00002.safetensors"
    tensors = load_torch(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_torch(tensors, path)


def the_same(models):
    for path in models["aligned"].glob("*.safetensors"):
        (models["finetuned"] / path.name).write_bytes(path.read_bytes())


def not_finite(models):
    path = models["finetuned"] / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lacks_a_layer, r"is no full fine-tune of .*aligned: it lacks model.layers.1.mlp.down_proj.weight; give the model"),
        (other_shape, r"down_proj.weight is \[16, 39\], but \[16, 40\] in the aligned model; give the model that it"),
        (quantized, r"down_proj.weight of the fine-tuned model is F8_E4M3; weights must be F32, BF16 or F16, not quantized"),
        (the_same, r"finetuned: holds the same weights as .*aligned, so there is no update to project"),
        (not_finite, r"down_proj.weight.* row 3, column 4"),
    ],
)  # fmt: skip
def test_wrong_models_are_refused(models, damage, message):
    damage(models)
    with pytest.raises(SafeLoraFastError, match=message):
        project_model(**models, select="all")
    assert not models["output"].exists()


def test_an_update_larger_than_v_is_warned_about(models, tmp_path):
    models["finetuned"] = write_finetuned(tmp_path / "far", models["aligned"], size=1.0)
    report = project_model(**models)
    assert any("is larger than ‖V‖ in 6 modules of 6" in warning for warning in report.warnings)


def test_the_paper_of_lox_needs_no_fine_tune(models):
    """FINETUNED may be the aligned model itself where the operator adds to it."""
    models["finetuned"] = models["aligned"]
    report = project_model(**models, select="all", **OPERATORS["extrapolate"])
    assert len(report.adapters[0].projected) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"operator": "restore", "weight": 1}, "operator restore does not depend on the update: give select all"),
        ({"operator": "restore", "select": "all"}, "operator restore needs weight: the factor of V"),
        ({"weight": 1.0}, "weight applies to operator merge and restore and extrapolate only"),
        ({"others": "base"}, "others must be one of finetuned, aligned, not 'base'"),
    ],
)
def test_settings_that_do_not_fit(models, given, message):
    with pytest.raises(SettingsError, match=message):
        project_model(**models, **given)


def test_an_earlier_output_is_replaced_only_if_asked(models, call):
    models["output"].mkdir()
    (models["output"] / "notes").write_text("mine")
    code, _, err = call(*command(models, "--overwrite"))
    assert (code, "which no earlier run wrote" in err) == (2, True)
    (models["output"] / "notes").unlink()
    assert call(*command(models)).code == 0
    code, _, err = call(*command(models))
    assert (code, err) == (
        2,
        f"error: {models['output']}: exists already; choose another folder, or pass --overwrite\n",
    )
    assert call(*command(models, "--overwrite", "--quiet")).code == 0
    assert room.REPORT in {path.name for path in Path(models["output"]).iterdir()}


def test_a_damaged_state_of_an_unfinished_output(tmp_path):
    models = {role: write_model(tmp_path / role, seed) for seed, role in enumerate(("aligned", "base"))}
    finetuned, output = write_model(tmp_path / "finetuned", 7), tmp_path / "out"
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    for content in ("{", "[]"):
        (unfinished / "safelora_unfinished.json").write_text(content)
        with pytest.raises(SafeLoraFastError, match=r"unfinished.json: .*; delete this folder, or pass --overwrite"):
            project_model(finetuned, **models, output=output, operator="zero", select="all")
    project_model(finetuned, **models, output=output, operator="zero", select="all", overwrite=True)
    assert output.is_dir()
    assert not unfinished.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"modules": [{}, {}, {}]}', '{"modules": []}', "shard"])
def test_a_damaged_record_of_a_shard_is_not_believed(models, monkeypatch, content):
    project_model(**models, operator="zero", select="all")
    expected = without_seconds(models["output"].rename(models["output"].with_name("whole")))
    monkeypatch.setattr(room, "copy_side_files", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(SafeLoraFastError, match="finished shards stay"):
        project_model(**models, operator="zero", select="all")
    monkeypatch.undo()
    unfinished = models["output"].with_name(".out.unfinished")
    if content == "shard":
        (unfinished / "model-00001-of-00002.safetensors").write_bytes(b"")
    else:
        (unfinished / "model-00001-of-00002.safetensors.record.json").write_text(content)
    project_model(**models, operator="zero", select="all")
    assert without_seconds(models["output"]) == expected


def test_a_link_out_of_the_models_folder_is_not_followed(models, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (Path(models["finetuned"]) / "merges.txt").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SafeLoraFastError, match=r"merges.txt: is a link to a file outside the model's folder"):
        project_model(**models, operator="zero", select="all")
    assert not Path(models["output"]).exists()


def test_files_of_others_in_the_unfinished_folder_stay(models):
    output = Path(models["output"])
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.mkdir()
    (unfinished / "thesis.txt").write_text("mine")
    with pytest.raises(SafeLoraFastError, match="holds files of something else"):
        project_model(**models, operator="zero", select="all")
    assert (unfinished / "thesis.txt").read_text() == "mine"
