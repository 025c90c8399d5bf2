"""The twelve categories that are held out are shown by kind of tasks, wherever scores are."""

import pytest

from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.page.run_page import run_report
from fedllm.reporting.results.metrics import categories_of, metric_rows
from fedllm.reporting.results.summary import score_table
from fedllm.reporting.results.task_kinds import KINDS, kind_of
from fedllm.reporting.status.status import run_status
from fedllm.reporting.status.status_text import status_text
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord, RoundRecord
from tests.planning.federations import client, prepared_of
from tests.reporting.runs import aggregated, begin, evaluation

CATEGORIES = {"n1": "Word Analogy", "n2": "textual_entailment", "n3": "Title Generation", "c": "QA"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run of one round; clients `n...` are of unseen categories."""
    paths = begin(tmp_path_factory.mktemp("kinds") / "run", rounds=1)
    clients = [client(id_, category=name) for id_, name in CATEGORIES.items()]
    prepared_of(clients).publish(paths.prepared)
    for number, losses in enumerate(([4.0, 2.0, 5.0, 1.0], [2.0, 1.0, 5.0, 0.5])):
        here = paths.round(number)
        aggregated(number).publish(here.aggregate_record)
        record = evaluation(number, dict(zip(CATEGORIES, losses, strict=True)))
        scores = [
            each.model_copy(update={"group": "new_category"}) if each.client != "c" else each
            for each in record.clients
        ]
        record.model_copy(update={"clients": scores}).publish(here.evaluation_record)
        RoundRecord(round=number, lease=1, state_sha256="", clients=4).publish(here.record)
    return paths


def test_each_of_the_twelve_has_one_kind_and_others_have_none() -> None:
    names = [name for of_kind in KINDS.values() for name in of_kind]
    assert len(names) == len(set(names)) == 12
    assert kind_of("CAUSE_EFFECT-classification") == "logical relation"
    assert kind_of("Translation") is kind_of("") is None


def test_metrics_have_the_means_of_every_kind(run: RunPaths) -> None:
    last = metric_rows(run)[-1]
    assert last["new_category_logical_relation_loss"] == 1.5
    assert last["new_category_generation_loss"] == 5.0
    assert not any("extraction" in name or name.startswith("train_logical") for name in last)


def test_status_evaluate_and_the_page_show_them(run: RunPaths) -> None:
    text = status_text(run.root, run_status(run))
    (line,) = [line for line in text.splitlines() if "new_category, logical relation" in line]
    assert "3.000 -> 1.500" in line
    record = EvaluationRecord.read(run.round(1).evaluation_record)
    table = score_table("run", record, categories_of(run))
    assert f"{GROUP_WORDS['new_category']}, generation" in table
    (section,) = [each for each in run_report(run.root).sections if each.name == "kinds"]
    (table_of_kinds,) = section.tables
    place = list(table_of_kinds.header).index("kind")
    kinds = {row[place] for row in table_of_kinds.rows}
    assert kinds == {"logical relation", "generation"}
