"""Slurm's commands for tests: answers by first words, and a clock that the test moves."""

from collections.abc import Mapping, Sequence

from fedllm.scheduling.slurm.command_output import MARK
from fedllm.scheduling.slurm.commands import CommandRefused

# Output of a development cluster of two nodes, with accounts, a QOS and one running job.
CONFIG = """Configuration data as of 2026-11-21T09:43:10
AccountingStorageEnforce = associations,limits,qos
ClusterName             = devcluster
DefMemPerCPU            = 200
MaxArraySize            = 10
SchedulerParameters     = batch_sched_delay=0,bf_continue
SelectTypeParameters    = CR_CPU_MEMORY
"""
PARTITIONS = """\
PartitionName=low AllowGroups=ALL Default=YES QoS=N/A DefaultTime=01:00:00 MaxTime=UNLIMITED \
Nodes=n[1-2] State=UP DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=high AllowGroups=ALL Default=NO QoS=N/A DefaultTime=01:00:00 MaxTime=UNLIMITED \
Nodes=n[1-2] State=UP DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=short AllowGroups=ALL Default=NO QoS=N/A DefaultTime=NONE MaxTime=00:30:00 \
Nodes=n1 State=UP DefMemPerNode=2000 MaxMemPerNode=UNLIMITED
"""
USERS = """\
root|lab|lab|short||big,normal||2||||
root|lab|lab|||big,normal|4|5||||
root|lab|root|||normal||||||
"""
ACCOUNTS = """\
root||||
denied|root|||
team|root|3|9|cpu=6,gres/gpu=3
lab|team|||
"""
QOS = """\
normal||||||||||
big|6|8|5||||02:00:00|cpu=4,gres/gpu=1,mem=6G||
"""
NODES = """\
n1|mixed|2/2/0/4|1|4000|1000|gpu:2|gpu:1|(null)|
n2|idle|0/4/0/4|1|4000|0|gpu:2|gpu:0|a100,ib|
"""
QUEUE = f"{MARK}1|RUNNING|lab|normal|low|None\n"

ANSWERS: Mapping[str, str | Exception] = {
    "scontrol show config": CONFIG,
    "scontrol --all --oneliner show partition": PARTITIONS,
    "sacctmgr --noheader --parsable2 show user": USERS,
    "sacctmgr --noheader --parsable2 show assoc": ACCOUNTS,
    "sacctmgr --noheader --parsable2 show qos": QOS,
    "scontrol --oneliner show job": CommandRefused(
        "slurm_load_jobs error: Invalid job id specified"
    ),
    "sinfo": NODES,
    "squeue": QUEUE,
    "sacct ": "",
    "sbatch": "Submitted batch job 7\n",
}


class Answering:
    """Commands that answer with a text, or raise, by the words they begin with."""

    def __init__(self, answers: Mapping[str, str | Exception] = ANSWERS) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []
        self.now = 0.0

    def call(self, words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
        del environment
        line = " ".join(words)
        self.asked.append(line)
        # the longest key that fits
        begun = max((begin for begin in self.answers if line.startswith(begin)), key=len)
        answer = self.answers[begun]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def count(self, begin: str) -> int:
        """Return how often a command with these first words was called."""
        return sum(line.startswith(begin) for line in self.asked)
