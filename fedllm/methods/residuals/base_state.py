"""The part of a state that is a change of the base of one module, in terms of its rounds.

Every round adds products of factors, a term of `B` (O, K) and `A` (K, I); the state of the next
round takes it over as it is (`base_terms`). Where a round has many columns, or where the terms
would take twice the bytes of a matrix, the term of the round is one matrix `W` (O, I), which has in
it all terms before. All are float32. The ranks of the whole cohort decide, whoever is left out;
columns that nobody fills are zero.

Legend: O out, I in, K columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import BaseDelta, Factors, ModuleShape, formed, on_device
from fedllm.methods.base_terms import live_terms, next_number, term_name
from fedllm.methods.protocol import Method, ModuleState, ServerStep, StatePart
from fedllm.methods.state import carried

_FORMED, _LEFT, _RIGHT = "W", "B", "A"
_OF_1_0 = "D"  # the whole change, in the states of an earlier version
# of the narrow side: with more columns in a round, a route no longer keeps the factors of the round
_MANY_COLUMNS = 0.4
# times the bytes of the matrix: multiplying costs the same per column whenever it is done, and a
# worker reads all terms
_MOST_BYTES = 2.0


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
        """Return the parts of the extended class and the terms of the change of the base."""
        columns = stacked_rank + self.adds_adapter * rank
        others, number = self.parts(shape, rank), next_number(before)
        held = {name: before[name] for name in live_terms(before)}
        if _OF_1_0 in before or _is_formed(shape, held, columns):
            matrix = StatePart(shape=(shape.out, shape.in_))
            return {**others, term_name(number, _FORMED): matrix}
        factors = {
            term_name(number, _LEFT): StatePart(shape=(shape.out, columns)),
            term_name(number, _RIGHT): StatePart(shape=(columns, shape.in_)),
        }
        return {**others, **{name: StatePart(shape=of) for name, of in held.items()}, **factors}

    def base_delta(self, state: ModuleState) -> BaseDelta | None:
        """Return the terms of the change that all rounds made."""
        return _terms(state) or None

    def changed(self, place: int, added: Added, step: ServerStep) -> Mapping[str, Tensor]:
        """Return the change of the base of the module at `place`, with `added` in addition.

        Raises:
            AdapterError: a value does not fit float32.
        """
        before, problem = step.before[place], step.problem
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        held = {name: before[name] for name in live_terms(before)}
        shapes = {name: tuple(part.shape) for name, part in held.items()}
        columns = problem.stacked_rank + self.adds_adapter * problem.rank
        number = next_number(before)
        if _OF_1_0 in before or _is_formed(shape, shapes, columns):
            whole = {term_name(number, _FORMED): _formed(_terms(before), added)}
            return carried(step.modules[place], whole)
        assert added.w_OI is None, "so few ranks stay factors on every route"
        b_OK, a_KI = _padded(added, columns)
        term = {term_name(number, _LEFT): b_OK, term_name(number, _RIGHT): a_KI}
        return {**held, **carried(step.modules[place], term)}


def _is_formed(shape: ModuleShape, held: Mapping[str, tuple[int, ...]], columns: int) -> bool:
    """Return whether the term of a round is the whole change, as one matrix."""
    rights = [of for name, of in held.items() if name.endswith(f"/{_RIGHT}")]
    values = (columns + sum(of[0] for of in rights)) * (shape.out + shape.in_)
    is_long = values > _MOST_BYTES * shape.out * shape.in_
    return is_long or columns > _MANY_COLUMNS * shape.largest_rank


def _terms(state: ModuleState) -> list[Tensor | Factors]:
    """Return the terms of a state, a matrix first."""
    names = live_terms(state)
    rights = [name for name in names if name.endswith(f"/{_RIGHT}")]
    factors = [
        Factors(a_RI=state[right], b_OR=state[f"{right[:-1]}{_LEFT}"], scale=1.0)
        for right in rights
    ]
    whole = [name for name in names if name.endswith(f"/{_FORMED}")]
    return [*(state[name] for name in whole or [_OF_1_0] if name in state), *factors]


def _padded(added: Added, columns: int) -> tuple[Tensor, Tensor]:
    """Return the factors of a round in float32, with as many columns as its cohort has ranks."""
    count, device = len(added.a_KI), added.b_OK.device
    b_OK = torch.zeros(len(added.b_OK), columns, device=device)
    a_KI = torch.zeros(columns, added.a_KI.shape[1], device=device)
    b_OK[:, :count], a_KI[:count] = added.b_OK, added.a_KI
    return b_OK, a_KI


def _formed(held: Sequence[Tensor | Factors], added: Added) -> Tensor:
    """Return the whole change as one new matrix."""
    terms = list(held)
    if added.w_OI is not None:
        # beside a matrix that is held, before any product
        terms.insert(sum(isinstance(term, Tensor) for term in held), added.w_OI)
    terms.append(Factors(a_RI=added.a_KI, b_OR=added.b_OK, scale=1.0))
    return formed([on_device(term, added.b_OK.device) for term in terms])
