"""The evaluation job: tasks claim pieces of an evaluation, score them and publish their parts.

The scores of a piece depend on the piece alone, so any number of tasks gives the same. The task
that finds all parts joins them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.config.models import Config
from fedllm.evaluation.scores import RowScores
from fedllm.planning.evaluation_targets import (
    EvaluationPiece,
    Target,
    choose_targets,
    is_complete,
    pieces_to_score,
)
from fedllm.planning.federation import Federation, plan_federation
from fedllm.process.late_files import read_late_file
from fedllm.process.session import Session
from fedllm.programs.evaluate import Scorer, in_order
from fedllm.programs.scoring import all_agree, scoring_task
from fedllm.scheduling.environment import TaskEnvironment, TaskIdentity
from fedllm.scheduling.traits import traits_of
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.kept_records import (
    AnswersRecord,
    Count,
    KeptAnswer,
    PartRecord,
    RequestRecord,
    uncounted,
)
from fedllm.storage.paths import EvaluationPaths, PackedJobPaths, RoundPaths, run_of_scored
from fedllm.storage.records import AggregateRecord, EvaluationRecord, SubmissionRecord
from fedllm.worker.claims import Claims

_PROMPT_LETTERS = 600


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation: a state, the pieces that are scored, and where their parts are.

    `keys` are those that the parts of the pieces must have.
    """

    state: RoundPaths
    place: EvaluationPaths
    federation: Federation
    targets: Sequence[Target]
    pieces: Sequence[EvaluationPiece]
    keys: Sequence[str]
    sha256: str
    complete: bool
    rank: int | None = None

    @classmethod
    def open(cls, target: Path, session: Session) -> "Evaluation":
        """Return the evaluation of a round, or one that `fedllm evaluate` asked for.

        Raises:
            FileNotFoundError: the state is not aggregated.
        """
        request = RequestRecord.find(EvaluationPaths(root=target).request)
        if request is None:
            state, rank = RoundPaths(root=target), None
            place, scored = state.evaluation, state.number
        else:
            run = run_of_scored(target)
            state, rank = run.round(request.round), request.rank
            place, scored = EvaluationPaths(root=target), session.config(run).rounds
        config, prepared = session.config(state.run), session.prepared(state.run.prepared)
        federation = plan_federation(config, prepared)
        pieces = pieces_to_score(
            federation, state_round=state.number, targets_round=scored, rank=rank
        )
        sha256 = AggregateRecord.read(state.aggregate_record).sha256
        return cls(
            state=state,
            place=place,
            federation=federation,
            targets=choose_targets(config, prepared, scored),
            pieces=pieces,
            keys=[_key(config, piece, sha256, rank) for piece in pieces],
            sha256=sha256,
            complete=rank is not None or is_complete(config.evaluation, scored, config.rounds),
            rank=rank,
        )

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.federation.config

    def part(self, piece: EvaluationPiece) -> PartRecord | None:
        """Return the scores of a piece, if they are there and whole."""
        found = PartRecord.glance(self.place.part(piece.number))
        if found is None or found.key != self.keys[piece.number]:
            return None
        clients = [target.client for target in piece.targets]
        return found if [each.client for each in found.clients] == clients else None

    def done(self) -> EvaluationRecord | None:
        """Return the record, if all pieces were scored and joined before."""
        record = EvaluationRecord.find(self.place.record)
        if record is None or record.state_sha256 != self.sha256:
            return None
        scored = [(each.client, each.as_deployed.rows) for each in record.clients]
        wanted = [(target.client, len(target.rows)) for target in self.targets]
        return record if scored == wanted else None

    def join(self) -> EvaluationRecord | None:
        """Publish the record of the evaluation once all parts are there; else return None."""
        parts = [part for piece in self.pieces if (part := self.part(piece))]
        if len(parts) < len(self.pieces):
            return None
        answers = [answer for part in parts for answer in part.answers]
        if answers:
            kept = AnswersRecord(round=self.state.number, state_sha256=self.sha256, answers=answers)
            kept.publish(self.place.answers)
        record = EvaluationRecord(
            round=self.state.number,
            state_sha256=self.sha256,
            complete=self.complete,
            seconds=sum(part.seconds for part in parts),
            clients=in_order((each for part in parts for each in part.clients), self.targets),
        )
        record.publish(self.place.record)
        return record


def _key(config: Config, piece: EvaluationPiece, sha256: str, rank: int | None) -> str:
    section = config.evaluation
    targets = [(target.client, target.rows) for target in piece.targets]
    return fingerprint_values(
        sha256,
        rank,
        targets,
        [section.max_new_tokens, section.batch_size, section.rougeL_published],
    )


def evaluate_pieces(
    target: Path,
    session: Session,
    identity: TaskIdentity | None = None,
    count: Count = uncounted,
    job: PackedJobPaths | None = None,
) -> EvaluationRecord | None:
    """Score the pieces of an evaluation that no other task of its job claims.

    Args:
        target: the folder of a round, or of an evaluation that `fedllm evaluate` asked for.
        session: the loaded base model and data.
        identity: the task; its processes score together, and the first one publishes. None: this
            process alone.
        count: called with the number of rows that are scored, and of all.
        job: the job, whose tasks claim pieces; None: all pieces that no part is there of.

    Returns:
        The record, which is published; None as long as other tasks score pieces.

    Raises:
        RunDirectoryError: the state is missing or damaged.
    """
    evaluation = Evaluation.open(target, session)
    if record := evaluation.done():
        return record
    task = identity or TaskEnvironment().identity
    is_first = identity is None or identity.is_first
    with scoring_task(session, identity, evaluation.config):
        scorer: Scorer | None = None
        for piece in _pieces(evaluation, job, identity):
            if scorer is None:
                scorer = _open(evaluation, session, count)
            if all_agree(scorer.slots, evaluation.part(piece) is not None):
                continue
            part = _score(evaluation, scorer, piece, task)
            if is_first:
                part.publish(evaluation.place.part(piece.number))
    return evaluation.join() if is_first else None


def _pieces(
    evaluation: Evaluation, job: PackedJobPaths | None, identity: TaskIdentity | None
) -> Iterator[EvaluationPiece]:
    """Yield the pieces that this task takes, claim by claim."""
    if job is None or identity is None or identity.num_processes > 1:
        yield from evaluation.pieces
        return
    seconds = traits_of(evaluation.config).visibility_seconds
    plan = read_late_file(lambda: SubmissionRecord.read(job.submission), seconds)
    claims = Claims(job, plan, None, identity, restarted=True)
    while claimed := claims.next(None):
        # the configuration may have changed since the plan was made
        yield from evaluation.pieces[claimed.bundle.number : claimed.bundle.number + 1]


def _open(evaluation: Evaluation, session: Session, count: Count) -> Scorer:
    scorer = Scorer.open(evaluation.state, session, count)
    scorer.progress.total = sum(
        scorer.num_rows(piece.targets, evaluation.rank) for piece in evaluation.pieces
    )
    return scorer


def _score(
    evaluation: Evaluation, scorer: Scorer, piece: EvaluationPiece, task: TaskIdentity
) -> PartRecord:
    begun = time.perf_counter()
    keeper = AnswerKeeper(scorer=scorer)
    clients = scorer.score(piece.targets, evaluation.rank, keeper)
    return PartRecord(
        key=evaluation.keys[piece.number],
        state_sha256=evaluation.sha256,
        task=task.task,
        node=task.node,
        seconds=time.perf_counter() - begun,
        clients=clients,
        answers=keeper.answers,
    )


@dataclass(frozen=True, kw_only=True)
class AnswerKeeper:
    """Keeper of the generated answers of the first `evaluation.keep_answers` rows of a client."""

    scorer: Scorer
    answers: list[KeptAnswer] = field(default_factory=list)

    def __call__(self, target: Target, scores: Sequence[RowScores]) -> None:
        """Keep the answers to the first rows of a client."""
        most = self.scorer.federation.config.evaluation.keep_answers
        rows = self.scorer.data.rows(target.client, "test")
        for index, found in list(zip(target.rows, scores, strict=True))[:most]:
            row = rows[index]
            self.answers.append(
                KeptAnswer(
                    client=target.client,
                    group=target.group,
                    tier=target.tier,
                    row=index,
                    prompt=self.scorer.slots.base.tokenizer.decode(
                        row.prompt_ids, skip_special_tokens=True
                    )[-_PROMPT_LETTERS:],
                    references=list(row.references),
                    answer=found.answer,
                    loss=found.loss / max(1, found.tokens),
                    rouge_l=found.rouge_l,
                    exact_match=found.exact_match,
                )
            )
