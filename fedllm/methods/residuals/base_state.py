"""The part of a state that is a change of the base of one module, in factors while these are few.

Every round adds products of factors. They lie side by side as `D_B` (O, K) and `D_A` (K, I), and
the change is D_B D_A. Where they would have too many columns, the change is one matrix `D` (O, I)
from then on. All are float32. The ranks of the whole cohort decide, whoever is left out; columns
that nobody fills are zero.

Legend: O out, I in, K columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.methods.protocol import Method, ModuleState, ServerStep, StatePart

_FORMED, _LEFT, _RIGHT = "D", "D_B", "D_A"
# of the narrow side: with more columns the factors take 0.8 of the bytes of the change or more,
# and a route no longer keeps the factors of a round
_MANY_COLUMNS = 0.4


@dataclass(frozen=True, kw_only=True)
class Added:
    """What a round adds to the base: the product `b_OK @ a_KI`, and `w_OI` where a route forms it.

    The number formats are those of the sums; the state has float32.
    """

    b_OK: Tensor
    a_KI: Tensor
    w_OI: Tensor | None = None

    @classmethod
    def of_formed(cls, w_OI: Tensor) -> "Added":
        """Return a change without factors."""
        return cls(b_OK=w_OI[:, :0], a_KI=w_OI[:0], w_OI=w_OI)


def mean_of(
    products: Sequence[Partial], place: int, *, total: float, less: Factors | None = None
) -> Added:
    """Return the mean of products of the module at `place`, without the adapter `less`."""
    if "W" in products[0]:
        (product,) = products  # `keep` adds them up
        formed = Added.of_formed((product["W"][place] / total).float())
        lefts, rights = [formed.b_OK.double()], [formed.a_KI.double()]
    else:
        formed = None
        lefts = [product["B"][place] / total for product in products]
        rights = [product["A"][place] for product in products]
    if less is not None:
        lefts.append(less.b_OR.double() * -less.scale)
        rights.append(less.a_RI.double())
    return Added(
        b_OK=torch.cat(lefts, 1),
        a_KI=torch.cat(rights),
        w_OI=formed.w_OI if formed else None,
    )


class ChangesBase(Method):
    """A method whose state also has a change of the base; named before the class it extends.

    `adds_adapter` says that a round adds the product of an adapter too.
    """

    changes_base: ClassVar[bool] = True
    adds_adapter: ClassVar[bool] = False

    def next_parts(
        self,
        shape: ModuleShape,
        rank: int,
        *,
        before: Mapping[str, tuple[int, ...]],
        stacked_rank: int,
    ) -> Mapping[str, StatePart]:
        """Return the parts of the extended class and the change of the base."""
        others = self.parts(shape, rank)
        columns = _columns_after(shape, before, stacked_rank + self.adds_adapter * rank)
        if columns is None:
            return {**others, _FORMED: StatePart(shape=(shape.out, shape.in_))}
        factors = {
            _LEFT: StatePart(shape=(shape.out, columns)),
            _RIGHT: StatePart(shape=(columns, shape.in_)),
        }
        return {**others, **factors}

    def base_delta(self, state: ModuleState) -> Tensor | Factors | None:
        """Return the change that all rounds made."""
        if _LEFT in state:
            return Factors(a_RI=state[_RIGHT], b_OR=state[_LEFT], scale=1.0)
        return state.get(_FORMED)

    def changed(self, place: int, added: Added, step: ServerStep) -> Mapping[str, Tensor]:
        """Return the change of the base of the module at `place`, with `added` in addition."""
        before, problem = step.before[place], step.problem
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        shapes = {name: tuple(part.shape) for name, part in before.items()}
        more = problem.stacked_rank + self.adds_adapter * problem.rank
        columns = _columns_after(shape, shapes, more)
        if columns is None:
            return {_FORMED: _formed(before, added)}
        assert added.w_OI is None, "so few ranks stay factors on every route"
        return _side_by_side(before, added, columns)


def _columns_after(
    shape: ModuleShape, before: Mapping[str, tuple[int, ...]], more: int
) -> int | None:
    """Return how many columns the change has after a round, None where it is one matrix."""
    columns = before[_LEFT][1] if _LEFT in before else 0
    is_formed = _FORMED in before or columns + more > _MANY_COLUMNS * shape.largest_rank
    return None if is_formed else columns + more


def _side_by_side(before: ModuleState, added: Added, columns: int) -> Mapping[str, Tensor]:
    device, out, in_ = added.b_OK.device, len(added.b_OK), added.a_KI.shape[1]
    b_OK, a_KI = torch.zeros(out, columns, device=device), torch.zeros(columns, in_, device=device)
    held = [(before[_LEFT], before[_RIGHT])] if _LEFT in before else []
    end = 0
    for left_OK, right_KI in (*held, (added.b_OK, added.a_KI)):
        begin, end = end, end + len(right_KI)
        b_OK[:, begin:end] = left_OK
        a_KI[begin:end] = right_KI
    return {_LEFT: b_OK, _RIGHT: a_KI}


def _formed(before: ModuleState, added: Added) -> Tensor:
    """Return the whole change as one new matrix."""
    left_OK, right_KI = added.b_OK.float(), added.a_KI.float()
    if _LEFT in before:
        left_OK = torch.cat([before[_LEFT], left_OK], 1)
        right_KI = torch.cat([before[_RIGHT], right_KI])
    whole = before.get(_FORMED, added.w_OI)
    if whole is None:
        return left_OK @ right_KI
    if whole is added.w_OI or added.w_OI is None:
        return torch.addmm(whole, left_OK, right_KI) if len(right_KI) else whole.clone()
    total = whole + added.w_OI
    return total.addmm_(left_OK, right_KI) if len(right_KI) else total
