"""What a campaign did, for a reader of a log."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.campaign import Campaign
from tests.chaos.plan import Kind

_TAIL_LINES = 40
_LOG_TAIL_LINES = 12
_MAX_LOGS = 12


def summary(campaign: Campaign) -> str:
    """Return how often each kind of fault hit, and in which rounds."""
    width = max(map(len, Kind))
    lines = []
    for kind in Kind:
        rounds = [landed.fault.round for landed in campaign.landed if landed.fault.kind is kind]
        told = f"{len(rounds)}  round {', '.join(map(str, sorted(rounds)))}" if rounds else "0"
        lines.append(f"{kind:<{width}}  {told}")
    by_round = Counter(landed.fault.round for landed in campaign.landed)
    lines.append(
        f"{len(campaign.landed)} of {len(campaign.plan.faults)} faults in {len(by_round)} rounds, "
        f"{campaign.seconds:.0f} s"
    )
    return "\n".join(lines)


def report(campaign: Campaign) -> str:
    """Return what is needed to see why a campaign did not come to its end."""
    done = {landed.fault.number for landed in campaign.landed}
    open_ = [str(fault) for fault in campaign.plan.faults if fault.number not in done]
    tripped = ", ".join(sorted(path.stem for path in campaign.wires.glob("*.tripped")))
    root = campaign.paths.root
    files = [path for path in root.rglob("*") if path.is_file()]
    newest = sorted(files, key=lambda path: path.stat().st_mtime_ns)
    recent = [str(path.relative_to(root)) for path in newest[-_TAIL_LINES:]]
    sections = {
        "faults that did not land": open_,
        "wires that tripped": [tripped],
        "queue": _queue(campaign),
        "the coordinator's log": _tail(campaign.command.log, _TAIL_LINES),
        "the newest files": recent,
        **{str(log.relative_to(root)): _tail(log, _LOG_TAIL_LINES) for log in _logs(newest)},
    }
    return "\n".join(line for title, lines in sections.items() for line in (f"--- {title}", *lines))


def _queue(campaign: Campaign) -> list[str]:
    fields = "%i %j %T %r %N %M"
    try:
        return campaign.cluster.slurm("squeue", "-h", "-t", "all", "-o", fields).splitlines()
    except AssertionError as error:
        return [str(error)]


def _tail(path: Path, count: int) -> list[str]:
    if not path.exists():
        return ["(none)"]
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def _logs(newest: list[Path]) -> Iterator[Path]:
    logs = [path for path in newest if path.suffix in {".out", ".log"}]
    yield from logs[-_MAX_LOGS:]
