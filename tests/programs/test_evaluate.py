"""A state is scored as its clients run it, and as the largest of them would."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.cli.execution import start
from fedllm.config.loading import read_config
from fedllm.errors import AdapterError, RunDirectoryError
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.catalog import method_of
from fedllm.packing.sequences import common_prefix
from fedllm.planning.evaluation_targets import choose_targets
from fedllm.planning.federation import plan_federation
from fedllm.process.server_state import read_state
from fedllm.process.session import Session
from fedllm.process.state_adapters import adapter_of
from fedllm.programs.entry_points import run as run_program
from fedllm.programs.evaluate import evaluate_adapter, evaluate_state
from fedllm.programs.evaluate_pieces import evaluate_pieces
from fedllm.programs.scoring import score_targets
from fedllm.storage.kept_records import AnswersRecord
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    BaseScoresRecord,
    EvaluationRecord,
    PreparedRecord,
    Scores,
    SubmissionRecord,
)
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run of one round with a rate at which ranks make a difference."""
    overrides = ["rounds=1", "training.learning_rate=0.05", "evaluation.rows_per_client=2"]
    return RunPaths(root=start(tiny.config, overrides, tmp_path_factory.mktemp("e") / "run"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def adapter_at(run: RunPaths, ranks: dict[str, int] | None = None) -> Adapter:
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    largest = plan_federation(config, prepared).largest_ranks
    return adapter_of(method_of(config), read_state(run.round(1)), ranks or largest)


def one_by_one(
    run: RunPaths, session: Session, ranks: dict[str, dict[str, int]]
) -> dict[str, Scores]:
    """Every client by itself, with an adapter of its own."""
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    slots, data = session.slots(config, prepared), session.data(prepared)
    found: dict[str, Scores] = {}
    for target in choose_targets(config, prepared, 1):
        slots.install(adapter_at(run, ranks[target.tier]))
        found |= score_targets(slots, data, [target], config)
    return found


def assert_close(found: Scores, expected: Scores) -> None:
    assert found.rows == expected.rows
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)
    assert (found.rouge_l, found.exact_match) == (expected.rouge_l, expected.exact_match)


def test_clients_are_scored_at_their_own_and_at_the_largest_rank(
    run: RunPaths, session: Session
) -> None:
    record = EvaluationRecord.read(run.round(1).evaluation_record)
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    federation = plan_federation(config, prepared)
    ranks = {tier: dict(of_tier) for tier, of_tier in federation.ranks.items()}
    deployed = one_by_one(run, session, ranks)
    largest = one_by_one(run, session, dict.fromkeys(ranks, federation.largest_ranks))
    assert [c.client for c in record.clients] == [
        t.client for t in choose_targets(config, prepared, 1)
    ]
    for client in record.clients:
        assert_close(client.as_deployed, deployed[client.client])
        assert_close(client.at_largest_rank, largest[client.client])
        if client.tier == "large":
            assert client.as_deployed == client.at_largest_rank
        else:
            assert client.as_deployed.loss != client.at_largest_rank.loss


def test_the_same_state_scores_the_same_again(run: RunPaths, session: Session) -> None:
    record = EvaluationRecord.read(run.round(1).evaluation_record)
    again = evaluate_state(run, 1, None, session)
    assert again.clients == record.clients
    assert again.state_sha256 == record.state_sha256


def test_rows_of_a_client_are_read_together(run: RunPaths, session: Session) -> None:
    """What a client's rows have in common is computed once, for their loss and their answers."""
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    slots, data = session.slots(config, prepared), session.data(prepared)
    targets = choose_targets(config, prepared, 1)
    clients = [[data.rows(t.client, "test")[index] for index in t.rows] for t in targets]
    texts = [[[*row.prompt_ids, *row.answer_ids] for row in rows] for rows in clients]
    shared = [common_prefix(of_client) for of_client in texts]
    computed = sum(
        prefix + sum(len(text) - 1 - prefix for text in of_client)
        for prefix, of_client in zip(shared, texts, strict=True)
    )
    widths: list[int] = []
    embedding: Any = slots.model.get_submodule("model.embed_tokens")
    hook = embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].numel()))
    try:
        slots.install(adapter_at(run))
        score_targets(slots, data, targets, config)
    finally:
        hook.remove()
    assert all(len(rows) == 2 for rows in clients)
    assert min(shared) > 50
    assert sum(width for width in widths if width > config.evaluation.batch_size) == computed


def test_round_0_scores_the_base(run: RunPaths, session: Session) -> None:
    record = evaluate_state(run, 0, None, session)
    for client in record.clients:
        assert client.as_deployed.loss == pytest.approx(client.at_largest_rank.loss, abs=1e-5)


@pytest.mark.usefixtures("run")
def test_runs_of_other_ranks_share_the_scores_of_the_untouched_base(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Found by what they say: the scores in the cache are changed, and the next run has them."""
    overrides = ["rounds=1", "training.learning_rate=0.05", "evaluation.rows_per_client=2"]
    cache = tmp_path / "cache"
    shutil.copytree(tiny.cache, cache)
    overrides += [f"storage.cache={cache}", "clients.tiers.small.ranks=1"]
    for stored in (cache / "scores").glob("*.json"):
        rows = BaseScoresRecord.read(stored).clients
        changed = {
            id_: [row.model_copy(update={"loss": 7.0 * row.tokens}) for row in of_client]
            for id_, of_client in rows.items()
        }
        BaseScoresRecord(clients=changed).publish(stored)
    other = RunPaths(root=start(tiny.config, overrides, tmp_path / "run"))
    record = EvaluationRecord.read(other.round(0).evaluation_record)
    assert {client.as_deployed.loss for client in record.clients} == {7.0}
    # with other settings they are scored
    shorter = [*overrides, "evaluation.max_new_tokens=2"]
    other = RunPaths(root=start(tiny.config, shorter, tmp_path / "shorter"))
    record = EvaluationRecord.read(other.round(0).evaluation_record)
    assert all(client.as_deployed.loss < 7.0 for client in record.clients)


def test_a_rank_is_the_same_for_all_and_at_most_the_states(run: RunPaths, session: Session) -> None:
    record = EvaluationRecord.read(run.round(1).evaluation_record)
    found = evaluate_state(run, 1, 1000, session)
    for client, other in zip(found.clients, record.clients, strict=True):
        assert client.as_deployed == client.at_largest_rank
        assert_close(client.as_deployed, other.at_largest_rank)


def test_an_exported_adapter_scores_as_its_state(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    about = PeftDescription(base_model=None, targets={"target_modules": ["q_proj"]})
    write_peft_adapter(folder, adapter_at(run), about=about)
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    found = evaluate_adapter(folder, config, prepared, session)
    expected = evaluate_state(run, 1, 1000, session)
    for client, other in zip(found.clients, expected.clients, strict=True):
        assert_close(client.as_deployed, other.as_deployed)


def test_an_adapter_of_another_base_is_refused(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    wrong = {
        module: Factors(a_RI=f.a_RI[:, :-1], b_OR=f.b_OR, scale=1.0)
        for module, f in adapter_at(run).items()
    }
    about = PeftDescription(base_model=None, targets={"target_modules": ["q_proj"]})
    write_peft_adapter(folder, wrong, about=about)
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    with pytest.raises(AdapterError, match="belongs to another model"):
        evaluate_adapter(folder, config, prepared, session)


def test_the_program_writes_the_record_or_why_not(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(run.root, root)
    paths = RoundPaths(root=root / "rounds" / "0001")
    before = EvaluationRecord.read(paths.evaluation_record)
    shutil.rmtree(paths.evaluation.root)
    job = tmp_path / "job"
    plan = SubmissionRecord.read(run.round(1).evaluation_job(1).submission)
    plan.publish(job / "submission.json")
    assert run_program("evaluate", [str(paths.root), "--job", str(job)], session=session) == 0
    assert EvaluationRecord.read(paths.evaluation_record).clients == before.clients
    paths.global_state.unlink()
    shutil.rmtree(paths.evaluation.root)
    shutil.rmtree(job / "claims")
    assert run_program("evaluate", [str(paths.root), "--job", str(job)], session=session) == 2
    assert "pruned" in (job / "error.json").read_text()
    with pytest.raises(RunDirectoryError, match="pruned"):
        evaluate_pieces(paths.root, session)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model_fingerprint", "not the model that was prepared"),
        ("tokenizer_fingerprint", "not the tokenizer that was prepared"),
    ],
)
def test_a_base_that_changed_since_it_was_prepared_is_refused(
    run: RunPaths, tmp_path: Path, key: str, words: str
) -> None:
    root = tmp_path / "run"
    shutil.copytree(run.root, root)
    paths = RunPaths(root=root)
    prepared = PreparedRecord.read(paths.prepared)
    prepared.model_copy(update={key: "another"}).publish(paths.prepared)
    job = tmp_path / "job"
    shutil.rmtree(paths.round(1).evaluation.root)
    SubmissionRecord.read(run.round(1).evaluation_job(1).submission).publish(
        job / "submission.json"
    )
    argv = [str(paths.round(1).root), "--job", str(job)]
    assert run_program("evaluate", argv, session=Session()) == 2
    assert words in (job / "error.json").read_text()


def test_answers_of_a_few_rows_are_kept_with_prompt_and_references(run: RunPaths) -> None:
    record = EvaluationRecord.read(run.round(1).evaluation_record)
    kept = AnswersRecord.read(run.round(1).answers)
    assert (kept.round, kept.state_sha256) == (1, record.state_sha256)
    assert Counter(answer.client for answer in kept.answers) == {
        client.client: 2 for client in record.clients
    }
    for client in record.clients:
        mine = [answer for answer in kept.answers if answer.client == client.client]
        assert sum(a.rouge_l for a in mine) / 2 == pytest.approx(client.as_deployed.rouge_l)
        assert all(a.references[0] for a in mine)
        assert all("### Response:" in a.prompt for a in mine)
