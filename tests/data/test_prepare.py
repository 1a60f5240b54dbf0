"""Whole datasets: ids and counts by hand, streams equal to map-style, caching."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from alignkit.data.prepare import prepare_preferences
from alignkit.data.tokenize import RecordTokenizer
from tests.data.conftest import ids

ROWS = [
    {"prompt": "hi ", "chosen": "yes ", "rejected": "no "},
    {"prompt": "hi ", "chosen": "", "rejected": "no "},
    {"prompt": "w1 w2 ", "chosen": "w3 w4 w5 w6 ", "rejected": "w7 "},
    {"prompt": "w1 w2 w3 w4 w5 ", "chosen": "yes ", "rejected": "no "},
    {"prompt": "w9 ", "chosen": "kind ", "rejected": "be kind "},
]
UNPAIRED = [
    {"prompt": "hi ", "completion": "w1 ", "label": True},
    {"prompt": "w1 w2 w3 ", "completion": "w2 w3 w4 ", "label": 0},
    {"prompt": "hi ", "completion": " ", "label": True},
    {"prompt": "hi ", "completion": "w5 w6 w7 ", "label": "false"},
]


def forms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "list": rows,
        "dataset": Dataset.from_list(rows, on_mixed_types="use_json"),
        "generator stream": IterableDataset.from_generator(rows.__iter__),
        "arrow stream": Dataset.from_list(rows, on_mixed_types="use_json").to_iterable_dataset(
            num_shards=min(2, len(rows))
        ),
    }


@pytest.mark.parametrize("form", ["list", "dataset", "generator stream", "arrow stream"])
def test_pairs_by_hand(form: str, word_tokenizer) -> None:
    prepared, report = prepare_preferences(forms(ROWS)[form], word_tokenizer, max_length=5, max_drop_fraction=0.5)
    assert list(prepared) == [
        {"row_id": 0, "prompt_ids": ids("hi"), "chosen_ids": ids("yes", "</s>"), "rejected_ids": ids("no", "</s>")},
        {
            "row_id": 2,
            "prompt_ids": ids("w1", "w2"),
            "chosen_ids": ids("w3", "w4", "w5"),
            "rejected_ids": ids("w7", "</s>"),
        },
        {
            "row_id": 4,
            "prompt_ids": ids("w9"),
            "chosen_ids": ids("kind", "</s>"),
            "rejected_ids": ids("be", "kind", "</s>"),
        },
    ]
    assert report.as_dict() == {
        "name": "train",
        "rows_in": 5,
        "rows_kept": 3,
        "drops": {
            "empty": {"count": 1, "row_ids": [1], "example": "chosen is empty"},
            "prompt fills the length": {"count": 1, "row_ids": [3], "example": "5 tokens, max_length=5"},
        },
        "truncated_completions": 1,
        "eos_lost": {"count": 1, "row_ids": [2], "example": ""},
        "not_prefix": {"count": 0, "row_ids": [], "example": ""},
        "token_lengths": {
            "prompt": {"min": 1, "median": 1, "p95": 2, "max": 2},
            "chosen": {"min": 2, "median": 2, "p95": 3, "max": 3},
            "rejected": {"min": 2, "median": 2, "p95": 3, "max": 3},
        },
    }


@pytest.mark.parametrize("form", ["list", "dataset", "generator stream", "arrow stream"])
def test_unpaired_rows_by_hand(form: str, word_tokenizer) -> None:
    prepared, report = prepare_preferences(
        forms(UNPAIRED)[form], word_tokenizer, max_length=6, unpaired=True, max_drop_fraction=0.25
    )
    first, second, third = ids("w1", "</s>"), ids("w2", "w3", "w4"), ids("w5", "w6", "w7", "</s>")
    assert list(prepared) == [
        {"row_id": 0, "prompt_ids": ids("hi"), "chosen_ids": first, "rejected_ids": second, "label": True},
        # the next kept row is row 3, whose completion is cut to the 3 tokens that are left
        {
            "row_id": 1,
            "prompt_ids": ids("w1", "w2", "w3"),
            "chosen_ids": second,
            "rejected_ids": third[:3],
            "label": False,
        },
        {"row_id": 3, "prompt_ids": ids("hi"), "chosen_ids": third, "rejected_ids": first, "label": False},
    ]
    assert report.quantiles()["completion"] == {"min": 2, "median": 3, "p95": 4, "max": 4}
    assert report.eos_lost.row_ids == [1]


@pytest.mark.parametrize("form", ["list", "dataset", "generator stream", "arrow stream"])
def test_pairs_as_unpaired_rows(form: str, word_tokenizer) -> None:
    rows = [{**ROWS[0], "weight": 2}, {**ROWS[1], "weight": 1}, {**ROWS[4], "weight": 0.5}]
    prepared, report = prepare_preferences(
        forms(rows)[form], word_tokenizer, max_length=None, unpaired=True, max_drop_fraction=0.5
    )
    yes, no, kind, be = ids("yes", "</s>"), ids("no", "</s>"), ids("kind", "</s>"), ids("be", "kind", "</s>")
    columns = ("row_id", "prompt_ids", "chosen_ids", "rejected_ids", "label", "weight")
    assert [tuple(row[column] for column in columns) for row in prepared] == [
        (0, ids("hi"), yes, kind, True, 2.0),
        (0, ids("hi"), no, be, False, 2.0),
        (2, ids("w9"), kind, yes, True, 0.5),
        (2, ids("w9"), be, no, False, 0.5),
    ]
    assert (report.rows_in, report.rows_kept) == (3, 2)


@pytest.mark.parametrize("form", ["list", "dataset", "generator stream", "arrow stream"])
def test_token_ids_and_numbers_pass_through(form: str, word_tokenizer) -> None:
    row = {"prompt_ids": [4, 5], "chosen_ids": [6, 7, 1], "rejected_ids": [8, 1], "weight": 1, "margin": -0.5}
    row |= {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0, "other": "x", "label": "a category"}
    prepared, _ = prepare_preferences(forms([row])[form], word_tokenizer, max_length=4)
    kept = {column: value for column, value in row.items() if column not in ("other", "label")}
    assert list(prepared) == [{**kept, "row_id": 0, "chosen_ids": [6, 7], "weight": 1.0}]


def test_what_was_prepared_can_be_prepared_again(word_tokenizer) -> None:
    for rows, unpaired in ((ROWS, False), (UNPAIRED, True)):
        once, _ = prepare_preferences(rows, word_tokenizer, max_length=6, unpaired=unpaired, max_drop_fraction=0.5)
        again, _ = prepare_preferences(once, word_tokenizer, max_length=6, unpaired=unpaired)
        assert again.remove_columns("row_id").to_list() == once.remove_columns("row_id").to_list()


def test_conversations_with_the_turn_end_trained(word_tokenizer) -> None:
    rows = [{"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}]
    prepared, _ = prepare_preferences(rows, word_tokenizer, max_length=None)
    assert prepared[0]["prompt_ids"] == ids("<user>", "hi", "<assistant>")
    assert prepared[0]["chosen_ids"] == ids("yes", "</s>")


def test_transcripts_stay_text_without_a_template(byte_bpe_tokenizer) -> None:
    rows = [{"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}]
    prepared, _ = prepare_preferences(rows, byte_bpe_tokenizer, max_length=None)
    assert byte_bpe_tokenizer.decode(prepared[0]["prompt_ids"]) == "\n\nHuman: hi\n\nAssistant:"
    assert byte_bpe_tokenizer.decode(prepared[0]["rejected_ids"]) == " no</s>"


def test_rows_that_are_no_prefix_stay_and_are_counted(byte_bpe_tokenizer) -> None:
    rows = [
        {"prompt": "the b", "chosen": "ar", "rejected": " is"},
        {"prompt": "the", "chosen": " bar", "rejected": " is"},
    ]
    prepared, report = prepare_preferences(rows, byte_bpe_tokenizer, max_length=None)
    assert len(prepared) == 2
    assert report.not_prefix.row_ids == [0]
    assert "prompt not a token prefix" in report.text()


def test_a_stream_counts_each_pass_anew(word_tokenizer) -> None:
    for unpaired in (False, True):
        stream = IterableDataset.from_generator((ROWS * 50).__iter__)
        prepared, report = prepare_preferences(
            stream, word_tokenizer, max_length=5, unpaired=unpaired, max_drop_fraction=0.5
        )
        assert report.rows_in == 0
        first = list(prepared)
        assert (report.rows_in, report.rows_kept) == (250, 150)
        assert list(prepared) == first
        assert (report.rows_in, report.rows_kept) == (250, 150)
        in_map_style, whole = prepare_preferences(
            ROWS * 50, word_tokenizer, max_length=5, unpaired=unpaired, max_drop_fraction=0.5
        )
        assert first == in_map_style.to_list()
        assert report == whole


def test_a_stream_of_pairs_resumes_where_it_was_left(word_tokenizer) -> None:
    source = Dataset.from_list(ROWS * 50).to_iterable_dataset(num_shards=5)
    prepared, _ = prepare_preferences(source, word_tokenizer, max_length=5, max_drop_fraction=0.5)
    rows = iter(prepared)
    seen = [next(rows) for _ in range(70)]
    state = prepared.state_dict()
    again, _ = prepare_preferences(source, word_tokenizer, max_length=5, max_drop_fraction=0.5)
    again.load_state_dict(state)
    assert seen + list(again) == list(prepared)


def test_a_stream_shuffles_its_source_anew_each_epoch(word_tokenizer) -> None:
    source = Dataset.from_list(ROWS * 50).to_iterable_dataset(num_shards=5).shuffle(seed=1, buffer_size=50)
    prepared, _ = prepare_preferences(source, word_tokenizer, max_length=5, max_drop_fraction=0.5)
    first = [row["prompt_ids"] for row in prepared]
    prepared.set_epoch(1)
    second = [row["prompt_ids"] for row in prepared]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("unpaired", [False, True])
def test_the_second_call_tokenises_nothing(unpaired: bool, tmp_path, word_tokenizer, monkeypatch) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    dataset = Dataset.load_from_disk(tmp_path / "rows")
    options = {"unpaired": unpaired, "max_drop_fraction": 0.5}
    first = prepare_preferences(dataset, word_tokenizer, max_length=5, **options)
    calls, encode = [], RecordTokenizer.encode

    def counted(self: RecordTokenizer, rows: list) -> list:
        calls.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(RecordTokenizer, "encode", counted)
    second = prepare_preferences(dataset, word_tokenizer, max_length=5, **options)
    assert calls == []
    assert second[0].to_list() == first[0].to_list()
    assert second[1] == first[1]
    prepare_preferences(dataset, word_tokenizer, max_length=6, **options)
    assert calls == [4]  # another length is another result; the empty row never reaches the tokenizer


def test_two_processes_give_the_same(word_tokenizer) -> None:
    dataset = Dataset.from_list(ROWS * 4)
    one = prepare_preferences(dataset, word_tokenizer, max_length=5, max_drop_fraction=0.5)
    two = prepare_preferences(dataset, word_tokenizer, max_length=5, max_drop_fraction=0.5, num_proc=2)
    assert one[0].to_list() == two[0].to_list()
    assert one[1] == two[1]


def test_formats_set_by_the_user_do_not_matter(word_tokenizer) -> None:
    rows = [{"prompt_ids": [4], "chosen_ids": [5, 1], "rejected_ids": [6, 1]}]
    prepared, _ = prepare_preferences(Dataset.from_list(rows).with_format("torch"), word_tokenizer, max_length=5)
    assert prepared[0] == {**rows[0], "row_id": 0}
