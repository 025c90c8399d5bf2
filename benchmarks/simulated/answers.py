"""What Slurm's commands print about a simulated cluster: tables as text, nothing else."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

ACCOUNT, QOS, PARTITION = "lab", "normal", "batch"
PARTITION_TIME = "7-00:00:00"
NODE_MEMORY_MIB = 128 << 10

_FLAGS = {"--noheader", "--array", "--parsable2", "--allocations", "--duplicates", "--quiet"}
_FLAGS |= {"--allusers"}


def directives(text: str) -> dict[str, str]:
    """Return the options of an sbatch file."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH --"):
            option, _, value = shlex.split(line.removeprefix("#SBATCH --"))[0].partition("=")
            found[option] = value
    return found


def started_by(text: str) -> list[str]:
    """Return program and arguments of what srun starts: all after `python -u`."""
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line)
    return words[words.index("-u") + 1 :]


def parsed(words: Sequence[str], *, with_value: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line; `with_value` are those whose value is a word."""
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if equals and name.startswith("--"):
            found[name] = value
        elif word in with_value:
            found[word] = next(rest)
        else:
            assert word in _FLAGS, f"an option that the simulated Slurm does not know: {word}"
    return found


def tasks_of(expression: str) -> list[str]:
    """Return the tasks that `7_3` or `7_[0,2-4]` stand for."""
    match = re.fullmatch(r"(\d+)_\[?([\d,-]+)\]?", expression)
    assert match, expression
    bounds = [part.partition("-") for part in match[2].split(",")]
    return [
        f"{match[1]}_{number}"
        for first, _, last in bounds
        for number in range(int(first), int(last or first) + 1)
    ]


def configuration(*, max_array_size: int) -> str:
    """Return what is read of `scontrol show config`."""
    values = {
        "AccountingStorageEnforce": "associations,limits,qos",
        "ClusterName": "simulated",
        "DefMemPerNode": "UNLIMITED",
        "MaxArraySize": str(max_array_size),
        "SchedulerParameters": "(null)",
        "SelectTypeParameters": "CR_CPU",
    }
    return "".join(f"{name:<24}= {value}\n" for name, value in values.items())


def partition() -> str:
    """Return the line of `scontrol --oneliner show partition`."""
    return (
        f"PartitionName={PARTITION} AllowAccounts=ALL Default=YES QoS=N/A "
        f"MaxTime={PARTITION_TIME} DefMemPerNode=UNLIMITED State=UP\n"
    )


def accounting_table(words: Sequence[str], *, max_submit_jobs: int | None) -> str:
    """Return a table of sacctmgr: one user of one account, whose jobs are limited."""
    columns = next(word for word in words if word.startswith("format=")).partition("=")[2]
    kind = words[words.index("show") + 1]
    known: Mapping[str, Mapping[str, str]] = {
        "user": {
            **{"User": "me", "DefaultAccount": ACCOUNT, "Account": ACCOUNT},
            **{"DefaultQOS": QOS, "QOS": QOS, "MaxSubmitJobs": str(max_submit_jobs or "")},
        },
        "assoc": {"Account": ACCOUNT, "ParentName": "root"},
        "qos": {"Name": QOS},
    }
    return "|".join(known[kind].get(column, "") for column in columns.split(",")) + "\n"


def node_lines(columns: str, *, cpus: Mapping[str, int], free: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of `sinfo --Node -O`."""
    for name, count in cpus.items():
        idle = free[name]
        state = "idle" if idle == count else "mixed" if idle else "allocated"
        values = {
            "NodeList": name,
            "StateLong": state,
            "CPUsState": f"{count - idle}/{idle}/0/{count}",
            "Threads": "1",
            "Memory": str(NODE_MEMORY_MIB),
            "AllocMem": "0",
            "Gres": "(null)",
            "GresUsed": "gpu:0",
            "Features": "(null)",
        }
        yield "".join(f"{values[c.removesuffix(':|')]}|" for c in columns.split(",")) + "\n"
