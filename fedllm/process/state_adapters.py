"""Adapters made from a server state."""

from collections.abc import Mapping

from fedllm.lora.factors import Adapter
from fedllm.methods.local_task import Recipient
from fedllm.methods.protocol import Method
from fedllm.storage.tensors import TensorFile


def adapter_of(method: Method, state: TensorFile, ranks: Mapping[str, int]) -> Adapter:
    """Return the adapter of `ranks`, read from a state file module by module."""
    return {
        module: method.module_adapter(module=module, state=state.module(module), rank=rank)
        for module, rank in ranks.items()
    }


def received_adapter(
    method: Method, state: TensorFile, ranks: Mapping[str, int], to: Recipient
) -> Adapter:
    """Return what a client with `ranks` receives, read from a state file module by module."""
    return {
        module: method.hand_out(module=module, state=state.module(module), rank=rank, to=to)
        for module, rank in ranks.items()
    }
