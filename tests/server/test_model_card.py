"""The model card of an export tells what it is, from which base, and how it scores."""

import pytest
import yaml

from fedllm.errors import ConfigError, RunFailed
from fedllm.server.hub_upload import push_folder, require_repository
from fedllm.server.model_card import CardFacts, model_card
from tests.reporting.runs import evaluation


def facts(**changes: object) -> CardFacts:
    given: dict[str, object] = {
        "base_model": "owner/base",
        "method": "flexlora + fedit",
        "round": 3,
        "ranks": {"a": 4, "b": 8},
        "clients": 12,
        "rows": 1200,
        "merged": False,
        "base": evaluation(0, {"a": 4.0, "d": 6.0}),
        "scores": evaluation(3, {"a": 1.0, "d": 3.0}),
    }
    return CardFacts(**{**given, **changes})  # type: ignore[arg-type]


def fields(card: str) -> dict[str, object]:
    """Return the fields that the hub reads."""
    found: dict[str, object] = yaml.safe_load(card.split("---")[1])
    return found


def test_the_hub_finds_base_library_and_task() -> None:
    assert fields(model_card(facts())) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "federated-learning", "fedllm"],
    }
    merged = fields(model_card(facts(merged=True, base_model="/models/base")))
    assert "base_model" not in merged
    assert merged["library_name"] == "transformers"


def test_the_card_has_the_scores_of_each_group_apart() -> None:
    card = model_card(facts())
    assert "| dev clients | 1 | 6.000 -> 3.000 | 0.600 -> 0.300 | 0.500 -> 0.500 |" in card
    assert "| training clients | 1 | 4.000 -> 1.000 |" in card
    assert "- Adapter: ranks 4 to 8 in 2 modules" in card
    assert "- Data: 12 clients with 1,200 training rows" in card
    assert "## Scores" not in model_card(facts(scores=None))


@pytest.mark.parametrize("merged", [False, True])
def test_the_code_of_the_card_is_python(merged: bool) -> None:
    card = model_card(facts(merged=merged))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("PeftModel" in code) is not merged


def test_a_name_without_an_owner_is_refused_before_anything_is_written() -> None:
    for name in ("base", "a/b/c", "a b/c", ""):
        with pytest.raises(ConfigError, match="need OWNER/NAME"):
            require_repository(name)
    require_repository("owner/name")


def test_a_hub_that_does_not_answer_leaves_the_folder_and_a_remedy(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunFailed, match=r"--push-to-hub: o/n: .*is complete: log in"):
        push_folder("o/n", tmp_path)  # type: ignore[arg-type]
