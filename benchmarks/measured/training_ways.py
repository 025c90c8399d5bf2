"""The ways in which `training.py` takes the same optimizer steps over the same rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.rounds import plain_batch, plain_steps
from fedllm.data.cache import Row
from fedllm.lora.factors import Adapter
from fedllm.packing.attention import fitted
from fedllm.packing.layout_check import set_layout
from fedllm.packing.losses import cross_entropies, forward
from fedllm.packing.micro_batches import PACKERS, Cut
from fedllm.packing.sequences import Packed, pack, shared_prefix, text_of
from fedllm.packing.slots import AdapterSlots
from fedllm.planning.engines import GROUP_LAYOUT
from fedllm.training.loop import LocalSettings, train_client
from fedllm.training.optimizers import build_optimizer
from fedllm.training.step_plan import Draws, plan_steps
from fedllm.training.together import Together
from fedllm.training.trainer_protocol import Member


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client's rows, and what draws those of each of its steps."""

    draws: Draws
    rows: Sequence[Row]

    def batches(self, settings: LocalSettings) -> list[list[Row]]:
        """Return the rows of every step."""
        plan = plan_steps(len(self.rows), settings.training, self.draws)
        return [[self.rows[place] for place in places] for places in plan]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The models that the ways train, made once, and how: `layout` is what prepare would find."""

    plain: nn.Module
    slots: AdapterSlots
    layout: str
    adapter: Adapter
    settings: LocalSettings

    def seconds(self, work: Callable[[], object]) -> float:
        """Return how long some work takes, on the device too."""
        begun = time.perf_counter()
        work()
        if self.slots.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What the steps of some clients took: seconds, and tokens that were computed."""

    seconds: float
    tokens: int


Way = Callable[[Bench, Sequence[Client]], Taken]


def _plain(bench: Bench, clients: Sequence[Client]) -> Taken:
    device = bench.slots.device
    seconds, tokens = 0.0, 0
    for client in clients:
        batches = [plain_batch(rows) for rows in client.batches(bench.settings)]
        placed = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
        seconds += bench.seconds(partial(plain_steps, bench.plain, placed))
        tokens += sum(batch["input_ids"].numel() for batch in batches)
    return Taken(seconds=seconds, tokens=tokens)


def _with_all_logits(bench: Bench, clients: Sequence[Client], *, share: bool) -> Taken:
    seconds, tokens = 0.0, 0
    for client in clients:
        packs = [_one_pack(bench, rows, share) for rows in client.batches(bench.settings)]
        installed = bench.slots.install(bench.adapter)
        bench.slots.train()
        seconds += bench.seconds(partial(_steps, bench, installed.parameters, packs))
        tokens += sum(packed.computed_tokens for packed in packs)
    return Taken(seconds=seconds, tokens=tokens)


def _one_pack(bench: Bench, rows: Sequence[Row], share: bool) -> Packed:
    prefix = shared_prefix([text_of(row) for row in rows]) if share else 0
    places = range(len(rows))
    packed = pack(rows, places, prefix, loss_on="answer", device=bench.slots.device)
    return fitted(packed, bench.layout)


def _steps(bench: Bench, parameters: Sequence[nn.Parameter], packs: Sequence[Packed]) -> None:
    training = bench.settings.training
    optimizer = build_optimizer(parameters, bench.settings.rule, training)
    for packed in packs:
        loss = _loss_of_all_logits(bench, packed)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.clip_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _loss_of_all_logits(bench: Bench, packed: Packed) -> Tensor:
    every_T = torch.arange(packed.computed_tokens, device=packed.kept_U.device)
    logits_TV = forward(bench.slots.model, packed, bench.layout, kept=every_T).logits[0]
    losses_K = cross_entropies(logits_TV[packed.kept_U], packed.inverse_K, packed.targets_K)
    return (losses_K * packed.weights_K).sum() / packed.num_targets


def _selected(bench: Bench, clients: Sequence[Client]) -> Taken:
    seconds = sum(
        train_client(
            bench.slots, bench.adapter, client.rows, settings=bench.settings, draws=client.draws
        ).stats.step_seconds
        for client in clients
    )
    return Taken(seconds=seconds, tokens=_packed_tokens(bench, clients, bench.layout))


def _co_trained(bench: Bench, clients: Sequence[Client]) -> Taken:
    members = [Member(received=lambda: bench.adapter, rows=c.rows, draws=c.draws) for c in clients]
    set_layout(bench.slots.model, GROUP_LAYOUT)
    results = Together(slots=bench.slots, settings=bench.settings).train(members)
    set_layout(bench.slots.model, bench.layout)
    seconds = sum(result.stats.step_seconds for result in results)
    return Taken(seconds=seconds, tokens=_packed_tokens(bench, clients, GROUP_LAYOUT))


def _packed_tokens(bench: Bench, clients: Sequence[Client], layout: str) -> int:
    cut = Cut(loss_on="answer", pad_token=0, device="cpu")
    batches = (rows for client in clients for rows in client.batches(bench.settings))
    return sum(one.computed_tokens for rows in batches for one in PACKERS[layout](rows, cut))


WAYS: Mapping[str, Way] = {
    "plain": _plain,
    "packed": partial(_with_all_logits, share=False),
    "shared": partial(_with_all_logits, share=True),
    "selected": _selected,
    "co-trained": _co_trained,
}
"""Each leaves out more than the one before; see `training.py`."""
