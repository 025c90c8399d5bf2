"""What commands of a site may answer: noise of wrappers, nothing, half a line, a false refusal."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.plan import Fault, Kind
from tests.chaos.trip import Handling, Trip, stopped_or_dead
from tests.slurm.cluster import intercept

if TYPE_CHECKING:
    from tests.chaos.campaign import Campaign

# kind -> which command tells what, how often
LIES = {
    Kind.SQUEUE_NOISE: ("squeue", "noise", 2),
    Kind.SQUEUE_EMPTY: ("squeue", "empty", 2),
    Kind.SQUEUE_CUT: ("squeue", "cut", 2),
    Kind.SBATCH_NOISE: ("sbatch", "noise", 1),
    Kind.SBATCH_SILENT: ("sbatch", "silent", 1),
    Kind.SBATCH_REFUSED: ("sbatch", "refused", 1),
}
# The command answers truly unless a file names a lie; it is used up, and only by an answer that
# has something to lie about.
_TELLER = """
lies="{wires}"
says=$("$REAL" "$@"); status=$?
[ -n "$says" ] || exit $status
case "$*" in *--test-only*) printf '%s\\n' "$says"; exit $status;; esac
for lie in "$lies/{command}".*.lie; do
  mv "$lie" "${{lie%.lie}}.told" 2> /dev/null || continue
  case "$lie" in
    *.noise.*) printf 'Your job 2 of 8 this month\\n%s\\n-- maintenance: Tuesday --\\n' "$says";;
    *.cut.*) printf '%s' "$says" | head -c -9;;
    *.refused.*) echo "sbatch: error: cannot write accounting hook: Broken pipe" >&2; exit 1;;
  esac
  exit $status
done
printf '%s\\n' "$says"; exit $status
"""


def with_liars(folder: Path, wires: Path, environment: Mapping[str, str]) -> str:
    """Put what may lie in front of squeue and sbatch; return the PATH."""
    path = environment["PATH"]
    for command in ("squeue", "sbatch"):
        script = _TELLER.format(wires=wires, command=command)
        path = intercept(folder / f"lying-{command}", command, script, {"PATH": path})
    return path


def lie(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:
    """A command answers as no cluster should, some times."""
    yield from stopped_or_dead(trip)
    command, what, times = LIES[fault.kind]
    names = [f"{command}.{fault.number:02d}-{n}.{what}" for n in range(times)]
    for name in names:
        (campaign.wires / f"{name}.lie").touch()
        # whoever asks uses it up
        os.chmod(campaign.wires / f"{name}.lie", 0o666)  # noqa: PTH101
    # sbatch is next; links of a chain ask squeue once the tasks ended
    goes_on = command == "sbatch" or not campaign.is_asked
    if goes_on:
        trip.go_on()
    while not all((campaign.wires / f"{name}.told").exists() for name in names):
        yield
    # once: it may be stopped for another fault now
    if not goes_on:
        trip.go_on()
    return f"{times} times, beside {trip.who}"
