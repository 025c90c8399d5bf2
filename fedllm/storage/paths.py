"""The one place for paths: every file of a run, of the cache and of the installation."""

import base64
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedllm.errors import UserError

_PLAIN = re.compile(r"[A-Za-z0-9_]{1,80}")
# Cluster admins ask for at most a few hundred entries per folder.
MAX_ENTRIES = 400
# half of them: the shard folders lie beside the first files
_SHARD = MAX_ENTRIES // 2
# a bundle may be published in several parts, so a shard holds fewer bundles
_BUNDLES_PER_SHARD = _SHARD // 2
# a lease is two files, and a cron job may take one a minute
_LEASES_PER_SHARD = _SHARD // 2


def shard(folder: Path, number: int, size: int = _SHARD) -> Path:
    """Return the folder of file `number`: `folder` itself below `size`, else a subfolder of it."""
    return folder if number < size else folder / f"{number // size:04d}"


def backup_name(path: Path, word: str) -> Path:
    """Return a free name beside `path`, `<name>.<word>-1`, to keep a file that is out of use."""
    number = 1
    while (free := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return free


def shown_path(path: Path) -> str:
    """Return a path as people read it: relative to the working directory if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, none if there is no such folder.

    Other errors are raised: a folder that a file server refuses is not empty, and `glob` would say
    that it is. Names alone: making paths takes ten times as long, and coordinators list all the
    time.
    """
    try:
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(folder: Path, suffix: str) -> list[Path]:
    """Return the files with a suffix in a folder and its subfolders, sorted, without hidden ones.

    A subfolder has no dot in its name.
    """
    found: list[Path] = []
    for name in names_in(folder):
        if "." not in name:
            found += files_below(folder / name, suffix)
        elif name.endswith(suffix) and not name.startswith("."):
            found.append(folder / name)
    return sorted(found)


def encode_client(client: str) -> str:
    """Return a file name for a client id: the id where it is plain, else `~` and a readable code.

    Ids may contain `/`, `..`, spaces or emoji. Two ids never share a name, not even on file systems
    that ignore case.
    """
    if _PLAIN.fullmatch(client) and client == client.lower():
        return client
    raw = client.encode()
    if len(raw) <= 60:
        return "~" + base64.b32encode(raw).decode().rstrip("=").lower()
    return "~~" + hashlib.sha256(raw).hexdigest()


def package_folder() -> Path:
    """Return the folder of this package's code."""
    return Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return a file that comes with fedllm (`jobs/client.py`, `configs/quickstart.yaml`).

    A wheel has these folders inside the package, a clone beside it.
    """
    package = package_folder()
    for root in (package, package.parent):
        if (root / name).exists():
            return root / name
    raise UserError(f"{name}: not part of this installation; install fedllm from a wheel or clone")


@dataclass(frozen=True, kw_only=True)
class JobPaths:
    """Paths of a job of one task (prepare, aggregate or evaluate); one folder per attempt."""

    root: Path

    @property
    def submission(self) -> Path:
        """The plan of the job, written before anything is submitted."""
        return self.root / "submission.json"

    @property
    def jobs(self) -> Path:
        """The scheduler's ids, written after the submission."""
        return self.root / "jobs.json"

    @property
    def in_doubt(self) -> Path:
        """The record of a submission in doubt: nothing is sent again while it exists."""
        return self.root / "in-doubt.json"

    @property
    def error(self) -> Path:
        """The reason why the job stopped, written by the job itself if it can."""
        return self.root / "error.json"

    @property
    def progress(self) -> Path:
        """How far the job is, written by it now and then."""
        return self.root / "progress.json"

    @property
    def outcome(self) -> Path:
        """The endings of failed tasks, written once no task is left."""
        return self.root / "outcome.json"


AnyJob = TypeVar("AnyJob", bound=JobPaths)


def attempts_of(folder: Callable[[int], AnyJob]) -> list[AnyJob]:
    """Return the attempts that have a plan, the first one first; `folder` gives attempt 1, 2..."""
    attempts: list[AnyJob] = []
    while (job := folder(len(attempts) + 1)).submission.exists():
        attempts.append(job)
    return attempts


@dataclass(frozen=True, kw_only=True)
class PackedJobPaths(JobPaths):
    """Paths of a job whose tasks claim bundle after bundle."""

    @property
    def claims(self) -> Path:
        """The folder of claims."""
        return self.root / "claims"

    def claim(self, bundle: int) -> Path:
        """The claim of bundle `bundle`: the task that took it."""
        return shard(self.claims, bundle) / f"{bundle:03d}.json"

    @property
    def progress_folder(self) -> Path:
        """The folder of how far its tasks are."""
        return self.root / "progress"

    def progress_of(self, task: str) -> Path:
        """How far one task is, written by it now and then."""
        name = task.replace(os.sep, "_")
        number = name.rpartition("_")[2]
        folder = shard(self.progress_folder, int(number) if number.isdecimal() else 0)
        return folder / f"{name}.json"

    def claim_files(self) -> list[Path]:
        """Return the existing claims, sorted."""
        return files_below(self.claims, ".json")

    def progress_files(self) -> list[Path]:
        """Return the existing records of tasks' progress, sorted."""
        return files_below(self.progress_folder, ".json")


@dataclass(frozen=True, kw_only=True)
class AttemptPaths(PackedJobPaths):
    """Paths of one attempt: one plan for everything that a round still misses."""

    number: int

    @property
    def round(self) -> "RoundPaths":
        """The round of the attempt."""
        return RoundPaths(root=self.root.parents[1])

    @property
    def run(self) -> "RunPaths":
        """The run of the attempt."""
        return self.round.run

    @property
    def tasks(self) -> Path:
        """The folder of progress records."""
        return self.root / "tasks"

    def task(self, name: str) -> Path:
        """The progress record of one worker; an array (`1234_56`) has a folder of its own."""
        name = name.replace(os.sep, "_")
        array, _, number = name.rpartition("_")
        if not (array and number.isdecimal()):
            return self.tasks / f"{name}.json"
        # every task may also have an error file
        return shard(self.tasks / array, int(number), _SHARD // 2) / f"{name}.json"

    def task_error(self, name: str) -> Path:
        """The reason why a worker stopped, written by the worker itself if it can."""
        return self.task(name).with_suffix(".error.json")

    def task_files(self) -> list[Path]:
        """Return the existing progress records, sorted."""
        return [path for path in self._all_task_files() if not path.name.endswith(".error.json")]

    def task_errors(self) -> list[Path]:
        """Return the errors that workers recorded, sorted."""
        return [path for path in self._all_task_files() if path.name.endswith(".error.json")]

    def _all_task_files(self) -> list[Path]:
        return files_below(self.tasks, ".json")


@dataclass(frozen=True, kw_only=True)
class EvaluationPaths:
    """Paths of one evaluation of a server state."""

    root: Path

    @property
    def request(self) -> Path:
        """What `fedllm evaluate` asks for; an evaluation of a round has none."""
        return self.root / "request.json"

    @property
    def record(self) -> Path:
        """The record of the complete evaluation."""
        return self.root / "evaluation.json"

    @property
    def answers(self) -> Path:
        """The generated answers that are kept."""
        return self.root / "answers.json"

    @property
    def parts(self) -> Path:
        """The folder of the scores of its pieces."""
        return self.root / "parts"

    def part(self, piece: int) -> Path:
        """The scores of piece `piece`."""
        return shard(self.parts, piece) / f"{piece:03d}.json"

    def part_files(self) -> list[Path]:
        """Return the existing scores of pieces, sorted."""
        return files_below(self.parts, ".json")

    def job(self, number: int) -> PackedJobPaths:
        """Attempt `number`."""
        return PackedJobPaths(root=self.root / "attempts" / f"{number:02d}")


@dataclass(frozen=True, kw_only=True)
class RoundPaths:
    """Paths of one round."""

    root: Path

    @property
    def number(self) -> int:
        """The round's number; 0 is the state before training."""
        return int(self.root.name)

    @property
    def run(self) -> "RunPaths":
        """The run of the round."""
        return RunPaths(root=self.root.parents[1])

    @property
    def cohort(self) -> Path:
        """The clients, tiers and ranks of the round."""
        return self.root / "cohort.json"

    @property
    def attempts(self) -> Path:
        """The folder of training attempts."""
        return self.root / "attempts"

    def attempt(self, number: int) -> AttemptPaths:
        """Training attempt `number`, from 1."""
        return AttemptPaths(root=self.attempts / f"{number:02d}", number=number)

    def last_attempt(self) -> int:
        """Return the number of the last training attempt whose plan exists, 0 if none."""
        return len(attempts_of(self.attempt))

    @property
    def previous(self) -> "RoundPaths":
        """The previous round."""
        return RoundPaths(root=self.root.with_name(f"{self.number - 1:04d}"))

    @property
    def updates(self) -> Path:
        """The folder of published updates."""
        return self.root / "updates"

    def update(self, *, attempt: int, bundle: int, part: int) -> Path:
        """The file of finished clients of one bundle."""
        folder = shard(self.updates, bundle, _BUNDLES_PER_SHARD)
        return folder / f"{attempt:02d}-{bundle:03d}-{part:02d}.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints of unfinished clients."""
        return self.root / "checkpoints"

    def checkpoint(self, client: str) -> Path:
        """The checkpoint of a client whose training was interrupted."""
        return self.checkpoints / f"{encode_client(client)}.safetensors"

    def checkpoint_files(self) -> list[Path]:
        """Return the existing checkpoints, sorted."""
        return files_below(self.checkpoints, ".safetensors")

    @property
    def clients(self) -> Path:
        """The losses, seconds, memory and bytes of the clients; kept when updates are pruned."""
        return self.root / "clients.json"

    @property
    def tasks(self) -> Path:
        """The times of the round's tasks; kept when their own records are pruned."""
        return self.root / "tasks.json"

    @property
    def collection(self) -> Path:
        """The list of updates that the round used, frozen before aggregation."""
        return self.root / "collection.json"

    @property
    def aggregate(self) -> Path:
        """The folder of the aggregation."""
        return self.root / "aggregate"

    @property
    def global_state(self) -> Path:
        """The server state after this round."""
        return self.aggregate / "global.safetensors"

    @property
    def earlier_states(self) -> Path:
        """The folder of links to earlier states, to which the server state refers."""
        return self.aggregate / "earlier"

    def earlier_state(self, number: int) -> Path:
        """The link to the state after an earlier round."""
        return self.earlier_states / f"{number:04d}.safetensors"

    @property
    def aggregate_record(self) -> Path:
        """The record of the complete aggregation."""
        return self.aggregate / "aggregate.json"

    @property
    def aggregate_attempts(self) -> Path:
        """The folder of aggregation attempts."""
        return self.aggregate / "attempts"

    def aggregate_job(self, number: int) -> JobPaths:
        """Aggregation attempt `number`."""
        return JobPaths(root=self.aggregate_attempts / f"{number:02d}")

    @property
    def evaluation(self) -> "EvaluationPaths":
        """The evaluation of the round's state."""
        return EvaluationPaths(root=self.root / "evaluation")

    @property
    def evaluation_record(self) -> Path:
        """The record of the complete evaluation."""
        return self.evaluation.record

    @property
    def answers(self) -> Path:
        """The generated answers that the evaluation keeps."""
        return self.evaluation.answers

    def evaluation_job(self, number: int) -> PackedJobPaths:
        """Evaluation attempt `number`."""
        return self.evaluation.job(number)

    @property
    def record(self) -> Path:
        """The record of the finished round."""
        return self.root / "round.json"


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Paths of one run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        """Run id, versions, fingerprints, changes."""
        return self.root / "run.json"

    @property
    def prepared(self) -> Path:
        """Model and data fingerprints, client index, module shapes."""
        return self.root / "prepared.json"

    @property
    def prepare_attempts(self) -> Path:
        """The folder of preparation attempts."""
        return self.root / "prepare" / "attempts"

    def prepare_job(self, number: int) -> JobPaths:
        """Preparation attempt `number`."""
        return JobPaths(root=self.prepare_attempts / f"{number:02d}")

    @property
    def stop(self) -> Path:
        """The decision to end the run before its configured last round."""
        return self.root / "stopped.json"

    @property
    def leases(self) -> Path:
        """The folder of coordinator leases."""
        return self.root / "coordinator"

    def lease(self, number: int) -> Path:
        """The file of lease `number`; the highest number holds."""
        return shard(self.leases, number, _LEASES_PER_SHARD) / f"{number:04d}.json"

    def released(self, number: int) -> Path:
        """The mark that the holder of lease `number` gave it back."""
        return self.lease(number).with_suffix(".released.json")

    def failure(self, number: int) -> Path:
        """The error that ended the holder of lease `number`."""
        return self.lease(number).with_suffix(".failed.json")

    def lease_folders(self) -> list[Path]:
        """Return the existing folders of leases, the highest numbers first."""
        names = names_in(self.leases)
        shards = sorted((name for name in names if name.isdecimal()), key=int, reverse=True)
        return [*(self.leases / name for name in shards), self.leases] if names else []

    @property
    def coordinator_job(self) -> Path:
        """The record of the Slurm job submitted last to coordinate the run."""
        return self.leases / "submitted.json"

    @property
    def run_copy(self) -> Path:
        """The copy of `run.json`, from which a damaged one is made again."""
        return self.leases / "run-copy.json"

    @property
    def coordinator_in_doubt(self) -> Path:
        """The record of a coordinator job in doubt: no other is submitted while it exists."""
        return self.leases / "in-doubt.json"

    @property
    def rounds(self) -> Path:
        """The folder of rounds."""
        return self.root / "rounds"

    def newest_state(self) -> RoundPaths | None:
        """Return the newest aggregated round, or None; round 0 is the state before training."""
        rounds = reversed(self.existing_rounds())
        return next((paths for paths in rounds if paths.aggregate_record.exists()), None)

    def existing_rounds(self) -> list[RoundPaths]:
        """Return the rounds that have a folder, in their order."""
        # backups of round folders have other names
        numbers = [int(name) for name in names_in(self.rounds) if name.isdecimal()]
        return [self.round(number) for number in sorted(numbers)]

    def round(self, number: int) -> RoundPaths:
        """Round `number`."""
        return RoundPaths(root=self.rounds / f"{number:04d}")

    @property
    def client_stores(self) -> Path:
        """The folder of what clients keep between their rounds."""
        return self.root / "clients"

    def client_store(self, client: str, round_number: int) -> Path:
        """What a client kept of the training of a round."""
        folder = self.client_stores / hashlib.sha256(client.encode()).hexdigest()[:2]
        return folder / f"{encode_client(client)}.{round_number:04}.safetensors"

    def client_store_files(self, client: str | None = None) -> dict[str, dict[int, Path]]:
        """Return what exists of a client, or of all: encoded client -> round -> file."""
        one = self.client_store(client, 0) if client is not None else None
        folder = one.parent if one else self.client_stores
        name = f"{encode_client(client)}" if client is not None else "[!.]*"
        found: dict[str, dict[int, Path]] = {}
        for path in sorted(folder.glob(f"{'' if one else '*/'}{name}.[0-9]*.safetensors")):
            encoded, _, number = path.stem.rpartition(".")
            found.setdefault(encoded, {})[int(number)] = path
        return found

    @property
    def metrics(self) -> Path:
        """The metrics, one line per round, rebuilt from the records."""
        return self.root / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report page, made from the records."""
        return self.root / "report.html"

    @property
    def title(self) -> str:
        """The name of the run; of a sweep's run that of its arm comes before it."""
        names = self.root.parts[-2:] if self.root.name.startswith("seed-") else (self.root.name,)
        return " ".join(names)

    def tracker(self, name: str) -> Path:
        """The folder of what a tracker of experiments writes."""
        return self.root / "trackers" / name

    def exported(self, name: str) -> Path:
        """How far a tracker was given what the run recorded."""
        return self.root / "trackers" / f"{name}.json"

    @property
    def all_logs(self) -> Path:
        """The folder of all logs."""
        return self.root / "logs"

    @property
    def evaluations(self) -> Path:
        """The folder of the evaluations that `fedllm evaluate` asked for."""
        return self.root / "evaluations"

    def harness(self, name: str) -> Path:
        """The results of lm-evaluation-harness, as it gave them."""
        return self.root / "lm-eval" / f"{name}.json"

    def requested(self, name: str) -> EvaluationPaths:
        """An evaluation that `fedllm evaluate` asked for."""
        return EvaluationPaths(root=self.evaluations / name)

    def all_requested(self) -> list[EvaluationPaths]:
        """Return all evaluations that `fedllm evaluate` asked for."""
        return [self.requested(name) for name in sorted(names_in(self.evaluations))]

    def logs(self, round_number: int) -> Path:
        """The folder of a round's logs; 0 holds those of prepare."""
        return self.all_logs / f"{round_number:04d}"


@dataclass(frozen=True, kw_only=True)
class SweepPaths:
    """Paths of a sweep: a folder of run directories and one record."""

    root: Path

    @property
    def file(self) -> Path:
        """A copy of the file that the sweep was made from."""
        return self.root / "sweep.yaml"

    @property
    def record(self) -> Path:
        """The runs of the sweep and their configurations."""
        return self.root / "sweep.json"

    @property
    def report(self) -> Path:
        """The report page, made from the records of the runs."""
        return self.root / "report.html"

    @property
    def coordination(self) -> RunPaths:
        """The sweep's own files of a coordinator: its job, and what it and its workers log."""
        return RunPaths(root=self.root)

    def run(self, name: str) -> RunPaths:
        """The run `name`, such as `runs/flexlora/seed-0`."""
        return RunPaths(root=self.root / name)

    def failure(self, name: str) -> Path:
        """The reason why the run `name` failed last."""
        return self.root / "failures" / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class ProbePaths:
    """Paths of a probe: its own folder in a trial folder, below the folder of future runs."""

    root: Path

    @property
    def runs_folder(self) -> Path:
        """The folder where runs will be."""
        return self.root.parents[1]

    @property
    def submitter_file(self) -> Path:
        """The file that the submitting machine writes."""
        return self.root / "here.json"

    @property
    def node_file(self) -> Path:
        """The file that the node of the probe writes."""
        return self.root / "there.json"


@dataclass(frozen=True, kw_only=True)
class CachePaths:
    """Paths of the cache that runs share, keyed by fingerprint."""

    root: Path

    def model(self, key: str) -> Path:
        """A fetched or embedded base model."""
        return self.root / "models" / key

    def data(self, key: str) -> Path:
        """A tokenised data set."""
        return self.root / "data" / key

    @property
    def preparations(self) -> Path:
        """The folder of what `fedllm plan` knows of prepared configurations."""
        return self.root / "plans"

    def preparation(self, key: str) -> Path:
        """What `fedllm plan` knows of a prepared configuration."""
        return self.preparations / key / "preparation.json"

    def base_scores(self, key: str) -> Path:
        """The scores of an untouched base on some clients and rows."""
        return self.root / "scores" / f"{key}.json"


def run_of_scored(target: Path) -> RunPaths:
    """Return the run of a round that is scored, or of an evaluation that was asked for."""
    return RunPaths(root=target.parents[1])


def cache_of(configured: str | None, run_root: Path, *, beside_runs: bool = False) -> CachePaths:
    """Return the cache: `storage.cache`, else `$FEDLLM_CACHE`, else the user's own.

    That is `fedllm` below `$XDG_CACHE_HOME` or `~/.cache`. `beside_runs` takes a folder beside the
    run directories instead, as does a cache that an earlier version made there.
    """
    chosen = configured or os.environ.get("FEDLLM_CACHE")
    beside = run_root.resolve().parent / ".fedllm-cache"
    if chosen:
        root = Path(chosen).expanduser()
    elif beside_runs or beside.is_dir():
        root = beside
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedllm"
    return CachePaths(root=root.resolve())
