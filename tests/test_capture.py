"""What is captured is what the model's head receives, and the benchmark runs from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from preference_data import Pair
from quickstart_parts import train_tokenizer
from test_benchmark import logps_of, run
from test_quickstart import HEADS, model_with
from tiny import write_jsonl
from transformers import AutoTokenizer

from benchmarks import capture
from benchmarks.inputs import Capture

# Chosen and rejected differ in length, and so do the pairs.
RECORDS = [
    {"prompt": f"The {thing} is", "chosen": f" {colour}.", "rejected": f" {'not ' * times}{colour}."}
    for times, thing in enumerate(["sky", "sea", "house", "car", "door", "hat"], start=1)
    for colour in ["red", "green", "blue", "white"]
]


def take(model: Path, data: Path, out: Path, *options: object) -> Capture:
    arguments = [model, "--data", data, "--out", out, "--device", "cpu", *options]
    capture.main([str(argument) for argument in arguments])
    return Capture.load(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """pairs.jsonl; a model for each head, another Llama ("sft"), one in bf16 and one with other words; and
    `NAME.pt` of each, with the reference log-probs of another model in "with-sft"."""
    folder, pairs = tmp_path_factory.mktemp("models"), [Pair(**r, group="", origin="") for r in RECORDS]
    data = write_jsonl(folder / "pairs.jsonl", RECORDS)
    variants = {"sft": {"intermediate_size": 32}, "bf16": {"dtype": torch.bfloat16}, "other words": {}}
    for name, options in {**{head: {} for head in HEADS}, **variants}.items():
        tokenizer = train_tokenizer(pairs[:1] if name == "other words" else pairs)
        model = model_with(name if name in HEADS else "llama", len(tokenizer), **options)
        model.to(options.get("dtype", torch.float32)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        take(folder / name, data, folder / f"{name}.pt")
    take(folder / "llama", data, folder / "with-sft.pt", "--reference", folder / "sft")
    return folder


@pytest.mark.parametrize("kind", HEADS)
def test_hidden_states_and_head_give_the_models_log_probs_chosen_first(kind, folder):
    taken = Capture.load(folder / f"{kind}.pt")
    assert taken.pairs == len(RECORDS) and taken.labels.shape == taken.hidden.shape[:1]
    transforms = {"gemma2": (2.0, 1.0), "cohere": (None, 0.25), "granite": (None, 0.25)}
    assert (taken.softcap, taken.logit_scale) == transforms.get(kind, (None, 1.0))
    assert (taken.bias is not None) == (kind == "phi")
    lengths = taken.cu_seqlens.diff().tolist()
    sums = torch.stack([part.sum() for part in logps_of(taken, taken.shape.transform).split(lengths)])
    torch.testing.assert_close(sums, taken.ref_logps, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in taken.labels.split(lengths)]
    found = zip(texts[: taken.pairs], texts[taken.pairs :], strict=True)
    assert sorted(found) == sorted((record["chosen"], record["rejected"]) for record in RECORDS)


def test_capture_stops_with_the_pair_that_brings_the_last_token(folder, tmp_path):
    everything = Capture.load(folder / "llama.pt")
    taken = take(folder / "llama", folder / "pairs.jsonl", tmp_path / "some.pt", "--tokens", 60)
    chosen, rejected = taken.cu_seqlens.diff().chunk(2)
    assert len(taken.labels) >= 60 > len(taken.labels) - chosen[-1] - rejected[-1]
    assert torch.equal(taken.labels[: chosen.sum()], everything.labels[: chosen.sum()])


def test_reference_log_probs_are_those_of_the_reference_model(folder):
    taken, other = Capture.load(folder / "with-sft.pt"), Capture.load(folder / "sft.pt")
    torch.testing.assert_close(taken.ref_logps, other.ref_logps)
    assert (taken.model, taken.reference, other.reference) == ("llama", "sft", "sft")
    assert Capture.load(folder / "bf16.pt").hidden.dtype == torch.bfloat16  # that of the checkpoint


@pytest.mark.parametrize(
    ("model", "record", "options", "message"),
    [
        ("llama", {"prompt": "a", "chosen": "b"}, [], "`rejected` is missing"),
        ("llama", RECORDS[0], ["--max-length", 2], "1 too long"),
        ("llama", RECORDS[0], ["--reference", "other words"], "another vocabulary"),
        ("no-such-model", RECORDS[0], [], "no-such-model"),
    ],
)
def test_what_cannot_be_used_is_named(model, record, options, message, folder, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "pairs.jsonl", [record])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=f"Nothing was captured: (.|\n)*{message}"):
        take(folder / model, path, tmp_path / "capture.pt", *options)


@pytest.mark.parametrize("kind", ["with-sft", "gemma2", "phi", "llama"])
def test_benchmark_runs_from_a_capture_and_agrees_with_float64(kind, folder, tmp_path, capsys):
    taken = Capture.load(folder / f"{kind}.pt")
    peers = "torch" if kind == "llama" else "torch torch-exact eager --no-memory"
    options = f"--device cpu --repeats 1 --dtype fp32 bf16 --saturated 0 0.5 --only {peers}"
    comparisons = run(f"{options} --capture {folder / kind}.pt", tmp_path / "result.json")["comparisons"]
    assert len(comparisons) == 4
    for comparison in comparisons:
        for row in comparison["rows"]:
            assert (row["status"], row["note"]) == ("ok", "")
            assert ("extra_bytes" in row) == (kind == "llama") and row.get("extra_bytes", 0) < 2**28
        assert (comparison["tokens"], comparison["pairs"]) == (len(taken.labels), taken.pairs)
        assert comparison["shape"]["vocab"] == len(taken.weight)
        assert comparison["input"]["kind"] == "captured" and comparison["input"]["model"] == taken.model
        assert str(folder) not in json.dumps(comparison)
    # In the model's own dtype the input is as sharp as its log-probs say.
    nll = -logps_of(taken, taken.shape.transform).mean().item()
    assert comparisons[0]["input"]["nll"] == pytest.approx(nll, rel=1e-4)
    said = f"captured from {taken.model} on pairs.jsonl, reference {taken.reference}"
    assert said in capsys.readouterr().out
