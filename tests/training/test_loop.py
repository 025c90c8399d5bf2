"""A client's training is a function of its inputs, and the textbook's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedllm.config.models import TrainingSection
from fedllm.errors import DataError
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, Loop, TrainResult, train_client
from fedllm.training.provenance import environment
from fedllm.training.step_plan import Draws, plan_steps, rate_factor
from tests.tiny import Tiny

TARGETS = ("q_proj", "down_proj")
LAYOUTS = ("parts", "mask", "packed", "padded")
Make = Callable[[float], AdapterSlots]


@dataclass(frozen=True)
class Row:
    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()


def rows_of(client: int, count: int = 7) -> list[Row]:
    """Rows of one instruction, with inputs and answers of very different length."""
    draws = torch.Generator().manual_seed(client)
    instruction = torch.randint(2, 200, (10,), generator=draws).tolist()
    rows = []
    for _ in range(count):
        prompt, answer = (int(n) for n in torch.randint(2, 9, (2,), generator=draws))
        ids = torch.randint(2, 200, (prompt + answer,), generator=draws).tolist()
        rows.append(Row([*instruction, *ids[:prompt]], [*ids[prompt:], 1]))
    return rows


def made(tiny: Tiny, dropout: float, layout: str) -> AdapterSlots:
    base = load_base(tiny.model, dtype="float32", device="cpu")
    return AdapterSlots(base, target_modules=TARGETS, dropout=dropout, layout=layout)


@pytest.fixture(scope="module", params=LAYOUTS)
def make(tiny: Tiny, request: pytest.FixtureRequest) -> Make:
    return lambda dropout: made(tiny, dropout, request.param)


@pytest.fixture(scope="module")
def slots(make: Make) -> AdapterSlots:
    return make(0.0)


def start(slots: AdapterSlots, rank: int = 3) -> Adapter:
    draws = torch.Generator().manual_seed(rank)
    found = {}
    for name, module in slots.model.named_modules():
        inner = getattr(module, "base_layer", module)
        if name.rpartition(".")[2] in TARGETS:
            out, in_ = inner.out_features, inner.in_features
            found[name] = Factors(
                a_RI=torch.randn(rank, in_, generator=draws),
                b_OR=torch.zeros(out, rank),
                scale=2.0,
            )
    return found


def with_frozen(adapter: Adapter, rank: int) -> Adapter:
    """Add frozen factors of a rank to an adapter."""
    draws = torch.Generator().manual_seed(rank)
    return {
        module: replace(
            own,
            frozen=Factors(
                a_RI=torch.randn(rank, own.shape.in_, generator=draws) / 4,
                b_OR=torch.randn(own.shape.out, rank, generator=draws) / 4,
                scale=0.5,
            ),
        )
        for module, own in adapter.items()
    }


def trained(
    slots: AdapterSlots,
    client: int = 0,
    *,
    rank: int = 3,
    rule: str = "fedit",
    loss_on: str = "answer",
    **changes: object,
) -> TrainResult:
    section = {"batch_size": 4, "max_steps": 3, "learning_rate": 0.01, **changes}
    settings = LocalSettings(
        training=TrainingSection.model_validate(section),
        rule=LOCAL_RULES[rule],
        loss_on=loss_on,  # type: ignore[arg-type]
    )
    draws = Draws(seed=0, round=1, client=str(client))
    return train_client(slots, start(slots, rank), rows_of(client), settings=settings, draws=draws)


def same(left: TrainResult, right: TrainResult) -> bool:
    return left.stats.losses == right.stats.losses and all(
        torch.equal(f.a_RI, right.adapter[m].a_RI) and torch.equal(f.b_OR, right.adapter[m].b_OR)
        for m, f in left.adapter.items()
    )


def close(left: TrainResult, right: TrainResult, tolerance: float = 1e-5) -> None:
    assert left.stats.losses == pytest.approx(right.stats.losses, abs=tolerance)
    for module, factors in left.adapter.items():
        other = right.adapter[module]
        torch.testing.assert_close(factors.b_OR, other.b_OR, atol=tolerance, rtol=0)
        torch.testing.assert_close(factors.a_RI, other.a_RI, atol=tolerance, rtol=0)


def test_a_client_trains_to_the_same_bits_whoever_trained_before(make: Make) -> None:
    one, other = make(0.2), make(0.2)
    alone = trained(one)
    for client in (3, 1, 2):
        trained(other, client, rank=2 + client)
    torch.rand(7)
    assert same(trained(other), alone)
    assert same(trained(one), alone)
    assert not same(trained(one, 5), alone)


def test_micro_batches_change_rounding_only(make: Make) -> None:
    slots = make(0.2)
    # SGD: AdamW's eps amplifies rounding
    whole = trained(slots, rule="fedavg")
    close(trained(slots, rule="fedavg", micro_batch_size=1), whole)
    close(trained(slots, rule="fedavg", micro_batch_size=3), whole)
    close(trained(slots, rule="fedavg", micro_batch_tokens=40), whole)


def test_a_token_budget_is_kept(make: Make) -> None:
    slots = make(0.0)
    seen: list[int] = []
    slots.model.register_forward_pre_hook(
        lambda _module, _inputs, options: seen.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    for budget in (None, 60, 40, 26):
        seen.clear()
        trained(slots, micro_batch_tokens=budget)
        assert max(seen) <= (budget or 1000)
        if budget == 60:
            assert len(seen) < 3 * 4


def test_a_budget_below_one_row_is_refused_by_name(slots: AdapterSlots) -> None:
    longest = max(len(row.prompt_ids) + len(row.answer_ids) for row in rows_of(0))
    trained(slots, micro_batch_tokens=longest - 1, max_steps=None)
    with pytest.raises(
        DataError, match=rf"training.micro_batch_tokens: got {longest - 2}, .* {longest} tokens"
    ):
        trained(slots, micro_batch_tokens=longest - 2, max_steps=None)


def test_all_ways_train_to_the_same_factors(tiny: Tiny) -> None:
    # 20 steps of SGD: an optimizer that divides by the gradient would amplify rounding
    section: dict[str, Any] = {
        "rule": "fedavg",
        "epochs": 10,
        "max_steps": 20,
        "learning_rate": 0.1,
    }
    padded = trained(made(tiny, 0.0, "padded"), **section)
    assert padded.stats.steps == 20
    assert padded.stats.losses[-1] < padded.stats.losses[0] - 0.01
    for layout in LAYOUTS[:-1]:
        close(trained(made(tiny, 0.0, layout), **section), padded, 1e-4)


@pytest.mark.parametrize("by_length", [False, True])
def test_padded_rows_keep_their_order_unless_they_are_grouped_by_length(
    tiny: Tiny, by_length: bool
) -> None:
    slots = made(tiny, 0.0, "padded")
    widths: list[int] = []
    slots.model.register_forward_pre_hook(
        lambda _module, _inputs, options: widths.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    training = TrainingSection(batch_size=7, micro_batch_size=1)
    settings = LocalSettings(training=training, rule=LOCAL_RULES["fedit"], by_length=by_length)
    draws = Draws(seed=0, round=1, client="0")
    train_client(slots, start(slots), rows_of(0), settings=settings, draws=draws)
    (places,) = plan_steps(7, training, draws)
    rows = [rows_of(0)[place] for place in places]
    lengths = [len(row.prompt_ids) + len(row.answer_ids) - 1 for row in rows]
    assert lengths != sorted(lengths)
    assert widths == (sorted(lengths) if by_length else lengths)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_get_no_gradients(slots: AdapterSlots, checkpointing: bool) -> None:
    trained(slots, gradient_checkpointing=checkpointing)
    assert all(parameter.grad is None for parameter in slots.model.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory(make: Make) -> None:
    slots = make(0.2)
    whole = trained(slots, rule="fedavg")
    close(trained(slots, rule="fedavg", gradient_checkpointing=True), whole, 1e-6)
    assert same(trained(slots, rule="fedavg"), whole)


@pytest.mark.parametrize("rule", ["fedit", "fedavg"])
@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_it_is_the_plain_loop(tiny: Tiny, slots: AdapterSlots, rule: str, loss_on: str) -> None:
    found = trained(slots, rule=rule, loss_on=loss_on, clip_norm=0.5, warmup_steps=1)
    expected = plain_loop(tiny, start(slots), rule=rule, loss_on=loss_on)
    assert found.stats.losses == pytest.approx(expected, abs=2e-4)


def plain_loop(tiny: Tiny, adapter: Adapter, *, rule: str, loss_on: str) -> list[float]:
    """Padded on the right, all logits, the optimizer's own defaults, no PEFT."""
    model = load_base(tiny.model, dtype="float32", device="cpu").model
    training = TrainingSection(
        batch_size=4, max_steps=3, learning_rate=0.01, clip_norm=0.5, warmup_steps=1
    )
    model.requires_grad_(False)
    parameters = []
    for module, factors in adapter.items():
        a, b = nn.Parameter(factors.a_RI.clone()), nn.Parameter(factors.b_OR.clone())
        parameters += [a, b]
        model.get_submodule(module).register_forward_hook(added(a, b, factors.scale))
    kind = torch.optim.AdamW if rule == "fedit" else torch.optim.SGD
    optimizer = kind(parameters, lr=0.01, weight_decay=0.0)
    rows, losses = rows_of(0), []
    steps = plan_steps(len(rows), training, Draws(seed=0, round=1, client="0"))
    for number, places in enumerate(steps):
        texts = [rows[p].prompt_ids + rows[p].answer_ids for p in places]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        labels = torch.full_like(ids, -100)
        for n, (place, text) in enumerate(zip(places, texts, strict=True)):
            first = len(rows[place].prompt_ids) if loss_on == "answer" else 1
            labels[n, first : len(text)] = ids[n, first : len(text)]
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = 0.01 * rate_factor(number, len(steps), training)
        optimizer.step()
        losses.append(loss.item())
    return losses


def added(a: Tensor, b: Tensor, scale: float) -> Callable[..., Tensor]:
    return lambda _module, inputs, output: output + scale * (inputs[0] @ a.T) @ b.T


def test_the_record_counts_what_entered_a_step(slots: AdapterSlots) -> None:
    found = trained(slots, epochs=2, max_steps=None, batch_size=3)
    rows = rows_of(0)
    assert found.stats.steps == len(found.stats.losses) == 6
    assert found.stats.rows == 7
    assert found.stats.loss_tokens == 2 * sum(len(row.answer_ids) for row in rows)
    assert found.stats.tokens == 2 * sum(len(r.prompt_ids) + len(r.answer_ids) for r in rows)
    assert 0 < found.stats.step_seconds < found.stats.seconds
    assert found.stats.peak_memory_bytes > 1 << 20
    assert set(found.norms) == set(found.scales) == set(found.adapter)
    module = next(iter(found.adapter))
    norms = (found.adapter[module].a_RI.norm().item(), found.adapter[module].b_OR.norm().item())
    assert found.norms[module] == pytest.approx(norms)
    assert trained(slots, max_steps=1, batch_size=3).stats.rows == 3


def test_bfloat16_trains_close_to_float32(slots: AdapterSlots) -> None:
    found = trained(slots, precision="bfloat16")
    assert found.stats.losses == pytest.approx(trained(slots).stats.losses, abs=0.1)
    assert found.stats.losses != trained(slots).stats.losses
    assert all(f.b_OR.dtype == torch.float32 for f in found.adapter.values())


def test_training_lowers_the_loss(slots: AdapterSlots) -> None:
    found = trained(slots, max_steps=None, epochs=15, schedule="constant")
    assert found.stats.losses[-1] < found.stats.losses[0] - 0.2


def test_a_divergent_client_fails_and_names_the_module(slots: AdapterSlots) -> None:
    found = trained(
        slots, rule="fedavg", learning_rate=1e30, clip_norm=None, epochs=3, max_steps=None
    )
    assert found.adapter == {}
    assert "model.layers.0.mlp.down_proj" in found.reason
    assert "is not finite after training" in found.reason
    assert trained(slots).reason == ""


def test_a_client_that_fails_names_the_step_whose_loss_was_not_finite(slots: AdapterSlots) -> None:
    broken = start(slots)
    broken["model.layers.1.self_attn.q_proj"].b_OR.fill_(float("nan"))
    settings = LocalSettings(training=TrainingSection(batch_size=4), rule=LOCAL_RULES["fedavg"])
    draws = Draws(seed=0, round=1, client="0")
    found = train_client(slots, broken, rows_of(0), settings=settings, draws=draws)
    assert found.adapter == {}
    assert found.reason.endswith("is not finite after training (loss of step 1: nan)")


def test_a_factor_that_is_empty_after_training_fails_the_client_by_name(
    slots: AdapterSlots,
) -> None:
    settings = LocalSettings(training=TrainingSection(max_steps=1), rule=LOCAL_RULES["fedit"])
    draws = Draws(seed=0, round=1, client="0")
    loop = Loop(slots, slots.install(start(slots)), rows_of(0), settings, draws)
    assert loop.run(None, lambda _step, _snapshot: None).reason == ""
    b = loop.installed.b[0]
    kept = b.data
    b.data = torch.empty(0)
    found = loop.result()
    b.data = kept
    assert found.adapter == {}
    assert found.reason == f"{loop.installed.modules[0]} B is empty after training"


def test_what_the_hook_raises_ends_the_training(slots: AdapterSlots) -> None:
    def stop(step: int, _snapshot: object) -> None:
        if step == 1:
            raise InterruptedError

    settings = LocalSettings(training=TrainingSection(batch_size=2), rule=LOCAL_RULES["fedit"])
    draws = Draws(seed=0, round=1, client="0")
    with pytest.raises(InterruptedError):
        train_client(
            slots, start(slots), rows_of(0), settings=settings, draws=draws, before_step=stop
        )


def test_the_environment_names_what_bits_depend_on() -> None:
    found = environment(TrainingSection(threads=3), "cpu")
    assert found["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert found["threads"] == "3"
    assert found["device"] == "cpu"
    assert found["processor"]


def test_the_norm_of_each_steps_gradients_is_that_before_clipping(slots: AdapterSlots) -> None:
    free = trained(slots, max_steps=1)
    clipped = trained(slots, max_steps=1, clip_norm=1e-3)
    (norm,) = free.stats.gradient_norms
    assert norm > 0.01
    assert clipped.stats.gradient_norms == [norm]
    assert len(trained(slots, max_steps=2).stats.gradient_norms) == 2
