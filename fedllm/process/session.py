"""The base model and the tokenised data, which a process loads once and keeps for all its steps."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed

from fedllm.config.models import Config
from fedllm.config.target_modules import Targets
from fedllm.errors import ModelError, UserError
from fedllm.model.device import resolve_device
from fedllm.planning.engines import engine_of, engines_of, scoring_engine
from fedllm.process.log import say
from fedllm.storage.frozen_config import FrozenConfigReader
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.publishing.staging import staged_folder
from fedllm.storage.records import PreparedRecord

if TYPE_CHECKING:
    from fedllm.data.cache import TokenizedClients
    from fedllm.model.base import Base
    from fedllm.packing.base_change import BaseChange
    from fedllm.packing.slots import AdapterSlots
    from fedllm.training.loop import LocalSettings
    from fedllm.training.trainer_protocol import OpenTrainer, Trainer


@dataclass(frozen=True, kw_only=True)
class _BaseKey:
    path: str
    dtype: str
    device: str
    to_divide: bool = False
    quantization: str = "none"


@dataclass(frozen=True, kw_only=True)
class _SlotsKey:
    base: _BaseKey
    fingerprint: str
    target_modules: Targets
    dropout: float
    layout: str


class Session:
    """A base model with its adapter slots, and one data set at a time.

    transformers, peft and pyarrow are imported on first use: an aggregation needs none of them.

    Args:
        kept_bytes: maximum size of a starting adapter that is kept for the next client. A larger
            one is made again for each client, which takes less than a step and no memory.
        held_bytes: size of finished clients' adapters at which they are published.
        trainers: the trainers by the name of their engine; None: those of `training.trainers`.
    """

    def __init__(
        self,
        *,
        kept_bytes: int = 32 << 20,
        held_bytes: int = 128 << 20,
        trainers: "Mapping[str, OpenTrainer] | None" = None,
    ) -> None:
        self.kept_bytes = kept_bytes
        self.held_bytes = held_bytes
        self._trainers = trainers
        self._base: tuple[_BaseKey, Base] | None = None
        self._slots: tuple[_SlotsKey, AdapterSlots] | None = None
        self._data: tuple[tuple[str, dict[str, str]], TokenizedClients] | None = None
        self._configs = FrozenConfigReader()
        self._prepared: tuple[tuple[Path, Version], PreparedRecord] | None = None
        self._near: dict[str, str] = {}

    def stage(self, folder: str, prepared: PreparedRecord) -> None:
        """Use copies of a run's base model and data below `folder`, on this node's own disk.

        Missing copies are made. If that fails, the log says so and the shared files are used.
        """
        below = CachePaths(root=Path())
        for shared, name in (
            (prepared.model_path, below.model(prepared.model_fingerprint)),
            (prepared.data_path, below.data(prepared.data_fingerprint)),
        ):
            if shared not in self._near:
                place, problem = staged_folder(Path(shared), name, folder)
                self._near[shared] = str(place)
                if problem:
                    say(problem)

    def _loaded(self, key: _BaseKey, threads: int) -> "Base":
        """Return a base model, loaded by the first call; set the number of threads."""
        # an earlier step of this process may have set another number
        torch.set_num_threads(threads)
        if self._base is None or self._base[0] != key:
            from fedllm.model.base import load_base

            # free the old model before the new one takes memory
            self._base = self._slots = None
            loaded = load_base(
                Path(key.path),
                dtype=key.dtype,
                device=key.device,
                to_divide=key.to_divide,
                quantization=key.quantization,
            )
            self._base = key, loaded
        return self._base[1]

    def slots(
        self,
        config: Config,
        prepared: PreparedRecord,
        *,
        to_divide: bool = False,
        change: "BaseChange | None" = None,
    ) -> "AdapterSlots":
        """Return the adapter slots of a run's base model.

        Args:
            config: configuration of the run.
            prepared: what was prepared of it.
            to_divide: whether each process of the task is to have a part of the weights only,
                which it reads when it first trains.
            change: what the base is to have in addition; one that it has from before is taken off.

        Raises:
            ModelError: its files are not the prepared ones.
        """
        device = str(resolve_device(config.training.device))
        path = self._near.get(prepared.model_path, prepared.model_path)
        key = _SlotsKey(
            base=_BaseKey(
                path=path,
                dtype=config.model.dtype,
                device=device,
                to_divide=to_divide,
                quantization=config.model.quantization,
            ),
            fingerprint=prepared.model_fingerprint,
            target_modules=config.lora.target_modules,
            dropout=config.lora.dropout,
            layout=_layout_of_engine(config, prepared) or layout_of(prepared, device),
        )
        if self._slots is not None and self._slots[0] != key:
            # the old slots have changed the model's layers: load a clean one
            self._base = self._slots = None
        base = self._loaded(key.base, config.training.threads)
        remedy = "restore it" if path == prepared.model_path else "remove this copy of it"
        if base.fingerprint != prepared.model_fingerprint:
            raise ModelError(
                f"{path}: not the model that was prepared (fingerprint {base.fingerprint[:12]}, "
                f"need {prepared.model_fingerprint[:12]}); {remedy}"
            )
        if self._slots is None:
            from fedllm.model.fingerprint import fingerprint_tokenizer
            from fedllm.packing.slots import AdapterSlots

            # a run of an earlier version does not know it
            known = prepared.tokenizer_fingerprint
            if known is not None and fingerprint_tokenizer(Path(path)) != known:
                raise ModelError(f"{path}: not the tokenizer that was prepared; {remedy}")

            slots = AdapterSlots(
                base, target_modules=key.target_modules, dropout=key.dropout, layout=key.layout
            )
            self._slots = key, slots
        self._slots[1].change_base(change)
        return self._slots[1]

    def scoring_slots(
        self, config: Config, prepared: PreparedRecord, change: "BaseChange | None" = None
    ) -> "AdapterSlots":
        """Return the slots in which a run's adapters are scored; the errors are those of `slots`.

        Where no tier's clients train on a whole base, the processes of this task divide it.

        Raises:
            UserError: the task has more or fewer processes than that takes.
        """
        engine = scoring_engine(engines_of(config))
        present = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if engine.divides_base and present != engine.processes:
            raise UserError(
                f"training.processes: {engine.processes} processes divide this run's base, and "
                f"score its adapters together; this task has {present}"
            )
        if engine.divides_base:
            from fedllm.training.trainers import require_installed

            require_installed(engine)
        slots = self.slots(config, prepared, to_divide=engine.divides_base, change=change)
        if engine.divides_base:
            from fedllm.training.partitioned import divide_base

            training = config.training
            divide_base(slots, resolve_device(training.device), training.deepspeed)
        return slots

    def trainer(
        self,
        config: Config,
        prepared: PreparedRecord,
        settings: "LocalSettings",
        change: "BaseChange | None" = None,
    ) -> "Trainer":
        """Return the trainer of a run's clients; the errors are those of `slots`."""
        from fedllm.training.trainers import TRAINERS, require_installed

        engine = engine_of(settings.training)
        require_installed(engine)
        trainers = TRAINERS if self._trainers is None else self._trainers
        slots = self.slots(config, prepared, to_divide=engine.divides_base, change=change)
        return trainers[engine.name](slots=slots, settings=settings)

    def end_task(self) -> None:
        """Drop a base whose parts the processes of the ended task hold: they part."""
        if self._base is not None and self._base[0].to_divide:
            self._base = self._slots = None
            gc.collect()  # its hooks are cycles

    def data(self, prepared: PreparedRecord) -> "TokenizedClients":
        """Return the tokenised clients of a run, or of their copy on this node.

        Raises:
            DataError: they are gone, or not as they were prepared.
        """
        path = self._near.get(prepared.data_path, prepared.data_path)
        key = path, prepared.data_sha256
        if self._data is None or self._data[0] != key:
            from fedllm.data.cache import TokenizedClients

            self._data = key, TokenizedClients.open(Path(path), prepared.data_sha256)
        return self._data[1]

    def config(self, run: RunPaths) -> Config:
        """Return a run's configuration, read again if the file changed; see `frozen_config`."""
        return self._configs.read(run)

    def prepared(self, path: Path) -> PreparedRecord:
        """Return the record of prepare, read again if the file changed.

        Raises:
            FileNotFoundError: nothing is prepared.
        """
        version = path, version_of(path)
        if self._prepared is None or self._prepared[0] != version:
            self._prepared = version, PreparedRecord.read(path)
        return self._prepared[1]


def _layout_of_engine(config: Config, prepared: PreparedRecord) -> str | None:
    """Return the layout that the run's engine needs; None: it needs none, or the base lacks it."""
    engine = engine_of(config.training)
    return engine.layout if engine.has_layout(prepared.layout) else None


def layout_of(prepared: PreparedRecord, device: str) -> str:
    """Return how rows are computed together on a device."""
    if prepared.layout is None:
        return "padded"
    return prepared.layout.cuda if device.startswith("cuda") else prepared.layout.cpu
