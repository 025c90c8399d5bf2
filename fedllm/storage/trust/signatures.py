"""Signatures: updates are signed by the client's worker, a run's commands by who accepted them.

The key of an update belongs to one run, round, state and client: HMAC-SHA256 (RFC 2104) of these,
chained from the user's secret. A client with its own key alone could sign for no other client.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from fedllm.storage.records import CohortRecord
from fedllm.storage.updates import PublishedUpdate


@dataclass(frozen=True, kw_only=True)
class RoundKeys:
    """The keys of a round's clients.

    `state_sha256` is that of the state that the clients start from: what was trained from another
    one has another key.
    """

    secret: bytes
    round: int
    state_sha256: str

    @classmethod
    def of(cls, secret: bytes, cohort: CohortRecord) -> "RoundKeys":
        """Return the keys of a cohort's clients."""
        return cls(secret=secret, round=cohort.round, state_sha256=cohort.state_sha256)

    def signature(self, run_id: str, client: str, digest: str) -> str:
        """Return a client's signature of an update file that has this digest."""
        of_round = _chained(self.secret, ("update", run_id, str(self.round), self.state_sha256))
        return _mac(_derived(of_round, client), digest)

    def signatures(self, run_id: str, clients: Sequence[str], digest: str) -> str:
        """Return the signatures of a file's clients, one after the other."""
        return "".join(self.signature(run_id, client, digest) for client in clients)

    def problem(self, update: PublishedUpdate) -> str | None:
        """Say that an update is not signed by its client's worker, or None."""
        record = update.record
        expected = self.signature(record.run_id, record.client, update.sha256)
        if hmac.compare_digest(expected, update.signature):
            return None
        return (
            "it is not signed with the key of this client in this round: forged, replayed, or of "
            "another user's task"
        )


def seal_of(secret: bytes, run_id: str, values: Any) -> str:
    """Return the seal of a user on values of a run; only the same user can make it again."""
    key = _chained(secret, ("seal", run_id))
    return _mac(key, json.dumps(values, sort_keys=True))


def is_sealed(secret: bytes, run_id: str, values: Any, seal: str) -> bool:
    """Say whether the owner of the secret sealed these values."""
    return hmac.compare_digest(seal_of(secret, run_id, values), seal)


@lru_cache
def _chained(secret: bytes, names: tuple[str, ...]) -> bytes:
    return reduce(_derived, names, secret)


def _derived(key: bytes, name: str) -> bytes:
    return hmac.digest(key, name.encode(errors="surrogatepass"), hashlib.sha256)


def _mac(key: bytes, text: str) -> str:
    return _derived(key, text).hex()
