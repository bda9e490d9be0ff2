"""What `FocalPOTrainer` says of its data before it trains: layouts, errors, counts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_tiny import CONVERSATIONS, RECORDS, TOKENIZER, focal_trainer, llama, near, seeded, tokenizer_of

from focalkern.trl.data import as_trl_takes_it, inspect_pairs

BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
SIMPO = {"reference_free": True, "length_normalize": True, "gamma": 0.0}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None) -> dict:
    return {"role": "assistant", "content": text}


def streamed(records: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(records))


def trained_on(folder, records, **changes):
    """A trainer, and what it warned of."""
    dataset = Dataset.from_list(records) if isinstance(records, list) else records
    model = seeded(llama)
    models = [model] if changes.get("reference_free") else [model, near(model)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = focal_trainer(folder, *models, options={"train_dataset": dataset}, **changes)
    return trainer, [w for w in caught if "dataset" in str(w.message)]


# ------------------------------------------------------------------------------------------------ the layouts

PLAIN = [{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}]
TURNS = [user("p"), assistant("r"), user("q")]
LAYOUTS = {
    "as TRL has it": (PLAIN, PLAIN),
    "text before whole conversations": (
        [{"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}],
        PLAIN,
    ),
    "text before answers": (
        [{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}],
        PLAIN,
    ),
    "messages before whole conversations": (
        [
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            }
        ],
        PLAIN,
    ),
    "answers, then whole conversations": (
        [
            *PLAIN,
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
        ],
        PLAIN * 2,
    ),
    "the last of several turns": (
        [{"prompt": "q", "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]}],
        [{"prompt": TURNS, "chosen": [assistant("a")], "rejected": [assistant("b")]}],
    ),
    "plain text": (RECORDS, RECORDS),
}


@pytest.mark.parametrize("make", [Dataset.from_list, streamed], ids=["dataset", "stream"])
@pytest.mark.parametrize(("records", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_are_taken(records, expected, make):
    assert list(as_trl_takes_it(make(records), "train")) == expected


def test_the_common_layout_is_tokenised_as_trl_s_own(tmp_path):
    """UltraFeedback's: a prompt of text beside two whole conversations, and columns of its own."""
    common = [
        {
            "prompt": record["prompt"][0]["content"],
            "prompt_id": str(i),
            "chosen": record["prompt"] + record["chosen"],
            "rejected": record["prompt"] + record["rejected"],
        }
        for i, record in enumerate(CONVERSATIONS)
    ]
    found, expected = (trained_on(tmp_path, x)[0].train_dataset for x in (common, CONVERSATIONS))
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[column][:] == expected[column][:]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
REFUSED = {
    "empty": ([], "eval dataset must hold pairs"),
    "other columns": (
        [{"question": "q", "yes": "a", "rejected": "b"}],
        r"columns prompt, chosen and rejected; got \['question', 'yes', 'rejected'\]: chosen missing",
    ),
    "null": ([PAIR, PAIR, {**PAIR, "chosen": None}], "row 2 of the eval dataset has null in chosen"),
    "null alone": ([{**PAIR, "prompt": None}], "'prompt': 'null'"),
    "null content": (
        [*PLAIN, {**PLAIN[0], "rejected": [assistant(None)]}],
        "row 1 of the eval dataset has null in rejected",
    ),
    "mixed": ([{**PAIR, "rejected": [assistant("b")]}], "'chosen': 'text', 'rejected': 'messages'"),
    "messages before text": ([{**PAIR, "prompt": [user("q")]}], "'prompt': 'messages', 'chosen': 'text'"),
    "numbers": ([{**PAIR, "chosen": 3}], "'chosen': 'int 3'"),
    "no messages": ([{**PLAIN[0], "chosen": []}], r"'chosen': 'list \[\]'"),
    "a prompt from elsewhere": (
        [{"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}],
        "row 0 of the eval dataset has a prompt that is not among the messages",
    ),
}


@pytest.mark.parametrize("make", [Dataset.from_list, streamed], ids=["dataset", "stream"])
@pytest.mark.parametrize(("records", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_is_said(records, message, make):
    with pytest.raises(ValueError, match=message):
        list(as_trl_takes_it(make(records), "eval"))


def test_a_message_that_calls_a_tool_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    records = [{**PLAIN[0], "chosen": [call, assistant("a")]}]
    assert len(as_trl_takes_it(Dataset.from_list(records), "train")) == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "train dataset must hold pairs"), ([{"question": "q"}], "must have the columns prompt, chosen")],
)
def test_the_trainer_says_it(records, message, tmp_path):
    dataset = Dataset.from_list(records) if records else Dataset.from_dict({"prompt": [], "chosen": []})
    with pytest.raises(ValueError, match=message):
        trained_on(tmp_path, dataset, padding_free=True)


# ------------------------------------------------------------------------------------------------- the report

ROWS = {
    # name: (prompt, chosen, rejected) as TRL tokenises them
    "good": ([BOS, 9, 8], [7, 6, EOS], [5, EOS]),
    "another": ([BOS, 9], [7, EOS, 30], [5, EOS, 30]),
    "doubled_bos": ([BOS, BOS, 9], [7, EOS], [5, EOS]),
    "doubled_bos at the end of a prompt": ([BOS], [BOS, 7, EOS], [BOS, 5, EOS]),
    "without_eos": ([BOS, 9], [7, 6], [5, EOS]),
    "empty": ([BOS, 9], [EOS], [5, EOS]),
    "empty rejected": ([BOS, 9], [5, EOS], [TOKENIZER.convert_tokens_to_ids("Ġ"), EOS]),
    "identical": ([BOS, 9], [7, EOS], [7, EOS]),
    "unpredicted": ([], [EOS], [7, EOS]),
    "cut": ([BOS, 9], [7, 6, 6, 6, 6, EOS], [5, EOS]),
    "cut, identical": ([BOS, 9], [7, 7, 7, 7, 7, EOS], [7, 7, 7, 7, 8, 9, EOS]),
}
NO_FLAGS = {"cut": 0, "doubled_bos": 0, "without_eos": 0, "empty": 0, "identical": 0, "unpredicted": 0}


def report_on(*rows, max_length=None, truncation_mode="keep_start", dropped=0):
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*rows, strict=True), strict=True))
    dataset = Dataset.from_dict({name: list(values) for name, values in columns.items()})
    return inspect_pairs(dataset, len(rows) + dropped, "train", TOKENIZER, max_length, truncation_mode)


def flags_of(report) -> dict[str, int]:
    return {name: getattr(report, name) for name in NO_FLAGS}


@pytest.mark.parametrize("name", ROWS)
def test_a_pair_is_counted_as_what_it_is(name):
    max_length = 6 if name.startswith("cut") else None
    expected = {flag: int(flag in name.replace("empty rejected", "empty")) for flag in NO_FLAGS}
    if name == "unpredicted":
        expected["empty"] = 1
    assert flags_of(report_on(ROWS[name], max_length=max_length)) == expected
    both = report_on(ROWS["good"], ROWS[name], ROWS[name], dropped=4)
    assert (both.pairs, both.dropped) == (3, 4)
    if max_length is None:
        assert flags_of(both) == {flag: 2 * count for flag, count in expected.items()}


def test_a_prompt_in_a_column_of_another_name_is_missed():
    without = [([], [7, EOS], [5, EOS]), ([BOS], [6, EOS], [8, EOS])]
    assert any("no prompt" in warning for warning in report_on(*without).warnings())
    assert not report_on(*without, ROWS["good"]).warnings()


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [1, 2, 3, 5, 8, 100])
def test_what_is_cut_is_what_the_collator_cuts(max_length, truncation_mode):
    collate = DataCollatorForPreference(0, max_length, truncation_mode)
    for prompt, chosen, rejected in ROWS.values():
        if truncation_mode == "keep_start" and len(prompt) >= max_length:
            continue  # TRL has dropped it
        batch = collate([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
        scored = [
            ids[mask == 1].tolist()
            for ids, mask in zip(*map(batch.get, ("input_ids", "completion_mask")), strict=True)
        ]
        found = report_on((prompt, chosen, rejected), max_length=max_length, truncation_mode=truncation_mode)
        whole = len(prompt) + max(len(chosen), len(rejected))
        assert found.cut == (whole > max_length)
        assert found.identical == (scored[0] == scored[1])
        assert found.unpredicted == (not batch["completion_mask"][:, 1:].any(1).all())
        assert repr(TOKENIZER.decode(scored[0])) in found.first_pair


def test_batches_of_rows_add_up(monkeypatch):
    whole = report_on(*ROWS.values(), max_length=6)
    monkeypatch.setattr("focalkern.trl.data._BATCH_ROWS", 3)
    assert report_on(*ROWS.values(), max_length=6) == whole
    assert whole.pairs == len(ROWS)


def test_the_report_is_printed_once_with_a_pair(tmp_path, capsys):
    trainer, caught = trained_on(tmp_path, RECORDS)
    printed = capsys.readouterr().out
    assert printed.count("train: 7 pairs, 0 others dropped, 0 cut (max_length=None)") == 1
    for label, text in (("prompt (masked)", "<s>The sky is"), ("chosen", " blue.</s>")):
        assert f"  {label:<16}{text!r}\n" in printed
    assert not caught
    trainer.evaluate(Dataset.from_list(RECORDS[:2]))
    trainer.evaluate(Dataset.from_list(RECORDS[:3]))
    assert capsys.readouterr().out.count("eval: 2 pairs") == 1
    assert trainer.data_reports["eval"].pairs == 2


def test_a_long_pair_is_printed_short():
    report = report_on(([BOS, *[9] * 500], [7, EOS], [8, EOS]))
    assert max(map(len, report.first_pair.splitlines())) < 100


def test_a_stream_is_looked_at_from_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr("focalkern.trl.trainer.STREAMED_ROWS", 4)
    trainer, _ = trained_on(tmp_path, streamed(RECORDS))
    assert str(trainer.data_reports["train"]).startswith("train: first 4 pairs")
    trainer.train()
    assert trainer.state.global_step == 3


TOLD = [{**record, "prompt": f"<s>{record['prompt']}"} for record in RECORDS]
SAME = [{**record, "rejected": record["chosen"]} for record in RECORDS]
LONG = [{**record, "prompt": "The sky is " * 30} for record in RECORDS[:2]]
BLANK = [{**record, "chosen": ""} for record in RECORDS]
WARNED = {
    "doubled BOS": (TOLD, {}, "7 of 7 pairs of the train dataset begin with BOS twice: take it out"),
    "identical": (RECORDS + SAME[:2], {}, "2 of 9 pairs .* have chosen equal to rejected: filter"),
    "empty": (RECORDS + BLANK[:1], {}, "1 of 8 pairs .* have an empty chosen or rejected: filter"),
    "dropped": (
        RECORDS + LONG,
        {"max_length": 60},
        "2 of 9 .* are dropped, their prompts fill max_length=60",
    ),
    "cut": (RECORDS, {"max_length": 14}, "are cut by max_length=14: raise it"),
}


@pytest.mark.parametrize(("records", "changes", "message"), WARNED.values(), ids=WARNED)
def test_what_is_warned_of_where_the_trainer_is_made(records, changes, message, tmp_path):
    trainer, (found,) = trained_on(tmp_path, records, **changes)
    assert re.search(message, str(found.message))
    assert Path(found.filename).name == "trl_tiny.py"  # which makes the trainer
    assert trainer.data_reports["train"].warnings() == [str(found.message)]


NOTHING = {
    "all dropped": (RECORDS, {"max_length": 2}, "max_length=2 leaves no pair to train on"),
    "all identical": (SAME, {}, "nothing can be trained on the train dataset: chosen equals rejected in all"),
    "all empty": (BLANK, {}, "chosen or rejected is empty in all its pairs"),
}


@pytest.mark.parametrize("make", [Dataset.from_list, streamed], ids=["dataset", "stream"])
@pytest.mark.parametrize(("records", "changes", "message"), NOTHING.values(), ids=NOTHING)
def test_data_that_trains_nothing_is_refused(records, changes, message, make, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained_on(tmp_path, make(records), **changes)


def test_identical_pairs_are_trained_on_by_sft(tmp_path):
    trainer, _ = trained_on(tmp_path, SAME, loss_type=["sft"])
    assert trainer.data_reports["train"].identical == len(SAME)


@pytest.fixture
def without_bos():
    """A tokenizer such as Qwen's."""
    tokenizer = tokenizer_of(RECORDS)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("objective", [SIMPO, {**SIMPO, "alpha": 0.1}], ids=["SimPO", "alpha-DPO"])
def test_a_completion_that_nothing_predicts_is_found_before_the_run(
    objective, split, packed, without_bos, tmp_path
):
    bad = Dataset.from_list([*RECORDS, {"prompt": "", "chosen": "</s>", "rejected": " no."}])
    options = {
        "processing_class": without_bos,
        "train_dataset": Dataset.from_list(RECORDS),
        f"{split}_dataset": bad,
    }
    models = [seeded(llama) for _ in range(1 + ("alpha" in objective))]
    message = f"length_normalize would divide by 0: 1 pairs of the {split} dataset"
    with pytest.raises(ValueError, match=message):
        focal_trainer(tmp_path, *models, options=options, padding_free=packed, **objective)
