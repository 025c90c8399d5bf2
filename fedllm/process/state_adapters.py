"""Adapters, and the change of the base, made from a server state."""

from collections.abc import Mapping
from dataclasses import replace

from fedllm.lora.factors import Adapter, BaseDelta, adapter_bytes
from fedllm.methods.local_task import Recipient, TrainedFactors
from fedllm.methods.protocol import Method
from fedllm.packing.base_change import BaseChange
from fedllm.process.client_store import Kept
from fedllm.storage.records import ReceivedRecord
from fedllm.storage.tensors import TensorFile


def adapter_of(method: Method, state: TensorFile, ranks: Mapping[str, int]) -> Adapter:
    """Return the adapter of `ranks`, read from a state file module by module."""
    return {
        module: method.module_adapter(module=module, state=state.module(module), rank=rank)
        for module, rank in ranks.items()
    }


def received_adapter(
    method: Method,
    state: TensorFile,
    ranks: Mapping[str, int],
    to: Recipient,
    kept: Kept,
) -> Adapter:
    """Return what a client with `ranks` receives, read from a state file module by module.

    `kept` is what the client kept from its last round.
    """
    to = replace(to, notes=kept.notes)
    return {
        module: method.hand_out(
            module=module,
            state=state.module(module),
            rank=rank,
            to=replace(to, kept=kept.tensors.get(module, {})),
        )
        for module, rank in ranks.items()
    }


def received_record(adapter: Adapter, trained: TrainedFactors) -> ReceivedRecord:
    """Return the sizes of what a client received, of which the factors `trained` train."""
    return ReceivedRecord(
        num_bytes=adapter_bytes(adapter),
        values=sum(factors.num_values for factors in adapter.values()),
        trained_values=sum(
            (factors.a_RI.numel() if "A" in trained else 0)
            + (factors.b_OR.numel() if "B" in trained else 0)
            + (factors.rank**2 if "C" in trained else 0)
            for factors in adapter.values()
        ),
    )


def base_change_of(method: Method, state: TensorFile, sha256: str | None) -> BaseChange | None:
    """Return the change of the base that goes with a state; `sha256` None: there is none."""
    if sha256 is None:
        return None

    def of(module: str) -> BaseDelta | None:
        parts = state.module(module)
        return method.base_delta(parts) if parts else None

    return BaseChange(sha256=sha256, of=of)
