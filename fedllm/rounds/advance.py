"""Advance a run: read its directory and take every step that is possible.

Calling it again changes nothing: a step is complete when its record exists, and the record is
written last. `fedllm run`, `resume`, `advance` and the coordinator job all make this call.
"""

from fedllm.errors import RunDirectoryError
from fedllm.planning.federation import Federation
from fedllm.rounds.aggregating import aggregate, evaluate
from fedllm.rounds.collecting import collect
from fedllm.rounds.dispatch.preflight import check_jobs
from fedllm.rounds.dispatch.submissions import run_server_job
from fedllm.rounds.ending.finishing import finish_rounds
from fedllm.rounds.ending.stopping import apply_stop, may_start
from fedllm.rounds.retries import train
from fedllm.rounds.run import Run
from fedllm.scheduling.traits import cache_for
from fedllm.storage.records import AggregateRecord, CohortRecord, PreparedRecord


def advance(run: Run) -> bool:
    """Take every step that is possible now; return whether the run is done.

    Raises:
        FedllmError: the run cannot go on; the exit code says why.
    """
    run.known_records.refuse_edits()
    run.observations.training_seconds = None
    federation = prepare(run)
    if federation is None:
        return False
    apply_stop(run)
    for number in range(run.observations.done, run.last_round + 1):
        if not may_start(run, number):
            break
        # before the next round begins, which people read next; after the decision to stop, which
        # may have the last round scored again
        finish_rounds(run, number - 1)
        if not advance_round(run, federation, number):
            break
        evaluate(run, federation, number)
    return finish_rounds(run, run.last_round)


def prepare(run: Run) -> Federation | None:
    """Prepare model and data in a job; return the federation, or None until they are prepared."""
    run.observations.prepares |= not run.paths.prepared.exists()
    if not run.paths.prepare_job(1).submission.exists():
        check_jobs(run.scheduler, run.config, run.paths)
    # also by a coordinator that waits for the job of an earlier one
    if run.observations.prepares and run.observations.is_new("prepare"):
        section = run.config
        run.say(
            f"prepare: model {section.model.path}, data {section.data.path}; cache "
            f"{cache_for(section, run.paths.root).root}; log in {run.paths.logs(0)}"
        )
    run_server_job(
        run,
        kind="prepare",
        folder=run.paths.prepare_job,
        target=run.paths.root,
        done=run.paths.prepared,
        round_number=0,
    )
    prepared = run.known_records.find(PreparedRecord, run.paths.prepared)
    if prepared is None:
        return None
    _require_same_content(run, prepared)
    for note in prepared.notes if run.observations.prepares else ():
        run.say(f"prepare: {note}")
    run.observations.prepares = False
    return run.known_records.federation(prepared)


def _require_same_content(run: Run, prepared: PreparedRecord) -> None:
    """Require the base and data of the first round: their paths may change, their content not.

    Raises:
        RunDirectoryError: the first round was trained on another base model or other data.
    """
    path = run.paths.round(1).cohort
    if run.observations.content is prepared or not path.exists():
        return
    first = CohortRecord.read(path)
    for key, was, now in (
        ("model.path", first.base_fingerprint, prepared.model_fingerprint),
        ("data.path", first.data_fingerprint, prepared.data_fingerprint),
    ):
        if was != now:
            raise RunDirectoryError(
                f"{key}: not what the first round was trained on (fingerprint {now[:12]}, it "
                f"was {was[:12]}); resume with --set {key}=<a path of the same content>, or with "
                "the version of fedllm that began the run: another one may make other tokens"
            )
    run.observations.content = prepared


def advance_round(run: Run, federation: Federation, number: int) -> bool:
    """Draw, train, collect, aggregate; return whether the round's server state exists."""
    paths = run.paths.round(number)
    if paths.aggregate_record.exists():
        return True
    if number:
        cohort = draw(run, federation, number)
        if not paths.collection.exists():
            run.observations.step = ("train", number)
            scan = train(run, federation, cohort)
            if scan is None or collect(run, cohort, scan) is None:
                return False
    return aggregate(run, number) is not None


def draw(run: Run, federation: Federation, number: int) -> CohortRecord:
    """Draw the round's cohort, or return it if it was drawn already."""
    paths = run.paths.round(number)
    drawn = run.known_records.find(CohortRecord, paths.cohort)
    if drawn:
        return drawn
    before = AggregateRecord.read(run.paths.round(number - 1).aggregate_record)
    cohort = CohortRecord(
        round=number,
        lease=run.lease.number,
        base_fingerprint=federation.prepared.model_fingerprint,
        data_fingerprint=federation.prepared.data_fingerprint,
        state_sha256=before.sha256,
        base_change=before.base_change,
        ranks={tier: dict(ranks) for tier, ranks in federation.ranks.items()},
        clients=[
            client.model_copy(update={"ranks": before.assigned.get(client.id)})
            for client in federation.cohort(number)
        ],
        enough=federation.enough,
        layout=federation.prepared.layout,
        sent=before.sent_next,
    )
    run.freeze(cohort, paths.cohort)
    return cohort
