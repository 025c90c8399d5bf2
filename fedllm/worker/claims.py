"""Taking bundles of an attempt: what this task holds already, then longest first."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import BundleRecord, ClaimRecord, SubmissionRecord

# so many lost races, and the folder of claims is looked at again
_LOST_RACES = 3


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A bundle of this task; `begun_before`: by an earlier start of it."""

    bundle: BundleRecord
    begun_before: bool = False


class Claims:
    """The bundles of an attempt that one worker may take.

    Args:
        attempt: the attempt.
        submission: its plan.
        worker_class: whose bundles, None for all.
        identity: who takes them.
        restarted: whether this task may hold some: then every claim is read once.
    """

    def __init__(
        self,
        attempt: AttemptPaths,
        submission: SubmissionRecord,
        worker_class: str | None,
        identity: TaskIdentity,
        *,
        restarted: bool,
    ) -> None:
        self._attempt, self._identity = attempt, identity
        self._most = 1 if submission.one_bundle else len(submission.bundles)
        mine = (b for b in submission.bundles if worker_class in {None, b.worker_class})
        self.bundles = sorted(mine, key=lambda bundle: (-bundle.cost, bundle.number))
        self._own = self._held() if restarted else []
        self._num_claimed = len(self._own)

    def is_any_left(self) -> bool:
        """Say whether there is a bundle that this task may go on with or take."""
        return bool(self._own) or (self._num_claimed < self._most and bool(self._free()))

    def next(self, seconds_left: float | None) -> Claimed | None:
        """Take a bundle, or return None where none is left that fits.

        Args:
            seconds_left: a bundle of more estimated seconds is passed over; None: no limit.
        """
        if self._own:
            return Claimed(bundle=self._own.pop(0), begun_before=True)
        if self._num_claimed >= self._most:
            return None
        free, races = self._free(), 0
        while fitting := [b for b in free if seconds_left is None or b.cost <= seconds_left]:
            bundle = fitting[self._place(races, len(fitting))]
            if self._take(bundle):
                self._num_claimed += 1
                return Claimed(bundle=bundle)
            races += 1
            free = [b for b in free if b is not bundle] if races % _LOST_RACES else self._free()
        return None

    def _place(self, races: int, count: int) -> int:
        """Return which of the longest to try: workers that start together go apart.

        Who lost `n` races is one of several: it tries one of the longest 2^n.
        """
        digits = self._identity.task.rpartition("_")[2]
        number = int(digits) if digits.isdigit() else 0
        return number % min(1 << min(races, 16), count)

    def _take(self, bundle: BundleRecord) -> bool:
        path = self._attempt.claim(bundle.number)
        claim = ClaimRecord(
            bundle=bundle.number,
            task=self._identity.task,
            node=self._identity.node,
            log=self._identity.log,
        )
        # a look is cheaper than a link
        return not path.exists() and claim.publish_once(path)

    def _free(self) -> list[BundleRecord]:
        """Return the bundles that nobody has, by one look at the folder of claims."""
        taken = {int(path.stem) for path in self._attempt.claim_files()}
        return [bundle for bundle in self.bundles if bundle.number not in taken]

    def _held(self) -> list[BundleRecord]:
        claims = (ClaimRecord.read(path) for path in self._attempt.claim_files())
        numbers = {claim.bundle for claim in claims if claim.task == self._identity.task}
        return [bundle for bundle in self.bundles if bundle.number in numbers]


def smallest_cost(bundles: Sequence[BundleRecord]) -> float:
    """Return the estimated seconds of the shortest bundle, 0 without any."""
    return min((bundle.cost for bundle in bundles), default=0.0)
