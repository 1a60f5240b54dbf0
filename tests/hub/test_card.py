"""The model card: true to the record, valid for the Hub, and kind to what a person wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from alignkit.errors import DataError
from alignkit.hub.card import card_for, is_generated, render_card, write_card
from alignkit.hub.metadata import LICENSES, check_metadata
from tests.hub.record_factory import interval, make_record

PEFT_CARD = """---
base_model: /home/someone/models/Some-1B
library_name: peft
tags:
- base_model:adapter:/home/someone/models/Some-1B
---

# Model Card for Model ID

[More Information Needed]
"""


def metadata_of(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_the_metadata_of_an_adapter() -> None:
    found = metadata_of(render_card(make_record(), repo_id="me/aligned"))
    assert found["library_name"] == "peft"
    assert found["base_model"] == "owner/Some-1B"
    assert found["tags"] == ["alignkit", "dpo", "lora", "base_model:adapter:owner/Some-1B"]
    assert found["datasets"] == ["owner/pairs"]
    assert (found["license"], found["language"]) == ("apache-2.0", ["en"])
    assert found["pipeline_tag"] == "text-generation"
    (entry,) = found["model-index"]
    assert entry["name"] == "aligned"
    metrics = [metric for result in entry["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"accuracy": 0.644, "loss": 0.633}
    check_metadata(found)


def test_figures_stand_with_their_intervals() -> None:
    text = render_card(make_record())
    assert "| reward accuracy | 0.500 [0.450, 0.550] | 0.644 [0.594, 0.694] |" in text
    assert "| loss | 0.693 | 0.633 |" in text
    assert "298 rows; 95 % intervals" in text
    assert "100 optimizer steps in 18 min" in text
    assert "5.30 GB of the process" in text
    assert "4 empty" in text
    assert "2.00 GB in 16 bits, or 520 MB in 4 bits" in text


def test_the_config_is_embedded_as_yaml() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", render_card(make_record()), flags=re.DOTALL)
    assert yaml.safe_load(block) == {"learning_rate": 1e-4}


def test_limits_follow_from_the_record() -> None:
    text = render_card(make_record())
    assert "No safety evaluation was made" in text
    assert "packed as nf4" in text
    assert "this is no proof" not in text
    weak = make_record()
    weak.add_evaluation("held-out preferences", {"accuracy": interval(0.58), "shorter": interval(0.557)}, rows=100)
    assert "reaches 0.530, and preferring the shorter answer alone gives 0.557: this is no proof" in render_card(weak)
    safe = make_record()
    safe.add_evaluation("safety: over-refusal", {"refusals": interval(0.1)}, rows=250)
    assert "No safety evaluation" not in render_card(safe)
    assert "nothing is claimed" in render_card(make_record(evaluations=[]))
    assert "had not finished" in render_card(make_record(finished=None))


def test_a_local_base_is_named_and_not_claimed_to_be_on_the_hub() -> None:
    base = {**make_record().base, "name": "my-model", "hub_id": None, "revision": None, "note": "a local model"}
    text = render_card(make_record(base=base), repo_id="me/x")
    assert "base_model" not in metadata_of(text)
    assert "`my-model`, is a local model: you need your own copy" in text
    assert "AutoPeft" not in text


def test_a_whole_model_and_a_reward_model_say_so() -> None:
    whole = metadata_of(render_card(make_record(adapter=None)))
    assert whole["library_name"] == "transformers"
    assert "base_model:finetune:owner/Some-1B" in whole["tags"]
    reward = render_card(make_record(method="reward", settings={"num_heads": 3}))
    assert metadata_of(reward)["pipeline_tag"] == "text-classification"
    assert "num_labels=3" in reward
    assert "load_reward_model" in reward


@pytest.mark.parametrize(
    ("base_license", "expected"), [(None, (None, None)), ("mit", ("mit", None)), ("my-own", ("other", "my-own"))]
)
def test_the_license_is_the_bases(base_license: str | None, expected: tuple) -> None:
    found = metadata_of(render_card(make_record(base={**make_record().base, "license": base_license})))
    assert (found.get("license"), found.get("license_name")) == expected


def test_a_license_that_is_given_wins_and_is_checked() -> None:
    assert metadata_of(render_card(make_record(), license="cc-by-4.0"))["license"] == "cc-by-4.0"
    with pytest.raises(DataError, match=r"license: 'apache2.0' is not one.*Did you mean 'apache-2.0'\?"):
        render_card(make_record(), license="apache2.0")
    assert {"apache-2.0", "llama3.1", "gemma", "mit", "other"} <= LICENSES


def test_hostile_samples_and_names_stay_text() -> None:
    samples = [{"prompt": "a ```` fence\n# head\n---", "before": None, "after": "\x1b[31mred\ud800 <script>"}]
    record = make_record(samples=samples)
    record.add_evaluation("x | y <b>\n# z", {"loss": 1.0}, rows=1)
    text = render_card(record)
    assert "\x1b" not in text
    assert "`````text\na ```` fence" in text
    assert "### x \\| y &lt;b> # z" in text
    assert text.count("\n---\n") == 2  # the metadata's end, and the one inside the fence


def test_a_long_sample_is_cut_and_says_so() -> None:
    text = render_card(make_record(samples=[{"prompt": "p", "before": None, "after": "x" * 200_000}]))
    assert "198,500 more characters" in text
    assert len(text) < 10_000


def test_pefts_card_is_replaced_and_a_persons_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(PEFT_CARD, encoding="utf-8")
    write_card(tmp_path, make_record())
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in first
    assert "/home/" not in first
    write_card(tmp_path, make_record(method="ppo"))  # ours, unchanged: written anew
    assert "proximal policy" in (tmp_path / "README.md").read_text(encoding="utf-8")
    edited = (tmp_path / "README.md").read_text(encoding="utf-8").replace("## Limits", "## Limits\n\nMind the gap.")
    edited = edited.replace("license: apache-2.0", "license: mit\nbase_model_relation: adapter")
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    record = make_record()
    record.add_evaluation("held-out preferences", {"accuracy": interval(0.7)}, rows=298)
    write_card(tmp_path, record)
    kept = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Mind the gap." in kept
    found = metadata_of(kept)
    assert found["license"] == "mit"
    assert found["base_model_relation"] == "adapter"
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7


def test_metadata_that_a_person_changed_stays_while_the_text_is_written_anew(tmp_path: Path) -> None:
    path = write_card(tmp_path, make_record())
    edited = path.read_text(encoding="utf-8").replace("license: apache-2.0", "license: mit\nthumbnail: x.png")
    path.write_text(edited, encoding="utf-8")
    record = make_record()
    record.add_evaluation("held-out preferences", {"accuracy": interval(0.7)}, rows=298)
    for _ in range(2):
        text = write_card(tmp_path, record).read_text(encoding="utf-8")
        found = metadata_of(text)
        assert (found["license"], found["thumbnail"]) == ("mit", "x.png")
        assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7
        assert "0.700 [0.650, 0.750]" in text
    assert metadata_of(card_for(tmp_path, record, license="cc0-1.0"))["license"] == "cc0-1.0"


def test_metadata_that_nobody_changed_follows_the_record(tmp_path: Path) -> None:
    write_card(tmp_path, make_record())
    other = {**make_record().base, "license": "mit", "language": ["de"]}
    found = metadata_of(card_for(tmp_path, make_record(base=other)))
    assert (found["license"], found["language"]) == ("mit", ["de"])


def test_a_card_with_a_byte_order_mark_keeps_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\ufeff---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    text = card_for(tmp_path, make_record())
    assert metadata_of(text)["license"] == "mit"
    assert text.count("license") == 1


def test_metadata_of_wrong_types_is_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: 3\n---\n# Mine\n", encoding="utf-8")
    with pytest.raises(DataError, match="mend its metadata"):
        card_for(tmp_path, make_record())


def test_a_name_with_quotes_stays_inside_the_code() -> None:
    base = {**make_record().base, "name": 'a"); import os #', "hub_id": None, "revision": None}
    (code,) = re.findall(r"```python\n(.*?)```", render_card(make_record(base=base), repo_id="me/x"), flags=re.DOTALL)
    compile(code, "card", "exec")
    assert "import os" not in [line.strip() for line in code.split(";")]
    assert r'from_pretrained("a\"); import os #"' in code


def test_what_an_evaluation_was_made_on_is_said() -> None:
    record = make_record(evaluations=[])
    data = {"source": "other/set", "hub_id": "other/set", "split": "test[:9]"}
    record.add_evaluation("preferences", {"subset/a|b\n# c": 1.0}, rows=9, details={"data": data})
    text = render_card(record)
    assert "9 rows of other/set, split test[:9].\n" in text
    assert "| subset/a\\|b # c | 1.000 |" in text
    (result,) = metadata_of(text)["model-index"][0]["results"]
    assert result["dataset"]["type"] == "other/set"
    assert "other/set" in result["dataset"]["name"]


def test_values_without_an_interval_promise_none() -> None:
    record = make_record(evaluations=[])
    record.add_evaluation("perplexity", {"perplexity": {"value": 3.0, "low": None, "high": None}}, rows=1)
    assert "in brackets" not in render_card(record)


def test_a_resumed_run_does_not_claim_the_time_of_all_its_steps() -> None:
    usage = {"steps": 1010, "resumed_from_step": 1000, "training_seconds": 10.0}
    assert "1010 optimizer steps, resumed after 1000; the last 10 in 10 s" in render_card(make_record(usage=usage))


def test_a_persons_metadata_with_a_path_is_mended(tmp_path: Path) -> None:
    own = PEFT_CARD.replace("# Model Card for Model ID\n\n[More Information Needed]", "# Mine\n\nMy words.")
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    text = card_for(tmp_path, make_record())
    assert "My words." in text
    assert "/home/" not in text
    assert metadata_of(text)["base_model"] == "owner/Some-1B"


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\na: [\n---\nmine", encoding="utf-8")
    with pytest.raises(DataError, match="mend its metadata, or remove the file"):
        write_card(tmp_path, make_record())
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("mine")


def test_what_counts_as_generated() -> None:
    body = ModelCard(render_card(make_record())).text
    assert is_generated(body)
    assert not is_generated(body.replace("0.644", "0.999"))
    assert is_generated("# Model Card for Model ID")
    assert is_generated("")
    assert not is_generated("# My model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library_name": "pefft"}, r"library_name: 'pefft'.*Did you mean 'peft'\?"),
        ({"pipeline_tag": "chat"}, "pipeline_tag: 'chat' is not one"),
        ({"license": "free"}, "license: 'free' is not one"),
        ({"language": ["english!"]}, "language: 'english!' is no ISO 639 code"),
        ({"base_model": "/home/x/model"}, "base_model: '/home/x/model' is no id of the Hub"),
        ({"datasets": ["a/b/c"]}, "datasets: 'a/b/c' is no id of the Hub"),
        ({"tags": ["fine", ""]}, "tags: .* must be words"),
        ({"model-index": [{"name": "x", "results": []}]}, "model-index: each entry needs a name and results"),
        ({"model-index": [{"name": "x", "results": [{"task": {"type": "t"}}]}]}, r"lacks dataset\.type, dataset\.name"),
    ],
)
def test_metadata_that_the_hub_would_not_take(change: dict, message: str) -> None:
    valid = metadata_of(render_card(make_record()))
    check_metadata(valid)
    with pytest.raises(DataError, match=message):
        check_metadata({**valid, **change})
