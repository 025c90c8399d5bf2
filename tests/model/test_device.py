"""Devices are found by the names of the configuration."""

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.model.device import resolve_device, resolve_devices


@pytest.mark.parametrize(
    ("name", "number"), [("auto", 2), ("cuda", 2), ("cuda:1", 1), ("cuda:0", 0)]
)
def test_a_gpu_has_a_number_so_that_it_can_be_made_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert resolve_device(name) == torch.device("cuda", number)
    assert resolve_devices(["cpu", name]) == (torch.device("cpu"), torch.device("cuda", number))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="got 'cuda', no GPU is visible here"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="need auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
