"""Scores of a server state, or of an adapter, on clients' test rows by generated answers."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedllm.adapters.base_copies import check_copies
from fedllm.adapters.peft_files import TENSORS, read_peft_adapter
from fedllm.adapters.tensor_names import names_in, place_of
from fedllm.config.models import Config
from fedllm.data.cache import TokenizedClients
from fedllm.errors import AdapterError
from fedllm.evaluation.scores import RowScores, mean_scores
from fedllm.methods.local_task import Recipient
from fedllm.methods.protocol import Method
from fedllm.packing.slots import AdapterSlots
from fedllm.planning.engines import engines_of, scoring_engine
from fedllm.planning.evaluation_targets import (
    Target,
    choose_targets,
    is_complete,
    pieces_to_score,
    scores_base,
)
from fedllm.planning.federation import Federation, plan_federation
from fedllm.process.client_store import ClientStore
from fedllm.process.run_method import method_of_run
from fedllm.process.server_state import read_state
from fedllm.process.session import Session
from fedllm.process.state_adapters import adapter_of, base_change_of, received_adapter
from fedllm.programs.scoring import Keep, all_agree, keep_nothing, score_targets
from fedllm.scheduling.traits import cache_for
from fedllm.storage.fingerprints import fingerprint_values, sha256_of
from fedllm.storage.kept_records import Count, Tally, uncounted
from fedllm.storage.paths import CachePaths, RoundPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    BaseRow,
    BaseScoresRecord,
    ClientScores,
    EvaluationRecord,
    PreparedRecord,
    RunRecord,
    Scores,
)
from fedllm.storage.tensors import TensorFile
from fedllm.training.provenance import environment

_Ranks = Mapping[str, int]
# what an evaluation counts
_SCORED = "rows scored"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A scorer of one server state; clients of equal ranks share an adapter and batches."""

    method: Method
    state: TensorFile
    federation: Federation
    slots: AdapterSlots
    data: TokenizedClients
    sha256: str
    round: int
    store: ClientStore
    cache: CachePaths
    progress: Tally

    @classmethod
    def open(cls, paths: RoundPaths, session: Session, count: Count = uncounted) -> "Scorer":
        """Open the server state of a round.

        Raises:
            RunDirectoryError: it is missing, pruned or damaged.
        """
        run = paths.run
        config = session.config(run)
        prepared = session.prepared(run.prepared)
        method, state = method_of_run(run, config), read_state(paths)
        record = AggregateRecord.read(paths.aggregate_record)
        change = base_change_of(method, state, record.base_change)
        return cls(
            method=method,
            state=state,
            federation=plan_federation(config, prepared),
            slots=session.scoring_slots(config, prepared, change),
            data=session.data(prepared),
            sha256=record.sha256,
            round=paths.number,
            store=ClientStore(paths=run, run=RunRecord.read(run.run)),
            cache=cache_for(config, run.root),
            progress=Tally(what=_SCORED, count=count),
        )

    def score(
        self, targets: Sequence[Target], rank: int | None = None, keep: Keep = keep_nothing
    ) -> list[ClientScores]:
        """Return the scores of clients of equal ranks; `rank` replaces each client's own.

        `keep` is called with every client's rows as deployed.
        """
        if scores_base(self.federation.config, self.round):
            deployed = largest = self.of_base(targets, keep)
        elif rank is not None:
            ranks = self.federation.largest_ranks
            at_rank = {module: min(rank, ranks[module]) for module in ranks}
            deployed = largest = self.at(at_rank, targets, keep)
        else:
            deployed = self.as_deployed(targets, keep)
            largest = self.at_largest_rank(targets, deployed)
        return _client_scores(targets, deployed, largest)

    def num_rows(self, targets: Sequence[Target], rank: int | None = None) -> int:
        """Return how many rows `score` scores, those at the largest ranks too."""
        again = rank is None and not scores_base(self.federation.config, self.round)
        counted = [*targets, *(self._smaller(targets) if again else ())]
        return sum(len(target.rows) for target in counted)

    def of_base(self, targets: Sequence[Target], keep: Keep) -> dict[str, Scores]:
        """Return every client's scores with the untouched base, from the cache if they are there.

        Without a starting adapter B is zero before training, so every rank scores the same, and
        runs of other tiers or methods need not score these rows again.
        """
        path = self.cache.base_scores(self._base_key(targets))
        known = BaseScoresRecord.find(path)
        if not all_agree(self.slots, known is not None) or known is None:
            known = self._score_base(targets)
            known.publish(path)
        found: dict[str, Scores] = {}
        for target in targets:
            scores = [RowScores(**row.model_dump()) for row in known.clients[target.client]]
            keep(target, scores)
            found[target.client] = mean_scores(scores)
        return found

    def _score_base(self, targets: Sequence[Target]) -> BaseScoresRecord:
        rows: dict[str, list[BaseRow]] = {}

        def note(target: Target, scores: Sequence[RowScores]) -> None:
            rows[target.client] = [BaseRow(**asdict(row)) for row in scores]

        self.at(self.federation.largest_ranks, targets, note)
        return BaseScoresRecord(clients=rows)

    def _base_key(self, targets: Sequence[Target]) -> str:
        """Return the fingerprint of everything that the scores of the base depend on."""
        config, prepared = self.federation.config, self.federation.prepared
        section = config.evaluation
        return fingerprint_values(
            prepared.model_fingerprint,
            prepared.data_fingerprint,
            [(target.client, target.rows) for target in targets],
            [section.max_new_tokens, section.batch_size, section.rougeL_published],
            [config.model.dtype, self.slots.layout],
            environment(config.training, str(self.slots.device), self.slots.base.quantisation),
            scoring_engine(engines_of(config)).processes,
        )

    def as_deployed(
        self, targets: Sequence[Target], keep: Keep = keep_nothing
    ) -> dict[str, Scores]:
        """Return the scores at the ranks that the clients share."""
        if not self.method.keeps_at_clients:
            return self.at(self.federation.ranks[targets[0].tier], targets, keep)
        scores: dict[str, Scores] = {}
        for target in targets:
            scores |= self._of_client(target, keep)
        return scores

    def at_largest_rank(
        self, targets: Sequence[Target], deployed: Mapping[str, Scores]
    ) -> dict[str, Scores]:
        """Return every client's scores at the largest ranks; clients that have them keep theirs."""
        return {**deployed, **self.at(self.federation.largest_ranks, self._smaller(targets))}

    def _smaller(self, targets: Sequence[Target]) -> list[Target]:
        """Return the clients that are scored at the largest ranks too."""
        if self.method.keeps_at_clients:
            return []  # a client has its own adapter, at its own rank
        largest, ranks = self.federation.largest_ranks, self.federation.ranks
        return [target for target in targets if ranks[target.tier] != largest]

    def _of_client(self, target: Target, keep: Keep) -> dict[str, Scores]:
        """Return the scores of a client with what it kept until the state's round."""
        after = self.round + 1
        to = Recipient(client=target.client, round=after)
        ranks = self.federation.ranks[target.tier]
        kept = self.store.read(target.client, after)
        self.slots.install(received_adapter(self.method, self.state, ranks, to, kept))
        self.state.release()
        return self._scores([target], keep)

    def at(
        self, ranks: _Ranks, targets: Sequence[Target], keep: Keep = keep_nothing
    ) -> dict[str, Scores]:
        """Return every client's scores with the adapter of `ranks`."""
        if not targets:
            return {}
        # the model has a copy of the adapter: the pages of the state can go
        self.slots.install(adapter_of(self.method, self.state, ranks))
        self.state.release()
        return self._scores(targets, keep)

    def _scores(self, targets: Sequence[Target], keep: Keep) -> dict[str, Scores]:
        config, progress = self.federation.config, self.progress
        return score_targets(self.slots, self.data, targets, config, keep, progress.add)


def evaluate_state(
    run: RunPaths,
    round_number: int,
    rank: int | None,
    session: Session,
    count: Count = uncounted,
) -> EvaluationRecord:
    """Score any round's state on the clients and rows of the last round's evaluation.

    Args:
        run: the run.
        round_number: the round of the state; 0 is the base.
        rank: the rank of all clients and modules, at most that of the state; None: each client's
            own. With a rank both scores of the record are the same.
        session: the loaded base model and data.
        count: called with the number of rows that are scored, and of all.

    Raises:
        RunDirectoryError: the state is missing, pruned or damaged.
    """
    begun = time.perf_counter()
    scorer = Scorer.open(run.round(round_number), session, count)
    last = scorer.federation.config.rounds
    pieces = pieces_to_score(
        scorer.federation, state_round=round_number, targets_round=last, rank=rank
    )
    scorer.progress.total = sum(scorer.num_rows(piece.targets, rank) for piece in pieces)
    scores = [each for piece in pieces for each in scorer.score(piece.targets, rank)]
    return EvaluationRecord(
        round=round_number,
        state_sha256=scorer.sha256,
        complete=rank is not None or is_complete(scorer.federation.config.evaluation, last, last),
        seconds=time.perf_counter() - begun,
        clients=in_order(
            scores, choose_targets(scorer.federation.config, scorer.federation.prepared, last)
        ),
    )


def evaluate_adapter(
    folder: Path,
    config: Config,
    prepared: PreparedRecord,
    session: Session,
    count: Count = uncounted,
) -> EvaluationRecord:
    """Score a PEFT adapter folder, with its own rank, on what a run's last round evaluates.

    Args:
        folder: the adapter; it may adapt other modules than the configuration names.
        config: base model, data and clients.
        prepared: the record of `prepare` for `config`.
        session: the loaded base model and data.
        count: called with the number of rows that are scored, and of all.

    Raises:
        AdapterError: it cannot be read, or belongs to another base model.
    """
    begun = time.perf_counter()
    opened = read_peft_adapter(folder)
    check_copies([opened], Path(prepared.model_path))
    _refuse_head(folder, opened.factors)
    leaves = tuple(sorted({module.rpartition(".")[2] for module in opened.factors}))
    lora = config.lora.model_copy(update={"target_modules": leaves})
    targets = choose_targets(config, prepared, config.rounds)
    slots = session.scoring_slots(config.model_copy(update={"lora": lora}), prepared)
    adapter = dict(opened.factors.named(names_in(opened.factors, slots.base.modules)))
    slots.install(adapter)
    total = sum(len(target.rows) for target in targets)
    progress = Tally(what=_SCORED, count=count, total=total)
    data = session.data(prepared)
    scores = score_targets(slots, data, targets, config, scored=progress.add)
    sha256 = sha256_of(folder / TENSORS)
    return EvaluationRecord(
        round=0,
        state_sha256=sha256,
        complete=True,
        seconds=time.perf_counter() - begun,
        clients=_client_scores(targets, scores, scores),
    )


def _refuse_head(folder: Path, modules: Iterable[str]) -> None:
    heads = [module for module in modules if place_of(module) == "lm_head"]
    if heads:
        raise AdapterError(
            f"{folder}: adapts {heads[0]}, whose LoRA is not computed here; score it with PEFT, or "
            "train without it"
        )


def in_order(scores: Iterable[ClientScores], targets: Sequence[Target]) -> list[ClientScores]:
    """Return the scores in the order of the targets."""
    by_client = {each.client: each for each in scores}
    return [by_client[target.client] for target in targets]


def _client_scores(
    targets: Sequence[Target], deployed: Mapping[str, Scores], largest: Mapping[str, Scores]
) -> list[ClientScores]:
    return [
        ClientScores(
            client=target.client,
            group=target.group,
            tier=target.tier,
            as_deployed=deployed[target.client],
            at_largest_rank=largest[target.client],
        )
        for target in targets
    ]
