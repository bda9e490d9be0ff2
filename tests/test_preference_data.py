"""The examples' data: honest docstring pairs, errors that name the line, only completions scored."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import (
    IGNORE_INDEX,
    DataError,
    Pair,
    PreferenceSet,
    check_pairs,
    described,
    docstring_pairs,
    encode_pairs,
    exchange_neighbours,
    read_pairs,
    split_pairs,
)
from quickstart_parts import train_tokenizer

QUESTION = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
PLAIN = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
SHARED = [QUESTION, BLUE, QUESTION]
CHAT = {"prompt": [QUESTION], "chosen": [BLUE], "rejected": [GREEN]}


def as_pair(record: dict) -> Pair:
    return Pair(**record, group="", origin="line 1")


@pytest.fixture(scope="module")
def stdlib_pairs() -> list[Pair]:
    return docstring_pairs(seed=0)


@pytest.fixture
def tokenizer():
    return train_tokenizer([as_pair(PLAIN), as_pair(CHAT)])


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines: dict | str | bytes) -> Path:
        path = tmp_path / "pairs.jsonl"
        encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        path.write_bytes(b"".join((e if isinstance(e, bytes) else e.encode()) + b"\n" for e in encoded))
        return path

    return write


class TestDocstringPairs:
    def test_the_standard_library_has_thousands_and_the_seed_decides_the_rejected_texts(self, stdlib_pairs):
        assert len(stdlib_pairs) > 2000
        other = docstring_pairs(seed=1)
        assert [(p.prompt, p.chosen) for p in other] == [(p.prompt, p.chosen) for p in stdlib_pairs]
        assert [p.rejected for p in other] != [p.rejected for p in stdlib_pairs]

    def test_chosen_and_rejected_have_the_same_tokens_in_another_order(self, stdlib_pairs):
        pairs = stdlib_pairs[::10]
        encoded, report = encode_pairs(pairs, train_tokenizer(pairs), max_length=10_000)
        assert report == Counter(kept=len(pairs))
        for pair in encoded:
            assert pair["chosen_ids"] != pair["rejected_ids"]
            assert Counter(pair["chosen_ids"]) == Counter(pair["rejected_ids"])

    def test_held_out_functions_share_no_module_and_no_docstring_with_training(self, stdlib_pairs):
        train, held_out = split_pairs(stdlib_pairs, held_out=500, seed=0)
        assert 500 <= len(held_out) < len(stdlib_pairs) / 2
        assert len(train) + len(held_out) == len(stdlib_pairs)
        assert not {pair.group for pair in train} & {pair.group for pair in held_out}
        texts = [
            {text.casefold() for p in side for text in (p.chosen, p.rejected)} for side in (train, held_out)
        ]
        assert not texts[0] & texts[1]
        assert split_pairs(stdlib_pairs, held_out=500, seed=0) == (train, held_out)
        assert split_pairs(stdlib_pairs, held_out=500, seed=1) != (train, held_out)

    def test_sources_are_read_in_order_and_never_run(self, tmp_path):
        sources = {
            "b.py": 'raise SystemExit\ndef run(x):\n    """Return one and then two."""\n',
            "package/__init__.py": "class Outer:\n    async def walk(x, *, y: int = 1):\n"
            '        """Walk all   the way\n        home.\n\n        More."""\n',
            "package/again.py": 'def run(x):\n    """RETURN one and then two."""\n',
            "package/test/a.py": 'def t(x):\n    """Test one and then two."""\n',
            "site-packages/a.py": 'def s(x):\n    """Site one and then two."""\n',
            "python2.py": "print 'no'",
            "binary.py": "\0",
        }
        for name, text in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        pairs = docstring_pairs(seed=0, library=tmp_path)
        assert [(pair.origin, pair.group) for pair in pairs] == [
            ("b.run", "b"),
            ("package.Outer.walk", "package"),
        ]
        assert pairs[1].prompt == '# package.Outer\ndef walk(x, *, y: int=1):\n    """'
        assert pairs[1].chosen == "Walk all the way home."

    def test_a_python_without_sources_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no docstrings found"):
            docstring_pairs(seed=0, library=tmp_path)

    @pytest.mark.parametrize("text", ["", "One.", "First second last.", "First same Same last."])
    def test_without_two_different_inner_words_there_is_no_pair(self, text):
        assert exchange_neighbours(text, random.Random(0)) is None


class TestReadPairs:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (PLAIN, PLAIN),
            (CHAT, CHAT),
            ({"chosen": [*SHARED, BLUE], "rejected": [*SHARED, GREEN]}, {**CHAT, "prompt": SHARED}),
            ({"chosen": [QUESTION, BLUE], "rejected": [QUESTION, BLUE]}, {**CHAT, "rejected": [BLUE]}),
        ],
        ids=["plain", "conversation", "implicit prompt", "identical"],
    )
    def test_a_pair_is_text_or_conversations_with_or_without_prompt(self, jsonl, line, expected):
        (pair,) = read_pairs(jsonl(line))
        assert {key: getattr(pair, key) for key in expected} == expected

    def test_other_keys_empty_lines_and_a_byte_order_mark_do_no_harm(self, jsonl):
        first = b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()
        separator = json.dumps({**PLAIN, "prompt": "a\u2028b", "score": 3}, ensure_ascii=False)
        assert [pair.origin for pair in read_pairs(jsonl(first, "", "  ", separator))] == ["line 1", "line 4"]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"prompt": "a", "chosen" "b"}', r"not valid JSON: Expecting ':' delimiter \(column 26\)"),
            (b'{"prompt": "\xe9"}', "can't decode byte 0xe9"),
            ("[1]", "expected a JSON object with prompt, chosen and rejected"),
            ("{}", "`prompt` is missing, `chosen` is missing.*; the line's keys: none"),
            (
                {"prompt": "a", "chosen": "b", "bad": "c"},
                "`rejected` is missing; .* keys: prompt, chosen, bad",
            ),
            ({"chosen": "b", "rejected": "c"}, "`prompt` is missing"),
            ({**PLAIN, "rejected": None}, "`rejected` is neither text nor messages"),
            ({**PLAIN, "prompt": " \n"}, "the prompt is empty"),
            ({**CHAT, "prompt": []}, "the prompt is empty"),
            ({"chosen": [BLUE], "rejected": [GREEN]}, "the prompt is empty"),
            ({**PLAIN, "chosen": "a\ud83d"}, "surrogates not allowed"),
            ({**PLAIN, "images": ["a.png"]}, "`images` is not supported"),
            (
                {**CHAT, "prompt": "Sky?"},
                "`prompt` is text, `chosen` is messages, .* expected all three as text",
            ),
            ({**CHAT, "chosen": [{"content": "x"}]}, "`chosen` is neither"),
            ({**CHAT, "prompt": [{**QUESTION, "content": [{"type": "image"}]}]}, "`prompt` is neither"),
            ({**CHAT, "rejected": [QUESTION]}, "`rejected` must begin and end with the assistant"),
            ({**CHAT, "prompt": [QUESTION, BLUE]}, "the prompt ends with a message of the assistant"),
        ],
    )
    def test_a_malformed_line_is_named_with_its_problem(self, jsonl, line, problem):
        with pytest.raises(DataError, match=f"pairs.jsonl, line 3: .*{problem}"):
            read_pairs(jsonl(PLAIN, "", line, CHAT))

    def test_other_malformed_lines_are_counted(self, jsonl):
        with pytest.raises(DataError, match=r"line 2: .* \(and 11 more lines cannot be used\)"):
            read_pairs(jsonl(PLAIN, *["{"] * 12))

    def test_a_file_without_pairs_is_refused(self, jsonl):
        with pytest.raises(DataError, match="holds no preference pairs"):
            read_pairs(jsonl(""))


def test_pairs_with_one_prompt_stay_on_one_side(jsonl):
    lines = [{**PLAIN, "prompt": f"prompt {i % 5}", "chosen": f"good {i}"} for i in range(20)]
    train, held_out = split_pairs(read_pairs(jsonl(*lines)), held_out=3, seed=0)
    assert len(held_out) == 4 and len({pair.prompt for pair in held_out}) == 1
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    with pytest.raises(DataError, match="only one prompt in the data"):
        split_pairs(held_out, held_out=1, seed=0)


class TestEncode:
    @pytest.mark.parametrize(
        ("record", "prompt"),
        [
            (PLAIN, "The sky is"),
            (CHAT, "user:\nWhat colour is the sky?</s>assistant:\n"),
            ({**PLAIN, "prompt": "<s>The sky is"}, "The sky is"),  # BOS is there once
        ],
    )
    def test_exactly_the_completion_and_its_end_are_scored(self, tokenizer, record, prompt):
        (pair,), report = encode_pairs([as_pair(record)], tokenizer, max_length=100)
        chosen, rejected = ("It is blue.", "It is green.") if record is CHAT else (" blue.", " green.")
        texts = [tokenizer.decode(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert texts == [f"<s>{prompt}", f"{chosen}</s>", f"{rejected}</s>"]
        assert report == Counter({"kept": 1, "doubled bos": record not in (PLAIN, CHAT)})

    def test_where_tokens_merge_across_the_boundary_both_completions_begin_before_it(self):
        tokenizer = train_tokenizer([as_pair({**PLAIN, "prompt": "The sky The skys"})])
        pair = as_pair({"prompt": "The sky", "chosen": "s", "rejected": " The"})
        ((encoded,), _) = encode_pairs([pair], tokenizer, max_length=100)
        texts = [tokenizer.decode(encoded[key]) for key in ("chosen_ids", "rejected_ids")]
        assert texts == [" skys</s>", " sky The</s>"]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "line 1 is a conversation, but .* no chat template"),
            (
                "{{ raise_exception('no system role') }}",
                "line 1: the model's chat template refuses it: no system",
            ),
        ],
    )
    def test_a_conversation_needs_a_chat_template_that_takes_it(self, tokenizer, template, message):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message):
            encode_pairs([as_pair(CHAT)], tokenizer, max_length=100)

    @pytest.mark.parametrize(
        ("prompt", "chosen", "rejected", "found"),
        [
            ([0, 5], [6, 1], [7, 1], {"kept": 1}),
            ([0, 5], [6, 8, 8, 1], [7, 1], {"too long": 1}),
            ([0, 5], [6, 1], [6, 1], {"identical": 1}),
            ([0, 5], [1], [6, 1], {"empty": 1}),
            ([0, 5], [6, 1], [], {"empty": 1}),
            ([0, 0, 5, 5], [6, 1], [7, 1], {"kept": 1, "doubled bos": 1}),
            ([0, 5], [6], [7, 1], {"kept": 1, "without eos": 1}),
        ],
    )
    def test_the_report_counts_what_is_wrong_with_pairs(self, prompt, chosen, rejected, found):
        pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        kept, report = check_pairs([pair], bos=0, eos=1, max_length=5)
        assert report == Counter(found)
        assert kept == ([{**pair, "prompt_ids": prompt[-3:]}] if report["kept"] else [])

    def test_a_report_names_the_kept_and_each_problem(self):
        assert described(Counter({"kept": 4, "too long": 2, "empty": 0})) == "4 kept, 2 too long"


class TestPreferenceSet:
    def make(self, lengths: list[int]) -> PreferenceSet:
        pairs = [{"prompt_ids": [1, 2], "chosen_ids": [3] * n, "rejected_ids": [4] * n} for n in lengths]
        return PreferenceSet(pairs, 4, "cpu")

    def test_a_batch_is_all_chosen_then_all_rejected_padded_on_the_right(self):
        batch = self.make([1, 3]).batch([1, 0])
        assert batch.ids.tolist() == [[1, 2, 3, 3, 3], [1, 2, 3, 0, 0], [1, 2, 4, 4, 4], [1, 2, 4, 0, 0]]
        assert batch.mask.tolist() == [[min(token, 1) for token in row] for row in batch.ids.tolist()]
        x = IGNORE_INDEX
        assert batch.labels.tolist() == [[x, x, 3, 3, 3], [x, x, 3, x, x], [x, x, 4, 4, 4], [x, x, 4, x, x]]

    def test_an_sft_batch_is_the_chosen_sequences_with_their_prompts(self):
        batch = self.make([1, 2]).sft_batch([0, 1])
        assert batch.labels.tolist() == [[1, 2, 3, IGNORE_INDEX], [1, 2, 3, 3]]

    def test_each_pass_takes_every_pair_once_in_the_order_of_the_seed(self):
        data = self.make(list(range(1, 140)))
        batches = list(data.shuffled(2 * data.steps_per_pass, seed=0))
        assert Counter(i for indices in batches for i in indices) == dict.fromkeys(range(len(data)), 2)
        assert batches == list(data.shuffled(2 * data.steps_per_pass, seed=0))
        assert batches != list(data.shuffled(2 * data.steps_per_pass, seed=1))

    @pytest.mark.parametrize("steps", [1, 17, 40])
    def test_there_are_as_many_batches_as_steps(self, steps):
        assert len(list(self.make([1] * 100).shuffled(steps, seed=0))) == steps

    def test_a_short_run_does_not_take_the_short_pairs_only(self):
        data = self.make([1] * 32 + [9] * 32)
        first = [next(iter(data.shuffled(1, seed))) for seed in range(20)]
        assert {len(data.pairs[indices[0]]["chosen_ids"]) for indices in first} == {1, 9}
