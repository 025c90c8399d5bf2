"""Local only: every client goes on with its own adapter, and the state never moves."""

import torch

from fedllm.lora.factors import ModuleShape
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.local_only import LocalOnly
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train

METHOD = LocalOnly(seed=3, alpha=16.0)


def test_a_client_goes_on_with_what_it_trained_itself() -> None:
    shape = ModuleShape(out=11, in_=9)
    begun = METHOD.start_module(module="m", shape=shape, rank=4)
    trained = [random_factors(n, out=11, in_=9, rank=n, scale=16.0 / n) for n in (2, 4)]
    sent = [METHOD.sent(module="m", trained=own, notes={}) for own in trained]
    assert not any(own.a_RI.any() or own.b_OR.any() for own in sent)
    state = aggregate(METHOD, sent, [1.0, 3.0], [2, 4], before=begun, clients="ab").state
    assert all(torch.equal(state[name], begun[name]) for name in ("A", "B"))
    for own, rank in zip(trained, (2, 4), strict=True):
        to = Recipient(client="a", round=2, kept=METHOD.kept(module="m", trained=own))
        back = METHOD.hand_out(module="m", state=state, rank=rank, to=to)
        assert torch.equal(back.a_RI, own.a_RI) and torch.equal(back.b_OR, own.b_OR)
        assert back.scale == own.scale


def test_a_client_that_never_trained_has_the_base() -> None:
    begun = METHOD.start_module(module="m", shape=ModuleShape(out=11, in_=9), rank=4)
    new = METHOD.hand_out(module="m", state=begun, rank=2, to=Recipient(client="a", round=5))
    assert not new.b_OR.any()
    can_train(new)
