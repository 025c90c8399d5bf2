"""Configuration as frozen models; every default is here and nowhere else.

Sections and keys that are marked `EXECUTION` may change on resume. All others decide the result
and are frozen with the first round.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedllm.config.deepspeed_keys import deepspeed_problems
from fedllm.config.spelling import misread
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
# beyond it, a count is a mistake
LARGEST_COUNT = 10**9
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Threads = Annotated[int, Field(ge=1, le=1024)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Rank = Annotated[int, Field(ge=1, le=65_536)]
RankSpec = Rank | dict[str, Rank]
EngineName = Literal["plain", "zero"]
RowFormat = Literal["auto", "alpaca", "messages", "sharegpt", "completion"]
SbatchOptions = dict[str, str | int | float | bool | None]
MethodOptions = dict[str, str | int | float | bool | None]


def _raise_lines(lines: Sequence[str]) -> None:
    if lines:
        raise PydanticCustomError(WHOLE_LINES, "{lines}", {"lines": "\n".join(lines)})


def _require_devices(key: str, names: Sequence[str]) -> None:
    problems = [f"got {name!r}" for name in names if not _DEVICE.fullmatch(name)]
    if not names:
        problems = ["got an empty list, need at least one"]
    _raise_lines([f"{key}: {p}; need auto, cpu, cuda or cuda:N" for p in problems])


# lists in which the same value again means something, or that the sweep checks by itself
_MAY_REPEAT = {"setup", "cut_rounds", "device", "seeds", "contrast_seeds", "learning_rates"}


class Section(BaseModel):
    """A group of keys; unknown ones are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic or the system would read as something else, or not at all."""
        assert info.field_name is not None
        if problem := misread(value, cls.model_fields[info.field_name].annotation):
            raise ValueError(problem)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _names_each_once(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a list that names something twice."""
        if isinstance(value, tuple) and info.field_name not in _MAY_REPEAT:
            twice = [each for place, each in enumerate(value) if each in value[:place]]
            if twice:
                raise ValueError(f"which names {twice[0]} twice; give it once")
        return value


class ModelSection(Section):
    """Base model (a directory, a hub name or `embedded`), and an adapter to start from."""

    path: Annotated[str, Field(json_schema_extra=EXECUTION)] = "embedded"
    """A Hugging Face model directory, a hub name, or `embedded`: a small model that fedllm
    makes. The content is fingerprinted: the same model at another path is fine, another model
    is not."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the base's matrices in memory. Adapters are float32. See [number
    formats](training.md#number-formats) for the format of each computation."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Bits of the base's linear layers, which are quantised when a worker loads the base:
    `nf4` (QLoRA, 4.1 bits a weight) or `int8` (8 bits, a scale for each row). It needs the
    extra `fedllm[quantization]`; see [quantised bases](training.md#quantised-bases)."""
    adapter: str | None = None
    """Folder of a PEFT adapter to start from, of any rank. It must be for this base and adapt
    only modules of `lora.target_modules`. The state before round 1 is its change, at the
    largest ranks of `clients.tiers` (the log reports how much of the change they keep); with
    `factor_mean` its rank must be that of all tiers. Its content is fingerprinted."""


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
    """Linear layers that get an adapter, read as in PEFT. See [Which layers](#which-layers)."""
    alpha: PositiveFloat = 16.0
    """Alpha of the scale of an update; see `lora.scaling`."""
    scaling: Literal["fixed", "proportional", "rslora"] = "fixed"
    """Scale of an update: alpha / rank (`fixed`), 2 at every rank (`proportional`), or
    alpha / √rank (`rslora`). With `fixed`, high ranks learn more slowly at one learning rate."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout of the adapter's input, drawn per row and position, but once for a prefix that
    rows share: see [training](training.md#dropout)."""

    @field_validator("target_modules")
    @classmethod
    def _can_name_modules(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if problem := target_problem(value):
            raise ValueError(problem)
        return value


class ColumnsSection(Section):
    """Column names of the user's data; `category` and `instruction` may be absent."""

    client: str | None = "client_id"
    """Column that names the client of a row; text or numbers. `null`: there is none, with
    `data.partition`."""
    category: str | None = "category"
    """Column of the category: dev and unseen clients are drawn from all categories alike, and
    scores are given by category. `null`: there is none."""
    instruction: str | None = "instruction"
    """Column of the instruction; `null`: there is none."""
    input: str | None = "input"
    """Column of the input; `null`: there is none."""
    output: str = "output"
    """Column of the answer: text, or a list of references, of which the first is trained."""


class PartitionSection(Section):
    """Partition: clients for data without clients, or other clients than the data's."""

    kind: Literal["column", "iid", "dirichlet", "pathological", "quantity"] = "column"
    """Where clients come from: the column, or a draw ([partitions](data.md#partitions))."""
    clients: PositiveInt | None = None
    """Number of clients of a draw; not for `column`."""
    alpha: PositiveFloat = 0.5
    """Of `dirichlet` and `quantity`: the smaller, the more clients differ."""
    categories: PositiveInt = 2
    """Of `pathological`: categories of a client."""
    min_rows: PositiveInt = 2
    """Least number of training rows of a client; the draw is repeated until every client has
    them."""
    seed: int = 0
    """Seed of the draw."""

    @model_validator(mode="after")
    def _has_clients(self) -> "PartitionSection":
        if self.kind != "column" and self.clients is None:
            _raise_lines([f"data.partition.clients: missing; kind {self.kind} needs their number"])
        return self


class DataSection(Section):
    """Data: the rows, how they become tokens, and which tokens have a loss."""

    path: Annotated[str, Field(json_schema_extra=EXECUTION)] = "embedded"
    """A folder of `train`, `validation` and `test` files, one file, a folder that `datasets`
    saved, a hub name, or `embedded`: [data](data.md) has the kinds of files and their names."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    format: RowFormat = "auto"
    """Format of the rows ([data](data.md#formats-of-rows)); `auto` finds it from the columns."""
    columns: ColumnsSection = ColumnsSection()
    partition: PartitionSection = PartitionSection()
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    """Prompt around instruction and input: Alpaca's; the tokenizer's own template; or none,
    directly followed by the answer. See [prompts](#prompts)."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that have a loss: those of the answer (of all answers of a conversation), or also
    those of the prompt."""
    cutoff_tokens: PositiveInt = 512
    """Maximum length of a row. If a row is longer, a conversation first loses its oldest turns;
    then the input is cut at its end, then the instruction, then the answer."""
    test_fraction: Fraction = 0.1
    """Share of each client's rows that becomes its test split if the data have none."""
    embedded_clients: Annotated[int, Field(ge=12, le=100_000)] = 16
    """Number of clients of `embedded`."""
    embedded_rows: Annotated[int, Field(ge=20, le=196)] = 96
    """Number of rows of each client of `embedded`."""

    @model_validator(mode="after")
    def _has_clients(self) -> "DataSection":
        if self.columns.client is None and self.partition.kind == "column":
            line = "data.columns.client: got null, name the column, or set data.partition.kind"
            _raise_lines([line])
        return self


class TierSection(Section):
    """A class of clients: its ranks, its share of the clients, and how it trains if otherwise."""

    ranks: RankSpec | None = None
    """One rank for all modules, or a table of ranks by `attention` and `mlp`, by module name
    (`q_proj`) or by full path; the most specific entry wins. `null`, with `clients.ranks: fit`:
    what fits into `memory_gib`."""
    share: Annotated[float, Field(ge=0)] | None = None
    """Share of the clients, met exactly (largest remainder). Without any share, all tiers have
    equal shares."""
    engine: EngineName | None = None
    """Engine of this tier's clients, where it is another than `training.engine`: small clients
    train alone, large ones in several processes."""
    processes: PositiveInt | None = None
    """Processes that train a client of this tier together; `null`: 1 where the tier says
    `engine: plain`, else `training.processes`."""
    nodes: Annotated[PositiveInt | None, Field(json_schema_extra=EXECUTION)] = None
    """Nodes over which these processes are spread; `null`: 1 where the tier says `engine:
    plain`, else `training.nodes`."""
    memory_gib: Annotated[PositiveFloat | None, Field(json_schema_extra=EXECUTION)] = None
    """Memory of one process that trains this tier's clients, in GiB: of its GPU, or its share
    of the node. A base that does not fit beside adapter, gradients and optimizer is refused
    before anything is submitted; activations are not counted. `fedllm plan` prints what a
    process needs at least, by stage."""


def _set_by(tier: TierSection) -> dict[str, Any]:
    values = {name: getattr(tier, name) for name in _OF_TIERS}
    return {name: value for name, value in values.items() if value is not None}


class CohortSection(Section):
    """Cohort size: how many clients train in a round."""

    count: Annotated[PositiveInt, Field(le=10_000_000)] | None = None
    """Number of clients in a round. Give this or `fraction`."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the trainable clients in a round. With `--set`, each of the two replaces the
    other."""
    sampling: Literal["fixed", "poisson"] = "fixed"
    """`fixed`: all cohorts have the same size. `poisson`: each client is drawn independently, and
    cohorts have this size on average. Without `privacy.clip_norm` the average must be at least 28,
    so that no cohort is empty."""
    tiers: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Only clients of these tiers are drawn; the others are scored. `null`: all tiers."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "CohortSection":
        if (self.count is None) == (self.fraction is None):
            raise ValueError("give either `count` or `fraction`, and null for the other")
        return self


class HeldOutSection(Section):
    """Clients that may become dev or unseen: `column` modulo `modulo` equals `equals`."""

    column: str
    """Of the table: an integer column of the data."""
    modulo: PositiveInt
    """Of the table: what the values of the column are divided by."""
    equals: NonNegativeInt
    """Of the table: the remainder that a client must leave to be held out."""


class ClientsSection(Section):
    """Clients: their tiers, how many train in a round, and which never train."""

    tiers: Annotated[dict[Name, TierSection], Field(min_length=1)]
    """The classes of clients, at least one, with names that you choose. Their order is part of
    the draw."""
    distribution: Literal["uniform", "heavy_tail_light", "heavy_tail_strong", "normal"] | None = (
        None
    )
    """Shares of four tiers by name, instead of `share`: 25/25/25/25, 80/5/5/10, 5/5/10/80,
    5.7/44.3/44.3/5.7."""
    assign: dict[Name, Name] = {}
    """Client and tier of clients with a fixed tier; the tiers of all others are drawn."""
    tier_seed: int | None = None
    """Seed of the draw of tiers; `null`: `seed`."""
    ranks: Literal["tiers", "fit"] = "tiers"
    """Ranks of the tiers: each says its own, or (`fit`) those without `ranks` get the largest of
    `clients.fit_ranks` whose predicted peak memory fits into their `memory_gib`. `prepare` trains
    two steps in a process of its own to predict it; the choice is recorded, and frozen with the
    first round."""
    fit_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (2, 4, 8, 16, 32, 64)
    """The ranks among which `clients.ranks: fit` chooses, one for all modules of a tier."""
    cohort: CohortSection = CohortSection(fraction=0.05)
    quorum: PositiveInt | Annotated[float, Field(gt=0, le=1)] | Literal["all"] = "all"
    """Number of valid updates that a round needs, as count or share of the cohort; with fewer
    the run ends with exit code 1. An update with values that are not finite is not valid: its
    client is left out and named."""
    over_sample: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Share of clients drawn beyond the cohort's size. The round goes on as soon as enough
    clients for the cohort's size have valid updates. The tiers of these clients are reported."""
    deadline_minutes: PositiveFloat | None = None
    """After this time of training, a round that meets the quorum goes on without the other
    clients."""
    ranks_above_module: Literal["error", "cap"] = "error"
    """A rank above a module's smaller side is refused (`error`), or lowered to that side
    (`cap`)."""
    split_seed: int = 0
    """Seed of the draw of dev and unseen clients, and of evaluation subsets."""
    dev: NonNegativeInt = 0
    """Number of clients that never train and choose the best round."""
    unseen: NonNegativeInt = 0
    """Number of clients that never train and are only scored."""
    held_out_from: Literal["all"] | str | tuple[Name, ...] | HeldOutSection = "all"
    """Clients from which dev and unseen are drawn: all, a list of ids, a file of them, or a
    table. The file has one id per line; spaces around an id and empty lines are ignored."""

    unseen_categories: tuple[Name, ...] = ()
    """Categories whose clients never train; all of them with test rows are scored, as a group of
    their own beside `unseen`."""

    @model_validator(mode="after")
    def _tiers_fit(self) -> "ClientsSection":
        _raise_lines(
            [
                *self._share_problems(),
                *self._assign_problems(),
                *self._cohort_problems(),
                *self._rank_problems(),
            ]
        )
        return self

    @property
    def fitted_tiers(self) -> tuple[str, ...]:
        """The tiers whose rank follows from their memory."""
        return tuple(name for name, tier in self.tiers.items() if tier.ranks is None)

    def _rank_problems(self) -> Iterator[str]:
        for name in self.fitted_tiers:
            key = f"clients.tiers.{name}"
            if self.ranks == "tiers":
                yield f"{key}.ranks: missing; give a rank, or clients.ranks: fit and memory_gib"
            elif self.tiers[name].memory_gib is None:
                yield f"{key}.memory_gib: missing; clients.ranks: fit chooses a rank for it"
        if self.ranks == "fit" and not self.fitted_tiers:
            yield "clients.ranks: got fit, but all tiers have ranks; remove theirs, or set tiers"

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

    def _cohort_problems(self) -> Iterator[str]:
        names = ", ".join(self.tiers)
        for tier in self.cohort.tiers or ():
            if tier not in self.tiers:
                yield f"clients.cohort.tiers: got {tier!r}, need some of {names}"
        count = self.cohort.count
        if count is not None and isinstance(self.quorum, int) and self.quorum > count:
            yield (
                f"clients.quorum: got {self.quorum}, clients.cohort.count is {count}; lower it, or "
                "give `all` or a share"
            )

    def _assign_problems(self) -> Iterator[str]:
        names = ", ".join(self.tiers)
        for client, tier in self.assign.items():
            if tier not in self.tiers:
                yield f"clients.assign.{client}: got {tier!r}, need one of {names}"


class ZeroSection(Section):
    """What DeepSpeed ZeRO divides among the processes that train a client."""

    stage: Literal[1, 2, 3] = 3
    """What the processes divide: `1` what the optimizer keeps, `2` the summed gradients too,
    `3` the weights of the base too."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps the optimizer's state in the host's memory and updates there."""
    restart_after_clients: Annotated[PositiveInt, Field(json_schema_extra=EXECUTION)] = 200
    """After so many clients the processes of a task end, and new ones take their place within the
    task: memory that libraries never free is bounded. A single process stays."""


class TrainingSection(Section):
    """Local training of one client in one round."""

    engine: EngineName = "plain"
    """`zero` trains a client in several processes with DeepSpeed ZeRO ([several
    processes](training.md#several-processes)); it needs the extra `fedllm[deepspeed]`."""
    processes: PositiveInt = 1
    """Processes of a worker that train a client together, at most one for each row of an
    optimizer step; more than one needs `training.engine: zero`, and `scheduler.kind: local` or
    `slurm`."""
    nodes: Annotated[PositiveInt, Field(json_schema_extra=EXECUTION)] = 1
    """Nodes over which the processes are spread evenly; more than one needs `scheduler.kind:
    slurm`. sbatch options of memory (`mem`) and `gpus-per-node` are per node, `cpus-per-task`
    and `gpus-per-task` per process."""
    zero: ZeroSection = ZeroSection()
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed, such as bucket sizes ([keys](training.md#several-processes)),
    or the path of a JSON or YAML file of them, whose content the run keeps. Keys that follow
    from keys of fedllm may be `auto`; another value is refused."""
    epochs: PositiveInt = 1
    """Passes over the client's rows."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps of a client in a round."""
    batch_size: PositiveInt = 4
    """Rows of an optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Rows in memory at once (gradients are accumulated); `null`: the whole batch."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens computed at once, including a shared prefix. A step with more tokens is divided
    further, so memory no longer depends on the rows' lengths. With `flex` on a GPU they are
    filled up to a multiple of 128; if clients train together, each member has the limit for
    itself. The longest row of a client that trains has to fit; `null`: the limit of the layout
    ([how rows are computed](training.md))."""
    smaller_micro_batch: bool = False
    """If memory runs out, train the client again from its start with half the micro-batch, down
    to one row, instead of ending with an error. The size is recorded with its update. Processes
    that divide the base (stage 3) refuse it."""
    clients_per_batch: PositiveInt = 1
    """Number of clients of similar rank that train together, each with its own adapter and
    optimizer, in one pass over the base."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate at the top of the schedule. Tune it per method: ranks and optimizers differ."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Schedule of the learning rate over the client's own steps of the round; all but
    `constant` end at zero."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise at the start of the schedule."""
    cut_rounds: tuple[PositiveInt, ...] = ()
    """From each of these rounds on, the learning rate is multiplied by `cut_factor`."""
    cut_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What the learning rate is multiplied by at each of `cut_rounds`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimizer."""
    clip_norm: PositiveFloat | None = 1.0
    """Maximum norm of a step's gradient; `null`: no maximum."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Format of the products with the base's weights, in training and evaluation. Adapters,
    sums with them and the optimizer are float32 ([number formats](training.md#number-formats))."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Layers keep only their input and are computed again in the backward pass: less memory for
    more time, the same bits. `true`: all; `auto`: as many as it takes to keep a pass within a
    [budget](training.md#memory)."""
    threads: Threads = 1
    """CPU threads of a worker. A result key, because it changes rounding."""
    device: Annotated[str, Field(json_schema_extra=EXECUTION)] = "auto"
    """`auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:N`."""
    checkpoint_every_minutes: Annotated[PositiveFloat, Field(json_schema_extra=EXECUTION)] = 10.0
    """How often a worker publishes its finished clients and saves the client in training, which
    can then continue at that step. It does so on a warning signal too. Finished clients are
    also published at the end of a bundle."""

    @model_validator(mode="after")
    def _device_is_named(self) -> "TrainingSection":
        _require_devices("training.device", (self.device,))
        return self

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
    """Server side: how updates become the next state. See [methods](methods.md)."""
    local: str = "fedit"
    """Client side: how a client trains, and with which optimizer (AdamW, or SGD)."""
    options: MethodOptions = {}
    """The server side's own options: see [methods](methods.md#server-side)."""
    local_options: MethodOptions = {}
    """The client side's own options: see [methods](methods.md#client-side)."""
    server: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    """The server's optimizer: see [methods](methods.md#the-servers-optimizer)."""
    server_options: MethodOptions = {}
    """The options of the server's optimizer."""


def is_own(name: str) -> bool:
    """Return whether `method.name` names a class of the user's own, as `package.module:Class`."""
    return ":" in name


class AggregationSection(Section):
    """Aggregation: on which devices, how exactly, and after which checks of the updates."""

    device: Annotated[str | tuple[str, ...], Field(json_schema_extra=EXECUTION)] = "auto"
    """As `training.device`; the modules are distributed over a list of devices, such as
    `[cuda:0, cuda:1]`."""
    threads: Threads = 1
    """CPU threads of the aggregation."""
    exact: bool = False
    """Use only direct decompositions in float64."""
    tolerance: PositiveFloat = 1e-4
    """How much more energy an iterative decomposition may leave out than an exact one, as a share
    of what the exact one leaves out."""
    block_clients: PositiveInt = 32
    """Number of clients in a block; updates are summed block by block, in the cohort's order."""
    weights: Literal["rows", "uniform"] = "rows"
    """Weight of a client in the mean: its number of training rows, or the same for all clients."""
    outliers: Literal["keep", "clip", "reject"] = "keep"
    """What to do with a client whose change of a module is more than `outlier_factor` times the
    median."""
    outlier_factor: Annotated[float, Field(gt=1)] = 10.0
    """How many times the median make a client an outlier (`outliers`)."""

    @model_validator(mode="after")
    def _devices_are_named(self) -> "AggregationSection":
        _require_devices(
            "aggregation.device", (self.device,) if isinstance(self.device, str) else self.device
        )
        return self


class PrivacySection(Section):
    """Differential privacy of whole clients: what bounds a client's change, and how much noise."""

    clip_norm: PositiveFloat | None = None
    """The largest norm of a client's change over all modules; `null`: clients are not private."""
    noise_multiplier: PositiveFloat = 1.0
    """Standard deviation of the noise on the sum of changes, in units of `clip_norm`."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The delta at which epsilon is stated."""


class EvaluationSection(Section):
    """Evaluation: which clients are scored, when (`every: 0` is never), and on how many rows."""

    every: NonNegativeInt = 1
    """Number of rounds from one evaluation to the next; the base and the last round are always
    evaluated. `0`: never."""
    clients: PositiveInt | None = None
    """Maximum number of clients of each group (trained, dev, unseen): a fixed seeded subset."""
    rows_per_client: PositiveInt | None = None
    """Maximum number of test rows of each client: a fixed seeded subset."""
    complete_at_end: bool = True
    """Score all clients and rows at the base and after the last round, regardless of the two
    limits."""
    max_new_tokens: PositiveInt = 128
    """Maximum length of a generated answer."""
    batch_size: PositiveInt = 16
    """Number of rows scored at once."""
    rougeL_published: bool = False  # noqa: N815  # as published tables call it
    """Also score the likeliest token at each place of the true answer, as FlexLoRA's published code
    does: for comparison with published figures only ([methods](methods.md#scores))."""
    keep_answers: Annotated[NonNegativeInt, Field(json_schema_extra=EXECUTION)] = 2
    """Number of scored rows per client whose generated answers are kept, in
    `evaluation/answers.json`."""


class SbatchSection(Section):
    """sbatch options, by job kind; `tiers` overrides `client` for the tiers it names."""

    default: SbatchOptions = {}
    """sbatch options of every job, by their long names or their letters: `{account: me, time:
    60}`."""
    prepare: SbatchOptions = {}
    """sbatch options of prepare; they override the default."""
    coordinator: SbatchOptions = {}
    """sbatch options of the coordinator (`fedllm submit`)."""
    client: SbatchOptions = {}
    """sbatch options of the workers that train."""
    aggregate: SbatchOptions = {}
    """sbatch options of the aggregation."""
    evaluate: SbatchOptions = {}
    """sbatch options of the evaluation."""
    tiers: dict[Name, SbatchOptions] = {}
    """sbatch options of one tier's workers; they override `client`. Tiers with equal options
    and equal engines share an array."""


class SchedulerSection(Section):
    """Scheduler: where and how jobs run. No key here changes a result."""

    kind: Literal["inline", "local", "slurm"] = "local"
    """In the coordinator itself, in local worker processes, or as Slurm job arrays."""
    workers: Annotated[PositiveInt, Field(le=10_000)] = 2
    """Number of processes of `local`."""
    max_parallel: PositiveInt = 64
    """Maximum number of array tasks of `slurm` that run at once."""
    target_minutes: PositiveFloat = 30.0
    """Work that an array task should have when slots are scarce."""
    worker_minutes_min: PositiveFloat = 5.0
    """Minimum work of an array task when slots are free: more tasks start only if each has at
    least this much work."""
    worker_teraflops: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """Sustained speed of a worker, for estimates before anything is measured; `null`: for each
    of its processes 20 with a GPU, 0.03 without."""
    clients_per_bundle: PositiveInt | Literal["auto"] = "auto"
    """Clients that a worker claims at once; `auto` makes bundles smaller towards the end. A
    group of `training.clients_per_batch` stays whole."""
    clients_per_task: PositiveInt | Literal["auto"] = "auto"
    """A number: bundles of that many clients, and one array task for each bundle; 1 is one task
    per client. A group of `training.clients_per_batch` stays whole."""
    linger_minutes: Annotated[float, Field(ge=0)] = 0.0
    """How long a worker without work waits for the next round before it ends."""
    coordinator: Literal["resident", "chained"] = "resident"
    """`fedllm submit` starts one small job for the whole run, or a chain of short jobs."""
    max_attempts: PositiveInt = 3
    """Number of consecutive attempts without any progress after which the run ends."""
    hung_minutes: PositiveFloat = 60.0
    """A running worker is ended if its progress record does not change for this time; other
    workers train its clients. The processes of one worker wait three quarters of it for each
    other."""
    node_failures: PositiveInt = 3
    """Number of failed tasks in a round after which a node is excluded."""
    poll_seconds: PositiveFloat = 10.0
    """Time between two scans of the run directory; in a long round it grows to a hundredth of
    the training time so far, up to `query_seconds`."""
    query_seconds: PositiveFloat = 60.0
    """Minimum time between two queries to Slurm."""
    python: str | None = None
    """Command that runs Python in a job, for example `apptainer exec image.sif python`; `null`:
    the Python that runs fedllm."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before Python, for example `module load cuda`."""
    interface: str | None = None
    """Network interface over which the processes of a task reach each other (`ib0`): jobs of
    several processes start with it in `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME`. `null`:
    that of the host name. `fedllm doctor` tells whether it works and how fast it is."""
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
    """Folder of fetched models, tokenised data and the embedded base, which runs share; `null`:
    `$FEDLLM_CACHE`, else the user's (`$XDG_CACHE_HOME/fedllm`); with `scheduler.kind: slurm`,
    `.fedllm-cache` beside the run directories, which nodes share."""
    visibility_seconds: Annotated[float, Field(ge=0)] = 90.0
    """With Slurm: how long a file that a record names may take to appear (NFS caches) before it
    counts as damaged."""
    keep_states: PositiveInt = 2
    """Number of last rounds whose server states are kept; the best round's state is always kept."""
    keep_every: PositiveInt = 10
    """The state of every such round is kept too (10: every tenth). Updates are removed once the
    next round is aggregated."""
    keep_logs: PositiveInt = 20
    """Number of rounds whose logs, claims and progress records are kept."""
    node_local: str | None = None
    """A folder on every node's own disk, to which base model and data are copied once per node.
    `$TMPDIR` and similar variables are expanded on the node."""
    group: str | None = None
    """Unix group that may read and write the run directory."""


class StoppingSection(Section):
    """Early stopping: after so many evaluations without a lower loss of dev clients."""

    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a lower mean loss of dev clients;
    `null`: never. Needs `clients.dev`."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """How much lower the loss has to be."""


class ReportingSection(Section):
    """Reporting: which experiment trackers get the metrics of every round."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that the coordinator gives the metrics of every finished round, the same as in
    `metrics.jsonl`: see [results](report.md#trackers). Each needs its package."""


class Config(Section):
    """A whole experiment."""

    seed: int = 0
    """Seed of everything random: cohorts, tiers, row order, dropout, initial A."""
    rounds: Annotated[PositiveInt, Field(le=100_000, json_schema_extra={"kind": "may grow"})] = 3
    """Number of training rounds. Round 0 is the state before training."""
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
    reporting: Annotated[ReportingSection, Field(json_schema_extra=EXECUTION)] = ReportingSection()

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
