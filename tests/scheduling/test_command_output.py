"""Laws of Slurm's answers: other lines that a site prints change nothing."""

import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.models import ClientsSection, Config, SchedulerSection, TierSection
from fedllm.scheduling.seam import Job, SubmissionUnknown, TaskState
from fedllm.scheduling.slurm.command_output import MARK, SubmittedJob, marked_lines, submitted_job
from fedllm.scheduling.slurm.coordinator_job import submit_coordinator
from fedllm.scheduling.slurm.executor import SlurmScheduler
from fedllm.scheduling.slurm.notation import entities, settings
from fedllm.scheduling.slurm.states import has_ended, state_in_queue
from fedllm.storage.paths import RunPaths
from tests.scheduling.slurm_double import CONFIG, PARTITIONS, Answering

IDS = st.integers(1, 10**9)
CLUSTERS = st.text(string.ascii_lowercase, min_size=1, max_size=8)
# a banner may hold numbers, the word job, bars and equals signs: never a number alone
BANNERS = st.lists(
    st.text(string.ascii_letters + string.digits + " *|=:,;[]%-", max_size=60).filter(
        lambda line: submitted_job(line) is None and MARK not in line
    )
    | IDS.map("This is job {} of at most 100 in your queue".format)
    | IDS.map("your job {} is charged to lab".format),
    max_size=5,
)


def lines(*parts: list[str]) -> str:
    return "".join(f"{line}\n" for part in parts for line in part)


@given(id_=IDS, cluster=CLUSTERS, before=BANNERS, after=BANNERS)
def test_the_id_is_found_whatever_a_site_prints_around_it(
    id_: int, cluster: str, before: list[str], after: list[str]
) -> None:
    sentence = f"Submitted batch job {id_}"
    for answer in (
        *(sentence, f"sbatch: {sentence}", f"  {sentence}\r", f">> {sentence}"),
        *(f"\x1b[32m{sentence}\x1b[0m", f"[site] {sentence}. Have fun!"),
    ):
        assert submitted_job(lines(before, [answer], after)) == SubmittedJob(job=str(id_))
    found = submitted_job(lines(before, [f"{sentence} on cluster {cluster}"], after))
    assert found == SubmittedJob(job=str(id_), cluster=cluster)


@given(id_=IDS, other=IDS, before=BANNERS, decoration=st.sampled_from(["", ">> ", "sbatch: "]))
def test_a_sentence_of_sbatch_comes_before_numbers_that_stand_alone(
    id_: int, other: int, before: list[str], decoration: str
) -> None:
    answer = [f"{decoration}Submitted batch job {id_}"]
    wanted = SubmittedJob(job=str(id_))
    assert submitted_job(lines(before, answer, [str(other)])) == wanted
    assert submitted_job(lines([str(other)], answer, before)) == wanted


@given(id_=IDS, cluster=CLUSTERS, blank=st.sampled_from(["", "\n", " \r\n\n"]))
def test_a_number_is_an_id_if_nothing_else_is_printed(id_: int, cluster: str, blank: str) -> None:
    assert submitted_job(f"{blank}{id_}\n{blank}") == SubmittedJob(job=str(id_))
    wanted = SubmittedJob(job=str(id_), cluster=cluster)
    assert submitted_job(f"{blank} {id_};{cluster}\n{blank}") == wanted


@given(number=IDS, banner=BANNERS.filter(lambda banner: any(line.strip() for line in banner)))
def test_a_number_beside_anything_else_is_unknown(number: int, banner: list[str]) -> None:
    for answer in (f"{number}", f"{number};far"):
        assert submitted_job(lines(banner, [answer])) is None
        assert submitted_job(lines([answer], banner)) is None


@pytest.mark.parametrize(
    ("said", "job"),
    [
        ("12\n>> Submitted batch job 7\n", "7"),
        ("12\nSubmitted batch job 7\nSubmitted batch job 8\n", None),
        ("Your balance:\n1234\n", None),
        ("INFO: job 7\n5000", None),
        ("7\n7\n", None),
    ],
)
def test_what_a_site_prints_is_no_id(said: str, job: str | None) -> None:
    assert submitted_job(said) == (SubmittedJob(job=job) if job else None)


@given(before=BANNERS, ids=st.lists(IDS, min_size=2, max_size=4, unique=True))
def test_no_answer_and_answers_that_disagree_are_unknown(before: list[str], ids: list[int]) -> None:
    assert submitted_job(lines(before)) is None
    assert submitted_job(lines(before, [str(id_) for id_ in ids])) is None
    assert submitted_job(lines([f"Submitted batch job {id_}" for id_ in ids])) is None


@given(noise=BANNERS, asked=st.lists(st.text(string.printable.strip(), max_size=20), max_size=5))
def test_only_lines_with_the_mark_are_answers(noise: list[str], asked: list[str]) -> None:
    wanted = [line for line in asked if MARK not in line]
    said = lines(noise, [f"{MARK}{line}" for line in wanted], noise)
    assert marked_lines(said) == wanted
    # an announcement without an end of line
    assert (
        marked_lines(f"Maintenance! {said.lstrip()}" if said.startswith(MARK) else said) == wanted
    )


NOISE = """*** Maintenance on Monday, 8:00 to 12:00 = 4 hours ***
| user | quota | used | jobs |
|||||||||||||

7_0
"""


def noisy(text: str) -> str:
    return NOISE + text + NOISE


def test_settings_partitions_and_tables_are_read_through_noise() -> None:
    assert settings(noisy(CONFIG)) == settings(CONFIG)
    known = entities(PARTITIONS, "PartitionName")
    assert list(known) == ["low", "high", "short"]
    assert entities(noisy(PARTITIONS), "PartitionName") == known
    plain, loud = Answering(), Answering()
    loud.answers = {key: noisy(str(said)) for key, said in loud.answers.items()}
    found = [
        SlurmScheduler(section=SchedulerSection(), commands=commands).capacity({"mem": 100})
        for commands in (plain, loud)
    ]
    assert found[0] == found[1]
    for commands in (plain, loud):
        commands.answers["squeue"] = ""
    loud.answers["squeue"] = NOISE
    endings = "me|7_0|FAILED|1:0|n1\nme|7_[1-2]|CANCELLED by 5|0:0|None assigned\n"
    plain.answers["sacct "], loud.answers["sacct "] = endings, noisy(endings)
    tasks = ["7_0", "7_1", "7_2"]
    ended = [
        SlurmScheduler(section=SchedulerSection(), commands=commands).endings(tasks)
        for commands in (plain, loud)
    ]
    assert ended[0] == ended[1]
    assert list(ended[0]) == tasks


def test_states_are_read_through_noise() -> None:
    loud = Answering()
    loud.answers["squeue"] = noisy(f"{MARK}7_0|REQUEUE_HOLD|lab|normal|low|a | b\n")
    scheduler = SlurmScheduler(section=SchedulerSection(), commands=loud)
    assert scheduler.states(["7_0", "7_1"]) == {"7_0": TaskState.WAITING, "7_1": TaskState.GONE}
    assert scheduler.waiting_for(["7_0"]) == {"7_0": "a | b"}


@pytest.mark.parametrize("said", ["", "Welcome to job 5\n", "12\n13\n"])
def test_an_array_that_sbatch_does_not_name_is_found_by_its_name_or_reported(
    said: str, tmp_path: Path
) -> None:
    slurm = Answering()
    slurm.answers["sbatch"] = said
    scheduler = SlurmScheduler(section=SchedulerSection(), commands=slurm)
    job = Job(name="fedllm-x-r0001", program="client", argv=(), tasks=2, log_folder=tmp_path)
    slurm.answers["squeue"] = noisy(f"{MARK}7_0|fedllm-x-r0001\n{MARK}7_1|fedllm-x-r0001\n")
    assert scheduler.submit(job) == ["7_0", "7_1"]
    slurm.answers["squeue"] = noisy(f"{MARK}8_0|fedllm-x-r0002\n")
    with pytest.raises(SubmissionUnknown, match=r"^sbatch: its answer names no job \(") as caught:
        scheduler.submit(job)
    assert "; ".join(said.split("\n")).strip("; ") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["resident", "chained"])
@pytest.mark.parametrize("answer", ["5;other", "Welcome"])
def test_a_coordinator_that_may_exist_unseen_is_not_submitted_again(
    mode: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, line in (("sbatch", f"echo x >> {tmp_path}/sent; echo '{answer}'"), ("squeue", ":")):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{line}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    section = SchedulerSection.model_validate({"kind": "slurm", "coordinator": mode})
    clients = ClientsSection(tiers={"all": TierSection(ranks=4)})
    config = Config(clients=clients, scheduler=section)
    paths = RunPaths(root=tmp_path / "run")
    for _ in range(3):
        with pytest.raises(SubmissionUnknown, match=r"remove \S+/in-doubt\.json$"):
            submit_coordinator(paths, config, "ab12")
    assert (tmp_path / "sent").read_text() == "x\n"
    paths.coordinator_in_doubt.unlink()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 6\n")
    assert submit_coordinator(paths, config, "ab12") == "6"


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD SPECIAL_EXIT", "waiting"),
        ("CONFIGURING RUNNING SIGNALING STAGE_OUT COMPLETING", "running"),
        ("STOPPED SUSPENDED", "suspended"),
    ],
)
def test_what_waits_runs_or_stands_still_has_not_ended(words: str, state: str) -> None:
    assert {state_in_queue(word).value for word in words.split()} == {state}
    assert not any(map(has_ended, words.split()))
