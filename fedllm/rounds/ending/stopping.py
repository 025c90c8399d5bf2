"""Early stopping: a run ends once the loss of dev clients has not fallen for a while.

The decision before a round takes the evaluations of all rounds before it, by their numbers: it is
the same whenever they became ready, and after any restart.
"""

from collections.abc import Mapping

from fedllm.config.loading import dump_config, read_config
from fedllm.planning.evaluation_targets import is_complete, is_evaluated
from fedllm.rounds.run import Run
from fedllm.storage.frozen_config import key_values
from fedllm.storage.paths import backup_name
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import ChangeRecord, EvaluationRecord, RunRecord, StopRecord

# the user has been told in this process that the run stopped
_SAID = "stopped early"


def stop_after(losses: Mapping[int, float], patience: int, min_gain: float) -> int | None:
    """Return the round after which to stop; None: go on.

    Args:
        losses: round -> mean loss of dev clients.
        patience: evaluations in a row without a new lowest loss after which to stop.
        min_gain: how much lower a loss has to be to count as new lowest.
    """
    lowest, waited = float("inf"), 0
    for number in sorted(losses):
        if losses[number] < lowest - min_gain:
            lowest, waited = losses[number], 0
        else:
            waited += 1
        if waited >= patience:
            return number
    return None


def may_start(run: Run, number: int) -> bool:
    """Return whether round `number` may start: not before the evaluation that decides on it.

    If it must not start at all, the run's last round becomes the one before it.
    """
    section, patience = run.config.evaluation, run.config.stopping.patience
    if patience is None or number < 2:
        return True
    if is_evaluated(section, number - 1, run.config.rounds):
        if not run.paths.round(number - 1).evaluation_record.exists():
            return False
        losses = dev_losses(run, number - 1)
        last = stop_after(losses, patience, run.config.stopping.min_gain)
        if last is not None:
            _stop(run, losses, last, patience)
            return False
    return True


def dev_losses(run: Run, number: int) -> dict[int, float]:
    """Return round -> mean loss of dev clients, up to a round, of the rows that this one scored."""
    losses: dict[int, float] = {}
    scored: set[tuple[str, int]] = set()
    for earlier in range(number, -1, -1):
        path = run.paths.round(earlier).evaluation_record
        record = run.known_records.find(EvaluationRecord, path)
        dev = [c for c in record.clients if c.group == "dev"] if record else []
        rows = {(c.client, c.as_deployed.rows) for c in dev}
        scored = scored or rows
        if dev and rows == scored:
            losses[earlier] = sum(c.as_deployed.loss for c in dev) / len(dev)
    return losses


def apply_stop(run: Run) -> None:
    """Apply the decision of an earlier call, as long as the patience is what it was."""
    if run.config.stopping.patience is None:
        return
    stop = run.known_records.find(StopRecord, run.paths.stop)
    if stop is None or stop.patience != run.config.stopping.patience:
        return
    if stop.round < run.config.rounds:
        run.observations.last_round = stop.round
        if run.observations.is_new(_SAID):
            run.say(
                f"was stopped after round {stop.round}; to go on: --set stopping.patience=null "
                f"--set rounds={run.config.rounds}"
            )
        _end_at(run, stop.round)


def _stop(run: Run, losses: Mapping[int, float], last: int, patience: int) -> None:
    best = min(losses, key=lambda number: losses[number])
    run.publish(StopRecord(round=last, best_round=best, patience=patience), run.paths.stop)
    run.observations.last_round = last
    run.observations.is_new(_SAID)
    run.say(
        f"stopped after round {last}: the loss of dev clients is lowest in round {best} "
        f"({losses[best]:.3f}); it has not fallen for {patience} evaluations"
    )
    _end_at(run, last)


def _end_at(run: Run, last: int) -> None:
    """Make a round the last one of the run, and have it scored completely if the last one is.

    All readers take the last round from `config.yaml`; the change is recorded in `run.json`.
    """
    config = read_config(run.paths.config)
    if config.rounds != last:
        lowered = config.model_copy(update={"rounds": last})
        run.lease.check()
        publish_bytes(run.paths.config, dump_config(lowered).encode())
        record = RunRecord.read(run.paths.run)
        change = ChangeRecord(
            key="rounds", before=config.rounds, after=last, lease=run.lease.number
        )
        update = {"changes": [*record.changes, change], "config": key_values(lowered)}
        run.publish(record.model_copy(update=update), run.paths.run)
    round_paths = run.paths.round(last)
    evaluation = EvaluationRecord.find(round_paths.evaluation_record)
    is_partial = evaluation is not None and not evaluation.complete
    is_finished = round_paths.record.exists()
    if is_complete(run.config.evaluation, last, last) and is_partial and not is_finished:
        place = round_paths.evaluation.root
        place.rename(backup_name(place, "replaced"))
