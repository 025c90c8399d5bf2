"""Groups and blocks follow from shapes, ranks and configuration alone."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.aggregation.groups import (
    WORKING_BYTES,
    ModuleGroup,
    ModuleRanks,
    blocks_of,
    group_modules,
)
from fedllm.lora.factors import ModuleShape
from tests.anonymous import peak_bytes


def alike(out: int, in_: int, ranks: tuple[int, ...] = (8, 0, 30)) -> ModuleRanks:
    return ModuleRanks(shape=ModuleShape(out=out, in_=in_), clients=ranks, received=(30, 8, 30))


def grouped(
    modules: Mapping[str, ModuleRanks],
    block_clients: int = 32,
    working_bytes: int = WORKING_BYTES,
) -> list[ModuleGroup]:
    return group_modules(
        modules,
        block_clients=block_clients,
        exact=True,
        tolerance=0.5,
        working_bytes=working_bytes,
    )


def test_modules_of_one_shape_and_equal_ranks_go_together() -> None:
    modules = {
        "a.q": alike(64, 64),
        "a.up": alike(96, 64),
        "b.q": alike(64, 64),
        "b.up": alike(96, 64),
        "b.down": alike(64, 96),
        "b.other": alike(64, 64, (8, 8, 30)),
    }
    found = grouped(modules)
    assert [group.modules for group in found] == [
        ("a.up", "b.up"),
        ("a.q", "b.q"),
        ("b.other",),
        ("b.down",),
    ]
    problem = found[0].problem
    assert (problem.out, problem.in_, problem.stacked_rank, problem.rank) == (96, 64, 38, 30)
    assert (problem.exact, problem.tolerance) == (True, 0.5)
    assert (found[0].clients, found[0].received) == ((8, 0, 30), (8, 30))


def test_a_group_is_limited_by_its_bytes_and_one_module_always_fits() -> None:
    modules = {f"m{n}": alike(2048, 2048) for n in range(40)}
    modules |= {f"huge{n}": alike(28672, 8192, (5000,) * 3) for n in range(2)}
    found = [group.modules for group in grouped(modules)]
    assert [len(names) for names in found] == [1, 1, 40]
    # three copies of a block, its factors, squares of its rank, and triplets
    one = 12 * 4096 * 38 + 8 * (4096 * 38 + 6 * 38**2 + 3 * 4126 * 30)
    fewer = grouped(modules, working_bytes=16 * one)
    assert [len(group.modules) for group in fewer] == [1, 1, 16, 16, 8]


GROUP = """
from fedllm.aggregation.route_types import Problem
from fedllm.aggregation.routes import decompose, fold
from fedllm.lora.factors import FactorBlock
problem = Problem(out={out}, in_={in_}, stacked_rank=8 * {rank}, rank={wanted}, exact={exact})
def block():
    ones = torch.ones({modules}, 1, dtype=torch.float64)
    a, b = torch.randn({modules}, {rank}, {in_}), torch.randn({modules}, {out}, {rank})
    return FactorBlock(a_GRI=a, b_GOR=b, ranks=({rank},), scales_GC=ones, weights_GC=ones)
found = decompose((fold(block(), problem) for _ in range(8)), problem, total=8.0)
assert {{each.route for each in found}} == {{{route!r}}}
"""


@pytest.mark.parametrize(
    ("route", "sides", "rank", "wanted", "exact"),
    [
        ("factored", (768, 768), 50, 32, True),
        ("factored", (1024, 256), 24, 100, True),
        ("dense", (512, 512), 80, 32, True),
        ("dense", (512, 512), 80, 512, True),
        ("dense", (1024, 256), 80, 32, True),
        ("iterative", (512, 1024), 80, 32, False),
        ("iterative", (1536, 1024), 100, 64, False),
    ],
)
def test_the_memory_of_a_group_is_near_its_estimate(
    route: str, sides: tuple[int, int], rank: int, wanted: int, *, exact: bool
) -> None:
    (out, in_), modules = sides, 8
    work = GROUP.format(
        out=out, in_=in_, rank=rank, wanted=wanted, exact=exact, modules=modules, route=route
    )
    peak = peak_bytes("import torch", work)
    alike = ModuleRanks(
        shape=ModuleShape(out=out, in_=in_), clients=(rank,) * 8, received=(wanted,)
    )

    def is_one_group(working_bytes: int) -> bool:
        names = dict.fromkeys(map(str, range(modules)), alike)
        found = group_modules(
            names, block_clients=1, exact=exact, tolerance=1e-4, working_bytes=working_bytes
        )
        return len(found) == 1

    assert not is_one_group(int(0.8 * peak))
    # the estimate also counts the buffers of blocks read ahead, which this test does not use
    assert is_one_group(int(2.0 * peak))


def test_smaller_blocks_leave_room_for_more_modules() -> None:
    modules = {f"m{n}": alike(2048, 2048, (200,) * 64) for n in range(40)}
    most = [max(len(group.modules) for group in grouped(modules, size)) for size in (64, 8)]
    assert most[0] < most[1]


@given(
    st.sets(st.integers(0, 200), min_size=1),
    st.integers(1, 40),
    st.data(),
)
def test_leaving_a_client_out_changes_its_own_block_alone(
    cohort: set[int], block_clients: int, data: st.DataObject
) -> None:
    places = sorted(cohort)
    gone = data.draw(st.sampled_from(places))
    whole = blocks_of(places, block_clients)
    left = blocks_of([place for place in places if place != gone], block_clients)
    assert [place for block in whole for place in block] == places
    assert all(
        {place // block_clients for place in block} == {block[0] // block_clients}
        for block in whole
    )
    own = next(block for block in whole if gone in block)
    assert [block for block in left if block not in whole] == (
        [tuple(place for place in own if place != gone)] if len(own) > 1 else []
    )
    assert [block for block in whole if block not in left] == [own]
