"""Configuration as frozen models; every default is here and nowhere else.

Sections and keys that are marked `EXECUTION` may change on resume. All others decide the result
and are frozen with the first round.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedllm.config.deepspeed_keys import deepspeed_problems
from fedllm.config.target_modules import target_problem

EXECUTION: dict[str, Any] = {"kind": "execution"}
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
# the type of an error whose message is whole lines, each with its own key
WHOLE_LINES = "whole_lines"
# how clients train, where a tier may have a value of its own
_OF_TIERS = ("engine", "processes", "nodes")
# what a tier with this engine has unless it says so: the general values may be for another engine
_OF_ENGINES: Mapping[str | None, Mapping[str, int]] = {"plain": {"processes": 1, "nodes": 1}}


Name = str  # of a client or a tier; may look like a number or a boolean (see `spelling`)
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

RankSpec = PositiveInt | dict[str, PositiveInt]
EngineName = Literal["plain", "zero"]
RowFormat = Literal["auto", "alpaca", "messages", "sharegpt", "completion"]
SbatchOptions = dict[str, str | int | float | bool | None]
MethodOptions = dict[str, str | int | float | bool | None]


def _raise_lines(lines: Sequence[str]) -> None:
    if lines:
        raise PydanticCustomError(WHOLE_LINES, "{lines}", {"lines": "\n".join(lines)})


class Section(BaseModel):
    """A group of keys; unknown ones are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSection(Section):
    """Base model (a directory, a hub name or `embedded`), and an adapter to start from."""

    path: Annotated[str, Field(json_schema_extra=EXECUTION)] = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: str | None = None


class LoraSection(Section):
    """LoRA: the modules that are adapted, and how updates are scaled."""

    target_modules: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    alpha: PositiveFloat = 16.0
    scaling: Literal["fixed", "proportional", "rslora"] = "fixed"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05

    @field_validator("target_modules")
    @classmethod
    def _can_name_modules(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if problem := target_problem(value):
            raise ValueError(problem)
        return value


class ColumnsSection(Section):
    """Column names of the user's data; `category` and `instruction` may be absent."""

    client: str | None = "client_id"
    category: str | None = "category"
    instruction: str | None = "instruction"
    input: str | None = "input"
    output: str = "output"


class PartitionSection(Section):
    """Partition: clients for data without clients, or other clients than the data's."""

    kind: Literal["column", "iid", "dirichlet", "pathological", "quantity"] = "column"
    clients: PositiveInt | None = None
    alpha: PositiveFloat = 0.5
    categories: PositiveInt = 2
    min_rows: PositiveInt = 2
    seed: int = 0

    @model_validator(mode="after")
    def _has_clients(self) -> "PartitionSection":
        if self.kind != "column" and self.clients is None:
            _raise_lines([f"data.partition.clients: missing; kind {self.kind} needs their number"])
        return self


class DataSection(Section):
    """Data: the rows, how they become tokens, and which tokens have a loss."""

    path: Annotated[str, Field(json_schema_extra=EXECUTION)] = "embedded"
    revision: str | None = None
    format: RowFormat = "auto"
    columns: ColumnsSection = ColumnsSection()
    partition: PartitionSection = PartitionSection()
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    loss_on: Literal["answer", "all"] = "answer"
    cutoff_tokens: PositiveInt = 512
    test_fraction: Fraction = 0.1
    embedded_clients: Annotated[int, Field(ge=12)] = 16
    embedded_rows: Annotated[int, Field(ge=20)] = 96

    @model_validator(mode="after")
    def _has_clients(self) -> "DataSection":
        if self.columns.client is None and self.partition.kind == "column":
            line = "data.columns.client: got null, name the column, or set data.partition.kind"
            _raise_lines([line])
        return self


class TierSection(Section):
    """A class of clients: its ranks, its share of the clients, and how it trains if otherwise."""

    ranks: RankSpec
    share: Annotated[float, Field(ge=0)] | None = None
    engine: EngineName | None = None
    processes: PositiveInt | None = None
    nodes: Annotated[PositiveInt | None, Field(json_schema_extra=EXECUTION)] = None
    memory_gib: Annotated[PositiveFloat | None, Field(json_schema_extra=EXECUTION)] = None


def _set_by(tier: TierSection) -> dict[str, Any]:
    values = {name: getattr(tier, name) for name in _OF_TIERS}
    return {name: value for name, value in values.items() if value is not None}


class CohortSection(Section):
    """Cohort size: how many clients train in a round."""

    count: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sampling: Literal["fixed", "poisson"] = "fixed"

    @model_validator(mode="after")
    def _exactly_one(self) -> "CohortSection":
        if (self.count is None) == (self.fraction is None):
            raise ValueError("give either `count` or `fraction`, and null for the other")
        return self


class HeldOutSection(Section):
    """Clients that may become dev or unseen: `column` modulo `modulo` equals `equals`."""

    column: str
    modulo: PositiveInt
    equals: NonNegativeInt


class ClientsSection(Section):
    """Clients: their tiers, how many train in a round, and which never train."""

    tiers: Annotated[dict[Name, TierSection], Field(min_length=1)]
    distribution: Literal["uniform", "heavy_tail_light", "heavy_tail_strong", "normal"] | None = (
        None
    )
    assign: dict[Name, Name] = {}
    tier_seed: int | None = None
    cohort: CohortSection = CohortSection(fraction=0.05)
    quorum: PositiveInt | Annotated[float, Field(gt=0, le=1)] | Literal["all"] = "all"
    over_sample: Annotated[float, Field(ge=0)] = 0.0
    deadline_minutes: PositiveFloat | None = None
    ranks_above_module: Literal["error", "cap"] = "error"
    split_seed: int = 0
    dev: NonNegativeInt = 0
    unseen: NonNegativeInt = 0
    held_out_from: Literal["all"] | str | tuple[Name, ...] | HeldOutSection = "all"

    @model_validator(mode="after")
    def _tiers_fit(self) -> "ClientsSection":
        _raise_lines([*self._share_problems(), *self._assign_problems()])
        return self

    def _share_problems(self) -> Iterator[str]:
        with_share = [name for name, tier in self.tiers.items() if tier.share is not None]
        without = [name for name in self.tiers if name not in with_share]
        if self.distribution and (with_share or len(self.tiers) != 4):
            yield (
                f"clients.distribution: {self.distribution} needs four tiers without `share`, "
                f"got {len(self.tiers)} tiers, {len(with_share)} with a share"
            )
        elif with_share and without:
            yield f"clients.tiers.{without[0]}.share: missing; give all tiers one, or none"
        elif with_share and not any(tier.share for tier in self.tiers.values()):
            yield "clients.tiers: all shares are 0; give at least one tier a share"

    def _assign_problems(self) -> Iterator[str]:
        names = ", ".join(self.tiers)
        for client, tier in self.assign.items():
            if tier not in self.tiers:
                yield f"clients.assign.{client}: got {tier!r}, need one of {names}"


class ZeroSection(Section):
    """What DeepSpeed ZeRO divides among the processes that train a client."""

    stage: Literal[1, 2, 3] = 3
    offload: Literal["none", "cpu"] = "none"


class TrainingSection(Section):
    """Local training of one client in one round."""

    engine: EngineName = "plain"
    processes: PositiveInt = 1
    nodes: Annotated[PositiveInt, Field(json_schema_extra=EXECUTION)] = 1
    zero: ZeroSection = ZeroSection()
    deepspeed: dict[str, Any] = {}
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 4
    micro_batch_size: PositiveInt | None = None
    micro_batch_tokens: PositiveInt | None = None
    smaller_micro_batch: bool = False
    clients_per_batch: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    cut_rounds: tuple[PositiveInt, ...] = ()
    cut_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: PositiveFloat | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    threads: PositiveInt = 1
    device: Annotated[str, Field(json_schema_extra=EXECUTION)] = "auto"
    checkpoint_every_minutes: Annotated[PositiveFloat, Field(json_schema_extra=EXECUTION)] = 10.0

    @model_validator(mode="after")
    def _processes_fit(self) -> "TrainingSection":
        _raise_lines(list(self.process_problems({})))
        return self

    def process_problems(self, tier_keys: Mapping[str, str]) -> Iterator[str]:
        """Yield a line for every key that does not fit the engine.

        Args:
            tier_keys: field -> its key in a tier, for the fields that a tier has set.
        """
        keys = {name: tier_keys.get(name, f"training.{name}") for name in _OF_TIERS}
        processes, engine = f"{keys['processes']}: got {self.processes}", keys["engine"]
        if self.engine == "plain" and self.processes > 1:
            yield (
                f"{processes}, but {engine} plain trains a client in one process; need 1, "
                f"or {engine}: zero"
            )
        if self.processes > self.batch_size:
            yield (
                f"{processes}, more than the {self.batch_size} rows of an optimizer step; need "
                f"<= {self.batch_size}, or a larger training.batch_size"
            )
        if self.processes % self.nodes:
            yield (
                f"{processes}, not the same number on each of {keys['nodes']} {self.nodes}; need "
                f"a multiple of {self.nodes}, or other nodes"
            )
        if self.engine == "zero":
            yield from deepspeed_problems(self.deepspeed, self)
        if self.engine == "zero" and self.clients_per_batch > 1:
            yield (
                f"training.clients_per_batch: got {self.clients_per_batch}, but {engine} "
                f"zero trains one client at a time; need 1, or {engine}: plain"
            )
        if self.smaller_micro_batch and self.processes > 1 and self.zero.stage == 3:
            yield (
                "training.smaller_micro_batch: got true, but processes that divide the base "
                "(training.zero.stage 3) cannot begin again when one of them runs out of memory; "
                "need false, a smaller training.micro_batch_size, or training.zero.stage: 1 or 2"
            )


class MethodSection(Section):
    """Federated method: `name` and `options` are the server side, `local...` the client side.

    `fedllm.methods.options` checks the options: each side has its own.
    """

    name: str = "flexlora"
    local: str = "fedit"
    options: MethodOptions = {}
    local_options: MethodOptions = {}
    server: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    server_options: MethodOptions = {}


def is_own(name: str) -> bool:
    """Return whether `method.name` names a class of the user's own, as `package.module:Class`."""
    return ":" in name


class AggregationSection(Section):
    """Aggregation: on which devices, how exactly, and after which checks of the updates."""

    device: Annotated[str | tuple[str, ...], Field(json_schema_extra=EXECUTION)] = "auto"
    threads: PositiveInt = 1
    exact: bool = False
    tolerance: PositiveFloat = 1e-4
    block_clients: PositiveInt = 32
    weights: Literal["rows", "uniform"] = "rows"
    outliers: Literal["keep", "clip", "reject"] = "keep"
    outlier_factor: Annotated[float, Field(gt=1)] = 10.0

    @model_validator(mode="after")
    def _devices_are_named(self) -> "AggregationSection":
        names = (self.device,) if isinstance(self.device, str) else self.device
        problems = [f"got {name!r}" for name in names if not _DEVICE.fullmatch(name)]
        if not names:
            problems = ["got an empty list, need at least one"]
        _raise_lines([f"aggregation.device: {p}; need auto, cpu, cuda or cuda:N" for p in problems])
        return self


class PrivacySection(Section):
    """Differential privacy of whole clients: what bounds a client's change, and how much noise."""

    clip_norm: PositiveFloat | None = None
    noise_multiplier: PositiveFloat = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5


class EvaluationSection(Section):
    """Evaluation: which clients are scored, when (`every: 0` is never), and on how many rows."""

    every: NonNegativeInt = 1
    clients: PositiveInt | None = None
    rows_per_client: PositiveInt | None = None
    complete_at_end: bool = True
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 16
    keep_answers: Annotated[NonNegativeInt, Field(json_schema_extra=EXECUTION)] = 2


class SbatchSection(Section):
    """sbatch options, by job kind; `tiers` overrides `client` for the tiers it names."""

    default: SbatchOptions = {}
    prepare: SbatchOptions = {}
    coordinator: SbatchOptions = {}
    client: SbatchOptions = {}
    aggregate: SbatchOptions = {}
    evaluate: SbatchOptions = {}
    tiers: dict[Name, SbatchOptions] = {}


class SchedulerSection(Section):
    """Scheduler: where and how jobs run. No key here changes a result."""

    kind: Literal["inline", "local", "slurm"] = "local"
    workers: PositiveInt = 2
    max_parallel: PositiveInt = 64
    target_minutes: PositiveFloat = 30.0
    worker_minutes_min: PositiveFloat = 5.0
    worker_teraflops: PositiveFloat | None = None
    clients_per_bundle: PositiveInt | Literal["auto"] = "auto"
    clients_per_task: PositiveInt | Literal["auto"] = "auto"
    linger_minutes: Annotated[float, Field(ge=0)] = 0.0
    coordinator: Literal["resident", "chained"] = "resident"
    max_attempts: PositiveInt = 3
    hung_minutes: PositiveFloat = 60.0
    node_failures: PositiveInt = 3
    poll_seconds: PositiveFloat = 10.0
    query_seconds: PositiveFloat = 60.0
    python: str | None = None
    setup: tuple[str, ...] = ()
    interface: str | None = None
    sbatch: SbatchSection = SbatchSection()

    @model_validator(mode="after")
    def _one_bundle_size(self) -> "SchedulerSection":
        bundle, task = self.clients_per_bundle, self.clients_per_task
        if "auto" not in {bundle, task}:
            _raise_lines(
                [
                    f"scheduler.clients_per_task: got {task} beside clients_per_bundle {bundle}; "
                    "give one of them and leave the other `auto`"
                ]
            )
        return self


class StorageSection(Section):
    """Storage: the shared cache, and what is kept of a run."""

    cache: str | None = None
    visibility_seconds: Annotated[float, Field(ge=0)] = 90.0
    keep_states: PositiveInt = 2
    keep_every: PositiveInt = 10
    keep_logs: PositiveInt = 20
    node_local: str | None = None
    group: str | None = None


class StoppingSection(Section):
    """Early stopping: after so many evaluations without a lower loss of dev clients."""

    patience: PositiveInt | None = None
    min_gain: Annotated[float, Field(ge=0)] = 0.0


class Config(Section):
    """A whole experiment."""

    seed: int = 0
    rounds: Annotated[PositiveInt, Field(json_schema_extra={"kind": "may grow"})] = 3
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    clients: ClientsSection
    training: TrainingSection = TrainingSection()
    method: MethodSection = MethodSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    stopping: Annotated[StoppingSection, Field(json_schema_extra=EXECUTION)] = StoppingSection()
    scheduler: Annotated[SchedulerSection, Field(json_schema_extra=EXECUTION)] = SchedulerSection()
    storage: Annotated[StorageSection, Field(json_schema_extra=EXECUTION)] = StorageSection()

    def training_of(self, tier: str) -> TrainingSection:
        """Return how the clients of a tier train: what the tier says comes before `training`."""
        own = self.clients.tiers[tier]
        changes = {**_OF_ENGINES.get(own.engine, {}), **_set_by(own)}
        return self.training.model_copy(update=changes)

    @model_validator(mode="after")
    def _can_stop_early(self) -> "Config":
        if self.stopping.patience is not None:
            needs = "stopping.patience: needs"
            if not self.clients.dev:
                _raise_lines([f"{needs} dev clients, but clients.dev is 0; set it, or null here"])
            if not self.evaluation.every:
                _raise_lines([f"{needs} evaluations, but evaluation.every is 0; need >= 1"])
        return self

    @model_validator(mode="after")
    def _tiers_can_train(self) -> "Config":
        lines: list[str] = []
        for name, tier in self.clients.tiers.items():
            if own := _set_by(tier):
                keys = {field: f"clients.tiers.{name}.{field}" for field in own}
                lines += self.training_of(name).process_problems(keys)
        engines = {self.training_of(name).engine for name in self.clients.tiers}
        if self.training.deepspeed and "zero" not in engines:
            lines.append(
                "training.deepspeed: given, but no tier trains with DeepSpeed; remove it, or set "
                "training.engine: zero"
            )
        _raise_lines(list(dict.fromkeys(lines)))
        return self

    @model_validator(mode="after")
    def _clients_are_private(self) -> "Config":
        if self.privacy.clip_norm is not None:
            _raise_lines(list(self._privacy_problems()))
        if self.clients.cohort.sampling == "poisson" and self.clients.over_sample:
            got = f"clients.over_sample: got {self.clients.over_sample}"
            _raise_lines([f"{got}, but a Poisson cohort has no size; need 0, or sampling: fixed"])
        return self

    def _privacy_problems(self) -> Iterator[str]:
        """Yield a line for each key with which other clients would decide what one counts."""
        needed = {
            "aggregation.weights": (self.aggregation.weights, "uniform"),
            "aggregation.outliers": (self.aggregation.outliers, "keep"),
            "clients.quorum": (self.clients.quorum, "all"),
            "clients.over_sample": (self.clients.over_sample, 0.0),
            "clients.deadline_minutes": (self.clients.deadline_minutes, None),
        }
        for key, (found, need) in needed.items():
            if found != need:
                word = "null" if need is None else need
                yield f"{key}: got {found}; with privacy.clip_norm it has to be {word}"

    @model_validator(mode="after")
    def _options_are_of_tiers(self) -> "Config":
        names = ", ".join(self.clients.tiers)
        unknown = [tier for tier in self.scheduler.sbatch.tiers if tier not in self.clients.tiers]
        where = "scheduler.sbatch.tiers"
        _raise_lines([f"{where}.{tier}: no such tier; need one of {names}" for tier in unknown])
        return self
