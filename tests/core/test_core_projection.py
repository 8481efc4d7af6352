from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from dense import Module, decode, lora, module, paper_operator, rounded, start, truth, whole, write

from safelora_fast import _core
from safelora_fast.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

# Relative half ULP of each dtype.
ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}


def assert_close(
    outcome: _core.JobOutcome,
    given: Module,
    operator: np.ndarray | None = None,
    tolerance: float = 1e-5,
    on_a: np.ndarray | None = None,
):
    """Compare every metric of every adapter with the dense oracle."""
    assert outcome.v_norm == pytest.approx(np.linalg.norm(given.v), rel=1e-6)
    for adapter, (factors, (lora_b, lora_a)) in enumerate(zip(outcome.factors, given.adapters, strict=True)):
        expected = truth(given.v, lora_b, lora_a, operator, on_a)
        assert factors.cosine == pytest.approx(expected.cosine, abs=1e-6)
        assert factors.gain == pytest.approx(expected.gain, rel=tolerance)
        assert factors.lora_b_norm == pytest.approx(expected.lora_b_norm, rel=1e-12)
        assert factors.lora_b_norm_projected == pytest.approx(np.linalg.norm(expected.projected), rel=tolerance)
        assert factors.update_norm == pytest.approx(expected.update_norm, rel=1e-12)
        assert factors.update_norm_projected == pytest.approx(expected.update_norm_projected, rel=tolerance)
        found = given.projected(outcome, adapter)
        scale = np.abs(expected.projected).max()
        assert np.linalg.norm(found - rounded(expected.projected, given.dtype)) <= (
            tolerance + ROUNDING[given.dtype]
        ) * np.linalg.norm(expected.projected)
        allowed = tolerance * scale + 1.001 * ROUNDING[given.dtype] * np.abs(expected.projected)
        if given.dtype == "F16":
            allowed += 2.0**-25  # the rounding error of subnormal numbers is absolute
        assert (np.abs(found - expected.projected) <= allowed).all()


OPTIONS = [
    {},
    {"normalize": "spectral"},
    {"operator": "orthogonal", "rank": 6},
    {"operator": "orthogonal", "energy": 0.9},
    {"operator": "attenuate", "rank": 6, "keep": 0.2},
]
DTYPES = ["F32", "BF16", "F16"]
SHAPES = [(1, 1), (1, 40), (40, 1), (33, 200), (300, 31), (129, 513)]
MODULES = [
    *({"weight_dtypes": pair, "dtype": dtype} for pair in itertools.product(DTYPES, repeat=2) for dtype in DTYPES),
    *({"shape": shape, "ranks": (3,), "transposed": transposed} for shape in SHAPES for transposed in (False, True)),
    {"shape": (70, 130), "parts": (10, 59, 1)},
    {"shape": (130, 70), "parts": (10, 59, 1), "transposed": True},
    *({"weight_dtypes": ("BF16", "F32"), "padding": padding} for padding in range(8)),  # unaligned bytes
    *({"ranks": (rank,)} for rank in (1, 2, 7, 16, 33, 64, 100)),
]


@pytest.mark.parametrize("layout", MODULES, ids=str)
def test_the_papers_operator_on_every_layout(tmp_path: Path, layout: dict) -> None:
    given = module(tmp_path, np.random.default_rng(1), **layout)
    assert_close(given.run(), given)


@pytest.mark.parametrize("transposed", [False, True])
def test_zero_leaves_nothing_and_has_the_papers_cosine(tmp_path: Path, transposed: bool) -> None:
    given = module(tmp_path, np.random.default_rng(2), transposed=transposed)
    outcome = given.run(operator="zero")
    (factors,), ((lora_b, lora_a),) = outcome.factors, given.adapters
    assert factors.cosine == pytest.approx(truth(given.v, lora_b, lora_a).cosine, abs=1e-6)
    assert (factors.gain, factors.lora_b_norm_projected, factors.update_norm_projected) == (0, 0, 0)
    assert not given.projected(outcome).any()


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=str,
)
def test_an_adapter_alone_and_among_others_gives_the_same_bytes(tmp_path: Path, options: dict) -> None:
    rng = np.random.default_rng(5)
    together = module(tmp_path / "together", rng, ranks=(4, 1, 9))
    outcome = together.run(**options)
    for index in range(3):
        file = _core.SafetensorsFile(str(tmp_path / "together" / f"adapter{index}.safetensors"))
        job = _core.Job("layer", together.parts, [lora(file)])
        (alone,) = start([job], **options)
        assert alone.factors[0].projected() == outcome.factors[index].projected()
        assert alone.factors[0].projected_lora_a() == outcome.factors[index].projected_lora_a()
        assert alone.factors[0].cosine == outcome.factors[index].cosine
        assert alone.rank == outcome.rank


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_thread_count_does_not_change_a_bit(tmp_path: Path, options: dict, transposed: bool) -> None:
    given = module(tmp_path, np.random.default_rng(6), shape=(150, 290), ranks=(5, 18), transposed=transposed)
    runs = [given.run(threads=threads, **options) for threads in (1, 2, 3, 7)]
    for run in runs[1:]:
        assert (run.v_norm, run.rank, run.energy, run.spectral_norm) == (
            runs[0].v_norm,
            runs[0].rank,
            runs[0].energy,
            runs[0].spectral_norm,
        )
        for found, expected in zip(run.factors, runs[0].factors, strict=True):
            assert (found.cosine, found.gain, found.update_norm_projected) == (
                expected.cosine,
                expected.gain,
                expected.update_norm_projected,
            )
            assert found.projected() == expected.projected()
            assert found.projected_lora_a() == expected.projected_lora_a()


def test_factors_are_read_through_strides(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    given = module(tmp_path, rng)
    lora_b, lora_a = given.adapters[0]
    # B is transposed inside a larger tensor, A is every other column of another tensor.
    framed = rng.standard_normal((9, 80))
    framed[2:7, 4:74] = lora_b.T
    wide = rng.standard_normal((5, 260))
    wide[:, 1::2] = lora_a
    file = write(tmp_path / "strided.safetensors", {"framed": ("F32", framed), "wide": ("F32", wide)})
    factors = _core.Factors(
        _core.View(file, "framed", offset=2 * 80 + 4, rows=70, cols=5, row_stride=1, col_stride=80),
        _core.View(file, "wide", offset=1, rows=5, cols=130, row_stride=260, col_stride=2),
    )
    (found,) = start([_core.Job("layer", given.parts, [factors])])
    assert found.factors[0].projected() == given.run().factors[0].projected()
    assert found.factors[0].cosine == given.run().factors[0].cosine


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (3, 50), (50, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_spectral_normalization_has_gain_one_at_most(tmp_path: Path, shape: tuple[int, int], transposed: bool) -> None:
    given = module(tmp_path, np.random.default_rng(8), shape=shape, transposed=transposed)
    largest = np.linalg.svd(given.v, compute_uv=False)[0]
    outcome = given.run(normalize="spectral")
    assert outcome.spectral_norm == pytest.approx(largest, rel=1e-6)
    assert_close(outcome, given, given.v @ given.v.T / largest**2)
    assert outcome.factors[0].gain <= 1


def decaying(rng: np.random.Generator, shape: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """Return a matrix with these singular values."""
    count = len(values)
    u = np.linalg.qr(rng.standard_normal((shape[0], count)))[0]
    w = np.linalg.qr(rng.standard_normal((shape[1], count)))[0]
    return (u * values) @ w.T


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_orthogonal_by_rank_is_the_projector_of_the_svd(
    tmp_path: Path, shape: tuple[int, int], transposed: bool, rank: int
) -> None:
    rng = np.random.default_rng(9)
    v = decaying(rng, shape, 0.3 * 0.9 ** np.arange(120))
    given = module(tmp_path, rng, shape=shape, v=v, transposed=transposed)
    u, s, _ = np.linalg.svd(given.v)
    outcome = given.run(operator="orthogonal", rank=rank)
    assert outcome.rank == rank
    assert outcome.energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)
    assert outcome.spectral_norm == pytest.approx(s[0], rel=1e-6)
    assert_close(outcome, given, u[:, :rank] @ u[:, :rank].T, tolerance=2e-4)


@pytest.mark.parametrize("sides", [None, "both", "left"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("shape", "transposed"), [((120, 200), False), ((200, 120), True)])
def test_attenuation_shrinks_what_lies_outside_of_the_leading_directions(
    tmp_path: Path, shape: tuple[int, int], transposed: bool, dtype: str, keep: float, sides: str | None
) -> None:
    rng = np.random.default_rng(25)
    v = decaying(rng, shape, 0.3 * 0.9 ** np.arange(120))
    given = module(tmp_path, rng, shape=shape, v=v, transposed=transposed, dtype=dtype, ranks=(4, 7))
    u, _, w = np.linalg.svd(given.v)
    on_b, on_a = (keep * np.eye(len(p)) + (1 - keep) * p for p in (u[:, :9] @ u[:, :9].T, w[:9].T @ w[:9]))
    outcome = given.run(operator="attenuate", rank=9, keep=keep, sides=sides)
    assert outcome.rank == 9
    assert_close(outcome, given, on_b, tolerance=2e-4, on_a=None if sides == "left" else on_a)
    for factors, (_, lora_a) in zip(outcome.factors, given.adapters, strict=True):
        written = factors.projected_lora_a()
        assert (written is None) == (sides == "left")
        if written is not None:
            error = np.linalg.norm(decode(written, dtype, lora_a.shape) - lora_a @ on_a)
            assert error <= (2e-4 + ROUNDING[dtype]) * np.linalg.norm(lora_a @ on_a)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("flat", [False, True])
def test_orthogonal_by_energy_keeps_the_fewest_vectors(tmp_path: Path, energy: float, flat: bool) -> None:
    rng = np.random.default_rng(10)
    v = None if flat else decaying(rng, (100, 150), 0.3 * 0.9 ** np.arange(100))
    given = module(tmp_path, rng, shape=(100, 150), v=v)
    s = np.linalg.svd(given.v, compute_uv=False)
    shares = np.cumsum(s**2) / (s**2).sum()
    outcome = given.run(operator="orthogonal", energy=energy)
    assert outcome.rank is not None
    assert outcome.energy is not None
    expected = int(np.searchsorted(shares, energy * (1 - 1e-6))) + 1
    assert outcome.rank == (expected if energy < 1 else pytest.approx(100, abs=40))
    assert outcome.energy == pytest.approx(shares[outcome.rank - 1], rel=1e-5)
    assert outcome.energy >= energy * (1 - 2e-6)


@pytest.mark.parametrize("rank", [48, 1000])
def test_orthogonal_of_full_rank_is_the_identity(tmp_path: Path, rank: int) -> None:
    given = module(tmp_path, np.random.default_rng(11), shape=(48, 100))
    outcome = given.run(operator="orthogonal", rank=rank)
    assert outcome.rank == 48
    assert outcome.energy == pytest.approx(1, abs=1e-6)
    assert_close(outcome, given, np.eye(48))


def test_orthogonal_keeps_no_more_than_the_rank_of_v(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    # Powers of two keep V exact in float32.
    v = np.sign(rng.standard_normal((64, 1))) * np.sign(rng.standard_normal((1, 80))) * 2.0**-6
    v[:, :3] *= 2
    v += np.outer(np.arange(64) % 4 == 0, np.arange(80) % 8 == 1) * 2.0**-5
    given = module(tmp_path, rng, shape=(64, 80), v=v)
    u, s, _ = np.linalg.svd(given.v)
    assert (s > 1e-4 * s[0]).sum() == 2
    outcome = given.run(operator="orthogonal", rank=20)
    assert outcome.rank == 2
    assert_close(outcome, given, u[:, :2] @ u[:, :2].T, tolerance=1e-4)


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [{"rank": 7}, {"energy": 0.8}], ids=str)
def test_the_kept_subspace_is_that_of_the_svd(
    tmp_path: Path, shape: tuple[int, int], transposed: bool, options: dict
) -> None:
    """The bytes are the same with and without LoRA factors, and for every number of threads."""
    rng = np.random.default_rng(21)
    v = decaying(rng, shape, 0.3 * 0.9 ** np.arange(120))
    stored = shape[1] if transposed else shape[0]
    bare = module(tmp_path, rng, shape=shape, v=v, transposed=transposed, ranks=(), parts=(stored - 31, 31))
    u, s, _ = np.linalg.svd(bare.v)
    outcome = bare.run(operator="orthogonal", keep_subspace=True, threads=2, **options)
    assert outcome.factors == []
    assert outcome.v_norm == pytest.approx(np.linalg.norm(bare.v), rel=1e-6)
    k = outcome.rank
    assert k is not None
    vectors = np.frombuffer(outcome.left_vectors(), np.float32).reshape(k, shape[0]).astype(np.float64)
    assert np.abs(vectors @ vectors.T - np.eye(k)).max() < 1e-6
    assert np.abs(vectors.T @ vectors - u[:, :k] @ u[:, :k].T).max() < 2e-4
    assert outcome.singular_values() == pytest.approx(s[:k], rel=1e-6)
    for threads in (1, 3, 7):
        again = bare.run(operator="orthogonal", keep_subspace=True, threads=threads, **options)
        assert again.left_vectors() == outcome.left_vectors()
        assert again.singular_values() == outcome.singular_values()
    beside = module(tmp_path / "beside", rng, ranks=(4, 9))
    file = write(
        tmp_path / "factors.safetensors",
        {"B": ("F32", rng.standard_normal((shape[0], 4))), "A": ("F32", rng.standard_normal((4, shape[1])))},
    )
    job = _core.Job("layer", bare.parts, [lora(file)], transposed=transposed)
    _, among = start([beside.job, job], operator="orthogonal", keep_subspace=True, **options)
    assert among.left_vectors() == outcome.left_vectors()


@pytest.mark.parametrize("options", [{}, {"normalize": "spectral"}, {"operator": "zero"}], ids=str)
def test_a_job_without_factors_has_a_norm(tmp_path: Path, options: dict) -> None:
    given = module(tmp_path, np.random.default_rng(22), ranks=())
    outcome = given.run(**options)
    assert outcome.v_norm == pytest.approx(np.linalg.norm(given.v), rel=1e-6)
    assert outcome.factors == []


def test_a_zero_v_has_an_empty_subspace(tmp_path: Path) -> None:
    given = module(tmp_path, np.random.default_rng(23), v=np.zeros((70, 130)), ranks=())
    outcome = given.run(operator="orthogonal", rank=3, keep_subspace=True)
    assert (outcome.v_norm, outcome.rank, outcome.left_vectors(), outcome.singular_values()) == (0, 0, b"", [])


@pytest.mark.parametrize("options", [{"operator": "orthogonal", "rank": 2}, {"keep_subspace": True}], ids=str)
def test_a_subspace_that_was_not_kept(tmp_path: Path, options: dict) -> None:
    outcome = module(tmp_path, np.random.default_rng(24)).run(**options)
    with pytest.raises(ValueError, match="keep_subspace"):
        outcome.left_vectors()
    with pytest.raises(ValueError, match="keep_subspace"):
        outcome.singular_values()


def test_seed_and_name_decide_the_random_start(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    given = module(tmp_path / "a", rng, shape=(300, 300))
    other = module(tmp_path / "b", rng, name="other")
    options = {"operator": "orthogonal", "rank": 3}
    alone = given.run(**options)
    _, among = start([other.job, given.job], **options)
    assert among.factors[0].projected() == alone.factors[0].projected()
    # The last digits depend on the start, because the iteration stops when the vectors are good enough.
    assert given.run(seed=1, **options).factors[0].projected() != alone.factors[0].projected()
    renamed = module(tmp_path / "c", np.random.default_rng(13), shape=(300, 300), name="renamed")
    assert renamed.run(**options).factors[0].projected() != alone.factors[0].projected()


@pytest.mark.parametrize("options", [*OPTIONS, {"operator": "zero"}], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_v_leaves_the_adapter_alone(tmp_path: Path, options: dict, transposed: bool) -> None:
    given = module(tmp_path, np.random.default_rng(14), v=np.zeros((70, 130)), dtype="BF16", transposed=transposed)
    outcome = given.run(**options)
    (factors,), ((lora_b, _),) = outcome.factors, given.adapters
    assert outcome.v_norm == 0
    assert math.isnan(factors.cosine)
    assert (factors.gain, factors.lora_b_norm_projected) == (1, factors.lora_b_norm)
    assert np.array_equal(given.projected(outcome), lora_b)
    assert factors.projected_lora_a() is None
    assert outcome.rank == (0 if options.keys() & {"rank", "energy"} else None)


@pytest.mark.parametrize("zero", ["B", "A"])
def test_zero_factors_have_no_cosine(tmp_path: Path, zero: str) -> None:
    given = module(tmp_path, np.random.default_rng(15))
    lora_b, lora_a = given.adapters[0]
    factors = {"B": ("F32", lora_b * (zero != "B")), "A": ("F32", lora_a * (zero != "A"))}
    file = write(tmp_path / "zero.safetensors", factors)
    (outcome,) = start([_core.Job("layer", given.parts, [lora(file)])])
    assert math.isnan(outcome.factors[0].cosine)
    assert math.isnan(outcome.factors[0].gain)
    assert outcome.factors[0].update_norm == 0


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15])
def test_scale_of_v_does_not_change_the_cosine(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(16)
    v = scale * rng.standard_normal((70, 130))
    given = module(tmp_path, rng, v=v)
    base = write(tmp_path / "base.safetensors", {"part0": ("F32", np.zeros((70, 130)))})
    aligned = write(tmp_path / "aligned.safetensors", {"part0": ("F32", v)})
    file = _core.SafetensorsFile(str(tmp_path / "adapter0.safetensors"))
    part = _core.Part(whole(aligned, "part0"), whole(base, "part0"))
    scaled = Module(_core.Job("layer", [part], [lora(file)]), [part], rounded(v, "F32"), given.adapters, "F32")
    assert_close(scaled.run(), scaled)


def test_outcomes_without_bytes(tmp_path: Path) -> None:
    given = module(tmp_path, np.random.default_rng(17))
    kept, dropped = given.run().factors[0], given.run(keep_projected=False).factors[0]
    assert (kept.cosine, kept.gain) == (dropped.cosine, dropped.gain)
    with pytest.raises(ValueError, match="keep_projected"):
        dropped.projected()


def test_a_result_beyond_float16_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(18)
    given = module(tmp_path, rng, v=1e5 * rng.standard_normal((70, 130)), dtype="F16")
    outcome = given.run()
    expected = paper_operator(given.v) @ given.adapters[0][0]
    assert outcome.factors[0].lora_b_norm_projected == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    with pytest.raises(AdapterError, match=r'tensor "B".*beyond the range of F16') as caught:
        outcome.factors[0].projected()
    assert "\n" not in str(caught.value)
