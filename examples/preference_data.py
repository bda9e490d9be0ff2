"""Preference pairs from text to batches: what the examples and benchmarks train on.

`docstring_pairs` and `read_pairs` give `Pair`s of text, and `split_pairs` holds some of them out.
`encode_pairs` turns them into token ids and counts what they are; a `PreferenceSet` makes batches.
"""

from __future__ import annotations

import ast
import json
import math
import random
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

IGNORE_INDEX = -100
KEYS = ("prompt", "chosen", "rejected")
NOT_SUPPORTED = ("images", "image", "tools", "chat_template_kwargs")

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | list[Message]  # plain, or a conversation
TokenIds = dict[str, list[int]]  # "prompt_ids", "chosen_ids", "rejected_ids", as TRL has them


class DataError(ValueError):
    """The preference data cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected completion; all three plain text, or all three messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    group: str  # pairs of one group are never split between training and held-out
    origin: str  # where the pair comes from, for error messages

    def texts(self) -> list[str]:
        """Prompt and chosen completion as strings, message by message."""
        if isinstance(self.prompt, str):
            return [self.prompt, self.chosen]
        return [message["content"] for message in self.prompt + self.chosen]


def shared_prefix(*sequences: Sequence[Any]) -> int:
    """The number of items with which all the sequences begin."""
    same = takewhile(lambda items: all(item == items[0] for item in items), zip(*sequences, strict=False))
    return sum(1 for _ in same)


# -------------------------------------------------------------- pairs from the standard library's docstrings

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MAX_WORDS = 32
MAX_SIGNATURE = 120  # characters


def docstring_pairs(seed: int, library: Path | None = None) -> list[Pair]:
    """One pair per documented function: its signature, its docstring, and that with two words exchanged.

    The exchanged words are neighbours, and neither the first nor the last. So chosen and rejected consist of
    the same tokens: no length and no single word gives the rejected one away, only how the words follow each
    other. No docstring comes twice. Sources are parsed, never imported. The group of a pair is its module.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    sources = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")}
    rng = random.Random(seed)
    pairs, seen = [], set()
    for name, path in sorted(sources.items()):  # an order that no file system decides
        if NOT_LIBRARY & set(name.split("/")):
            continue
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for scope, function in documented_functions(parse(path)):
            docstring = " ".join(ast.get_docstring(function).split("\n\n")[0].split()[:MAX_WORDS])
            spoiled = exchange_neighbours(docstring, rng)
            if spoiled is None or docstring.casefold() in seen:
                continue
            seen.add(docstring.casefold())
            place = ".".join([module, *scope])
            signature = f"{function.name}({ast.unparse(function.args)})"
            signature = textwrap.shorten(signature, MAX_SIGNATURE, placeholder=" ...")
            prompt = f'# {place}\ndef {signature}:\n    """'
            pairs.append(Pair(prompt, docstring, spoiled, group=module, origin=f"{place}.{function.name}"))
    if not pairs:
        raise DataError(f"no docstrings found in {library}: this Python comes without its library's sources")
    return pairs


def parse(path: Path) -> ast.Module:
    """Syntax tree of a source file; empty for what this Python cannot parse (templates, Python 2)."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            return ast.parse(file.read())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def documented_functions(node: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Functions with a docstring, each with the names of the classes and functions around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # most of a tree, and without functions but lambdas
            continue
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(child, ast.ClassDef) and ast.get_docstring(child):
                yield scope, child
            inner = (*scope, child.name)
        yield from documented_functions(child, inner)


def exchange_neighbours(text: str, rng: random.Random) -> str | None:
    """The text with two neighbouring inner words exchanged; None where no two differ."""
    words = text.split()
    places = [i for i in range(1, len(words) - 2) if words[i].casefold() != words[i + 1].casefold()]
    if not places:
        return None
    i = rng.choice(places)
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


# ----------------------------------------------------------------------------------- pairs from a JSONL file


def read_pairs(path: Path) -> list[Pair]:
    """Read a file with one preference pair per line, in TRL's format.

    A line is an object with `prompt`, `chosen` and `rejected`: three strings, or three lists of
    `{"role", "content"}` messages. Without `prompt`, `chosen` and `rejected` are conversations, and the
    messages with which both begin are the prompt. Other keys are ignored; empty lines are skipped.

    Raises:
        DataError: a line is not in this format; names the first such line, and counts the others.
        OSError: the file cannot be read.
    """
    pairs, errors = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    pairs.append(parse_pair(json.loads(text), origin=f"line {number}"))
            except json.JSONDecodeError as error:
                errors.append(f"line {number}: not valid JSON: {error.msg} (column {error.colno})")
            except ValueError as error:
                errors.append(f"line {number}: {error}")
    if errors:
        others = f" (and {len(errors) - 1} more lines cannot be used)" if len(errors) > 1 else ""
        raise DataError(f"{path}, {errors[0]}{others}")
    if not pairs:
        raise DataError(f"{path} holds no preference pairs")
    return pairs


def parse_pair(record: Any, origin: str) -> Pair:
    """The pair of one line. Raises ValueError if the line is not in the format."""
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object with prompt, chosen and rejected")
    if used := [key for key in NOT_SUPPORTED if record.get(key)]:
        raise ValueError(f"`{used[0]}` is not supported by this example")
    kinds = {key: kind(record[key]) if key in record else "missing" for key in KEYS}
    if list(kinds.values()) == ["missing", "messages", "messages"]:
        shared = shared_prefix(record["chosen"][:-1], record["rejected"][:-1])
        prompt, chosen, rejected = (
            record["chosen"][:shared],
            record["chosen"][shared:],
            record["rejected"][shared:],
        )
    elif set(kinds.values()) in ({"text"}, {"messages"}):
        prompt, chosen, rejected = (record[key] for key in KEYS)
    else:
        found = ", ".join(f"`{key}` is {kind}" for key, kind in kinds.items())
        raise ValueError(
            f"{found}; expected all three as text, or all as messages with role and content;"
            f" the line's keys: {', '.join(record) or 'none'}"
        )
    json.dumps([prompt, chosen, rejected], ensure_ascii=False).encode()  # refuses half of a surrogate pair
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty")
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with a message of the assistant, whose turn must come next")
        ends = [*chosen[:1], *chosen[-1:], *rejected[:1], *rejected[-1:]]
        if any(message["role"] != "assistant" for message in ends):
            raise ValueError("`chosen` and `rejected` must begin and end with the assistant")
    return Pair(prompt, chosen, rejected, group=json.dumps(prompt), origin=origin)


def kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    messages = isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )
    return "messages" if messages else "neither text nor messages"


# ------------------------------------------------------------------------------------- splitting, tokenising


def split_pairs(pairs: Sequence[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs. Whole groups, drawn at random, are held out until there are enough."""
    sizes = Counter(pair.group for pair in pairs)
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    drawn, count = set(), 0
    for group in groups:
        if count >= held_out:
            break
        drawn.add(group)
        count += sizes[group]
    train = [pair for pair in pairs if pair.group not in drawn]
    if not train:
        raise DataError("only one prompt in the data: two are needed, one to train on and one to hold out")
    return train, [pair for pair in pairs if pair.group in drawn]


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: Any, max_length: int
) -> tuple[list[TokenIds], Counter[str]]:
    """Token ids of the pairs that can be trained on, and how many of all are what.

    Raises:
        DataError: the tokenizer has no EOS, no chat template for a conversation, or one that refuses it.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the model's tokenizer has no EOS token")
    encoded = [encode_pair(pair, tokenizer) for pair in pairs]
    return check_pairs(encoded, tokenizer.bos_token_id, tokenizer.eos_token_id, max_length)


def encode_pair(pair: Pair, tokenizer: Any) -> TokenIds:
    """The completion begins where the tokens of the prompt alone and of prompt + completion part, as in TRL:
    a tokenizer may merge across the boundary, and a template may end a lone prompt differently."""
    if isinstance(pair.prompt, list):
        prompt = encode_conversation(pair, pair.prompt, tokenizer, add_generation_prompt=True)
        chosen = encode_conversation(pair, pair.prompt + pair.chosen, tokenizer)
        rejected = encode_conversation(pair, pair.prompt + pair.rejected, tokenizer)
    else:
        prompt = tokenizer(pair.prompt)["input_ids"]
        chosen, rejected = (
            tokenizer(pair.prompt + completion)["input_ids"] for completion in (pair.chosen, pair.rejected)
        )
        end = tokenizer.eos_token_id
        chosen, rejected = (ids if ids[-1:] == [end] else [*ids, end] for ids in (chosen, rejected))
    start = shared_prefix(prompt, chosen, rejected)
    return {"prompt_ids": prompt[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


def encode_conversation(pair: Pair, messages: list[Message], tokenizer: Any, **options: Any) -> list[int]:
    """The chat template writes BOS and end-of-turn itself: nothing is added to its text."""
    if not tokenizer.chat_template:
        raise DataError(f"{pair.origin} is a conversation, but the model's tokenizer has no chat template")
    try:
        encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # whatever the template raises
        raise DataError(f"{pair.origin}: the model's chat template refuses it: {error}") from error
    return encoding["input_ids"]


def check_pairs(
    pairs: Iterable[TokenIds], bos: int | None, eos: int, max_length: int
) -> tuple[list[TokenIds], Counter[str]]:
    """The pairs that can be trained on, and how many of all are what; `described` puts it into words.

    Long pairs are dropped whole. Cut short, a pair would be another one than the one that was judged.
    """
    kept, found = [], Counter(kept=0)
    for pair in pairs:
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        if prompt[:2] == [bos, bos]:  # the tokenizer's, and one in the text
            prompt = prompt[1:]
            found["doubled bos"] += 1  # kept without the second
        if not (set(chosen) - {eos} and set(rejected) - {eos}):
            found["empty"] += 1  # a completion has no token before EOS; dropped, like the next two
        elif chosen == rejected:
            found["identical"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            found["too long"] += 1
        else:
            found["kept"] += 1
            # A completion does not teach where to stop.
            found["without eos"] += not (eos in chosen and eos in rejected)
            kept.append({**pair, "prompt_ids": prompt})
    return kept, found


def described(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in found.items() if count or what == "kept")


# --------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    ids: torch.Tensor  # [S, T]
    mask: torch.Tensor  # [S, T]
    labels: torch.Tensor  # [S, T], of the completions alone unless said otherwise


@dataclass
class PreferenceSet:
    """Tokenised pairs, and their completions' log-probs under the reference model once they are known."""

    pairs: list[TokenIds]
    batch_size: int
    device: str
    ref_logps: torch.Tensor | None = None  # [2, pairs]: chosen, rejected

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int]) -> Batch:
        """All the chosen, then all the rejected sequences: the order that `FusedFocalPOLoss` expects."""
        rows = [(self.pairs[i], side) for side in ("chosen_ids", "rejected_ids") for i in indices]
        prompts_masked = [[IGNORE_INDEX] * len(pair["prompt_ids"]) + pair[side] for pair, side in rows]
        return pad([pair["prompt_ids"] + pair[side] for pair, side in rows], prompts_masked, self.device)

    def sft_batch(self, indices: Sequence[int]) -> Batch:
        """The chosen sequences; the prompt is learned too."""
        sequences = [self.pairs[i]["prompt_ids"] + self.pairs[i]["chosen_ids"] for i in indices]
        return pad(sequences, sequences, self.device)

    def by_length(self, indices: Sequence[int] | None = None) -> list[list[int]]:
        """Batches of pairs of similar length, which need little padding; of all pairs unless given."""
        ordered = sorted(range(len(self)) if indices is None else indices, key=lambda i: self.tokens([i]))
        return [ordered[at : at + self.batch_size] for at in range(0, len(ordered), self.batch_size)]

    def shuffled(self, steps: int, seed: int) -> Iterator[list[int]]:
        """`steps` batches in random order, pass after pass; within 16 batches, pairs go by length."""
        rng = random.Random(seed)
        stretch = 16 * self.batch_size
        while steps > 0:
            order = rng.sample(range(len(self)), len(self))
            for at in range(0, len(order), stretch):
                batches = self.by_length(order[at : at + stretch])
                rng.shuffle(batches)
                yield from batches[:steps]
                steps -= min(steps, len(batches))

    @property
    def steps_per_pass(self) -> int:
        return math.ceil(len(self) / self.batch_size)

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens of the sequences of these pairs, prompts included."""
        pairs = [self.pairs[i] for i in indices]
        return sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)


def pad(sequences: list[list[int]], labels: list[list[int]], device: str) -> Batch:
    """A batch padded on the right."""
    length = max(map(len, sequences))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    ones = [[1] * len(ids) for ids in sequences]
    return Batch(padded(sequences, 0), padded(ones, 0), padded(labels, IGNORE_INDEX))
