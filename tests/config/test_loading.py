"""Configuration files give the values that people wrote, and all problems are reported at once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.deepspeed_keys import for_base, for_engine
from fedllm.config.loading import (
    dump_config,
    flatten,
    load_config,
    override_config,
    read_config,
    result_fingerprint,
    validate,
)
from fedllm.config.models import Config, HeldOutSection
from fedllm.config.spelling import resolve_scalars
from fedllm.config.yaml_text import parse_yaml, write_yaml
from fedllm.errors import ConfigError
from fedllm.storage.paths import shipped

PATHS = "model: {path: embedded}\ndata: {path: embedded}\n"
SMALL = PATHS + "clients:\n  tiers:\n    small: {ranks: 2}\n    large: {ranks: 8}\n"


@pytest.fixture(autouse=True)
def _no_paths_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_MODEL", raising=False)
    monkeypatch.delenv("FEDLLM_DATA", raising=False)


def loaded(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def small(*overrides: str) -> Config:
    return override_config(
        validate({"clients": {"tiers": {"small": {"ranks": 2}, "large": {"ranks": 8}}}}), overrides
    )


# --- files


def test_keys_that_a_file_omits_have_their_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL + "training: {learning_rate: 1e-4}\n")
    assert list(config.clients.tiers) == ["small", "large"]
    assert config.training.learning_rate == 1e-4
    assert config.training.batch_size == 4


def test_a_resolved_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = small(
        "clients.held_out_from={column: client_id, modulo: 5, equals: 4}",
        "clients.assign={'1e4': small, 'ü: x': large, 7: small}",
        "model.revision='7213e04'",
        "scheduler.sbatch.default={time: 2:00:00, requeue: yes, mem: '08', begin: 2026-01-01}",
        "clients.quorum=1.0",
        "training.clip_norm=null",
        "clients.cohort.count=3",
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert read_config(path) == config
    assert isinstance(config.clients.held_out_from, HeldOutSection)
    assert list(config.clients.assign) == ["1e4", "ü: x", "7"]
    assert config.scheduler.sbatch.default == {
        "time": "2:00:00",
        "requeue": True,
        "mem": "08",
        "begin": "2026-01-01",
    }


def test_a_run_that_names_a_key_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL)
    path = tmp_path / "run.yaml"
    text = dump_config(config).replace("aggregation:\n", "aggregation:\n  fold_ahead: true\n")
    path.write_text(text, encoding="utf-8")
    assert "fold_ahead" in text
    assert read_config(path) == config
    assert any("aggregation.fold_ahead" in line for line in problems(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such configuration file; see configs/"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"not a run directory \(no config.yaml\)"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1, 2", "line 2 is not YAML"),
        ("a: 1\nb: :\n  - x", "is not YAML"),
        ("- 1\n- 2", "got a list, need keys and values"),
        ("a: \x07", "is not YAML (special characters are not allowed)"),
        ("seed: 1\nrounds: 2\nseed: 3\n", "line 3 is not YAML (key `seed` is given twice)"),
        ("a: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_what_is_not_yaml_is_one_line_with_file_and_line(
    tmp_path: Path, text: str, words: str
) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(str(tmp_path / "config.yaml"))
    assert words in line


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match=r"config.yaml: is not YAML"):
        load_config(path)


def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **others: Any) -> Any:
        if mode == "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **others)

    monkeypatch.setattr(Path, "open", refuse)
    (line,) = problems(tmp_path, SMALL)
    assert "config.yaml: cannot be read (Permission denied); check its path" in line


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("lora.target_modules=[q_proj, v_proj, q_proj]", "q_proj"),
        ("reporting.trackers=[wandb, wandb]", "wandb"),
        ("clients.fit_ranks=[2, 4, 2]", "2"),
    ],
)
def test_a_list_that_names_something_twice_is_refused(
    tmp_path: Path, override: str, named: str
) -> None:
    (line,) = problems(tmp_path, SMALL, override)
    assert line.startswith(f"{override.partition('=')[0]}: got ")
    assert line.endswith(f", which names {named} twice; give it once")


def test_an_empty_file_lacks_everything(tmp_path: Path) -> None:
    lines = problems(tmp_path, "")
    assert [line.partition(":")[0] for line in lines] == ["model.path", "data.path", "clients"]


def test_a_section_whose_keys_are_commented_out_has_its_defaults(tmp_path: Path) -> None:
    text = SMALL + "evaluation:\n  # every: 2\nscheduler:\n  sbatch:\n"
    assert loaded(tmp_path, text) == loaded(tmp_path, SMALL)


def test_defaults_may_be_merged(tmp_path: Path) -> None:
    text = PATHS + (
        "clients:\n  tiers:\n    small: &base {ranks: 2, share: 1}\n"
        "    large: {<<: *base, ranks: 8}\n"
    )
    assert loaded(tmp_path, text).clients.tiers["large"].ranks == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("0x1f", 31),
        ("010", "010"),
        ("08", "08"),
        ("1_000", "1_000"),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2:00:00", "2:00:00"),
        ("1-12:00:00", "1-12:00:00"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_numbers_are_numbers_and_times_are_texts(text: str, value: object) -> None:
    found = resolve_scalars(parse_yaml(text.encode(), "here"))
    assert (type(found), found) == (type(value), value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"))
        | st.from_regex(r"[-+0-9][-+0-9.:_eE]{0,6}", fullmatch=True),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab01e:", max_size=4), inner, max_size=3)
        ),
        max_leaves=5,
    )
)
def test_whatever_is_written_reads_back_as_it_was(value: object) -> None:
    written = write_yaml({"key": value}).encode()
    assert resolve_scalars(parse_yaml(written, "here")) == {"key": value}


# --- --set and the environment


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=5", "rounds", 5),
        ("training.learning_rate=3e-4", "training.learning_rate", 3e-4),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=.*[qv]_proj", "lora.target_modules", ".*[qv]_proj"),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.max_steps=", "training.max_steps", None),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing", True),
        ("model.path=/a=b c", "model.path", "/a=b c"),
        ("clients.quorum=0.5", "clients.quorum", 0.5),
        ("clients.quorum=3", "clients.quorum", 3),
        (
            "clients.tiers.large.ranks={attention: 4, mlp: 8}",
            "clients.tiers.large.ranks",
            {"attention": 4, "mlp": 8},
        ),
        ("clients.held_out_from.column=id", "clients.held_out_from.column", "id"),
        (
            "scheduler.sbatch.tiers.large.time=2:00:00",
            "scheduler.sbatch.tiers",
            {"large": {"time": "2:00:00"}},
        ),
    ],
)
def test_set_takes_yaml_values(override: str, key: str, value: object) -> None:
    extra = ["clients.held_out_from.modulo=5", "clients.held_out_from.equals=4"]
    config = small(override, *(extra if "held_out" in key else []))
    assert flatten(config)[key][1] == value


def test_the_last_set_of_a_key_counts() -> None:
    assert small("rounds=5", "rounds=6").rounds == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds", "--set rounds: need KEY=VALUE"),
        ("=5", "--set =5: need KEY=VALUE"),
        ("rounds=[1", "--set rounds=[1: is not YAML"),
        ("rounds.x=5", "rounds: got {'x': 5}, need a whole number"),
        ("clients..cohort=5", "clients.: unknown key"),
    ],
)
def test_an_invalid_override_is_reported_in_one_line(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_setting_a_count_unsets_the_fraction(tmp_path: Path) -> None:
    text = SMALL + "  cohort: {fraction: 0.5}\n"
    assert loaded(tmp_path, text, "clients.cohort.count=3").clients.cohort.count == 3
    assert small("clients.cohort.count=3").clients.cohort.fraction is None
    assert (
        small(
            "clients.cohort.count=3", "clients.cohort.count=null", "clients.cohort.fraction=0.1"
        ).clients.cohort.fraction
        == 0.1
    )
    with pytest.raises(ConfigError, match=r"clients.cohort: got .*, give either"):
        small("clients.cohort.count=3", "clients.cohort.fraction=0.1")
    with pytest.raises(ConfigError, match=r"clients.cohort: got .*, give either"):
        small("clients.cohort.fraction=null")


def test_environment_variables_give_the_paths_that_a_file_omits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMALL.replace("model: {path: embedded}", "model: {path: null}").replace(
        "data: {path: embedded}", ""
    )
    lines = problems(tmp_path, text, "rouns=3")
    assert lines == [
        "model.path: not given; set it in the file, with --set model.path=PATH or $FEDLLM_MODEL"
        " (`embedded` needs no download)",
        "data.path: not given; set it in the file, with --set data.path=PATH or $FEDLLM_DATA"
        " (`embedded` needs no download)",
        "rouns: unknown key; did you mean `rounds`?",
    ]
    assert len(problems(tmp_path, text)) == 2
    monkeypatch.setenv("FEDLLM_MODEL", "/models/base")
    monkeypatch.setenv("FEDLLM_DATA", "")
    assert len(problems(tmp_path, text)) == 1
    monkeypatch.setenv("FEDLLM_DATA", "/data/tasks")
    config = loaded(tmp_path, text)
    assert (config.model.path, config.data.path) == ("/models/base", "/data/tasks")
    config = loaded(tmp_path, text, "data.path=/other")
    assert config.data.path == "/other"
    # a file that names its own is not overruled
    assert loaded(tmp_path, SMALL).model.path == "embedded"


# --- what is wrong


def test_presets_are_defaults_below_the_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "presets: [cross-silo, ranks-4-64]\nmodel: {path: embedded}\n"
        "data: {path: embedded, partition: {kind: iid}}\nclients: {dev: 1}\n"
    )
    config = load_config(path)
    assert config.clients.cohort.fraction == 1.0 and config.clients.dev == 1
    assert config.data.partition.clients == 16
    assert {name: tier.share for name, tier in config.clients.tiers.items()} == {
        "rank-4": 40, "rank-8": 20, "rank-16": 20, "rank-32": 10, "rank-64": 10
    }  # fmt: skip
    own = load_config(path, ["clients.cohort.count=3", "clients.tiers.mine.ranks=2"])
    assert (own.clients.cohort.count, list(own.clients.tiers)) == (3, ["mine"])
    with pytest.raises(ConfigError, match="presets: got 'silo', need some of cross-device"):
        load_config(path, ["presets=[silo]"])
    with pytest.raises(ConfigError, match="presets: got 'cross-silo', need a list of"):
        load_config(path, ["presets=cross-silo"])


def test_all_problems_are_reported_at_once_each_with_path_value_and_remedy(tmp_path: Path) -> None:
    text = PATHS + (
        "rouns: 3\nlearning_rate: 1\ntrainnig: {}\n"
        "clients:\n  tiers:\n    a: {ranks: {mlp: 0}, rank: 2}\n    3: {ranks: 0}\n"
        "training: {lr: 1, batch_size: many, schedule: lineer}\n"
    )
    assert sorted(problems(tmp_path, text)) == sorted(
        [
            "rouns: unknown key; did you mean `rounds`?",
            "learning_rate: unknown key; did you mean `training.learning_rate`?",
            "trainnig: unknown key; did you mean `training`?",
            "clients.tiers.a.ranks.mlp: got 0, need >= 1",
            "clients.tiers.a.rank: unknown key; did you mean `clients.tiers.a.ranks`?",
            "clients.tiers.3.ranks: got 0, need >= 1",
            "training.batch_size: got 'many', need a whole number",
            "training.schedule: got 'lineer', need 'constant', 'linear' or 'cosine'",
            "training.lr: unknown key; valid here: batch_size, checkpoint_every_minutes, "
            "clients_per_batch, clip_norm, cut_factor, cut_rounds, deepspeed, device, engine, "
            "epochs, gradient_checkpointing, learning_rate, max_steps, micro_batch_size, "
            "micro_batch_tokens, nodes, precision, processes, schedule, smaller_micro_batch, "
            "threads, warmup_steps, weight_decay, zero",
        ]
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("clients.quorum=0", "clients.quorum: got 0, need >= 1"),
        ("clients.quorum=1.5", "clients.quorum: got 1.5, need <= 1.0"),
        (
            "clients={quorum: 5, cohort: {count: 2}, tiers: {a: {ranks: 1}}}",
            "clients.quorum: got 5, clients.cohort.count is 2; lower it, or give `all` or a share",
        ),
        ("training.learning_rate=.inf", "training.learning_rate: got inf, need a finite number"),
        ("training.weight_decay=.nan", "training.weight_decay: got nan, need a finite number"),
        ("training.clip_norm=0", "training.clip_norm: got 0, need > 0.0"),
        (
            "training={engine: zero, processes: 9}",
            "training.processes: got 9, more than the 4 rows of an optimizer step; need <= 4, or a "
            "larger training.batch_size",
        ),
        (
            "training={engine: zero, clients_per_batch: 2}",
            "training.clients_per_batch: got 2, but training.engine zero trains one client at a "
            "time; need 1, or training.engine: plain",
        ),
        *(
            (f"training={{engine: zero, deepspeed: {given}}}", f"training.deepspeed.{line}")
            for given, line in (
                (
                    "{zero_optimization: {stage: 2}}",
                    "zero_optimization.stage: got 2, but training.zero.stage decides it (now 3); "
                    "remove it, or set that key",
                ),
                (
                    "{fp16: {enabled: true}}",
                    "fp16.enabled: got True, but training.precision decides it (now False): fedllm "
                    "trains in float32 or bfloat16, on CPU and GPU; remove it, or set that key",
                ),
                (
                    "{gradient_accumulation_steps: 4}",
                    "gradient_accumulation_steps: got 4, but training.micro_batch_size decides it; "
                    "remove it, or set that key",
                ),
                (
                    "{optimizer: {type: Adam}}",
                    "optimizer.type: got 'Adam', but method.local decides it; remove it, or set "
                    "that key",
                ),
            )
        ),
        (
            "training={engine: zero, zero: {stage: 1}, deepspeed: {zero_optimization: "
            "{stage3_max_live_parameters: 9}}}",
            "training.deepspeed.zero_optimization.stage3_max_live_parameters: got 9, without "
            "effect at training.zero.stage 1; remove it, or training.zero.stage: 3",
        ),
        (
            "training.deepspeed={wall_clock_breakdown: true}",
            "training.deepspeed: given, but no tier trains with DeepSpeed; remove it, or set "
            "training.engine: zero",
        ),
        (
            "training.deepspeed=nowhere.json",
            "training.deepspeed: nowhere.json: no such file; need keys and values of DeepSpeed, or "
            "a JSON or YAML file of them, such as configs/deepspeed/small_buckets.json",
        ),
        (
            "training={engine: zero, processes: 2, smaller_micro_batch: true}",
            "training.smaller_micro_batch: got true, but processes that divide the base "
            "(training.zero.stage 3) cannot begin again when one of them runs out of memory; need "
            "false, a smaller training.micro_batch_size, or training.zero.stage: 1 or 2",
        ),
        ("training.zero.stage=4", "training.zero.stage: got 4, need 1, 2 or 3"),
        (
            "training={engine: zero, processes: 3, nodes: 2}",
            "training.processes: got 3, not the same number on each of training.nodes 2; need a "
            "multiple of 2, or other nodes",
        ),
        (
            "clients.tiers.large.processes=2",
            "clients.tiers.large.processes: got 2, but training.engine plain trains a client in "
            "one process; need 1, or training.engine: zero",
        ),
        (
            "clients.tiers.large={ranks: 8, engine: zero, processes: 9}",
            "clients.tiers.large.processes: got 9, more than the 4 rows of an optimizer step; need "
            "<= 4, or a larger training.batch_size",
        ),
        (
            "clients.tiers.large={ranks: 8, engine: zero, processes: 2, nodes: 4}",
            "clients.tiers.large.processes: got 2, not the same number on each of "
            "clients.tiers.large.nodes 4; need a multiple of 4, or other nodes",
        ),
        (
            "training.processes=2",
            "training.processes: got 2, but training.engine plain trains a client in one process; "
            "need 1, or training.engine: zero",
        ),
        ("lora.dropout=1", "lora.dropout: got 1, need < 1.0"),
        (
            "lora.target_modules=q_proj",
            "lora.target_modules: got 'q_proj', need a list ([q_proj]), a regular expression over "
            "whole paths (.*q_proj) or all-linear",
        ),
        ("lora.target_modules=[]", "lora.target_modules: got [], need at least one name"),
        ("evaluation=[1]", "evaluation: got [1], need keys and values"),
        ("clients.tiers={}", "clients.tiers: got {}, need at least one"),
        (
            "clients.tiers.a.share=1",
            "clients.tiers.a.ranks: missing; give a rank, or clients.ranks: fit and memory_gib",
        ),
        ("model.path=[3]", "model.path: got [3], need a text"),
        (
            "scheduler.kind=sge",
            "scheduler.kind: got 'sge', need 'inline', 'local' or 'slurm'",
        ),
        (
            "clients.held_out_from=null",
            "clients.held_out_from: got None, need 'all' or a text or a list or keys and values",
        ),
        (
            "scheduler.sbatch.default={time: [1]}",
            "scheduler.sbatch.default.time: got [1], need a text or a whole number or a number "
            "or true or false",
        ),
        ("clients.assign={x: tiny}", "clients.assign.x: got 'tiny', need one of small, large"),
        (
            "clients.cohort={count: 1, tiers: [tiny]}",
            "clients.cohort.tiers: got 'tiny', need some of small, large",
        ),
        (
            "clients.distribution=normal",
            "clients.distribution: normal needs four tiers without `share`, got 2 tiers, "
            "0 with a share",
        ),
        (
            "clients.tiers.small.share=0.5",
            "clients.tiers.large.share: missing; give all tiers one, or none",
        ),
        (
            "clients.tiers={a: {ranks: 1, share: 0}, b: {ranks: 1, share: 0}}",
            "clients.tiers: all shares are 0; give at least one tier a share",
        ),
        (
            "scheduler.sbatch.tiers.tiny.mem=1",
            "scheduler.sbatch.tiers.tiny: no such tier; need one of small, large",
        ),
        (
            "clients.held_out_from.columnx=x",
            "clients.held_out_from.columnx: unknown key; did you mean "
            "`clients.held_out_from.column`?",
        ),
    ],
)
def test_an_invalid_value_is_reported_with_path_value_and_remedy(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(override)
    assert line in str(caught.value).splitlines()


def test_a_distribution_needs_four_tiers_without_shares() -> None:
    tiers = "clients.tiers={a: {ranks: 1}, b: {ranks: 1}, c: {ranks: 1}, d: {ranks: 1}}"
    assert small(tiers, "clients.distribution=normal").clients.distribution == "normal"
    with pytest.raises(ConfigError, match="got 4 tiers, 1 with a share"):
        small(tiers, "clients.distribution=normal", "clients.tiers.a.share=1")


# --- kinds of keys


def test_every_key_has_a_kind() -> None:
    keys = flatten(small())
    assert {kind for kind, _ in keys.values()} == {"result", "execution", "may grow"}
    assert [key for key, (kind, _) in keys.items() if kind == "may grow"] == ["rounds"]
    for key in ("seed", "training.learning_rate", "clients.tiers.small.ranks", "method.name"):
        assert keys[key][0] == "result"
    for key in (
        "scheduler.kind",
        "scheduler.sbatch.default",
        "storage.keep_states",
        "model.path",
        "data.path",
        "training.device",
        "training.checkpoint_every_minutes",
        "aggregation.device",
    ):
        assert keys[key][0] == "execution"


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "clients.tiers.small.ranks=3",
        "clients.tiers.small.engine=zero",
        "data.revision=x",
        "method.options.truncated=keep",
    ],
)
def test_a_result_key_changes_the_fingerprint(override: str) -> None:
    assert result_fingerprint(small(override)) != result_fingerprint(small())


@pytest.mark.parametrize(
    "override", ["rounds=9", "scheduler.kind=inline", "model.path=/elsewhere", "storage.cache=/c"]
)
def test_an_execution_key_or_more_rounds_leave_the_fingerprint(override: str) -> None:
    assert result_fingerprint(small(override)) == result_fingerprint(small())


def test_a_run_that_was_begun_before_a_key_was_added_keeps_its_fingerprint() -> None:
    # printed by the version before `method.options`
    before = "9bfd630e7934c4aa20cbd52a55b911822108f750f94c42c17aa0c901f7a54a3b"
    tiers = {"a": {"ranks": 2}, "b": {"ranks": 4}}
    config = validate({"clients": {"tiers": tiers}})
    assert result_fingerprint(config) == before
    old = config.model_dump(mode="json")
    del old["method"]["options"]
    for key in ("engine", "processes", "zero", "nodes", "deepspeed"):
        del old["training"][key]
    for tier in old["clients"]["tiers"].values():
        for key in ("engine", "processes", "nodes"):
            del tier[key]
    assert validate(old) == config


def test_keys_of_deepspeed_come_from_a_file_whose_content_the_run_keeps() -> None:
    file = shipped("configs/deepspeed/small_buckets.json")
    config = small(f"training={{engine: zero, deepspeed: {file}}}")
    assert for_engine(config.training.deepspeed) == {
        "zero_optimization": {
            "reduce_bucket_size": 1_000_000,
            "allgather_bucket_size": 1_000_000,
            "contiguous_gradients": True,
        }
    }
    assert validate(config.model_dump(mode="json")) == config
    same = "train_batch_size: 4, zero_optimization: {stage: 3, stage3_max_reuse_distance: 5}"
    given = small(f"training={{engine: zero, deepspeed: {{{same}}}}}").training.deepspeed
    assert (for_engine(given), for_base(given)) == ({}, {"max_reuse_distance": 5})


def test_what_a_tier_says_of_its_training_comes_before_the_general_keys() -> None:
    training = "training={engine: zero, processes: 4, nodes: 2}"
    config = small(training, "clients.tiers.small.engine=plain", "clients.tiers.large.processes=2")
    trains = {tier: config.training_of(tier) for tier in config.clients.tiers}
    found = {tier: (t.engine, t.processes, t.nodes) for tier, t in trains.items()}
    assert found == {"small": ("plain", 1, 1), "large": ("zero", 2, 2)}
    assert trains["small"].batch_size == config.training.batch_size
    # where processes run decides no result
    moved = small(
        "training={engine: zero, processes: 4}",
        "clients.tiers.small.engine=plain",
        "clients.tiers.large={ranks: 8, processes: 2, nodes: 1}",
    )
    assert result_fingerprint(moved) == result_fingerprint(config)


def test_the_order_of_tiers_decides_the_result_so_it_is_in_the_fingerprint() -> None:
    turned = small("clients.tiers={large: {ranks: 8}, small: {ranks: 2}}")
    assert flatten(turned) != flatten(small())
    assert result_fingerprint(turned) != result_fingerprint(small())


def test_the_order_of_assignments_does_not_change_the_fingerprint() -> None:
    one, other = (
        small(f"clients.assign={{{pairs}}}")
        for pairs in ("a: small, b: large", "b: large, a: small")
    )
    assert result_fingerprint(one) == result_fingerprint(other)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "got an empty list, need at least one"),
        ("[cpu, banana]", "got 'banana'"),
        ("cuda:x", "got 'cuda:x'"),
        ("''", "got ''"),
        ("CPU", "got 'CPU'"),
    ],
)
def test_an_unknown_aggregation_device_is_reported_with_its_key(
    tmp_path: Path, value: str, words: str
) -> None:
    (line,) = problems(tmp_path, SMALL + f"aggregation: {{device: {value}}}\n")
    assert line == f"aggregation.device: {words}; need auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:1", "[cuda:0, cuda:10]", "[cpu]"])
def test_devices_of_the_aggregation_are_one_or_a_list(tmp_path: Path, value: str) -> None:
    config = loaded(tmp_path, SMALL + f"aggregation: {{device: {value}}}\n")
    assert config.aggregation.device == (
        tuple(resolve_scalars(parse_yaml(value.encode(), "here")))
        if value.startswith("[")
        else value
    )


def test_two_bundle_sizes_are_refused(tmp_path: Path) -> None:
    text = SMALL + "scheduler: {clients_per_task: 1, clients_per_bundle: 2}\n"
    assert problems(tmp_path, text) == [
        "scheduler.clients_per_task: got 1 beside clients_per_bundle 2; give one of them and leave "
        "the other `auto`"
    ]


def test_an_unknown_key_with_a_dot_of_its_own_is_named(tmp_path: Path) -> None:
    found = problems(tmp_path, 'model: {"x.y": 1}\n"a.b": 2\n')
    assert any(line.startswith("model.x.y: unknown key; valid here: ") for line in found)
    assert any(line.startswith("a.b: unknown key; valid here: ") for line in found)
