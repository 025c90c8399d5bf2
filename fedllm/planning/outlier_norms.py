"""Outliers: clients whose change of a module is far larger than that of the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A client's change of one module that is too large.

    `size` is an upper bound of the change's Frobenius norm, `median` the upper median of the sizes
    over the round's clients that change this module, `limit` the largest size allowed.
    """

    client: str
    module: str
    size: float
    median: float
    limit: float

    @property
    def clip(self) -> float:
        """The factor, below 1, that scales the change down to the limit."""
        return self.limit / self.size

    def __str__(self) -> str:
        """Describe the size and its limit."""
        return (
            f"{self.module} changes by up to {self.size:.3g}, need at most {self.limit:.3g} "
            f"(aggregation.outlier_factor times the median {self.median:.3g})"
        )


@dataclass(frozen=True, kw_only=True)
class UpdateSizes:
    """Sizes of a client's changes, one per module in the same order: upper bounds of norms."""

    client: str
    modules: Sequence[str]
    values: Sequence[float]


def size_bound(*, scale: float, norms: tuple[float, float]) -> float:
    """Return an upper bound of |scale B A| from the Frobenius norms of A and B."""
    norm_a, norm_b = norms
    return abs(scale) * norm_a * norm_b


def find_outliers(clients: Iterable[UpdateSizes], *, factor: float) -> dict[str, list[Outlier]]:
    """Return client -> its outliers, the one furthest above its limit first.

    The limit of a module is `factor` times the upper median of the sizes above 0. Clients that do
    not change the module are left out of the median, however many they are, and are never outliers.
    So fewer than half of the compared clients can be outliers, and none of one or two.

    Args:
        clients: sizes (>= 0) of the round's clients, in any order.
        factor: allowed multiple of the median, above 1.
    """
    by_module: dict[str, list[tuple[float, str]]] = {}
    for sizes in clients:
        for module, size in zip(sizes.modules, sizes.values, strict=True):
            if size > 0:
                by_module.setdefault(module, []).append((size, sizes.client))
    by_client: dict[str, list[Outlier]] = {}
    for outlier in _outliers(by_module, factor):
        by_client.setdefault(outlier.client, []).append(outlier)
    return {
        client: sorted(by_client[client], key=lambda outlier: (outlier.clip, outlier.module))
        for client in sorted(by_client)
    }


def _outliers(
    by_module: Mapping[str, Sequence[tuple[float, str]]], factor: float
) -> Iterable[Outlier]:
    for module, sizes in by_module.items():
        median = median_high(size for size, _ in sizes)
        limit = factor * median
        for size, client in sizes:
            if size > limit:
                yield Outlier(client=client, module=module, size=size, median=median, limit=limit)
