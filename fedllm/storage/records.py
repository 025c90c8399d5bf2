"""Records of a run: frozen models written as JSON, last in every step. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.errors import FedllmError, RunDirectoryError
from fedllm.storage.publishing.publish import publish_bytes, publish_once
from fedllm.storage.trust.printable import Line
from fedllm.storage.trust.regular_files import ForeignFileError, read_record

# a role of clients in scores: who trains, who chooses the best round, who is only scored
Group = Literal["train", "dev", "unseen", "new_category"]


class Record(BaseModel):
    """A frozen record that is published atomically."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        populate_by_name=True,
        # JSON has no such numbers, and a diverged loss must be read back as it was
        ser_json_inf_nan="strings",
    )

    # what to do about a damaged one
    _remedy: ClassVar[str] = "restore it from a backup"

    def to_bytes(self) -> bytes:
        """Return the record as indented JSON."""
        return (self.model_dump_json(indent=1, by_alias=True) + "\n").encode()

    def publish(self, path: Path) -> None:
        """Write the record to `path`, whole or not at all."""
        publish_bytes(path, self.to_bytes())

    def publish_once(self, path: Path) -> bool:
        """Write the record unless `path` exists; say whether this call did."""
        return publish_once(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            FileNotFoundError: the file does not exist.
            RunDirectoryError: the file is not a record of this kind.
        """
        try:
            content = read_record(path)
        except ForeignFileError as error:
            raise RunDirectoryError(f"{path}: {error}; remove it, or restore the record") from error
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "JSON"
            raise RunDirectoryError(
                f"{path}: damaged record ({where}: {error.errors()[0]['msg']}); "
                f"{cls._remedy}; `fedllm verify RUN` says what can be made again"
            ) from error

    @classmethod
    def glance(cls, path: Path) -> Self | None:
        """Read a record that only informs; return None if it does not exist or is damaged."""
        try:
            return cls.read(path)
        except (FileNotFoundError, RunDirectoryError):
            return None

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Read a record, or return None if the file does not exist."""
        try:
            return cls.read(path)
        except FileNotFoundError:
            return None


# the name in JSON; records of runs that began with an earlier version have it
_LAYOUT = Field(default=None, validation_alias="way", serialization_alias="way")


class ModuleRecord(Record):
    """A target module of the base: W is (out, in), stored as (in, out) if `transposed`."""

    out_features: int
    in_features: int
    kind: Literal["attention", "mlp", "other"]
    transposed: bool = False


class LayoutRecord(Record):
    """The layout of rows in a forward pass, per kind of device; chosen once, kept for the run.

    `parts`, `flex` and `mask` compute the common prefix of rows once: one attention call per part
    of the sequence, block masks of FlexAttention, or one boolean mask. `packed` rows lie one after
    the other and share nothing; `padded` rows fill a rectangle. `why` says what is wrong with the
    better layouts.
    """

    cpu: Literal["parts", "mask", "packed", "padded"]
    cuda: Literal["flex", "mask", "packed", "padded"]
    why: str = ""


class ClientRecord(Record):
    """A client of the data: usable rows per split, without the rows that lack an answer.

    `truncated_rows` counts prompts and answers that were cut at `data.cutoff_tokens`, `cut_answers`
    the answers among them. `longest_row` is the largest number of tokens of a training row.
    """

    id: str
    category: str = ""
    held_out_candidate: bool = True
    train_rows: int
    test_rows: int = 0
    dropped_rows: int = 0
    truncated_rows: int = 0
    cut_answers: int = 0
    train_tokens: int = 0
    longest_row: int = 0


class StartRecord(Record):
    """The adapter at the start of a run: its folder, and the SHA-256 of its content."""

    path: str
    fingerprint: str


SentFactors: TypeAlias = Literal["AB", "A", "B"]  # the factors that a client sends


class FittedRecord(Record):
    """The rank that fits into a tier's memory: what was measured, and what follows from it.

    `measured_bytes` is the peak of a process that trained at `measured_rank`, `predicted_bytes`
    that of a worker by rank. Once a run has begun, its preparation measures nothing more.
    """

    rank: int
    measured_rank: int | None = None
    measured_bytes: int | None = None
    predicted_bytes: dict[int, int] = {}


class PreparedRecord(Record):
    """The result of prepare: everything a coordinator needs to know about model and data.

    A run prepared by a version without layouts has none, and continues with padded rows. `notes`
    tells the user about the base; a note is no error. `linear_parameters` is the number of weights
    that can be quantised. It, `tokenizer_fingerprint` and `data_sha256`, the digests of the files
    of tokenised rows, are unknown for runs of earlier versions.
    `fitted` are the tiers whose rank follows from their memory, `kept_bytes` what each client of a
    tier keeps between its rounds, where the method lets it keep anything, `sent` the factors that
    clients of the first round send.
    """

    model_fingerprint: str
    model_path: str
    tokenizer_fingerprint: str | None = None
    data_fingerprint: str
    data_path: str
    data_sha256: dict[str, str] = {}
    model_parameters: int
    linear_parameters: int = 0
    modules: dict[str, ModuleRecord]
    clients: list[ClientRecord]
    layout: LayoutRecord | None = _LAYOUT
    notes: list[str] = []
    start: StartRecord | None = None
    fitted: dict[str, FittedRecord] = {}
    kept_bytes: dict[str, int] = {}
    sent: SentFactors = "AB"

    @property
    def fitted_ranks(self) -> dict[str, int]:
        """The ranks of the tiers that fit into their memory."""
        return {tier: record.rank for tier, record in self.fitted.items()}


class ChangeRecord(Record):
    """A key that changed on resume."""

    key: str
    before: Any
    after: Any
    lease: int


class OwnCodeRecord(Record):
    """The source of a class of the user's own.

    `folders` are those that jobs and commands import from, `files` the SHA-256 of each module.
    """

    name: str
    folders: list[str]
    files: dict[str, str]


class PlaceRecord(Record):
    """The place of a run directory: its path and its inode, which no copy has."""

    path: str
    inode: int


class RunRecord(Record):
    """The identity of a run.

    `config` is the value of every key of `config.yaml` as the run last accepted it; a run of an
    earlier version has none. `own_code` is the source of a method of the user's own. `place` is
    where the run has its id; a copy gets another id, and keeps those before it as `earlier_ids`.
    `seals` are those of the last user who opened it, on the keys that hold commands.
    """

    _remedy = "`fedllm resume RUN` makes it again from its copy in coordinator/"

    run_id: str
    earlier_ids: list[str] = []
    place: PlaceRecord | None = None
    seals: dict[str, str] = {}
    result_fingerprint: str
    versions: dict[str, str]
    own_code: OwnCodeRecord | None = None
    changes: list[ChangeRecord] = []
    config: dict[str, Any] = {}


class LeaseRecord(Record):
    """The holder of a lease: the process that coordinates a run.

    `origin` is the lease at which a person started the run. A requeued coordinator, the links of a
    chain and calls of `advance` keep it: they continue to count the retries that are used up.
    `place` is the run directory: in a copy of it this lease holds nothing. Leases of earlier
    versions have neither it nor `machine_id`, `pid_namespace` and `user` (a number).
    """

    number: int
    host: str
    boot_id: str
    pid: int
    start_time: str
    slurm_job: str | None = None
    origin: int | None = None
    place: PlaceRecord | None = None
    machine_id: str | None = None
    pid_namespace: str | None = None
    user: int | None = None


class CoordinatorJobRecord(Record):
    """The Slurm job submitted last to coordinate a run.

    In a chain this is the waiting link, and `lost` counts the links before it that ended, in a row,
    without reporting anything. `user` is the number of who submitted it; earlier versions did not
    record it.
    """

    job: str
    mode: Literal["resident", "chained"]
    lost: int = 0
    user: int | None = None


class CohortClient(Record):
    """A client of a round; `ranks` are its own, where its method gave it others than its tier."""

    id: str
    tier: str
    cost: float
    ranks: dict[str, int] | None = None


class CohortRecord(Record):
    """The clients of a round and the ranks that each tier trains.

    `base_change` is the SHA-256 of the change of the base that goes with the state, null if its
    method leaves the base as it is. `enough` valid updates complete the round; null: all. `cost` of
    a client is in tokens. `layout` comes from prepare; that of the first round holds for the run.
    `sent` are the factors in an update; the others are as the client received them.
    """

    round: int
    lease: int
    base_fingerprint: str
    data_fingerprint: str
    state_sha256: str
    base_change: str | None = None
    ranks: dict[str, dict[str, int]]
    clients: list[CohortClient]
    enough: int | None = None
    layout: LayoutRecord | None = _LAYOUT
    sent: SentFactors = "AB"

    def ranks_of(self, client: CohortClient) -> dict[str, int]:
        """Return the rank of every module that a client trains."""
        return client.ranks or self.ranks[client.tier]


class BundleRecord(Record):
    """The few clients that a worker claims at once; `cost` is estimated seconds of work."""

    number: int
    worker_class: str
    clients: list[str]
    cost: float


class ArrayRecord(Record):
    """One array of identical tasks of one class, as submitted.

    `minutes` is the requested time limit, after which no bundle is claimed either; `parallel` the
    `%N` of the array; `logs` the folder of its logs, below that of the round. A task is so many
    `processes`, spread evenly over so many `nodes`.
    """

    name: str
    worker_class: str
    tasks: int
    options: dict[str, str | int | float | bool | None] = {}
    minutes: float | None = None
    parallel: int | None = None
    logs: str = ""
    processes: int = 1
    nodes: int = 1


class WorkersRecord(Record):
    """The workers that an attempt needs of a class: tasks in all, at once, and in one array.

    `memory_factor` multiplies the configured memory in their options. A task is so many
    `processes`, spread evenly over so many `nodes`.
    """

    tasks: int
    parallel: int
    largest_array: int = 1
    memory_factor: float = 1.0
    minutes: float | None = None
    options: dict[str, str | int | float | bool | None] = {}
    processes: int = 1
    nodes: int = 1


class SubmissionRecord(Record):
    """The plan of an attempt, written before anything is submitted.

    `workers` are needed per class: arrays are added, wave by wave, as the cluster's limits allow.
    `adopted` are idle tasks of the previous round that wait for this one. With `one_bundle` every
    task claims exactly one bundle. `user` is the number of the user who made it, and who submitted
    the adopted tasks.
    """

    token: str
    lease: int
    kind: Literal["prepare", "client", "aggregate", "evaluate"]
    command: list[str]
    arrays: list[ArrayRecord]
    bundles: list[BundleRecord] = []
    workers: dict[str, WorkersRecord] = {}
    adopted: list[str] = []
    one_bundle: bool = False
    excluded_nodes: list[str] = []
    user: int | None = None


class JobsRecord(Record):
    """The scheduler's ids per array name, in task order, and the number of the user of each array.

    A scheduler may hide a user's jobs from another member of the group. Earlier versions did not
    record the users.
    """

    ids: dict[str, list[str]]
    users: dict[str, int] = {}


class DoubtRecord(Record):
    """A submission whose success is unknown: the job `name` may exist.

    `said` is what the scheduler answered. A person removes the record once sure that there is no
    such job.
    """

    name: str
    said: str


class ErrorRecord(Record):
    """The reason why a job stopped.

    `bad_places` names clients by their places in the cohort, with what is wrong with their updates:
    the aggregation may go on without them.
    """

    kind: Line
    message: str
    exit_code: int
    log: Line = ""
    bad_places: dict[int, str] = {}

    @classmethod
    def of(
        cls,
        error: Exception,
        *,
        log: str,
        exit_code: int = FedllmError.exit_code,
        bad_places: Mapping[int, str] | None = None,
    ) -> "ErrorRecord":
        """Return the record of an error."""
        return cls(
            kind=type(error).__name__,
            message=str(error) or type(error).__name__,
            exit_code=exit_code,
            log=log,
            bad_places=dict(bad_places or {}),
        )


class ClaimRecord(Record):
    """The claim of a bundle by a task; the same task, requeued, continues it."""

    bundle: int
    task: Line
    node: Line
    log: Line = ""


class TaskRecord(Record):
    """The progress of one worker, in seconds since its process began.

    The record of a hung worker does not change. `startup_seconds` passed before the first client
    trained, `busy_seconds` in training clients. Both, and `allocated_seconds`, are of this start of
    the task alone: `earlier_...` sums the starts before it was requeued. `clients` are in training
    together, `client` is the first of them.
    """

    task: str
    node: Line
    clients_done: int
    client: str | None = None
    clients: list[str] = []
    step: int = 0
    state: Literal["starting", "training", "lingering", "ended"] = "training"
    worker_class: str = ""
    startup_seconds: float = 0.0
    busy_seconds: float = 0.0
    allocated_seconds: float = 0.0
    starts: int = 1
    earlier_busy_seconds: float = 0.0
    earlier_allocated_seconds: float = 0.0


def training_text(client: str | None, clients: Sequence[str]) -> str:
    """Return the clients that a task trains, in words: the first one, and how many more."""
    more = f" and {len(clients) - 1} more" if len(clients) > 1 else ""
    return f"{client or ''}{more}"


class EndingRecord(Record):
    """The ending of a task: `state` is its scheduler's word (`FAILED`, `exit 3`, `preempted`)."""

    state: Line
    exit_code: Line = ""
    node: Line = ""
    log: Line = ""

    def __str__(self) -> str:
        """Return the ending in a few words."""
        code = f", exit code {self.exit_code}" if self.exit_code else ""
        node = f" on {self.node}" if self.node else ""
        log = f"; log {self.log}" if self.log else ""
        return f"{self.state}{code}{node}{log}"


class OutcomeRecord(Record):
    """The outcome of an attempt once none of its tasks is left; written before the next one.

    `endings` has only the tasks that failed, `cancelled` the reasons why the coordinator ended
    some. `checkpoints` has the optimizer steps of unfinished clients, by the names of their files;
    `progressed` tells whether there are more than after the attempt before.
    """

    endings: dict[str, EndingRecord] = {}
    cancelled: dict[str, str] = {}
    checkpoints: dict[str, int] = {}
    progressed: bool = False


class TrainingStats(Record):
    """Numbers of a client's training, over the optimizer steps taken so far.

    `rows` counts the distinct rows that entered a step, `tokens` and `loss_tokens` those of all
    steps. `losses` has each step's mean over its targets, `gradient_norms` the Euclidean norm of
    all its gradients before clipping. `step_seconds` is the time inside forward, backward and
    update. `computed_tokens` went through the base: a shared prefix once, padding too.
    `padded_tokens` would have, if the rows of every step were padded to the longest. Both are 0
    where the engine does not count them. `energy_joules` is what the device used meanwhile, for all
    its processes; None where it does not tell, or where several processes trained the client.
    """

    rows: Annotated[int, Field(ge=0)] = 0
    steps: int
    tokens: int
    loss_tokens: int
    losses: list[float]
    gradient_norms: list[float] = []
    seconds: float
    step_seconds: float
    peak_memory_bytes: int
    computed_tokens: int = 0
    padded_tokens: int = 0
    energy_joules: float | None = None

    @classmethod
    def of(cls, record: "TrainingStats") -> "TrainingStats":
        """Return only the training numbers of a record that has more fields."""
        return TrainingStats(**{name: getattr(record, name) for name in TrainingStats.model_fields})


def training_metrics(clients: Sequence[TrainingStats]) -> dict[str, float]:
    """Return the numbers of a round's clients for `metrics.jsonl`, by name.

    Every client counts once, however many steps it took. A number that no client has is left out.
    `training_loss` is the mean over clients of the mean over their steps.
    """
    metrics: dict[str, float] = {}
    losses_of_clients = [client.losses for client in clients if client.losses]
    if losses_of_clients:
        metrics["training_loss"] = _mean(map(_mean, losses_of_clients))
        metrics["training_loss_first_step"] = _mean(losses[0] for losses in losses_of_clients)
        metrics["training_loss_last_step"] = _mean(losses[-1] for losses in losses_of_clients)
    norms_of_clients = [client.gradient_norms for client in clients if client.gradient_norms]
    if norms_of_clients:
        metrics["gradient_norm_mean"] = _mean(map(_mean, norms_of_clients))
        metrics["gradient_norm_max"] = max(map(max, norms_of_clients))
    return metrics


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


class ReceivedRecord(Record):
    """What a client received: bytes and number of values, frozen ones too, and how many trained."""

    num_bytes: int
    values: int
    trained_values: int


class UpdateRecord(TrainingStats):
    """The record that a client sends with its tensors; `group` are the clients trained with it.

    `notes` are what a method lets its clients tell beside their numbers.
    """

    run_id: str
    round: int
    client: str
    attempt: int
    bundle: int
    status: Literal["ok", "failed"] = "ok"
    reason: Line = ""
    kind: Literal["lora", "sparse"] = "lora"
    base_fingerprint: str
    base_change: str | None = None
    notes: dict[str, Any] = {}
    norms: dict[str, tuple[float, float]] = {}
    scales: dict[str, float] = {}
    group: list[str] = []
    received: ReceivedRecord | None = None
    micro_batch_size: int | None = None
    resumed_at: list[int] = []
    earlier_environments: list[dict[str, str]] = []
    environment: dict[str, str] = {}
    node: Line = ""
    task: Line = ""
    log: Line = ""


class KeptRecord(Record):
    """What a client keeps of the training of a round, beside its tensors: `notes` are its JSON."""

    run_id: str
    client: str
    round: int
    notes: dict[str, Any] = {}


class CollectedUpdate(Record):
    """A client's update as the round uses it; the weight is its rows, not yet normalised.

    `clipped` maps the modules whose change is scaled down to the factor of the scaling.
    """

    client: str
    tier: str
    attempt: int
    file: str
    sha256: str
    weight: float
    clipped: dict[str, float] = {}
    notes: dict[str, Any] = {}


class TierMix(Record):
    """The clients of a tier in a round: how many were drawn and how many used.

    `tokens` were expected of the used ones (as in the cohort); their training took `seconds`.
    """

    drawn: int
    used: int
    tokens: float
    seconds: float


class CollectionRecord(Record):
    """The updates that a round used, frozen; `training` has metrics of its clients' training.

    `refused` counts the update files that were set aside: truncated, forged or impossible.
    """

    round: int
    lease: int
    updates: list[CollectedUpdate]
    failed: dict[str, str] = {}
    missing: list[str] = []
    replaces: int = 0
    refused: int = 0
    environments: list[dict[str, str]] = []
    tiers: dict[str, TierMix] = {}
    startup_seconds: float | None = None
    training: dict[str, float] = {}


class RankQuality(Record):
    """Quality of an adapter of `rank`: what it keeps of the aggregated change of one module.

    `energy_kept` is a share of the squared Frobenius norm; `truncation_error` is the Frobenius norm
    of the part left out over that of the change (0 if there is no change).
    """

    rank: int
    energy_kept: float
    truncation_error: float


class PartitionQuality(Record):
    """Energies of directions `first` to `last` of one module, from 1, which the same tiers train.

    `reach` is the share of the round's weight whose clients trained them. If nobody had trained,
    the method would carry on `energy_kept` of the state before the round and drop `energy_lost`;
    their sum is the energy that state had in these directions. `energy` is that of the new state
    there. All are squared Frobenius norms.
    """

    first: int
    last: int
    reach: float
    energy_kept: float
    energy_lost: float
    energy: float


class ModuleDiagnostics(Record):
    """Diagnostics of one module's aggregation: leading singular values, energy, errors per rank.

    `stacked_rank` is that of the problem. `residual_energy` is the part of `total_energy` that the
    spectrum leaves out; both are squared Frobenius norms. It exceeds the smallest residual that the
    same number of triplets could have by at most the share `relative_excess`, with probability `1 -
    failure_probability`. `effective_rank` and `overlap` are those of `lora.spectral`. `overlap`
    compares with the previous state in the leading space of the smallest of `ranks`; it is None if
    either state has a dead direction there, as every state has before the first round.
    `beyond_smallest_rank` is the share of the energy that the smallest of `ranks` misses.
    `partitions` are the ranges of directions between ranks; records of earlier versions have none.
    """

    route: str
    stacked_rank: int
    total_energy: float
    spectrum: list[float]
    ranks: list[RankQuality]
    residual_energy: float = 0.0
    relative_excess: float = 0.0
    failure_probability: float = 0.0
    effective_rank: float = 0.0
    beyond_smallest_rank: float = 0.0
    overlap: float | None = None
    partitions: list[PartitionQuality] = []


class PrivacyRecord(Record):
    """What all rounds so far say about any one client: (epsilon, delta)-differential privacy.

    `cohort` is the size of a cohort, the expected one with Poisson sampling; `clients` is how many
    it is drawn from.
    """

    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    sampling: str
    cohort: int
    clients: int


class AggregateRecord(Record):
    """The record of a complete aggregation.

    `base_change` is the SHA-256 of the change of the base that the state holds; null: none.
    `earlier` has the SHA-256 of the earlier states, by their round, that hold other terms of it.
    `assigned` has the ranks of the clients, by module, whose method gives them others than their
    tier has, `sent_next` the factors that clients of the next round send.
    """

    round: int
    method: str
    rank: dict[str, int]
    sha256: str
    base_change: str | None = None
    earlier: dict[int, str] = {}
    assigned: dict[str, dict[str, int]] = {}
    sent_next: SentFactors = "AB"
    seconds: float
    clients: int
    device: str
    stages: dict[str, float] = {}
    privacy: PrivacyRecord | None = None
    modules: dict[str, ModuleDiagnostics] = {}


class Scores(Record):
    """Quality of answers on a set of rows; Rouge-L and exact match in 0..1 of generated answers.

    `rougeL_published` is that of teacher-forced answers, if the configuration asks for it.
    """

    rows: int
    loss: float
    rouge_l: float
    exact_match: float
    rougeL_published: float | None = None  # noqa: N815


class ClientScores(Record):
    """Scores of one client at its own rank and at the largest."""

    client: str
    group: Group
    tier: str
    as_deployed: Scores
    at_largest_rank: Scores


class EvaluationRecord(Record):
    """The record of the complete evaluation of one round."""

    round: int
    state_sha256: str
    complete: bool
    seconds: float
    clients: list[ClientScores]


class StopRecord(Record):
    """The decision to end a run after `round`: dev clients were best in `best_round`.

    It holds as long as `stopping.patience` is what it was.
    """

    round: int
    best_round: int
    patience: int


class BaseRow(Record):
    """A test row as an untouched base answers it; `loss` is the sum over its `tokens`."""

    loss: float
    tokens: int
    rouge_l: float
    exact_match: float
    answer: str = ""
    rougeL_published: float | None = None  # noqa: N815


class BaseScoresRecord(Record):
    """Rows of an untouched base by client: the same for all runs that score these rows."""

    clients: dict[str, list[BaseRow]]


class RoundRecord(Record):
    """The record of a finished round."""

    round: int
    lease: int
    state_sha256: str
    clients: int
    failed: int = 0
    late: int = 0
    refused: int = 0
    tasks: int = 0
    busy_seconds: Annotated[float, Field(ge=0)] = 0.0
    allocated_seconds: Annotated[float, Field(ge=0)] = 0.0
    gpu_seconds: Annotated[float, Field(ge=0)] = 0.0
