"""Workers with bundles against one client per array task: the same run on a development cluster.

    python benchmarks/bundling.py [--repeats N] [--json]

The quickstart's model and 24 clients of it, one round, two tasks at a time: with the bundles that
`scheduler.clients_per_bundle: auto` makes, and with `scheduler.clients_per_task: 1`, in turn. The
seconds are those of the training phase, from the cohort to the collection: submission, waiting,
start of Python, loading of the base, training, publication. Needs Slurm: make slurm-packages.
"""

import sys
from collections.abc import Sequence

from benchmarks.on_slurm.comparison import Comparison, Way, compare, parsed

COMPARISON = Comparison(
    title="one client a task over workers with bundles",
    changes={
        "rounds": 1,
        "data.embedded_clients": 24,
        "clients.cohort.count": 24,
    },
    baseline=Way(name="one client a task", changes={"scheduler.clients_per_task": 1}),
    ours=Way(name="workers with bundles", changes={}),
    wall="training",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return compare(COMPARISON, parsed(__doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
