"""The example's data: honest docstring pairs, errors that name the line, only completions scored."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import (
    IGNORE_INDEX,
    DataError,
    EncodedPair,
    Pair,
    PreferenceSet,
    docstring_pairs,
    encode_pairs,
    exchange_neighbours,
    read_pairs,
    split_pairs,
)
from quickstart import train_tokenizer

QUESTION = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
PLAIN = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHAT = {"prompt": [QUESTION], "chosen": [BLUE], "rejected": [GREEN]}


def as_pair(record: dict) -> Pair:
    return Pair(record["prompt"], record["chosen"], record["rejected"], group="", origin="line 1")


@pytest.fixture(scope="module")
def stdlib_pairs() -> list[Pair]:
    return docstring_pairs(seed=0)


@pytest.fixture(scope="module")
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
    def test_the_standard_library_has_thousands(self, stdlib_pairs):
        assert len(stdlib_pairs) > 2000

    def test_the_seed_decides_the_rejected_texts_and_nothing_else(self, stdlib_pairs):
        other = docstring_pairs(seed=1)
        assert docstring_pairs(seed=0) == stdlib_pairs
        assert [(p.prompt, p.chosen) for p in other] == [(p.prompt, p.chosen) for p in stdlib_pairs]
        assert [p.rejected for p in other] != [p.rejected for p in stdlib_pairs]

    def test_chosen_and_rejected_have_the_same_tokens_in_another_order(self, stdlib_pairs):
        pairs = stdlib_pairs[::5]
        tokenizer = train_tokenizer(pairs)
        encoded, left_out = encode_pairs(pairs, tokenizer, max_length=10_000)
        assert not left_out
        for pair in encoded:
            assert pair.chosen != pair.rejected
            assert Counter(pair.chosen) == Counter(pair.rejected)

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
        (tmp_path / "package" / "test").mkdir(parents=True)
        (tmp_path / "site-packages").mkdir()
        function = 'def {}(x, *, y: int = 1):\n    """{}"""\n'
        (tmp_path / "b.py").write_text(
            "raise SystemExit\n" + function.format("run", "Return one and then two.")
        )
        (tmp_path / "package" / "__init__.py").write_text(
            "class Outer:\n    async "
            + function.format("walk", "Walk all   the way\n home.\n\n    More.").replace("\n", "\n    ")
        )
        (tmp_path / "package" / "again.py").write_text(function.format("run", "RETURN one and then two."))
        (tmp_path / "package" / "test" / "a.py").write_text(function.format("t", "Test one and then two."))
        (tmp_path / "site-packages" / "a.py").write_text(function.format("s", "Site one and then two."))
        (tmp_path / "python2.py").write_text("print 'no'")
        (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
        pairs = docstring_pairs(seed=0, library=tmp_path)
        assert [pair.origin for pair in pairs] == ["b.run", "package.Outer.walk"]
        assert [pair.group for pair in pairs] == ["b", "package"]
        assert pairs[1].prompt == '# package.Outer\ndef walk(x, *, y: int=1):\n    """'
        assert pairs[1].chosen == "Walk all the way home."

    def test_a_python_without_sources_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no docstrings found"):
            docstring_pairs(seed=0, library=tmp_path)

    @pytest.mark.parametrize("text", ["", "One.", "First second last.", "First same Same last."])
    def test_without_two_different_inner_words_there_is_no_pair(self, text):
        assert exchange_neighbours(text, random.Random(0)) is None


class TestReadPairs:
    def test_plain_text(self, jsonl):
        (pair,) = read_pairs(jsonl(PLAIN))
        assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")

    def test_conversations(self, jsonl):
        (pair,) = read_pairs(jsonl(CHAT))
        assert (pair.prompt, pair.chosen, pair.rejected) == ([QUESTION], [BLUE], [GREEN])

    def test_the_prompt_of_conversations_may_be_implicit(self, jsonl):
        shared = [QUESTION, BLUE, QUESTION]
        line = {"chosen": [*shared, BLUE], "rejected": [*shared, GREEN]}
        (pair,) = read_pairs(jsonl(line))
        assert (pair.prompt, pair.chosen, pair.rejected) == (shared, [BLUE], [GREEN])

    def test_other_keys_empty_lines_and_a_byte_order_mark_do_no_harm(self, jsonl):
        first = b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()
        separator = json.dumps({**PLAIN, "prompt": "a\u2028b", "score": 3}, ensure_ascii=False)
        pairs = read_pairs(jsonl(first, "", "  ", separator))
        assert [pair.origin for pair in pairs] == ["line 1", "line 4"]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"prompt": "a", "chosen" "b"}', r"not valid JSON: Expecting ':' delimiter \(column 26\)"),
            (b'{"prompt": "\xe9"}', r"not UTF-8 text \(byte 13\)"),
            ("[1]", "expected a JSON object with prompt, chosen and rejected, got a list"),
            ("{}", "`prompt` and `chosen` and `rejected` missing; the keys here: none"),
            (
                {"prompt": "a", "chosen": "b", "bad": "c"},
                "`rejected` missing; the keys here: prompt, chosen, bad",
            ),
            ({"chosen": "b", "rejected": "c"}, "`prompt` missing"),
            ({**PLAIN, "rejected": None}, "`rejected` must be a string or a list of messages, got null"),
            ({**PLAIN, "prompt": 3}, "`prompt` must be a string or a list of messages, got a number"),
            ({**PLAIN, "chosen": True}, "`chosen` must be a string or a list of messages, got a boolean"),
            ({**PLAIN, "prompt": " \n"}, "the prompt is empty"),
            ({**PLAIN, "chosen": " "}, "the completion of `chosen` is empty"),
            ({**PLAIN, "chosen": "a\ud83d"}, "`chosen` holds half of a surrogate pair"),
            ({**PLAIN, "rejected": " blue."}, "`chosen` and `rejected` are identical"),
            ({**PLAIN, "images": ["a.png"]}, "`images` is not supported"),
            (
                {**CHAT, "prompt": "Sky?"},
                "mixed: `prompt` is plain text, `chosen` is a conversation, `rejected` is a conversation",
            ),
            ({**CHAT, "rejected": []}, "the completion of `rejected` is empty"),
            ({**CHAT, "chosen": [{**BLUE, "content": ""}]}, "the completion of `chosen` is empty"),
            (
                {**CHAT, "chosen": ["blue"]},
                r"`chosen`\[0\] must be an object with role and content, got a string",
            ),
            ({**CHAT, "chosen": [{"content": "x"}]}, r"`chosen`\[0\]: `role` must be a string, got nothing"),
            (
                {**CHAT, "prompt": [{**QUESTION, "content": [{"type": "image"}]}]},
                r"`prompt`\[0\]: `content` must be a string, got a list",
            ),
            (
                {**CHAT, "rejected": [QUESTION]},
                "`rejected` must begin and end with the assistant, not 'user'",
            ),
            ({**CHAT, "prompt": []}, "the prompt is empty"),
            ({**CHAT, "prompt": [QUESTION, BLUE]}, "the prompt ends with a message of the assistant"),
            ({"chosen": [BLUE], "rejected": [GREEN]}, "do not begin with the same message"),
            ({"chosen": [QUESTION, BLUE], "rejected": [QUESTION]}, "the completion of `rejected` is empty"),
        ],
    )
    def test_a_malformed_line_is_named_with_what_is_wrong(self, jsonl, line, problem):
        with pytest.raises(DataError, match=rf"pairs.jsonl cannot be used:\n  line 3: .*{problem}"):
            read_pairs(jsonl(PLAIN, "", line, CHAT))

    def test_the_first_ten_malformed_lines_are_shown_and_the_others_counted(self, jsonl):
        with pytest.raises(DataError) as caught:
            read_pairs(jsonl(PLAIN, *["{"] * 12))
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:-1]] == [f"line {n}" for n in range(2, 12)]
        assert lines[-1].strip() == "and 2 more lines"

    def test_a_file_without_pairs_is_refused(self, jsonl):
        with pytest.raises(DataError, match="holds no preference pairs"):
            read_pairs(jsonl(""))


class TestSplit:
    def test_pairs_with_one_prompt_stay_on_one_side(self, jsonl):
        lines = [{**PLAIN, "prompt": f"prompt {i % 5}", "chosen": f"good {i}"} for i in range(20)]
        train, held_out = split_pairs(read_pairs(jsonl(*lines)), held_out=3, seed=0)
        assert len(held_out) == 4 and len({pair.prompt for pair in held_out}) == 1
        assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}

    def test_a_single_prompt_cannot_be_split(self, jsonl):
        with pytest.raises(DataError, match="2 pairs with 1 different prompts cannot be split"):
            split_pairs(read_pairs(jsonl(PLAIN, {**PLAIN, "chosen": " red."})), held_out=1, seed=0)


class TestEncode:
    def scored(self, pair: EncodedPair, tokenizer) -> list[str]:
        """The texts that are scored: what the labels leave of chosen and rejected."""
        sides = (pair.chosen, pair.rejected)
        labels = [[label for label in pair.labels(ids) if label != IGNORE_INDEX] for ids in sides]
        return [tokenizer.decode(kept) for kept in labels]

    @pytest.mark.parametrize("record", [PLAIN, CHAT], ids=["plain", "chat"])
    def test_exactly_the_completion_and_its_end_are_scored(self, tokenizer, record):
        (pair,), _ = encode_pairs([as_pair(record)], tokenizer, max_length=100)
        plain = record is PLAIN
        chosen, rejected = (" blue.", " green.") if plain else ("It is blue.", "It is green.")
        assert self.scored(pair, tokenizer) == [chosen + "</s>", rejected + "</s>"]
        prompt = "The sky is" if plain else "user:\nWhat colour is the sky?</s>assistant:\n"
        assert tokenizer.decode(pair.chosen) == f"<s>{prompt}{chosen}</s>"

    @pytest.mark.parametrize("record", [{**PLAIN, "prompt": "<s>The sky is"}, CHAT], ids=["plain", "chat"])
    def test_bos_is_there_once(self, tokenizer, record):
        (pair,), _ = encode_pairs([as_pair(record)], tokenizer, max_length=100)
        for ids in (pair.chosen, pair.rejected):
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1

    def test_where_tokens_merge_across_the_boundary_both_completions_begin_before_it(self):
        tokenizer = train_tokenizer([as_pair({**PLAIN, "prompt": "The sky The skys"})])
        pair = as_pair({"prompt": "The sky", "chosen": "s", "rejected": " The"})
        encoded, _ = encode_pairs([pair], tokenizer, max_length=100)
        assert self.scored(encoded[0], tokenizer) == [" skys</s>", " sky The</s>"]

    def test_pairs_left_out_are_counted_with_the_reason(self, tokenizer):
        same = as_pair({**PLAIN, "rejected": " blue.</s>"})
        long = as_pair({**PLAIN, "chosen": " blue" * 50})
        encoded, left_out = encode_pairs([same, as_pair(PLAIN), long], tokenizer, max_length=20)
        assert len(encoded) == 1
        assert left_out == {"longer than 20 tokens": 1, "chosen and rejected have the same tokens": 1}

    def test_a_conversation_needs_a_chat_template(self, tokenizer):
        without = train_tokenizer([as_pair(PLAIN)])
        without.chat_template = None
        with pytest.raises(DataError, match=r"line 1 is a conversation, but .* no chat template"):
            encode_pairs([as_pair(CHAT)], without, max_length=100)

    def test_what_the_chat_template_refuses_is_named(self):
        strict = train_tokenizer([as_pair(PLAIN)])
        strict.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match="line 1: the model's chat template refuses it: no system role"):
            encode_pairs([as_pair(CHAT)], strict, max_length=100)


class TestPreferenceSet:
    def make(self, lengths: list[int], batch_size: int = 4) -> PreferenceSet:
        pairs = [EncodedPair([1, 2] + [3] * n, [1, 2] + [4] * n, prompt_length=2) for n in lengths]
        return PreferenceSet(pairs, batch_size, "cpu")

    def test_a_batch_is_all_chosen_then_all_rejected_padded_on_the_right(self):
        batch = self.make([1, 3]).batch([1, 0])
        assert batch.ids.tolist() == [[1, 2, 3, 3, 3], [1, 2, 3, 0, 0], [1, 2, 4, 4, 4], [1, 2, 4, 0, 0]]
        x = IGNORE_INDEX
        assert batch.labels.tolist() == [[x, x, 3, 3, 3], [x, x, 3, x, x], [x, x, 4, 4, 4], [x, x, 4, x, x]]
        assert torch.equal(batch.mask, (batch.ids != 0).long())

    def test_an_sft_batch_is_the_chosen_sequences_with_their_prompts(self):
        batch = self.make([1, 2]).sft_batch([0, 1])
        assert batch.labels.tolist() == [[1, 2, 3, IGNORE_INDEX], [1, 2, 3, 3]]

    def test_each_pass_takes_every_pair_once(self):
        data = self.make(list(range(1, 140)))
        batches = list(data.shuffled(2 * data.steps_per_pass, seed=0))
        seen = Counter(i for indices in batches for i in indices)
        assert set(seen) == set(range(len(data))) and set(seen.values()) == {2}
        assert batches == list(data.shuffled(2 * data.steps_per_pass, seed=0))
        assert batches != list(data.shuffled(2 * data.steps_per_pass, seed=1))

    @pytest.mark.parametrize("steps", [1, 17, 40])
    def test_there_are_as_many_batches_as_steps(self, steps):
        assert len(list(self.make([1] * 100).shuffled(steps, seed=0))) == steps

    def test_a_short_run_does_not_take_the_short_pairs_only(self):
        data = self.make([1] * 32 + [9] * 32)
        first = [next(iter(data.shuffled(1, seed))) for seed in range(20)]
        assert {len(data.pairs[indices[0]].chosen) for indices in first} == {3, 11}
