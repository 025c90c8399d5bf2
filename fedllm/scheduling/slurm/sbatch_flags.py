"""Flags of sbatch from `scheduler.sbatch`, and the keys that a refusal of sbatch is about."""

import re
from collections.abc import Iterator, Mapping

from fedllm.config.models import SbatchOptions, SbatchSection, SchedulerSection
from fedllm.errors import ConfigError
from fedllm.planning.option_spelling import by_flag, flag_name, time_minutes
from fedllm.scheduling.seam import Option

# Processes of a task.
PROCESSES = 1

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")

_ONE_PROCESS = (
    "a task is one process; scheduler.max_parallel says how many tasks run at once, cpus-per-task "
    "how many CPUs each has"
)
_ANSWER = "the job's id is read from what sbatch says"
# Options that fedllm sets itself, each with the reason: they define tasks, or how jobs are found.
_OWNED = {
    "array": "the number of tasks and scheduler.max_parallel decide it",
    "chdir": "jobs start where fedllm was started; give --run-dir for another place",
    "cluster-constraint": "jobs of another cluster cannot be seen from here",
    "clusters": "jobs of another cluster cannot be seen from here; start fedllm on a host there",
    "dependency": "the records of the run decide what comes after what",
    "error": "logs lie in the run directory",
    "gid": "jobs belong to who submits them",
    "help": "nothing would run",
    "input": "programs read no standard input",
    "job-name": "names find submissions again",
    "nodes": "a task is one process on one node",
    "ntasks": _ONE_PROCESS,
    "ntasks-per-core": _ONE_PROCESS,
    "ntasks-per-gpu": _ONE_PROCESS,
    "ntasks-per-node": _ONE_PROCESS,
    "ntasks-per-socket": _ONE_PROCESS,
    "open-mode": "a task that is requeued goes on in its log",
    "output": "logs lie in the run directory",
    "parsable": _ANSWER,
    "quiet": _ANSWER,
    "test-only": "nothing would run",
    "uid": "jobs belong to who submits them",
    "usage": "nothing would run",
    "version": "nothing would run",
    "wait": "sbatch has to answer at once",
    "wrap": "tasks run programs of fedllm",
}
# Values that change nothing: fedllm sets them too.
_HARMLESS = {
    "nodes": {"1", "1-1"},
    "ntasks": {str(PROCESSES)},
    "ntasks-per-core": {"1"},
    "ntasks-per-node": {str(PROCESSES)},
    "ntasks-per-socket": {"1"},
    "open-mode": {"append"},
}

# An array task is one process on one node. This, requeueing, appending to logs, the warning before
# the end and the time limit are given explicitly, because sites have different defaults.
TASK_DEFAULTS: Mapping[str, Option] = {
    "nodes": 1,
    "ntasks": PROCESSES,
    "time": 60,
    "requeue": True,
    "open-mode": "append",
}
# no option removes these
_ALWAYS = ("nodes", "ntasks", "open-mode")
_MAX_WARNING_SECONDS = 90
# submitit always writes these
WRITTEN_BY_SUBMITIT = ("time", "signal")

_HANDLED_SIGNALS = {
    "client": (
        {"USR1", "USR2", "TERM", "10", "12", "15"},
        "a worker hears USR1, USR2 or TERM, sent to it and not to its batch script (B:)",
    ),
    "coordinator": (
        {"B:USR2", "B:12"},
        "the coordinator's batch script hears USR2, sent to it alone: B:USR2@120",
    ),
}

Flags = Mapping[str, str | int | float | bool]

# What sbatch prints if a limit on submitted jobs leaves no room. Older versions print the same text
# for all limits.
_NO_ROOM = re.compile(r"(Assoc|QOS)(Max|Grp)Submit", re.IGNORECASE)
_SOME_LIMIT = "violates accounting/qos policy"

# Words in a refusal, and the options that they may be about.
_ABOUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("maxwall", ("time", "qos", "account")),
    ("maxcpu", ("cpus-per-task", "qos", "account")),
    ("maxmem", ("mem", "mem-per-cpu", "qos", "account")),
    ("maxgres", ("gres", "gpus", "gpus-per-node", "gpus-per-task", "qos", "account")),
    ("maxnode", ("nodes", "qos", "account")),
    ("partition", ("partition", "account")),
    ("qos", ("qos",)),
    ("account", ("account", "partition")),
    ("time limit", ("time", "partition")),
    ("feature", ("constraint",)),
    ("reservation", ("reservation",)),
    ("generic resource", ("gres", "gpus", "gpus-per-node", "gpus-per-task")),
    ("memory", ("mem", "mem-per-cpu", "mem-per-gpu")),
    (
        "node configuration",
        ("cpus-per-task", "mem", "gpus", "gpus-per-node", "gres", "constraint", "nodes"),
    ),
    ("node name", ("nodelist", "exclude")),
    ("dependency", ("dependency",)),
    ("wckey", ("wckey",)),
)


def refusal_reason(name: str, value: object) -> str | None:
    """Return why users may not set an option; None: they may.

    Shortened names are refused too, as sbatch accepts them: `ntasks-per-no`.
    """
    if not _NAME.fullmatch(name):
        return "not the name of an sbatch option; write name: value, and true for a flag alone"
    if "\n" in str(value) or "\r" in str(value):
        return "an option is one line; remove the line break"
    if value is None or value is False or str(value) in _HARMLESS.get(name, ()):
        return None
    full = name if name in _OWNED else next((o for o in _OWNED if o.startswith(name)), None)
    return None if full is None else f"got {value}; fedllm sets it ({_OWNED[full]}); remove it"


def task_defaults(options: Mapping[str, Option]) -> Mapping[str, Option]:
    """Return the defaults of a task with these options, with a warning signal before its end."""
    given = by_flag(options)
    try:
        limit = time_minutes({**TASK_DEFAULTS, **given}["time"])
    except ValueError:
        # sbatch will say what is wrong with it
        limit = None
    seconds = limit * 60 / 3 if limit else _MAX_WARNING_SECONDS
    return {**TASK_DEFAULTS, "signal": f"USR2@{max(1, min(_MAX_WARNING_SECONDS, int(seconds)))}"}


def sbatch_flags(
    options: Mapping[str, Option],
    *,
    sbatch: SbatchSection,
    program: str,
    defaults: Mapping[str, Option],
) -> Flags:
    """Return the flags for sbatch; `True` is a flag without a value.

    An option that is null or false removes a default; `requeue: false` becomes `--no-requeue`.

    Raises:
        ConfigError: options that only fedllm sets, one line for each.
    """
    given = by_flag(options)
    problems = [
        f"{key_of(name, value, sbatch=sbatch, program=program)}: {reason}"
        for name, value in given.items()
        if (reason := refusal_reason(name, value))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    chosen = {**defaults, **{name: v for name, v in given.items() if name not in _ALWAYS}}
    _require_signal(chosen.get("signal"), sbatch=sbatch, program=program)
    if chosen.get("no-requeue"):
        chosen["requeue"] = False
    if chosen.get("requeue") is False:
        chosen["no-requeue"] = True
    return {
        name: value for name, value in chosen.items() if value is not None and value is not False
    }


def reserved_problems(sbatch: SbatchSection) -> list[str]:
    """Return a line for every configured option that only fedllm sets."""
    sections: list[tuple[str, SbatchOptions]] = [
        *((name, getattr(sbatch, name)) for name in type(sbatch).model_fields if name != "tiers"),
        *((f"tiers.{tier}", options) for tier, options in sbatch.tiers.items()),
    ]
    return [
        f"scheduler.sbatch.{name}.{key}: {reason}"
        for name, options in sections
        for key, value in options.items()
        if (reason := refusal_reason(flag_name(key), value))
    ]


def refuse_reserved(section: SchedulerSection) -> None:
    """Refuse configured options that only fedllm sets, if the scheduler is Slurm.

    Raises:
        ConfigError: one line for each.
    """
    if section.kind == "slurm" and (lines := reserved_problems(section.sbatch)):
        raise ConfigError("\n".join(lines))


def _require_signal(given: Option, *, sbatch: SbatchSection, program: str) -> None:
    """Refuse a warning signal that a worker or coordinator does not handle: it would die of it."""
    if program not in _HANDLED_SIGNALS or given is None or given is False:
        return
    handled, rule = _HANDLED_SIGNALS[program]
    name = str(given).partition("@")[0].upper().removeprefix("R").removeprefix(":")
    if name.replace("SIG", "") not in handled:
        where = key_of("signal", given, sbatch=sbatch, program=program)
        raise ConfigError(f"{where}: got {given}; {rule}")


def key_of(option: str, value: Option, *, sbatch: SbatchSection, program: str) -> str:
    """Return the configuration key that set an option; the most specific one if several did."""
    for name, options in _sections(sbatch, program):
        for key, configured in options.items():
            if flag_name(key) == option and configured == value:
                return f"scheduler.sbatch.{name}.{key}"
    return f"scheduler.sbatch.{program}.{option}"


def words_of(flags: Flags) -> list[str]:
    """Return the flags as words of a command line."""
    return [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]


def says_no_room(message: str) -> bool | None:
    """Say whether sbatch refused because of a limit on submitted jobs; None: any limit may be."""
    if _NO_ROOM.search(message):
        return True
    # reasons look like `QOSMaxWallDurationPerJobLimit`
    has_reason = re.search(r"\b(Assoc|QOS)[A-Z]\w+", message) is not None
    return None if _SOME_LIMIT in message.lower() and not has_reason else False


def refusal(message: str, flags: Flags, *, sbatch: SbatchSection, program: str) -> ConfigError:
    """Return the error for a refusal of sbatch; it names the keys of the options in question."""
    if "job array specification" in message:
        return ConfigError(f"scheduler.max_parallel: more tasks than MaxArraySize ({message})")
    keys = (
        f"{key_of(option, flags[option], sbatch=sbatch, program=program)}: {flags[option]}"
        for option in _options_meant(message, flags)
    )
    where = ", ".join(keys) or f"scheduler.sbatch.{program}"
    return ConfigError(f"{where}: refused by sbatch ({message}); change it")


def _options_meant(message: str, flags: Flags) -> list[str]:
    """Return the given options that a refusal names, else those that its words may mean."""
    named = [name for name in re.findall(r"--([a-z][a-z-]*)", message) if name in flags]
    if named:
        return list(dict.fromkeys(named))
    for words, options in _ABOUT:
        given = [option for option in options if option in flags]
        if words in message.lower() and given:
            return given
    return []


def _sections(sbatch: SbatchSection, program: str) -> Iterator[tuple[str, SbatchOptions]]:
    if program == "client":
        yield from ((f"tiers.{tier}", options) for tier, options in sbatch.tiers.items())
    own: SbatchOptions = getattr(sbatch, program)
    yield program, own
    yield "default", sbatch.default
