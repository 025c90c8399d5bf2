"""pfl-research: federated averaging of the factors, a worker process per slot under torchrun."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.peer_programs.adapters import load_model
from benchmarks.peer_programs.work import ClientWork, read_work, round_done, trained
from benchmarks.rounds import BATCH, RATE, plain_batch


class WithLoss(torch.nn.Module):
    """The model with the two functions that pfl calls."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, **batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        return self.model(**batch, use_cache=False).loss

    def metrics(self, **batch: Any) -> dict[str, Any]:  # noqa: ARG002 - pfl's signature
        """Return no metrics: nothing is evaluated."""
        return {}


class ClientRows(Dataset):
    """A client's batches; the stock data set has no rows of different lengths."""

    def __init__(self, client: ClientWork) -> None:
        super().__init__(raw_data=(), user_id=client.client)
        self._client = client

    def __len__(self) -> int:
        return self._client.rows

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """Yield the batches of the client's steps."""
        trained(self._client, len(self._client.steps))
        return iter([plain_batch(rows) for rows in self._client.steps])


class RoundEnds(TrainingProcessCallback):
    """Notes the end of a round; pfl calls it after the global adapter is changed."""

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002 - pfl's signature
        model: PyTorchModel,  # noqa: ARG002
        *,
        central_iteration: int,  # noqa: ARG002
    ) -> tuple[bool, Metrics]:
        """Note it once, in the first process."""
        if pytorch_ops.distributed.global_rank == 0:
            round_done()
        return False, Metrics()


def main() -> None:
    """Run all rounds."""
    torch.set_num_threads(1)
    work = read_work()
    network = WithLoss(load_model(work.model)).train()
    cohort = len(work.rounds[0])
    order = iter([(number, place) for number in range(len(work.rounds)) for place in range(cohort)])
    data = FederatedDataset(
        lambda user: ClientRows(work.rounds[user[0]][user[1]]), lambda: next(order)
    )
    factors = [p for p in network.parameters() if p.requires_grad]
    algorithm = FederatedAveraging()
    # at iteration 0 pfl evaluates every client whatever the frequency is: begin at 1
    algorithm._current_central_iteration = 1
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(work.rounds) + 1,
            evaluation_frequency=10**9,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=None, postprocessors=[WeightByDatapoints()]
        ),
        model=PyTorchModel(
            model=network,
            local_optimizer_create=partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
            central_optimizer=torch.optim.SGD(factors, lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=RATE,
            local_num_epochs=1,
            local_batch_size=BATCH,
            local_max_grad_norm=1.0,
        ),
        callbacks=[RoundEnds()],
    )


if __name__ == "__main__":
    main()
