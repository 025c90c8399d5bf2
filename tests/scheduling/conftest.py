"""Fixtures that run a test on every scheduler, also on the real Slurm."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scheduling import sites
from tests.scheduling.sites import Site
from tests.slurm.cluster import program
from tests.slurm.conftest import limited_cluster as limited_cluster

SLURM = pytest.param("slurm", marks=pytest.mark.slurm)


def on_sites(*names: str) -> pytest.MarkDecorator:
    """Return the mark that runs a test on these schedulers."""
    params = [SLURM if name == "slurm" else name for name in names]
    return pytest.mark.parametrize("site", params, indirect=True)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """The scheduler that a test is run on."""
    if request.param == "slurm":
        yield from _slurm(request, tmp_path)
    else:
        with getattr(sites, request.param)(tmp_path) as made:
            yield made


def _slurm(request: pytest.FixtureRequest, folder: Path) -> Iterator[Site]:
    from fedllm.config.models import SchedulerSection
    from fedllm.scheduling.slurm.executor import SlurmScheduler

    cluster = request.getfixturevalue("limited_cluster")
    program(folder / "jobs", "client", sites.PROGRAM)
    # two tasks at once, as elsewhere
    section = SchedulerSection(query_seconds=1e-6, max_parallel=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield Site(
            scheduler=SlurmScheduler(section=section, jobs_folder=folder / "jobs"),
            folder=folder,
            argv=lambda seconds, code: (str(seconds), str(code)),
            restart=lambda task: cluster.slurm("scontrol", "requeue", task) and None,
            is_batch=True,
        )
    cluster.slurm("scancel", "--full", f"--user={os.getuid()}")
