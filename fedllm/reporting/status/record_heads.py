"""Heads of large records: the few fields that a status needs of what lists thousands of clients."""

from pydantic import Field

from fedllm.storage.kept_records import ClientCosts
from fedllm.storage.records import Record, TierMix


class _Category(Record):
    """The category of a client."""

    id: str
    category: str = ""


class PreparedHead(Record):
    """The size of the base in `prepared.json`, and the categories of the clients."""

    model_parameters: int
    clients: list[_Category]


class _Counted(Record):
    """An update that is only counted."""


class CollectionHead(Record):
    """The number of updates in `collection.json`, their tiers and the metrics of their training."""

    updates: list[_Counted]
    tiers: dict[str, TierMix] = Field(default_factory=dict)
    training: dict[str, float] = Field(default_factory=dict)


class ClientsHead(Record):
    """The costs of the clients in a round's `clients.json`."""

    round: int
    clients: list[ClientCosts]
