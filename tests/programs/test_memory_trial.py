"""Memory decides about a rank: `clients.ranks: fit`, measured on a real base."""

from pathlib import Path

import pytest

from fedllm.config.loading import dump_config, override_config, read_config
from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.programs.memory_trial import fit_ranks
from fedllm.programs.prepare import prepare_run
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord
from tests.tiny import Tiny


def fit(tiny: Tiny, memory_gib: float, *more: str) -> Config:
    tiers = f"clients.tiers={{all: {{memory_gib: {memory_gib}}}}}"
    changes = [tiers, "clients.ranks=fit", "clients.fit_ranks=[2, 4, 64]", *more]
    return override_config(read_config(tiny.config), changes)


def run_of(config: Config, root: Path) -> RunPaths:
    run = RunPaths(root=root)
    run.root.mkdir()
    run.config.write_text(dump_config(config), encoding="utf-8")
    return run


# one process that imports all that a worker does: 8 s
def test_prepare_measures_a_training_and_records_the_choice(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(fit(tiny, 8.0), tmp_path / "run")
    (record,) = prepare_run(run).fitted.values()
    # k and v take at most 16
    assert (record.rank, record.measured_rank, list(record.predicted_bytes)) == (4, 2, [2, 4])
    assert record.measured_bytes is not None
    assert 200 << 20 < record.measured_bytes < 4 << 30
    assert PreparedRecord.read(run.prepared).fitted_ranks == {"all": 4}


def test_a_run_that_has_begun_keeps_its_ranks(tiny: Tiny, tmp_path: Path) -> None:
    run = run_of(fit(tiny, 0.2), tmp_path / "run")  # too little by now
    cohort = CohortRecord(
        round=1,
        lease=1,
        base_fingerprint="",
        data_fingerprint="",
        state_sha256="",
        ranks={"all": {"model.layers.0.self_attn.q_proj": 2}},
        clients=[],
        layout=None,
    )
    cohort.publish(run.round(1).cohort)
    assert prepare_run(run).fitted_ranks == {"all": 2}


def test_what_cannot_be_measured_here_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    begun = PreparedRecord.read(prepared_of(tiny, tmp_path))
    zero = fit(tiny, 8.0, "training.engine=zero")
    with pytest.raises(ConfigError, match=r"^clients.tiers.all.ranks: .* engine zero; give it"):
        fit_ranks(zero, begun)
    on_gpu = fit(tiny, 8.0, "scheduler.sbatch.client={gres: 'gpu:1'}")
    with pytest.raises(ConfigError, match=r"^clients.tiers.all.ranks: .* no GPU; let "):
        fit_ranks(on_gpu, begun)


def prepared_of(tiny: Tiny, folder: Path) -> Path:
    run = run_of(read_config(tiny.config), folder / "prepared")
    prepare_run(run)
    return run.prepared
