"""Claims of bundles: a task first takes those that it holds already, then the longest ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import PackedJobPaths
from fedllm.storage.records import BundleRecord, ClaimRecord, SubmissionRecord

# after so many lost races the folder of claims is listed again
_RACES_PER_LOOK = 3


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A bundle that a task holds; `begun_before`: an earlier start of the task claimed it."""

    bundle: BundleRecord
    begun_before: bool = False


class Claims:
    """The claims of one task on the bundles of a job.

    Args:
        job: the job.
        submission: its plan.
        worker_class: the class whose bundles it takes; None: all.
        identity: the task that claims.
        restarted: whether an earlier start of the task may hold bundles: then all claims are read.
    """

    def __init__(
        self,
        job: PackedJobPaths,
        submission: SubmissionRecord,
        worker_class: str | None,
        identity: TaskIdentity,
        *,
        restarted: bool,
    ) -> None:
        self._job, self._identity = job, identity
        self._max_bundles = 1 if submission.one_bundle else len(submission.bundles)
        mine = (b for b in submission.bundles if worker_class in {None, b.worker_class})
        self.bundles = sorted(mine, key=lambda bundle: (-bundle.cost, bundle.number))
        self._own_bundles = self._claimed_before() if restarted else []
        self._num_claimed = len(self._own_bundles)

    def is_any_left(self) -> bool:
        """Return whether a bundle is left that this task holds or may claim."""
        return bool(self._own_bundles) or (
            self._num_claimed < self._max_bundles and bool(self._unclaimed())
        )

    def next(self, seconds_left: float | None) -> Claimed | None:
        """Claim the next bundle; return None if no bundle is left that fits.

        Args:
            seconds_left: a free bundle with a longer estimate is skipped; None: no limit.
        """
        if self._own_bundles:
            return Claimed(bundle=self._own_bundles.pop(0), begun_before=True)
        if self._num_claimed >= self._max_bundles:
            return None
        free, races = self._unclaimed(), 0
        while fitting := [b for b in free if seconds_left is None or b.cost <= seconds_left]:
            bundle = fitting[self._choice(races, len(fitting))]
            if self._claim(bundle):
                self._num_claimed += 1
                return Claimed(bundle=bundle)
            races += 1
            free = (
                [b for b in free if b is not bundle]
                if races % _RACES_PER_LOOK
                else self._unclaimed()
            )
        return None

    def _choice(self, races: int, count: int) -> int:
        """Return the place of the bundle to try, among the free ones from the longest on.

        Workers that start together would race for the same bundle. So a worker that lost `n` races
        tries, by its task number, one of the 2^n longest.
        """
        digits = self._identity.task.rpartition("_")[2]
        number = int(digits) if digits.isdecimal() else 0
        return number % min(1 << min(races, 16), count)

    def _claim(self, bundle: BundleRecord) -> bool:
        path = self._job.claim(bundle.number)
        claim = ClaimRecord(
            bundle=bundle.number,
            task=self._identity.task,
            node=self._identity.node,
            log=self._identity.log,
        )
        # to look for the file is cheaper than a link that fails
        return not path.exists() and claim.publish_once(path)

    def _unclaimed(self) -> list[BundleRecord]:
        """Return the bundles without a claim; this lists the folder of claims once."""
        taken = {int(path.stem) for path in self._job.claim_files()}
        return [bundle for bundle in self.bundles if bundle.number not in taken]

    def _claimed_before(self) -> list[BundleRecord]:
        """Return the bundles that an earlier start of this task claimed."""
        claims = (ClaimRecord.read(path) for path in self._job.claim_files())
        numbers = {claim.bundle for claim in claims if claim.task == self._identity.task}
        return [bundle for bundle in self.bundles if bundle.number in numbers]


def smallest_cost(bundles: Sequence[BundleRecord]) -> float:
    """Return the estimated seconds of the shortest bundle; 0 without bundles."""
    return min((bundle.cost for bundle in bundles), default=0.0)
