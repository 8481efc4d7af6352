"""Safe subspaces on a torch device (here the CPU), compared with the Rust extension and the dense float64 oracle."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, save
from plain_pair import write_pair
from safetensors.torch import save_file

from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import BackendError, CheckpointError, PairingError, how_to_install
from safelora_fast.projection.device import subspace_stream
from safelora_fast.projection.device.leading_vectors import Extent, leading_vectors
from safelora_fast.projection.device.subspace_stream import SubspaceStream
from safelora_fast.projection.settings import Settings
from safelora_fast.subspace.plan import plan_subspace
from safelora_fast.subspace.safe_subspace import SafeSubspace

RESIDUAL = 1e-5  # relative to σ₁: the convergence tolerance of both implementations
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def small_batches(monkeypatch):
    """Limit batches to a few modules, or a single larger one."""
    monkeypatch.setattr(subspace_stream, "SubspaceStream", partial(SubspaceStream, batch_bytes=8000))


def assert_same(found, expected):
    """Assert equal norms, singular values and projectors; projectors may rotate if σ_k and σ_k+1 are close."""
    assert list(found.modules) == list(expected.modules)
    for name, theirs in expected.modules.items():
        ours = found.modules[name]
        assert (ours.rank, ours.columns) == (theirs.rank, theirs.columns), name
        assert ours.v_norm == pytest.approx(theirs.v_norm, rel=1e-6)
        if not theirs.rank:
            continue
        assert ours.left_vectors.dtype == ours.singular_values.dtype == np.float32
        assert np.abs(ours.singular_values - theirs.singular_values).max() <= 1e-6 * theirs.spectral_norm
        assert (np.diff(ours.singular_values) <= 0).all()
        vectors = ours.left_vectors.astype(np.float64)
        assert np.abs(vectors.T @ vectors - np.eye(ours.rank)).max() < 1e-6
        assert (vectors.max(0) >= -vectors.min(0)).all()  # the largest element is positive


def assert_same_projectors(found, expected, following):
    """Bound ‖U_k·U_kᵀ − P_k‖ by the residual divided by the gap to the following singular values."""
    for name, theirs in expected.modules.items():
        ours, other = found.modules[name].left_vectors.astype(np.float64), theirs.left_vectors.astype(np.float64)
        gap = theirs.singular_values[-1] - following[name]
        assert gap > 1e-4 * theirs.spectral_norm, "a gap that tells nothing"
        apart = np.linalg.norm(ours - other @ (other.T @ ours), 2)
        assert apart <= 2 * RESIDUAL * theirs.spectral_norm / gap + 1e-6, name


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_beside_the_extension(name, tmp_path):
    family = FAMILIES[name]
    sources = {"aligned": save(family.make(1), tmp_path / "aligned"), "base": save(family.make(2), tmp_path / "base")}
    of_experts = [[parameter.rpartition(".")[2] for parameter in family.experts]] if family.experts else []
    for modules in (None, *of_experts):
        longer = SafeSubspace.build(**sources, modules=modules, rank=6)
        following = {name: float(module.singular_values[5:6].sum()) for name, module in longer.modules.items()}
        for extent in ({"rank": 5}, {"energy": 0.6}):
            theirs, ours = (
                SafeSubspace.build(**sources, modules=modules, **extent, device=device) for device in (None, "cpu")
            )
            assert_same(ours, theirs)
            assert ours.sources == theirs.sources
            if "rank" in extent:
                assert_same_projectors(ours, theirs, following)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_half_precision(tmp_path, dtypes):
    """V has decaying singular values, and is wide or tall."""
    generator = torch.Generator().manual_seed(3)
    tensors = [{}, {}]
    for module, (rows, columns) in {"q_proj": (96, 200), "down_proj": (200, 96)}.items():
        left, right = (torch.linalg.qr(torch.randn(size, 96, generator=generator))[0] for size in (rows, columns))
        base = torch.randn(rows, columns, generator=generator) / 4
        weight = f"model.layers.0.{module}.weight"
        tensors[0][weight] = (base + (left * 0.9 ** torch.arange(96)) @ right.T).to(dtypes[0])
        tensors[1][weight] = base.to(dtypes[1])
    for place, given in zip(("aligned", "base"), tensors, strict=True):
        save_file(given, tmp_path / f"{place}.safetensors")
    sources = {"aligned": tmp_path / "aligned.safetensors", "base": tmp_path / "base.safetensors"}
    theirs, ours = SafeSubspace.build(**sources, rank=12), SafeSubspace.build(**sources, rank=12, device="cpu")
    assert_same(ours, theirs)
    for weight, aligned in tensors[0].items():
        left, values, _ = np.linalg.svd((aligned.double() - tensors[1][weight].double()).numpy())
        module = ours.modules[weight.removesuffix(".weight")]
        assert module.v_norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert np.abs(module.singular_values - values[:12]).max() <= 1e-6 * values[0]
        apart = np.linalg.norm(module.left_vectors - left[:, :12] @ (left[:, :12].T @ module.left_vectors), 2)
        assert apart <= 2 * RESIDUAL * values[0] / (values[11] - values[12])


def one_module(folder, aligned, base):
    for place, weight in (("aligned", aligned), ("base", base)):
        save_file({f"{NAME}.weight": weight}, folder / f"{place}.safetensors")
    return {"aligned": folder / "aligned.safetensors", "base": folder / "base.safetensors"}


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-70, 2.0**70, 2.0**100], ids=str)
def test_weights_of_other_sizes(tmp_path, size):
    """With powers of two whose squares exceed float32, all results scale accordingly."""
    generator = torch.Generator().manual_seed(4)
    aligned, base = (torch.randn(40, 30, generator=generator) for _ in range(2))
    for extent in ({"rank": 4}, {"energy": 0.5}):
        plain = SafeSubspace.build(**one_module(tmp_path, aligned, base), **extent, device="cpu").modules[NAME]
        scaled = SafeSubspace.build(**one_module(tmp_path, aligned * size, base * size), **extent, device="cpu")
        found = scaled.modules[NAME]
        assert found.v_norm == pytest.approx(plain.v_norm * size, rel=1e-6)
        assert found.singular_values == pytest.approx(plain.singular_values * size, rel=1e-6)
        assert np.abs(found.left_vectors - plain.left_vectors).max() < 1e-5


@pytest.mark.parametrize("size", [3e38, 1e37])
def test_weights_beyond_the_range_of_float32(tmp_path, size):
    """V overflows, or products with V could overflow."""
    sources = one_module(tmp_path, torch.full((40, 30), size), torch.full((40, 30), -size))
    with pytest.raises(CheckpointError, match=rf"module {NAME}: the products with V leave the range of float32"):
        SafeSubspace.build(**sources, device="cpu")


@pytest.mark.parametrize("role", ["aligned", "base"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_as_the_extension_names_it(tmp_path, role, value):
    weights = {"aligned": torch.ones(40, 30), "base": torch.zeros(40, 30)}
    weights[role][7, 11] = value
    sources = one_module(tmp_path, **weights)
    messages = []
    for device in (None, "cpu"):
        with pytest.raises(CheckpointError) as refused:
            SafeSubspace.build(**sources, device=device)
        messages.append(str(refused.value))
    assert "row 7, column 11" in messages[0]
    assert messages[0] == messages[1]


def test_v_so_small_that_products_vanish():
    """The smallest float32 times less than a half is zero."""
    smallest = torch.zeros(1, 3)
    smallest[0, 1] = 2.0**-149
    sizes = set()
    for seed in range(20):
        found = leading_vectors((smallest, torch.zeros(1, 3)), Extent(rank=1), seed=seed)
        assert found.vectors.shape == (1, len(found.values))
        sizes.add(len(found.values))
    assert 0 in sizes


def test_batches_and_threads_do_not_matter(tmp_path, monkeypatch):
    pair = write_pair(tmp_path)
    build = partial(SafeSubspace.build, aligned=pair.aligned, base=pair.base, rank=4, device="cpu")
    build().save(tmp_path / "0.safetensors")
    for number, size in enumerate((1, 5000, 20000), 1):
        monkeypatch.setattr(subspace_stream, "SubspaceStream", partial(SubspaceStream, batch_bytes=size))
        build(threads=number).save(tmp_path / f"{number}.safetensors")
    written = {(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}
    assert len(written) == 1


def test_memory_is_bounded_by_the_batch(tmp_path):
    pair = write_pair(tmp_path)
    models = open_checkpoint(pair.aligned, role="aligned"), open_checkpoint(pair.base, role="base")
    plan = plan_subspace(*models, None)
    largest = max(module.job.nbytes for module in plan.modules)
    stream = SubspaceStream(
        plan, Settings("orthogonal", rank=2), device=torch.device("cpu"), seed=0, batch_bytes=largest
    )
    sizes = [sum(part.nbytes for pair in batch for part in pair.parts) for batch in stream._reader]
    stream.close()
    assert len(sizes) > 2
    assert max(sizes) <= largest
    assert sum(sizes) == stream.nbytes == plan.nbytes


def test_the_seed_decides_the_start(tmp_path):
    pair = write_pair(tmp_path)
    build = partial(SafeSubspace.build, aligned=pair.aligned, base=pair.base, energy=0.3, device="cpu")
    first, again, other = build(), build(), build(seed=2**64 - 1)
    assert_same(other, first)
    same = [
        np.array_equal(first.modules[name].left_vectors, again.modules[name].left_vectors) for name in first.modules
    ]
    assert all(same)
    assert any(
        not np.array_equal(first.modules[name].left_vectors, other.modules[name].left_vectors) for name in first.modules
    )


def test_the_settings_say_what_built_it(tmp_path):
    pair = write_pair(tmp_path)
    sources = {"aligned": pair.aligned, "base": pair.base}
    plain, found = SafeSubspace.build(**sources, rank=2), SafeSubspace.build(**sources, rank=2, device="cpu:0")
    assert found.settings == {**plain.settings, "device": "cpu", "torch": torch.__version__}
    found.save(tmp_path / "safe.safetensors")
    assert SafeSubspace.load(tmp_path / "safe.safetensors").settings == found.settings


def test_a_device_without_memory(tmp_path, monkeypatch):
    pair = write_pair(tmp_path)

    def leading(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    monkeypatch.setattr(subspace_stream, "leading_vectors", leading)
    with pytest.raises(
        BackendError,
        match=r"device 'cpu' ran out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB.\); leave device out",
    ) as refused:
        SafeSubspace.build(aligned=pair.aligned, base=pair.base, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("small_batches")
def test_an_interruption_ends_the_reading(tmp_path):
    pair = write_pair(tmp_path)

    class Progress:
        def start(self, total_bytes, modules):
            assert (total_bytes > 0, modules) == (True, 6)

        def advance(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeSubspace.build(aligned=pair.aligned, base=pair.base, device="cpu", progress=Progress())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("safelora-fast-reader")]


def test_the_same_weights_twice_are_refused(tmp_path):
    pair = write_pair(tmp_path)
    for device in (None, "cpu"):
        with pytest.raises(PairingError, match="the same weights in every module"):
            SafeSubspace.build(aligned=pair.base, base=pair.base, device=device)


def test_without_torch(tmp_path):
    """The extension does not need torch; other code reports the missing package before reading files."""
    pair = write_pair(tmp_path)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from safelora_fast import SafeSubspace\n"
        "from safelora_fast.errors import MissingDependencyError\n"
        "print(len(SafeSubspace.build(aligned=sys.argv[1], base=sys.argv[2]).modules))\n"
        "try: SafeSubspace.build(aligned='absent', base='absent', device='cuda')\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(pair.aligned), str(pair.base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["6", f"device 'cuda' needs torch: {how_to_install('train')}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    with pytest.raises(BackendError, match=r"device 'cuda' cannot be used .*; leave device out to compute on the CPU"):
        SafeSubspace.build(aligned="absent", base="absent", device="cuda")


def test_v_of_low_rank_has_no_more_vectors(tmp_path):
    aligned, base = torch.zeros(64, 80), torch.zeros(64, 80)
    aligned[3, ::2], aligned[40, 1::2] = 0.5, 0.25
    module = SafeSubspace.build(**one_module(tmp_path, aligned, base), rank=20, device="cpu").modules[NAME]
    assert module.singular_values == pytest.approx([0.5 * 40**0.5, 0.25 * 40**0.5], rel=1e-6)
    assert np.abs(module.left_vectors - np.eye(64)[:, [3, 40]]).max() < 1e-6
