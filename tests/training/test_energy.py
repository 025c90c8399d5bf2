"""Energy is what the device's counter says, and unknown where there is none."""

from pathlib import Path

import pytest
import torch

from fedllm.training.energy import EnergyMeter, energy_counter, joules_of, rapl_counter


def package(folder: Path, name: str, micro_joules: int, most: int = 10_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    (path / "energy_uj").write_text(f"{micro_joules}\n")
    return path / "energy_uj"


def test_the_packages_are_summed_and_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    first = package(tmp_path, "intel-rapl:0", 9_000_000)
    second = package(tmp_path, "intel-rapl:1", 0)
    # a part of the first package, which counts it too
    package(tmp_path, "intel-rapl:0:0", 5_000_000)
    meter = EnergyMeter(rapl_counter(tmp_path))
    second.write_text("500000\n")
    assert meter.joules() == pytest.approx(0.5)
    first.write_text("1000000\n")
    assert meter.joules() == pytest.approx(2.5)


def test_without_a_counter_there_is_no_energy(tmp_path: Path) -> None:
    assert rapl_counter(tmp_path) is None
    assert EnergyMeter(None).joules() is None
    unreadable = package(tmp_path, "intel-rapl:0", 1)
    counter = rapl_counter(tmp_path)
    assert counter is not None
    meter = EnergyMeter(counter)
    unreadable.unlink()
    assert meter.joules() is None
    assert rapl_counter(tmp_path) is None
    energy_counter(torch.device("cpu"))  # whatever this host tells


def test_a_training_whose_part_is_unknown_has_no_energy() -> None:
    assert joules_of(1.0, 2.0) == 3.0
    assert joules_of(None, 2.0) is joules_of(1.0, None) is None
