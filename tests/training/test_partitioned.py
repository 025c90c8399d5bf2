"""DeepSpeed's engine over factors, one client after another in the same process."""

from contextlib import closing

import pytest
import torch
from torch import nn

from fedllm.config.models import TrainingSection
from fedllm.training.partitioned import PartitionedTraining, process_group

STAGE_2 = TrainingSection.model_validate(
    {"engine": "zero", "zero": {"stage": 2}, "clip_norm": None}
)


def opened(parameters: list[nn.Parameter]) -> PartitionedTraining:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return PartitionedTraining(parameters, optimizer, STAGE_2, torch.device("cpu"))


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.mark.parametrize("sizes", [(1,), (3, 2), (3, 3)])
def test_factors_of_any_number_of_values_take_a_step(sizes: tuple[int, ...]) -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    with process_group(), closing(opened(parameters)) as training:
        training.step([torch.ones(size) for size in sizes], learning_rate=0.5)
        assert [parameter.tolist() for parameter in parameters] == [[0.5] * size for size in sizes]


def test_an_engine_collected_late_leaves_the_factors_to_the_next_client() -> None:
    # adapter slots keep their parameters, so both engines have the same ones
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    with process_group():
        first = opened(parameters)
        first.close()
        with closing(opened(parameters)) as second:
            # what the garbage collector does, at a time of its own
            first._engine.__del__()
            assert all(vars(each)["_hp_mapping"] is not None for each in parameters)
            second.step([torch.ones(3), torch.ones(3)], learning_rate=0.5)
    assert [parameter.tolist() for parameter in parameters] == [[0.5] * 3] * 2
