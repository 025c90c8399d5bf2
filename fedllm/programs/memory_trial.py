"""A training for its peak memory: `python -m fedllm.programs.memory_trial FOLDER TIER RANK`.

As a worker of the tier would, it trains two clients at one rank, one after the other: those with
the longest rows, for two optimizer steps on their longest ones. It prints the peak of its memory in
bytes. FOLDER has a configuration and the record of `prepare`, where a run directory has them.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from fedllm.config.loading import dump_config, read_config
from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.lora.factors import Adapter, Factors, ModuleShape
from fedllm.methods.catalog import local_rule, method_of
from fedllm.methods.local_task import Recipient
from fedllm.methods.protocol import Method
from fedllm.packing.base_change import BaseChange
from fedllm.packing.batches import TokenRow
from fedllm.packing.sequences import length_of
from fedllm.planning.classes import asks_for_gpus, tier_options
from fedllm.planning.engines import engine_of
from fedllm.planning.roles import split_roles
from fedllm.planning.tiers import candidate_ranks, fitted, predicted_bytes, resolve_ranks
from fedllm.process.session import Session
from fedllm.scheduling.heap import with_heap_settings
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import FittedRecord, ModuleRecord, PreparedRecord
from fedllm.training.loop import LocalSettings
from fedllm.training.step_plan import Draws
from fedllm.training.trainer_protocol import Member

_STEPS = 2  # from the second one on, the optimizer has its moments
_CLIENTS = 2  # the heap has grown in holes by the second one


def fit_ranks(config: Config, prepared: PreparedRecord) -> dict[str, FittedRecord]:
    """Return what fits into the tiers without ranks; each is measured at its smallest rank.

    Raises:
        ConfigError: nothing fits, or a tier's training cannot be measured here.
    """
    ranks = candidate_ranks(config, prepared.modules)
    optimizer = local_rule(config.method.local, config.method.local_options).optimizer
    found = {}
    for tier in config.clients.fitted_tiers:
        _refuse_other_place(config, tier)
        memory_gib = config.clients.tiers[tier].memory_gib
        assert memory_gib is not None, "a tier without ranks has memory"
        peak = measured_peak(config, prepared, tier, ranks[0])
        predicted = predicted_bytes(
            peak, ranks=ranks, modules=prepared.modules, optimizer=optimizer
        )
        found[tier] = fitted(tier, memory_gib, peak, predicted)
    return found


def _refuse_other_place(config: Config, tier: str) -> None:
    key = f"clients.tiers.{tier}.ranks"
    if engine_of(config.training_of(tier)).name == "zero":
        raise ConfigError(
            f"{key}: missing; clients.ranks: fit measures one process, and this tier trains with "
            "engine zero; give it ranks"
        )
    on_gpu = asks_for_gpus(tier_options(config.scheduler.sbatch, tier))
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"{key}: missing; clients.ranks: fit measures where prepare runs, which has no GPU; "
            "let scheduler.sbatch.prepare ask for one as the tier does, or give it ranks"
        )


def measured_peak(config: Config, prepared: PreparedRecord, tier: str, rank: int) -> int:
    """Return the peak memory of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(root=Path(folder))
        paths.config.write_text(dump_config(config), "utf-8")
        prepared.publish(paths.prepared)
        # a method of the user's own is where this process finds it
        path = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-m", __name__, folder, tier, str(rank)],
            env=with_heap_settings({**os.environ, "PYTHONPATH": path}),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ConfigError(
            f"clients.tiers.{tier}.ranks: the training at rank {rank} that measures its memory "
            f"failed: {lines[-1]}"
        )
    return int(done.stdout.split()[-1])


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    folder, tier, rank = argv
    paths = RunPaths(root=Path(folder))
    peak = peak_of(read_config(paths.config), PreparedRecord.read(paths.prepared), tier, int(rank))
    sys.stdout.write(f"{peak}\n")
    return 0


def peak_of(config: Config, prepared: PreparedRecord, tier: str, rank: int) -> int:
    """Return the peak memory of this process after a training of the tier's clients."""
    import fedllm.worker.worker  # noqa: F401  # a worker has its modules in memory too

    method, session = method_of(config), Session()
    training = config.training_of(tier).model_copy(update={"epochs": _STEPS, "max_steps": _STEPS})
    settings = LocalSettings(
        training=training,
        rule=local_rule(config.method.local, config.method.local_options),
        loss_on=config.data.loss_on,
        task=method.local_task(1),
    )
    change = _zero_change(prepared) if method.changes_base else None
    trainer = session.trainer(config, prepared, settings, change)
    received = partial(_received, config, prepared, method, tier, rank)
    peak = 0
    for rows in _longest_rows(session, config, prepared):
        members = [
            Member(received=received, rows=rows, draws=Draws(seed=0, round=1, client=str(number)))
            for number in range(engine_of(training).clients_at_once)
        ]
        results = trainer.train(members)
        peak = max(peak, *(result.stats.peak_memory_bytes for result in results))
    return peak


def _received(
    config: Config, prepared: PreparedRecord, method: Method, tier: str, rank: int
) -> Adapter:
    ranks = resolve_ranks(
        config, prepared.modules, dict.fromkeys(config.clients.fitted_tiers, rank)
    )[tier]
    return {
        module: first_adapter(method, module, prepared.modules[module], own)
        for module, own in ranks.items()
    }


def first_adapter(method: Method, module: str, record: ModuleRecord, rank: int) -> Factors:
    """Return what a client of a rank would receive of a module, were it the largest rank."""
    shape = ModuleShape(out=record.out_features, in_=record.in_features)
    state = method.start_module(module=module, shape=shape, rank=rank)
    to = Recipient(client="0", round=1)
    return method.hand_out(module=module, state=state, rank=rank, to=to)


def _longest_rows(
    session: Session, config: Config, prepared: PreparedRecord
) -> Iterator[Sequence[TokenRow]]:
    """Yield the longest rows of the clients with the longest ones, a batch of each."""
    train = set(split_roles(config.clients, prepared.clients).train)
    clients = sorted(
        (client for client in prepared.clients if client.id in train),
        key=lambda client: (client.longest_row, client.train_tokens / client.train_rows),
    )
    for client in clients[-_CLIENTS:]:
        rows = session.data(prepared).rows(client.id, "train")
        yield sorted(rows, key=length_of)[-config.training.batch_size :]


def _zero_change(prepared: PreparedRecord) -> BaseChange:
    def of(module: str) -> torch.Tensor:
        record = prepared.modules[module]
        return torch.zeros(record.out_features, record.in_features)

    return BaseChange(sha256="", of=of)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
