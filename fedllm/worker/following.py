"""The other processes of a worker: they train what the first one claims, and do no more."""

from contextlib import suppress

from fedllm.worker.bundle import StopRequested, open_round
from fedllm.worker.client_training import ClientRound, Save
from fedllm.worker.task import WorkerTask


def follow(task: WorkerTask, *, saves: bool = True) -> int:
    """Take part in the training of every group that the first process claims.

    Args:
        task: the task of this process.
        saves: whether the first process writes checkpoints; all gather what one holds.

    Returns:
        The exit code that the first process ends with.
    """
    opened: ClientRound | None = None

    def before_step(step: int, save: Save) -> None:
        del step
        stop, due = task.agree(due=False)
        if saves and (stop or due):
            save()
        if stop:
            raise StopRequested

    while not isinstance(order := task.processes.receive(), int):
        if opened is None or opened.paths != order.paths.round:
            opened = open_round(task, order.paths)
        if task.attempt != order.paths:
            task.go_on(order.paths)
        with suppress(StopRequested):
            opened.take_part(order, identity=task.identity, before_step=before_step)
    return order
