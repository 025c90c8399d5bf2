"""Clients whose change of a module is far larger than the others' of the same round."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A client's change of one module that is too large.

    `size` is an upper bound of the change's Frobenius norm, `median` that of the round's clients
    that change this module at all, `limit` what may not be exceeded.
    """

    client: str
    module: str
    size: float
    median: float
    limit: float

    @property
    def clip(self) -> float:
        """What the change is multiplied by so that its size is the limit, below 1."""
        return self.limit / self.size

    def __str__(self) -> str:
        """Say what was found and what was needed."""
        return (
            f"{self.module} changes by up to {self.size:.3g}, need at most {self.limit:.3g} "
            f"(aggregation.outlier_factor times the median {self.median:.3g})"
        )


@dataclass(frozen=True, kw_only=True)
class UpdateSizes:
    """How much a client changes each of some modules, in their order: upper bounds of norms."""

    client: str
    modules: Sequence[str]
    values: Sequence[float]


def size_bound(*, scale: float, norms: tuple[float, float]) -> float:
    """Return an upper bound of |scale B A| from the Frobenius norms of A and B."""
    norm_a, norm_b = norms
    return abs(scale) * norm_a * norm_b


def find_outliers(clients: Iterable[UpdateSizes], *, factor: float) -> dict[str, list[Outlier]]:
    """Return what is too large per client, the furthest above its limit first.

    A module's limit is `factor` times the (upper) median over the clients that change it at all:
    clients that do not say nothing about how large a change is, however many they are, and are no
    outliers. Fewer than half of those that are compared can be outliers; of one or two, none.

    Args:
        clients: the round's clients; the order does not matter. UpdateSizes are >= 0.
        factor: above 1.
    """
    by_module: dict[str, list[tuple[float, str]]] = {}
    for sizes in clients:
        for module, size in zip(sizes.modules, sizes.values, strict=True):
            if size > 0:
                by_module.setdefault(module, []).append((size, sizes.client))
    found: dict[str, list[Outlier]] = {}
    for outlier in _outliers(by_module, factor):
        found.setdefault(outlier.client, []).append(outlier)
    return {
        client: sorted(found[client], key=lambda outlier: (outlier.clip, outlier.module))
        for client in sorted(found)
    }


def _outliers(
    by_module: Mapping[str, Sequence[tuple[float, str]]], factor: float
) -> Iterable[Outlier]:
    for module, sizes in by_module.items():
        middle = median_high(size for size, _ in sizes)
        limit = factor * middle
        for size, client in sizes:
            if size > limit:
                yield Outlier(client=client, module=module, size=size, median=middle, limit=limit)
