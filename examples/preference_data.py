"""Preference data for `quickstart.py`: from the standard library's docstrings or a JSONL file, up to batches.

`docstring_pairs` and `read_pairs` give `Pair`s of text, `split_pairs` sets some aside, `encode_pairs` turns
them into token ids, and a `PreferenceSet` makes batches of those.
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
from typing import Any

import torch

IGNORE_INDEX = -100
MAX_ERRORS_SHOWN = 10

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | list[Message]  # plain, or a conversation


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


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of prompt + completion, twice; the first `prompt_length` tokens of both are not scored."""

    chosen: list[int]
    rejected: list[int]
    prompt_length: int

    def labels(self, ids: list[int]) -> list[int]:
        """The labels of `chosen` or `rejected`: its ids, with the prompt masked."""
        return [IGNORE_INDEX] * self.prompt_length + ids[self.prompt_length :]


# -------------------------------------------------------------- pairs from the standard library's docstrings

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MAX_WORDS = 32
MAX_SIGNATURE = 120  # characters


def docstring_pairs(seed: int, library: Path | None = None) -> list[Pair]:
    """One pair per documented function: its signature, its docstring, and that with two words exchanged.

    The exchanged words are neighbours, and neither the first nor the last. So chosen and rejected consist of
    the same tokens: no length and no single word gives the rejected one away, only how the words follow each
    other. Sources are parsed, never imported.

    Args:
        seed: of the exchanged words.
        library: folder of Python sources; the running interpreter's standard library unless given.

    Returns:
        list[Pair]: in the order of the sources, no docstring twice. The group of a pair is its module.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    rng = random.Random(seed)
    pairs, seen = [], set()
    for path in library_sources(library):
        module = module_name(path.relative_to(library))
        for scope, function in documented_functions(parse(path)):
            docstring = first_paragraph(function)
            spoiled = exchange_neighbours(docstring, rng)
            if spoiled is None or docstring.casefold() in seen:
                continue
            seen.add(docstring.casefold())
            origin = ".".join([module, *scope, function.name])
            prompt = f'# {".".join([module, *scope])}\ndef {signature(function)}:\n    """'
            pairs.append(Pair(prompt, docstring, spoiled, group=module, origin=origin))
    if not pairs:
        raise DataError(f"no docstrings found in {library}: this Python comes without its library's sources")
    return pairs


def library_sources(library: Path) -> list[Path]:
    """Source files without tests and installed packages, in an order that no file system decides."""
    sources = (
        path for path in library.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(library).parts)
    )
    return sorted(sources, key=lambda path: path.relative_to(library).as_posix())


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


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
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(child, ast.ClassDef) and ast.get_docstring(child):
                yield scope, child
            inner = (*scope, child.name)
        yield from documented_functions(child, inner)


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return textwrap.shorten(
        f"{function.name}({ast.unparse(function.args)})", MAX_SIGNATURE, placeholder=" ..."
    )


def first_paragraph(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    paragraph = (ast.get_docstring(function) or "").split("\n\n")[0]
    return " ".join(paragraph.split()[:MAX_WORDS])


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

NOT_SUPPORTED = ("images", "image", "tools", "chat_template_kwargs")


def read_pairs(path: Path) -> list[Pair]:
    """Read a file with one preference pair per line, in TRL's format.

    A line is an object with `prompt`, `chosen` and `rejected`: three strings, or three lists of
    `{"role", "content"}` messages. Without `prompt`, `chosen` and `rejected` are conversations, and the
    messages with which both begin are the prompt. Other keys are ignored; empty lines are skipped.

    Raises:
        DataError: naming the lines at fault (the first ten) and what is wrong with each.
        OSError: the file cannot be read.
    """
    pairs, errors = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    pairs.append(parse_pair(text, origin=f"line {number}"))
            except UnicodeDecodeError as error:
                errors.append(f"line {number}: not UTF-8 text (byte {error.start + 1})")
            except ValueError as error:
                errors.append(f"line {number}: {error}")
    if errors:
        raise DataError(report(path, errors))
    if not pairs:
        raise DataError(f"{path} holds no preference pairs")
    return pairs


def report(path: Path, errors: Sequence[str]) -> str:
    lines = [f"{path} cannot be used:", *errors[:MAX_ERRORS_SHOWN]]
    if len(errors) > MAX_ERRORS_SHOWN:
        lines.append(f"and {len(errors) - MAX_ERRORS_SHOWN} more lines")
    return "\n  ".join(lines)


def parse_pair(line: str, origin: str) -> Pair:
    """The pair of one line. Raises ValueError saying what is wrong with it."""
    record = parse_object(line)
    kinds = {key: text_kind(key, record[key]) for key in ("prompt", "chosen", "rejected") if key in record}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"`{key}` is {kind}" for key, kind in kinds.items())
        raise ValueError(f"plain text and conversations are mixed: {found}")
    if record["chosen"] == record["rejected"]:
        raise ValueError("`chosen` and `rejected` are identical")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if prompt is None:
        prompt, chosen, rejected = split_shared_prompt(chosen, rejected)
    check_prompt(prompt)
    check_completion("chosen", chosen)
    check_completion("rejected", rejected)
    return Pair(prompt, chosen, rejected, group=json.dumps(prompt), origin=origin)


def parse_object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with prompt, chosen and rejected, got {json_type(record)}")
    implicit_prompt = isinstance(record.get("chosen"), list)
    required = ["chosen", "rejected"] if implicit_prompt else ["prompt", "chosen", "rejected"]
    if missing := [f"`{key}`" for key in required if key not in record]:
        raise ValueError(f"{' and '.join(missing)} missing; the keys here: {', '.join(record) or 'none'}")
    if used := [key for key in NOT_SUPPORTED if record.get(key)]:
        raise ValueError(f"`{used[0]}` is not supported by this example")
    return record


def text_kind(key: str, value: Any) -> str:
    """Whether the value is plain text or a conversation. Raises ValueError if it is neither."""
    if isinstance(value, str):
        check_encodable(f"`{key}`", value)
        return "plain text"
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be a string or a list of messages, got {json_type(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(
                f"`{key}`[{i}] must be an object with role and content, got {json_type(message)}"
            )
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                found = json_type(message[field]) if field in message else "nothing"
                raise ValueError(f"`{key}`[{i}]: `{field}` must be a string, got {found}")
            check_encodable(f"`{key}`[{i}]", message[field])
    return "a conversation"


def check_encodable(where: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} holds half of a surrogate pair, which is not a character")


def split_shared_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Prompt, chosen and rejected of two conversations: the prompt is what both begin with."""
    shared = list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if not shared:
        raise ValueError("`prompt` missing, and `chosen` and `rejected` do not begin with the same message")
    return chosen[: len(shared)], chosen[len(shared) :], rejected[len(shared) :]


def check_prompt(prompt: Text) -> None:
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with a message of the assistant, whose turn must come next")


def check_completion(key: str, completion: Text) -> None:
    messages = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    if not messages or not all(message["content"].strip() for message in messages):
        raise ValueError(f"the completion of `{key}` is empty")
    for place in (0, -1):
        if (role := messages[place]["role"]) != "assistant":
            raise ValueError(f"the completion of `{key}` must begin and end with the assistant, not {role!r}")


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ------------------------------------------------------------------------------------- splitting, tokenising


def split_pairs(pairs: Sequence[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs. Whole groups, drawn at random, are held out until `held_out` is reached.

    Raises:
        DataError: nothing is left on one of the sides.
    """
    sizes = Counter(pair.group for pair in pairs)
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    chosen_groups, count = set(), 0
    for group in groups:
        if count >= held_out:
            break
        chosen_groups.add(group)
        count += sizes[group]
    sides = [[pair for pair in pairs if (pair.group in chosen_groups) is held] for held in (False, True)]
    if not all(sides):
        raise DataError(
            f"{len(pairs)} pairs with {len(sizes)} different prompts cannot be split: two are needed"
        )
    return sides[0], sides[1]


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: Any, max_length: int
) -> tuple[list[EncodedPair], Counter[str]]:
    """Token ids of the pairs, and how many pairs were left out for what reason.

    Nothing is truncated: without the end of a completion, or the start of its prompt, it would be another
    pair than the one that was judged.

    Raises:
        DataError: the tokenizer has no chat template for conversational pairs, or the template refuses one.
    """
    encoded, left_out = [], Counter()
    for pair in pairs:
        tokens = encode_pair(pair, tokenizer)
        if max(len(tokens.chosen), len(tokens.rejected)) > max_length:
            left_out[f"longer than {max_length} tokens"] += 1
        elif tokens.chosen == tokens.rejected:
            left_out["chosen and rejected have the same tokens"] += 1
        else:
            encoded.append(tokens)
    return encoded, left_out


def encode_pair(pair: Pair, tokenizer: Any) -> EncodedPair:
    """The completion begins where the tokens of the prompt alone and of prompt + completion part, as in TRL:
    a tokenizer may merge across the boundary, and a template may end a lone prompt differently."""
    if isinstance(pair.prompt, list):
        prompt = encode_conversation(pair, pair.prompt, tokenizer, add_generation_prompt=True)
        chosen = encode_conversation(pair, pair.prompt + pair.chosen, tokenizer)
        rejected = encode_conversation(pair, pair.prompt + pair.rejected, tokenizer)
    else:
        prompt = encode_text(pair.prompt, tokenizer)
        chosen = encode_text(pair.prompt + pair.chosen, tokenizer, end=True)
        rejected = encode_text(pair.prompt + pair.rejected, tokenizer, end=True)
    prompt_length = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return EncodedPair(chosen, rejected, prompt_length)


def encode_conversation(pair: Pair, messages: list[Message], tokenizer: Any, **options: Any) -> list[int]:
    """The chat template writes BOS and end-of-turn itself: nothing is added to what it gives."""
    if not tokenizer.chat_template:
        raise DataError(f"{pair.origin} is a conversation, but the model's tokenizer has no chat template")
    try:
        encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # whatever the template raises
        raise DataError(f"{pair.origin}: the model's chat template refuses it: {error}") from error
    return encoding["input_ids"]


def encode_text(text: str, tokenizer: Any, end: bool = False) -> list[int]:
    """Plain text as the tokenizer writes it, but with no second BOS; on request EOS, which is scored too."""
    if tokenizer.eos_token_id is None:
        raise DataError("the model's tokenizer has no EOS token")
    ids = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text itself began with it
        ids = ids[1:]
    if end and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def common_prefix_length(ids: list[int], others: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, others, strict=False)))


# --------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    ids: torch.Tensor  # [S, T]
    mask: torch.Tensor  # [S, T]
    labels: torch.Tensor  # [S, T], of the completions alone unless said otherwise


@dataclass
class PreferenceSet:
    """Tokenised pairs, and their completions' log-probs under the reference model once they are known."""

    pairs: list[EncodedPair]
    batch_size: int
    device: str
    ref_logps: torch.Tensor | None = None  # [2, pairs]: chosen, rejected

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int]) -> Batch:
        """All the chosen, then all the rejected sequences: the order that `FusedFocalPOLoss` expects."""
        pairs = [self.pairs[i] for i in indices]
        chosen = [(pair.chosen, pair.labels(pair.chosen)) for pair in pairs]
        rejected = [(pair.rejected, pair.labels(pair.rejected)) for pair in pairs]
        return pad(chosen + rejected, self.device)

    def sft_batch(self, indices: Sequence[int]) -> Batch:
        """The chosen sequences; the prompt is learned too."""
        return pad([(self.pairs[i].chosen, self.pairs[i].chosen) for i in indices], self.device)

    def by_length(self, indices: Sequence[int] | None = None) -> list[list[int]]:
        """Batches of pairs of similar length, which need little padding; of all pairs unless given."""
        indices = range(len(self)) if indices is None else indices
        ordered = sorted(indices, key=lambda i: self.tokens([i]))
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
        return sum(len(self.pairs[i].chosen) + len(self.pairs[i].rejected) for i in indices)


def pad(sequences: Sequence[tuple[list[int], list[int]]], device: str) -> Batch:
    """Ids and labels of the sequences, padded on the right to the longest."""
    length = max(len(ids) for ids, _ in sequences)

    def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    return Batch(
        ids=padded((ids for ids, _ in sequences), 0),
        mask=padded(([1] * len(ids) for ids, _ in sequences), 0),
        labels=padded((labels for _, labels in sequences), IGNORE_INDEX),
    )
