"""Partitions: clients for a data set without clients, from a seed.

Every kind says which share of the rows of each category a client gets. The same shares hold for
training, validation and test rows, so a client is tested on what it is trained on.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedllm.config.models import PartitionSection
from fedllm.errors import DataError
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of

COLUMN = "column"
_MAX_DRAWS = 100

Tables = Mapping[str, pa.Table]
# places of rows in a table
Rows = npt.NDArray[np.int64]
# category -> the share of its rows that each client gets
Shares = Mapping[str, Sequence[float]]


def partition_tables(tables: Tables, section: PartitionSection) -> dict[str, pa.Table]:
    """Return the tables with the clients of a partition; rows keep their order and category.

    Raises:
        DataError: there are fewer rows than `clients` clients of `min_rows` rows need, or no draw
            gives every client that many.
    """
    train = _categories(tables["train"])
    shares = _drawn_shares(train, section)
    return {split: _with_clients(table, split, shares, section) for split, table in tables.items()}


def _with_clients(
    table: pa.Table, split: str, shares: Shares, section: PartitionSection
) -> pa.Table:
    clients = np.zeros(table.num_rows, dtype=np.int64)
    for category, rows in _categories(table).items():
        # a category without training rows is spread evenly
        of_clients = shares.get(category) or [1.0] * _num_clients(section)
        order = _shuffled(rows, section, split, category)
        for client, count, start in _cut(of_clients, len(rows)):
            clients[order[start : start + count]] = client
    names = pa.array(client_names(_num_clients(section)), pa.large_string())
    place = table.column_names.index("client")
    return table.set_column(place, "client", pa.chunked_array([names.take(pa.array(clients))]))


def client_names(count: int) -> list[str]:
    """Return the names of a partition's clients, sorted as they are numbered."""
    digits = len(str(count - 1))
    return [f"client-{number:0{digits}d}" for number in range(count)]


def _drawn_shares(train: Mapping[str, Rows], section: PartitionSection) -> Shares:
    """Draw shares until every client has `min_rows` training rows."""
    sizes = {category: len(rows) for category, rows in train.items()}
    total, needed = sum(sizes.values()), _num_clients(section) * section.min_rows
    if total < needed:
        raise DataError(
            f"data.partition: {total:,} training rows are too few for {_num_clients(section):,} "
            f"clients of at least {section.min_rows} rows; lower clients or min_rows"
        )
    kind = KINDS[section.kind]
    for attempt in range(_MAX_DRAWS):
        draw = random.Random(seed_of("partition", section.seed, section.kind, attempt))
        shares = kind(sorted(sizes), section, draw)
        if min(_rows_of_clients(shares, sizes)) >= section.min_rows:
            return shares
    raise DataError(
        f"data.partition: none of {_MAX_DRAWS} draws of kind {section.kind} gives every client "
        f"{section.min_rows} training rows; lower clients or min_rows, or raise alpha"
    )


def _rows_of_clients(shares: Shares, sizes: Mapping[str, int]) -> list[int]:
    counts = [0] * len(next(iter(shares.values())))
    for category, of_clients in shares.items():
        for client, count, _ in _cut(of_clients, sizes[category]):
            counts[client] += count
    return counts


def _cut(shares: Sequence[float], rows: int) -> list[tuple[int, int, int]]:
    """Return (client, number of rows, first row) for every client that gets rows."""
    counts = largest_remainder({str(n): share for n, share in enumerate(shares)}, rows)
    cut, start = [], 0
    for client, count in enumerate(counts.values()):
        if count:
            cut.append((client, count, start))
        start += count
    return cut


def _categories(table: pa.Table) -> dict[str, Rows]:
    """Return category -> its rows, in the table's order."""
    encoded = pc.dictionary_encode(table["category"].combine_chunks())
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    names: list[str] = encoded.dictionary.to_pylist()
    return {name: np.flatnonzero(codes == code) for code, name in enumerate(names)}


def _shuffled(
    rows: Rows,
    section: PartitionSection,
    split: str,
    category: str,
) -> Rows:
    order = list(range(len(rows)))
    random.Random(seed_of("partition rows", section.seed, split, category)).shuffle(order)
    return rows[order]


def _num_clients(section: PartitionSection) -> int:
    assert section.clients is not None, "the configuration requires it"
    return section.clients


# --- kinds: the categories in sorted order, the keys and a generator in; shares out

_Kind = Callable[[Sequence[str], PartitionSection, random.Random], Shares]


def _iid(categories: Sequence[str], section: PartitionSection, draw: random.Random) -> Shares:  # noqa: ARG001
    """Every client gets the same share of every category."""
    return {category: [1.0] * _num_clients(section) for category in categories}


def _quantity(categories: Sequence[str], section: PartitionSection, draw: random.Random) -> Shares:
    """Clients differ in their number of rows, by a symmetric Dirichlet draw, not in categories."""
    sizes = _dirichlet_draw(section, draw)
    return dict.fromkeys(categories, sizes)


def _dirichlet(categories: Sequence[str], section: PartitionSection, draw: random.Random) -> Shares:
    """Every category is divided by a symmetric Dirichlet draw (Hsu et al. 2019, 1909.06335)."""
    if len(categories) < 2:
        raise DataError(
            "data.partition.kind: dirichlet divides categories, and all rows have the same; name "
            "their column with data.columns.category, or use quantity"
        )
    return {category: _dirichlet_draw(section, draw) for category in categories}


def _pathological(
    categories: Sequence[str], section: PartitionSection, draw: random.Random
) -> Shares:
    """Every client gets `categories` categories (McMahan et al. 2017, 1602.05629).

    They are dealt from shuffled decks of all categories, so that each is dealt about equally often
    and none is left over as long as there are enough clients.
    """
    wanted = section.categories
    if wanted > len(categories):
        raise DataError(
            f"data.partition.categories: got {wanted}, the data have {len(categories)} categories; "
            "lower it, or name their column with data.columns.category"
        )
    if wanted * _num_clients(section) < len(categories):
        raise DataError(
            f"data.partition.categories: {_num_clients(section)} clients of {wanted} categories "
            f"leave some of the {len(categories)} categories to nobody; raise it, or clients"
        )
    shares = {category: [0.0] * _num_clients(section) for category in categories}
    deck: list[str] = []
    for client in range(_num_clients(section)):
        hand: list[str] = []
        while len(hand) < wanted:
            if not any(category not in hand for category in deck):
                deck += draw.sample(categories, len(categories))
            card = next(category for category in deck if category not in hand)
            deck.remove(card)
            hand.append(card)
        for category in hand:
            shares[category][client] = 1.0
    return shares


def _dirichlet_draw(section: PartitionSection, draw: random.Random) -> list[float]:
    weights = [draw.gammavariate(section.alpha, 1.0) for _ in range(_num_clients(section))]
    # with a tiny alpha all weights may round to zero: then one client gets everything
    if not sum(weights):
        weights[draw.randrange(len(weights))] = 1.0
    return weights


KINDS: Mapping[str, _Kind] = {
    "iid": _iid,
    "quantity": _quantity,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
}
