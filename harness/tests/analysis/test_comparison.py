"""Comparing adapters: against dense deltas, and the laws that any overlap must keep."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from harness.tests.analysis.dense import layered_adapter, make_pair, write_adapter

SEEDS = st.integers(0, 2**31)
QUICK = settings(max_examples=15, deadline=None)


def _pair(first: Any, second: Any) -> Any:
    from harness.analysis.overlap import join_module, pair_figures

    return pair_figures(join_module([first, second]), 0, 1, kind="q_proj", layer=0)


def _compare(paths: Any, **options: Any) -> Any:
    from harness.analysis.running import compare

    return compare(paths, **options)


@QUICK
@given(first=SEEDS, second=SEEDS)
def test_cosines_overlaps_and_interference_equal_the_dense_ones(first: int, second: int) -> None:
    import torch

    one, two = make_pair(first, rank=3), make_pair(second, rank=5, scale=-0.5)
    found = _pair(one, two)
    dense = [one.delta(), two.delta()]
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in dense]
    (u1, s1, v1), (u2, s2, v2) = (
        (part.U[:, :k], part.S[:k], part.Vh[:k].T) for part, k in zip(parts, (3, 5), strict=True)
    )
    sizes = float(dense[0].norm() * dense[1].norm())
    assert found.cosine == pytest.approx(float((dense[0] * dense[1]).sum()) / sizes, abs=1e-10)
    assert found.norm_ratio == pytest.approx(float(dense[1].norm() / dense[0].norm()))
    assert found.column_cosines == pytest.approx(torch.linalg.svdvals(u1.T @ u2), abs=1e-8)
    assert found.row_cosines == pytest.approx(torch.linalg.svdvals(v1.T @ v2), abs=1e-8)
    assert found.column_overlap == pytest.approx(float((u1.T @ u2).square().sum()) / 3)
    u, v, s = torch.cat([u1, u2], 1), torch.cat([v1, v2], 1), torch.cat([s1, s2])
    eye = torch.eye(8, dtype=torch.float64)
    singular = ((u.T @ u - eye) @ torch.diag(s) @ (v.T @ v - eye)).abs().sum() / s.sum()
    assert found.interference == pytest.approx(float(singular), rel=1e-7)
    opposite = float((dense[0] * dense[1] < 0).double().mean())
    assert found.sign_conflict == pytest.approx(opposite, abs=0.15)


@QUICK
@given(first=SEEDS, second=SEEDS)
def test_a_comparison_the_other_way_round_says_the_same(first: int, second: int) -> None:
    one, two = make_pair(first, rank=3), make_pair(second, rank=4)
    there, back = _pair(one, two), _pair(two, one)
    for name in ("cosine", "column_overlap", "row_overlap", "interference", "balance"):
        assert getattr(there, name) == pytest.approx(getattr(back, name), abs=1e-9), name
    assert there.sign_conflict == back.sign_conflict
    assert there.norm_ratio == pytest.approx(1 / back.norm_ratio)


@QUICK
@given(seed=SEEDS, rank=st.integers(1, 5))
def test_an_adapter_is_one_with_itself_and_opposite_to_its_negation(seed: int, rank: int) -> None:
    pair = make_pair(seed, rank=rank)
    same, opposite = _pair(pair, pair), _pair(pair, make_pair(seed, rank=rank, b=-pair.b))
    assert (same.cosine, opposite.cosine) == pytest.approx((1, -1), abs=1e-9)
    assert (same.sign_conflict, opposite.sign_conflict) == (0, 1)
    for found in (same, opposite):
        assert found.column_overlap == pytest.approx(1)
        assert found.row_overlap == pytest.approx(1)
        assert found.interference == pytest.approx(1, abs=1e-6)


def test_adapters_in_separate_rows_and_columns_do_not_meet() -> None:
    import torch

    one, two = make_pair(1), make_pair(2)
    b1, a1, b2, a2 = one.b.clone(), one.a.clone(), two.b.clone(), two.a.clone()
    b1[12:], b2[:12], a1[:, 8:], a2[:, :8] = 0, 0, 0, 0
    found = _pair(make_pair(1, a=a1, b=b1), make_pair(2, a=a2, b=b2))
    assert torch.tensor([found.cosine, found.column_overlap, found.row_overlap]).abs().max() < 1e-20
    assert found.interference < 1e-12
    assert found.sign_conflict is None


def test_random_adapters_meet_as_chance_says() -> None:
    figures = [
        _pair(*(make_pair(seed, rank=8, out=96, columns=64) for seed in (number, number + 99)))
        for number in range(40)
    ]

    def mean(name: str) -> float:
        return sum(getattr(f, name) for f in figures) / len(figures)

    assert mean("column_overlap") == pytest.approx(mean("column_overlap_by_chance"), rel=0.1)
    assert mean("row_overlap") == pytest.approx(mean("row_overlap_by_chance"), rel=0.1)
    assert mean("interference") == pytest.approx(mean("interference_by_chance"), rel=0.1)
    square = math.sqrt(sum(f.cosine**2 for f in figures) / len(figures))
    assert square == pytest.approx(mean("cosine_by_chance"), rel=0.35)


def test_merge_strategies_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    import torch

    from harness.adapter_files import read_adapter
    from harness.merge.strategies import STRATEGIES, StrategyOptions

    paths = [layered_adapter(tmp_path / n, seed=i, factor=1 + i) for i, n in enumerate("ab")]
    figures = _compare(paths, weights=[0.7, 0.3])
    found = {s.strategy: s for s in figures.strategies}
    assert found["sequential"].distance == 0
    assert found["sequential"].norm_ratio == 1
    files = [read_adapter(path) for path in paths]
    modules = list(files[0].pairs)
    deltas = [[f.pair(m).delta() for m in modules] for f in files]
    pairs = [[f.pair(m) for m in modules] for f in files]

    def rule(name: str) -> list[torch.Tensor]:
        merge = STRATEGIES[name].factors
        assert merge is not None
        parts = []
        for one, two in zip(*pairs, strict=True):
            thin = [(p.scale * p.b.double().numpy(), p.a.double().numpy()) for p in (one, two)]
            left, right = merge(thin, (0.7, 0.3), StrategyOptions())
            parts.append(torch.from_numpy(left @ right))
        return parts

    dense = {
        "weighted": [0.7 * x + 0.3 * y for x, y in zip(*deltas, strict=True)],
        "linear": [
            math.sqrt(x.scale * y.scale) * (x.b + y.b).double() @ (x.a + y.a).double()
            for x, y in zip(*pairs, strict=True)
        ],
        "tsv": rule("tsv"),
        "iso_c": rule("iso_c"),
        "knots": rule("knots"),
    }
    plain = torch.cat([(x + y).flatten() for x, y in zip(*deltas, strict=True)])
    for name, parts in dense.items():
        merged = torch.cat([part.flatten() for part in parts])
        distance = float((merged - plain).norm() / plain.norm())
        assert found[name].distance == pytest.approx(distance, rel=1e-6), name
        for number, alone in enumerate(deltas):
            own = torch.cat([delta.flatten() for delta in alone])
            retained = float((merged @ own / (own @ own)) ** 2)
            assert found[name].retained["ab"[number]] == pytest.approx(retained, rel=1e-6), name
    assert found["ties"].sampled
    assert not found["svd"].sampled
    assert not found["knots"].sampled  # these modules are small enough to be looked at whole


@pytest.mark.parametrize("transposed", [False, True])
def test_knots_on_sampled_columns_is_near_the_whole(transposed: bool) -> None:
    from harness.analysis import merge_preview
    from harness.analysis.overlap import join_module
    from harness.merge.strategies import STRATEGIES, StrategyOptions

    # KnOTS aligns the matrix as the base stores it: (in, out) for a transposed layer.
    out, columns = (1400, 40) if transposed else (40, 1400)
    pairs = [
        make_pair(seed, rank=3, out=out, columns=columns, transposed=transposed) for seed in (1, 2)
    ]
    (figures,) = (
        f
        for f in merge_preview.strategy_figures(
            ["x", "y"], [merge_preview.merge_sums(join_module(pairs), (0, 1), 2, None)], None
        )
        if f.strategy == "knots"
    )
    thin = []
    for pair in pairs:
        left, right = (pair.a.T, pair.b.T) if transposed else (pair.b, pair.a)
        thin.append((pair.scale * left.double().numpy(), right.double().numpy()))
    rule = STRATEGIES["knots"].factors
    assert rule is not None
    merged_left, merged_right = rule(thin, (1.0, 1.0), StrategyOptions())
    plain = sum(left @ right for left, right in thin)
    difference = merged_left @ merged_right - plain
    expected = (difference**2).sum() ** 0.5 / (plain**2).sum() ** 0.5
    assert figures.sampled
    assert figures.distance == pytest.approx(expected, rel=0.1)


def test_the_preview_knows_every_merge_strategy(tmp_path: Path) -> None:
    from harness.merge.strategies import STRATEGIES

    paths = [layered_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    found = {s.strategy for s in _compare(paths, weights=[0.7, 0.3]).strategies}
    assert found >= set(STRATEGIES)


def test_modules_of_one_adapter_alone_are_listed_and_not_compared(tmp_path: Path) -> None:
    one = layered_adapter(tmp_path / "one", seed=1, kinds=("q_proj", "down_proj"))
    two = layered_adapter(tmp_path / "two", seed=2, kinds=("q_proj", "up_proj"))
    (pair,) = _compare([one, two]).pairs
    assert {m.kind for m in pair.modules} == {"q_proj"}
    assert pair.only_first == tuple(f"model.layers.{n}.mlp.down_proj" for n in range(3))
    assert pair.only_second == tuple(f"model.layers.{n}.mlp.up_proj" for n in range(3))


def test_adapters_without_a_common_module_cannot_overlap(tmp_path: Path) -> None:
    from harness.analysis import findings_of

    one = layered_adapter(tmp_path / "one", seed=1, kinds=("q_proj",))
    two = layered_adapter(tmp_path / "two", seed=2, kinds=("up_proj",))
    figures = _compare([one, two])
    assert figures.pairs[0].total is None
    assert any("no module in common" in f.text for f in findings_of(figures))


def test_an_adapter_that_changes_nothing_there_is_said_so_and_not_called_independent(
    tmp_path: Path,
) -> None:
    import torch

    from harness.analysis import findings_of

    name = "model.layers.0.mlp.up_proj"
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    one = write_adapter(tmp_path / "one", {f"{name}.lora_A": a, f"{name}.lora_B": b})
    two = write_adapter(tmp_path / "two", {f"{name}.lora_A": a, f"{name}.lora_B": 0 * b})
    words = [finding.text for finding in findings_of(_compare([one, two]))]
    assert (
        "two changes nothing in what one and two both adapt (1 module): they cannot overlap."
        in (words)
    )
    assert not any("independent" in text for text in words)


def test_more_module_types_than_have_lines_are_named_all_the_same(tmp_path: Path) -> None:
    from harness.analysis import findings_of

    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    paths = [layered_adapter(tmp_path / n, seed=1, kinds=kinds) for n in ("one", "two")]
    found = [f for f in findings_of(_compare(paths)) if "adds to" in f.text]
    assert len(found) == 4
    assert all(any(kind in f.text for f in found) for kind in kinds)
    assert len({module for f in found for module in f.modules}) == 6 * 3


def test_three_adapters_make_three_pairs(tmp_path: Path) -> None:
    paths = {name: layered_adapter(tmp_path / name, seed=i) for i, name in enumerate("abc")}
    figures = _compare(list(paths.values()), names=["x", "y", "z"])
    assert [(p.first, p.second) for p in figures.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert figures.strategies[-1].retained.keys() == {"x", "y", "z"}


def test_a_planted_overlap_is_the_finding(tmp_path: Path) -> None:
    import torch

    from harness.analysis import findings_of

    tensors: list[dict[str, Any]] = [{}, {}]
    for layer in range(6):
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * layer + number)
            name = f"model.layers.{layer}.self_attn.o_proj"
            tensors[number][f"{name}.lora_A"] = torch.randn(4, 64, generator=generator)
            tensors[number][f"{name}.lora_B"] = torch.randn(64, 4, generator=generator)
            if number and layer in (2, 3, 4):
                tensors[1][f"{name}.lora_A"][0] = tensors[0][f"{name}.lora_A"][0]
                tensors[1][f"{name}.lora_B"][:, 0] = tensors[0][f"{name}.lora_B"][:, 0]
    paths = [write_adapter(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    found = findings_of(_compare(paths, names=["style", "instruct"]))
    assert any(
        f.level == "attention" and "instruct adds to style in o_proj, layers 2–4" in f.text
        for f in found
    )


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    import torch

    one = layered_adapter(tmp_path / "one", seed=1)
    name = "model.layers.0.mlp.q_proj"
    two = write_adapter(
        tmp_path / "two",
        {f"{name}.lora_A": torch.randn(4, 12), f"{name}.lora_B": torch.randn(24, 4)},
    )
    with pytest.raises(InputError, match=r"q_proj.*\[24, 12\].*\[24, 16\].*same base"):
        _compare([one, two])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "NaN"),
        ({"names": ["a", "a"]}, "2 adapters, 1 different names"),
    ],
)
def test_wrong_options_of_a_comparison_are_named(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    paths = [layered_adapter(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    with pytest.raises(InputError, match=message):
        _compare(paths, **options)
    with pytest.raises(InputError, match="two adapters or more"):
        _compare(paths[:1])
