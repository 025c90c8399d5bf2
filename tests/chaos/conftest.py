"""The one run of `make chaos SEED=n`, and the quiet one that it is compared with.

Without CHAOS_SEED, as in `make test`, only the plans are tested.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fedllm.storage.trust.secret import STATE_VARIABLE
from tests.chaos.acts_on_files import make_shim
from tests.chaos.campaign import Campaign
from tests.chaos.coordinators import Command, environment_of
from tests.chaos.lies import with_liars
from tests.chaos.member import Member, member
from tests.chaos.plan import ROUNDS, draw
from tests.chaos.report import report, summary
from tests.cli.commands import in_process
from tests.slurm.cluster import ENVIRONMENT, Cluster, is_installed, running
from tests.slurm.runs import ON_CLUSTER
from tests.tiny import make_tiny, raw_config

SEED = os.environ.get("CHAOS_SEED")
# rounds of the plan that are played
PLAYED = int(os.environ.get("CHAOS_ROUNDS", ROUNDS))
collect_ignore = [] if SEED else ["test_chaos.py"]

# two long faults at a time must find work left; broken nodes are the test's own doing
ON_THREE_WORKERS = (
    *ON_CLUSTER,
    "scheduler.max_parallel=3",
    "scheduler.worker_minutes_min=0.001",
    "scheduler.node_failures=1000",
    "scheduler.max_attempts=10",
    # at every step
    "training.checkpoint_every_minutes=1e-6",
)
DISK_MIB = 24
_FINISHED = pytest.StashKey[Campaign]()


@dataclass(frozen=True, kw_only=True)
class Aftermath:
    """What a campaign left, and the states of the quiet run."""

    campaign: Campaign
    quiet: Path
    cluster: Cluster


def pytest_report_header() -> str | None:
    """Say with which seed to see the same again."""
    return f"chaos: SEED={SEED}" if SEED else None


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print all faults once more, by kind."""
    campaign = config.stash.get(_FINISHED, None)
    if campaign:
        terminalreporter.section(f"chaos, SEED={SEED}")
        terminalreporter.write_line(summary(campaign))


@pytest.fixture(scope="session")
def public() -> Iterator[Path]:
    """A folder that every user can read."""
    if os.geteuid() != 0:
        message = "not root: file systems are mounted, and a user is made; run it as root"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="fedllm-chaos-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def config_file(public: Path) -> Path:
    """Six clients of six steps a round, every state kept."""
    tiny = make_tiny(public / "tiny")
    # weights are saved for their owner alone
    subprocess.run(["chmod", "-R", "a+rX", str(public / "tiny")], check=True)
    raw = raw_config(tiny.model.parent)
    raw |= {"rounds": PLAYED, "evaluation": {"every": 0}}
    raw["clients"] |= {"cohort": {"count": 6}}  # type: ignore[operator]
    raw["training"] |= {"max_steps": 6, "threads": 1}  # type: ignore[operator]
    raw["storage"] |= {"keep_every": 1}  # type: ignore[operator]
    path = tiny.model.parent / "chaos.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def quiet(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same run, made inline, that nothing disturbed."""
    root = tmp_path_factory.mktemp("quiet") / "run"
    done = in_process("run", config_file, "--run-dir", root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def disk(public: Path) -> Iterator[Path]:
    """A small file system of its own, seen by every node."""
    folder = public / "disk"
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=755", "tmpfs")
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def environment(public: Path, disk: Path, cluster: Cluster) -> dict[str, str]:
    """The variables of all processes of the campaign: wires, calls that fail, commands that lie."""
    wires, state = public / "wires", public / "state"
    state.mkdir(mode=0o700)
    path = with_liars(public, wires, ENVIRONMENT)
    watched = environment_of({**ENVIRONMENT, "PATH": path}, cluster, wires)
    shim = {"LD_PRELOAD": str(make_shim(public)), "FEDLLM_CHAOS_RUN": str(disk / "run")}
    return {**watched, **shim, STATE_VARIABLE: str(state)}


@pytest.fixture(scope="session")
def second_user(public: Path, environment: dict[str, str]) -> Iterator[Member]:
    """Another user of the run's group."""
    with member(public, environment) as one:
        yield one


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster without accounting that only this run uses."""
    if not is_installed():
        message = "Slurm is not installed: make slurm-packages"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    with running(accounting=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def said(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line at once, past pytest's capture."""
    manager = pytestconfig.pluginmanager
    capture, terminal = manager.getplugin("capturemanager"), manager.getplugin("terminalreporter")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)

    return say


@pytest.fixture(scope="session")
def aftermath(
    pytestconfig: pytest.Config,
    config_file: Path,
    quiet: Path,
    disk: Path,
    public: Path,
    cluster: Cluster,
    environment: dict[str, str],
    second_user: Member,
    said: Callable[[str], None],
) -> Aftermath:
    """Run the campaign of the seed."""
    assert SEED is not None
    plan = draw(int(SEED)).first(PLAYED)
    shared = (f"storage.group={second_user.name}", f"scheduler.python={second_user.python}")
    command = Command(
        config=config_file,
        changes=(*ON_THREE_WORKERS, *shared),
        root=disk / "run",
        cluster=cluster,
        environment=environment,
        log=public / "coordinator.log",
    )
    campaign = Campaign(
        plan=plan,
        command=command,
        wires=public / "wires",
        disk=disk,
        say=said,
        member=second_user,
    )
    pytestconfig.stash[_FINISHED] = campaign
    said(f"chaos: SEED={SEED}, {len(plan.faults)} faults in {plan.rounds} rounds")
    try:
        campaign.run()
    except BaseException:
        said(report(campaign))
        raise
    return Aftermath(campaign=campaign, quiet=quiet, cluster=cluster)
