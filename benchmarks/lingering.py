"""Workers that stay for the next round against a new array each round, on a development cluster.

    python benchmarks/lingering.py [--repeats N] [--json]

Ten short rounds of the quickstart's model: 8 clients of one step each, two tasks at a time, with
`scheduler.linger_minutes` 5 and 0, in turn. The seconds are those from the first cohort to the
last round's record: aggregation, a job of its own in both, is in them. Needs Slurm:
make slurm-packages.
"""

import sys
from collections.abc import Sequence

from benchmarks.on_slurm.comparison import Comparison, Way, compare, parsed

COMPARISON = Comparison(
    title="a new array each round over lingering workers",
    changes={
        "rounds": 10,
        "clients.cohort.count": 8,
        "training.max_steps": 1,
    },
    baseline=Way(name="a new array each round", changes={"scheduler.linger_minutes": 0}),
    ours=Way(name="lingering workers", changes={"scheduler.linger_minutes": 5}),
    wall="rounds",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return compare(COMPARISON, parsed(__doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
