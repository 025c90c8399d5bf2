"""Groups and blocks follow from shapes, ranks and configuration alone."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.aggregation import groups as grouping
from fedllm.aggregation.groups import Group, ModuleRanks, blocks_of, group_modules
from fedllm.lora.factors import ModuleShape


def alike(out: int, in_: int, ranks: tuple[int, ...] = (8, 0, 30)) -> ModuleRanks:
    return ModuleRanks(shape=ModuleShape(out=out, in_=in_), clients=ranks, received=(30, 8, 30))


def grouped(modules: Mapping[str, ModuleRanks], block_clients: int = 32) -> list[Group]:
    return group_modules(modules, block_clients=block_clients, exact=True, tolerance=0.5)


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
        ("b.down",),
        ("b.other",),
        ("a.q", "b.q"),
    ]
    problem = found[0].problem
    assert (problem.out, problem.in_, problem.stacked_rank, problem.rank) == (96, 64, 38, 30)
    assert (problem.exact, problem.tolerance) == (True, 0.5)
    assert (found[0].clients, found[0].received) == ((8, 0, 30), (8, 30))


def test_a_group_is_limited_by_its_bytes_and_one_module_always_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {f"m{n}": alike(2048, 2048) for n in range(40)}
    modules |= {f"huge{n}": alike(28672, 8192, (5000,) * 3) for n in range(2)}
    found = [group.modules for group in grouped(modules)]
    assert [len(names) for names in found] == [1, 1, 40]
    monkeypatch.setattr(grouping, "WORKING_BYTES", 16 * 20 * (2048 + 2048) * 38)
    assert [len(group.modules) for group in grouped(modules)] == [1, 1, 16, 16, 8]


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
