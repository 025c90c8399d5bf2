"""Federations drawn by Hypothesis, and the configurations that they fit."""

from hypothesis import strategies as st

from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.storage.records import ClientRecord, ModuleRecord, PreparedRecord

MODULES = {
    "model.layers.0.self_attn.q_proj": ModuleRecord(
        out_features=16, in_features=16, kind="attention"
    ),
    "model.layers.0.self_attn.k_proj": ModuleRecord(
        out_features=8, in_features=16, kind="attention"
    ),
    "model.layers.0.mlp.up_proj": ModuleRecord(out_features=40, in_features=16, kind="mlp"),
}


def config_of(**changes: object) -> Config:
    """Return a configuration of two tiers; `changes` are keys with `__` for dots."""
    raw: dict[str, object] = {"clients": {"tiers": {"small": {"ranks": 2}, "large": {"ranks": 8}}}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})  # type: ignore[assignment]
        node[last] = value
    return validate(raw)


def client(
    id_: str, *, category: str = "", train: int = 10, test: int = 3, candidate: bool = True
) -> ClientRecord:
    return ClientRecord(
        id=id_,
        category=category,
        held_out_candidate=candidate,
        train_rows=train,
        test_rows=test,
        train_tokens=7 * train,
    )


def prepared_of(clients: list[ClientRecord]) -> PreparedRecord:
    return PreparedRecord(
        model_fingerprint="base",
        model_path="nowhere",
        data_fingerprint="data",
        data_path="nowhere",
        model_parameters=1,
        modules=MODULES,
        clients=clients,
    )


@st.composite
def client_lists(draw: st.DrawFn, *, min_size: int = 1, max_size: int = 40) -> list[ClientRecord]:
    ids = draw(st.lists(st.text(max_size=6), min_size=min_size, max_size=max_size, unique=True))
    return [
        client(
            id_,
            category=draw(st.sampled_from("abc")),
            train=draw(st.integers(0, 3)),
            test=draw(st.integers(0, 2)),
            candidate=draw(st.integers(0, 4)) > 0,
        )
        for id_ in ids
    ]
