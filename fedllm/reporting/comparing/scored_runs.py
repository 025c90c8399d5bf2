"""Scored runs: what a comparison needs of every run, and which runs cannot be compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.loading import read_config, result_fingerprint
from fedllm.config.models import Config
from fedllm.config.sweep_files import ComparisonSection, endpoint_parts
from fedllm.errors import RunDirectoryError, UserError
from fedllm.planning.sweeps.sweep_runs import NOISE_ARM
from fedllm.reporting.comparing.spending import SpentRound, spent_rounds
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.records import EvaluationRecord, PreparedRecord
from fedllm.storage.sweep_records import SweepRecord

_SEED_FOLDER = "seed-"
# the state before training, and the noise floor
_TAKEN = {"base", NOISE_ARM}
Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ScoredRun:
    """A run with its scores.

    Attributes:
        root: its directory.
        arm: its arm.
        seed: its seed.
        values: endpoint -> client -> value, the mean over the last evaluations.
        spent: the evaluated rounds with their primary endpoint and what was spent until then.
    """

    root: Path
    arm: str
    seed: int
    values: Mapping[str, Values]
    spent: tuple[SpentRound, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredArms:
    """The runs to compare, by arm.

    Attributes:
        arms: arm -> its runs, by seed.
        clusters: client -> the clients that are drawn with it.
        categories: client -> category.
        comparison: the keys of the comparison.
        contrast: the primary contrast, its first arm minus its second.
        is_named: whether the primary contrast is named in a sweep's file.
        noise: the A/A arm and the arm that it repeats; None: there is none.
        left_out: runs that are not compared, each with the reason.
    """

    arms: Mapping[str, tuple[ScoredRun, ...]]
    clusters: Mapping[str, str]
    categories: Mapping[str, str]
    comparison: ComparisonSection
    contrast: tuple[str, str]
    is_named: bool
    noise: tuple[str, str] | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    root: Path
    arm: str
    config: Config
    from_sweep: bool


def read_scored_arms(inputs: Sequence[str], last_rounds: int | None = None) -> ScoredArms:
    """Read the runs of `RUN`, `NAME=RUN` and `SWEEP` arguments.

    Args:
        inputs: the arguments; runs without a name share an arm if only their seeds differ. The
            first sweep says how to compare.
        last_rounds: the number of last evaluations whose mean counts; None: as in the sweep.

    Raises:
        RunDirectoryError: a run is not done, or was scored on other test data than the first.
        UserError: fewer than two arms are left.
    """
    sweeps = [SweepRecord.read(paths.record) for paths in _sweeps(inputs)]
    candidates = _candidates(inputs)
    if sweeps:
        comparison = ComparisonSection.model_validate(sweeps[0].comparison)
    else:
        comparison = _usual_comparison(candidates)
    if last_rounds is not None:
        comparison = comparison.model_copy(update={"last_rounds": last_rounds})
    noise_of = next((record.noise_of for record in sweeps if record.noise_of), None)
    return _arranged(_read(candidates, comparison), comparison, noise_of)


@dataclass(kw_only=True)
class _Read:
    """What was read: the arms, the runs that were left out, and the test data of all."""

    arms: dict[str, list[ScoredRun]]
    left_out: list[str]
    test_data: "_TestData | None" = None


def _read(candidates: Sequence[_Candidate], comparison: ComparisonSection) -> _Read:
    read = _Read(arms={}, left_out=[])
    for candidate in candidates:
        evaluations, problem = _evaluations(candidate, comparison.last_rounds)
        if problem and not candidate.from_sweep:
            raise RunDirectoryError(f"{candidate.root}: {problem}")
        if not problem:
            read.test_data = _same_test_data(read.test_data, candidate, evaluations)
            run = _scored(candidate, evaluations, comparison)
            problem = _divergence(run)
        if problem:
            read.left_out.append(f"{candidate.arm} seed {candidate.config.seed} ({problem})")
        else:
            _add(read.arms, run)
    return read


def _sweeps(inputs: Sequence[str]) -> list[SweepPaths]:
    paths = [SweepPaths(root=Path(given).resolve()) for given in inputs]
    return [each for each in paths if each.record.exists()]


def _candidates(inputs: Sequence[str]) -> list[_Candidate]:
    candidates: list[_Candidate] = []
    names: dict[str, str] = {}
    for given in inputs:
        sweep = SweepPaths(root=Path(given).resolve())
        if sweep.record.exists():
            candidates += _of_sweep(sweep)
            continue
        name, separator, folder = given.partition("=")
        is_named = bool(name and separator) and not Path(given).exists()
        if is_named and name in _TAKEN:
            raise UserError(f"{given}: `{name}` has another meaning; choose another name")
        root = Path(folder if is_named else given).resolve()
        config = read_config(RunPaths(root=root).config)
        # runs that differ in their seed only are one arm
        what = f"{result_fingerprint(config.model_copy(update={'seed': 0}))} {config.rounds}"
        arm = name if is_named else names.setdefault(what, _arm_of(root))
        candidates.append(_Candidate(root=root, arm=arm, config=config, from_sweep=False))
    return candidates


def _arm_of(root: Path) -> str:
    return root.parent.name if root.name.startswith(_SEED_FOLDER) else root.name


def _of_sweep(paths: SweepPaths) -> list[_Candidate]:
    found = []
    for item in SweepRecord.read(paths.record).runs:
        if item.phase == "run":
            run = paths.run(item.name)
            config = (
                read_config(run.config)
                if run.config.exists()
                else Config.model_validate(item.config)
            )
            found.append(_Candidate(root=run.root, arm=item.arm, config=config, from_sweep=True))
    return found


def _usual_comparison(candidates: Sequence[_Candidate]) -> ComparisonSection:
    """Return the defaults, on trained clients where none is unseen."""
    if candidates and candidates[0].config.clients.unseen:
        return ComparisonSection()
    return ComparisonSection(endpoint="train_loss")


def _evaluations(candidate: _Candidate, count: int) -> tuple[list[EvaluationRecord], str]:
    """Return the last evaluations of a run that is done, or the problem."""
    paths, rounds = RunPaths(root=candidate.root), candidate.config.rounds
    found: list[EvaluationRecord] = []
    for number in range(rounds, 0, -1):
        record = EvaluationRecord.find(paths.round(number).evaluation_record)
        if record is None and number == rounds:
            return [], "not done: its last round is not evaluated; resume the run"
        if record is not None:
            found.append(record)
        if len(found) == count:
            return found, ""
    return [], f"has {len(found)} evaluated rounds, need last_rounds {count}; lower it"


@dataclass(frozen=True, kw_only=True)
class _TestData:
    """What has to be equal in all runs, and the run that was read first."""

    root: Path
    fingerprint: str
    round: int | None
    scored: frozenset[tuple[str, str, int]]
    categories: Mapping[str, str]


def _same_test_data(
    first: _TestData | None, candidate: _Candidate, evaluations: Sequence[EvaluationRecord]
) -> _TestData:
    prepared = PreparedRecord.read(RunPaths(root=candidate.root).prepared)
    found = _TestData(
        root=candidate.root,
        fingerprint=prepared.data_fingerprint,
        round=_chosen_last_round(candidate, evaluations),
        scored=frozenset((c.client, c.group, c.as_deployed.rows) for c in evaluations[0].clients),
        categories={client.id: client.category for client in prepared.clients},
    )
    if first is None:
        return found
    _refuse_other_rounds(first, found)
    for what, was, now in (
        (
            "data, clients.split_seed, tokenizer, data.template or data.cutoff_tokens",
            first.fingerprint,
            found.fingerprint,
        ),
        ("clients or test rows scored", first.scored, found.scored),
    ):
        if was != now:
            raise RunDirectoryError(
                f"{candidate.root}: other {what} than in {first.root}; compare runs of the same "
                "data, clients.split_seed and evaluation"
            )
    return first


def _refuse_other_rounds(first: _TestData, found: _TestData) -> None:
    if first.round is None or found.round is None or first.round == found.round:
        return
    pair = [(first.round, first.root), (found.round, found.root)]
    (rounds, shorter), (most, longer) = sorted(pair)
    raise RunDirectoryError(
        f"{longer}: its last evaluation is of round {most}, that of {shorter} is of round "
        f"{rounds}; resume it: fedllm resume {shorter} --set rounds={most}"
    )


def _chosen_last_round(
    candidate: _Candidate, evaluations: Sequence[EvaluationRecord]
) -> int | None:
    """Return a run's last evaluated round; None if a sweep's file or early stopping chose it."""
    if candidate.from_sweep or candidate.config.stopping.patience is not None:
        return None
    return max(evaluation.round for evaluation in evaluations)


def _scored(
    candidate: _Candidate, evaluations: Sequence[EvaluationRecord], comparison: ComparisonSection
) -> ScoredRun:
    """Return a run with its scores."""
    values = {endpoint: _values(evaluations, endpoint) for endpoint in comparison.endpoints}
    run = ScoredRun(
        root=candidate.root,
        arm=candidate.arm,
        seed=candidate.config.seed,
        values=values,
        spent=spent_rounds(RunPaths(root=candidate.root), candidate.config, comparison.endpoint),
    )
    empty = [endpoint for endpoint, of_clients in values.items() if not of_clients]
    if empty:
        raise UserError(
            f"{candidate.root}: no client of group {endpoint_parts(empty[0])[0]} was scored, which "
            f"{empty[0]} needs; choose another endpoint"
        )
    return run


def _divergence(run: ScoredRun) -> str:
    values = (value for of_clients in run.values.values() for value in of_clients.values())
    return "" if all(map(math.isfinite, values)) else "diverged: a score is not finite"


def _values(evaluations: Sequence[EvaluationRecord], endpoint: str) -> dict[str, float]:
    """Return client -> mean over the evaluations, of the clients that all of them scored."""
    group, metric = endpoint_parts(endpoint)
    scored = [
        {c.client: float(getattr(c.as_deployed, metric)) for c in e.clients if c.group == group}
        for e in evaluations
    ]
    in_all = [client for client in scored[0] if all(client in each for each in scored)]
    return {client: sum(each[client] for each in scored) / len(scored) for client in in_all}


def _add(arms: dict[str, list[ScoredRun]], run: ScoredRun) -> None:
    others = arms.setdefault(run.arm, [])
    same = [other for other in others if other.seed == run.seed]
    if same:
        raise UserError(
            f"{run.root}: seed {run.seed} of arm {run.arm} is there already ({same[0].root}); "
            "leave one out, or name them: NAME=RUN"
        )
    others.append(run)


def _arranged(read: _Read, comparison: ComparisonSection, noise_of: str | None) -> ScoredArms:
    arms, left_out, test_data = read.arms, read.left_out, read.test_data
    names = [arm for arm in arms if arm != NOISE_ARM]
    missing = f"; left out: {', '.join(left_out)}" if left_out else ""
    wanted = comparison.contrast or tuple(names[:2])
    if len(wanted) < 2 or test_data is None:
        raise UserError(
            f"compare: need finished runs of two arms, found {', '.join(names) or 'none'}{missing}"
            "; name another run"
        )
    absent = [arm for arm in wanted if arm not in arms]
    if absent:
        raise UserError(f"compare: no run of arm {absent[0]} is done{missing}")
    values = next(iter(arms.values()))[0].values
    clients = {client for of_clients in values.values() for client in of_clients}
    noise = (NOISE_ARM, noise_of) if noise_of in arms and NOISE_ARM in arms else None
    return ScoredArms(
        arms={arm: tuple(sorted(runs, key=lambda run: run.seed)) for arm, runs in arms.items()},
        clusters=_clusters(clients, test_data.categories, comparison.cluster),
        categories=test_data.categories,
        comparison=comparison,
        contrast=(wanted[0], wanted[1]),
        is_named=comparison.contrast is not None,
        noise=noise if noise is None else (noise[0], str(noise[1])),
        left_out=tuple(left_out),
    )


def _clusters(clients: set[str], categories: Mapping[str, str], kind: str) -> dict[str, str]:
    """Return the cluster of every client: its category, or itself where there is none."""
    if kind == "client":
        return {client: client for client in clients}
    return {client: categories.get(client) or client for client in clients}
