"""A method whose clients train an r x r core between A and B."""

from dataclasses import dataclass

from fedllm.lora.factors import ModuleShape, initial_a
from fedllm.methods.local_task import LocalTask
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.protocol import ModuleState


@dataclass(frozen=True, kw_only=True)
class CoreOnly(FactorMean):
    """The mean of every client's B C; A stays, and B begins with seeded columns."""

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        start = super().start_module(module=module, shape=shape, rank=rank)
        turned = ModuleShape(out=shape.in_, in_=shape.out)
        b_RO = initial_a(seed=self.seed, module=f"{module} B", rank=rank, shape=turned)
        return {**start, "B": b_RO.T.contiguous()}

    def local_task(self, round_number: int) -> LocalTask:
        del round_number
        return LocalTask(trained="C")
