"""What is captured is what the model's head receives, and the benchmark runs from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_quickstart import HEADS, model_with
from tiny import TINY, write_jsonl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import quickstart_parts
from preference_data import Pair

from benchmarks import capture, throughput
from benchmarks.capture_file import Capture, CaptureError
from benchmarks.inputs import transformed

# Chosen and rejected differ in length, and so do the pairs.
RECORDS = [
    {"prompt": f"The {thing} is", "chosen": f" {colour}.", "rejected": f" {'not ' * times}{colour}."}
    for times, thing in enumerate(["sky", "sea", "house", "car", "door", "hat"], start=1)
    for colour in ["red", "green", "blue", "white"]
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", RECORDS)


def save_model(
    folder: Path, head: str = "llama", dtype: torch.dtype = torch.float32, **sizes: object
) -> Path:
    tokenizer = quickstart_parts.train_tokenizer([Pair(**r, group="", origin="") for r in RECORDS])
    model_with(head, len(tokenizer), **sizes).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {head: save_model(folder / head, head) for head in HEADS} | {
        "sft": save_model(folder / "sft", intermediate_size=32),
        "bf16": save_model(folder / "bf16", dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module")
def captures(models, data, tmp_path_factory) -> dict[str, Path]:
    """Files of all the models; "with-sft" has another model's reference log-probs."""
    folder = tmp_path_factory.mktemp("captures")
    for kind, model in models.items():
        take(model, data, folder / f"{kind}.pt")
    take(models["llama"], data, folder / "with-sft.pt", "--reference", models["sft"])
    return {path.stem: path for path in folder.iterdir()}


def take(model: Path, data: Path, out: Path, *options: object) -> Capture:
    arguments = [model, "--data", data, "--out", out, "--device", "cpu", *options]
    capture.main([str(argument) for argument in arguments])
    return Capture.load(out)


def head_logps(taken: Capture) -> torch.Tensor:
    """Log-probs of the labels `[N]` from the file alone, without the model."""
    logits = taken.hidden @ taken.weight.T + (0 if taken.bias is None else taken.bias)
    logps = transformed(logits.float(), taken.shape.transform).log_softmax(-1)
    return logps.gather(-1, taken.labels[:, None])[:, 0]


@pytest.mark.parametrize("kind", HEADS)
def test_hidden_states_and_head_give_the_models_log_probs_chosen_first(kind, models, captures):
    taken = Capture.load(captures[kind])
    assert taken.pairs == len(RECORDS) and taken.labels.shape == taken.hidden.shape[:1]
    transforms = {"gemma2": (2.0, 1.0), "cohere": (None, 0.25), "granite": (None, 0.25)}
    assert (taken.softcap, taken.logit_scale) == transforms.get(kind, (None, 1.0))
    assert (taken.bias is not None) == (kind == "phi")
    lengths = taken.cu_seqlens.diff().tolist()
    sums = torch.stack([part.sum() for part in head_logps(taken).split(lengths)])
    torch.testing.assert_close(sums, taken.ref_logps, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in taken.labels.split(lengths)]
    found = zip(texts[: taken.pairs], texts[taken.pairs :], strict=True)
    assert sorted(found) == sorted((record["chosen"], record["rejected"]) for record in RECORDS)


def test_capture_stops_with_the_pair_that_brings_the_last_token(models, captures, data, tmp_path):
    everything = Capture.load(captures["llama"])
    taken = take(models["llama"], data, tmp_path / "some.pt", "--tokens", 60)
    assert len(taken.labels) >= 60 > len(taken.first(taken.pairs - 1).labels)
    torch.testing.assert_close(taken.hidden, everything.first(taken.pairs).hidden)
    assert torch.equal(taken.labels, everything.first(taken.pairs).labels)


def test_reference_log_probs_are_those_of_the_reference_model(captures):
    taken, other = Capture.load(captures["with-sft"]), Capture.load(captures["sft"])
    torch.testing.assert_close(taken.ref_logps, other.ref_logps)
    assert (taken.model, taken.reference) == ("llama", "sft")
    assert (other.model, other.reference) == ("sft", "sft")
    assert Capture.load(captures["bf16"]).hidden.dtype == torch.bfloat16  # that of the checkpoint


def test_a_reference_with_another_vocabulary_is_refused(models, data, tmp_path):
    tokenizer = quickstart_parts.train_tokenizer([Pair("Quite", " other words", "", "", "")])
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="another vocabulary"):
        take(models["llama"], data, tmp_path / "capture.pt", "--reference", tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "line", "options", "message"),
    [
        ("llama", '{"prompt": "a", "chosen": "b"}', [], "`rejected` is missing"),
        ("llama", '{"prompt": "a", "chosen": "b", "rejected": "c"}', ["--max-length", 2], "1 too long"),
        ("no-such-model", '{"prompt": "a", "chosen": "b", "rejected": "c"}', [], "no-such-model"),
    ],
)
def test_unusable_data_or_model_is_refused_by_name(model, line, options, message, models, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(line)
    model = models.get(model, tmp_path / model)
    with pytest.raises(SystemExit, match=f"Nothing was captured: (.|\n)*{message}"):
        take(model, tmp_path / "pairs.jsonl", tmp_path / "capture.pt", *options)


def benchmark(path: Path, tmp_path: Path, *options: object) -> tuple[int, dict]:
    report = tmp_path / "result.json"
    arguments = ["--capture", path, "--device", "cpu", "--repeats", 1, "--json", report]
    status = throughput.main([str(argument) for argument in [*arguments, *options]])
    return status, json.loads(report.read_text())


@pytest.mark.parametrize("kind", ["with-sft", "gemma2", "phi"])
def test_benchmark_runs_from_a_capture_and_agrees_with_float64(kind, captures, tmp_path, capsys):
    taken = Capture.load(captures[kind])
    options = ["--no-memory", "--only", "torch", "torch-exact", "eager", "--saturated", 0, 0.5]
    status, result = benchmark(captures[kind], tmp_path, "--dtype", "fp32", "bf16", *options)
    assert status == 0 and len(result["comparisons"]) == 4
    for comparison in result["comparisons"]:
        assert [row["status"] for row in comparison["rows"]] == ["ok"] * 3
        assert (comparison["tokens"], comparison["pairs"]) == (len(taken.labels), taken.pairs)
        assert comparison["shape"]["vocab"] == len(taken.weight)
        assert comparison["input"]["kind"] == "captured" and comparison["input"]["model"] == taken.model
        assert str(captures[kind].parent) not in json.dumps(comparison)
    # In the model's own dtype the input is as sharp as `head_logps` says.
    assert result["comparisons"][0]["input"]["nll"] == pytest.approx(
        -head_logps(taken).mean().item(), rel=1e-4
    )
    assert (
        f"captured from {taken.model} on pairs.jsonl, reference {taken.reference}" in capsys.readouterr().out
    )


def test_memory_of_the_first_pairs_that_fit_is_measured_without_the_file(captures, tmp_path):
    taken = Capture.load(captures["llama"])
    options = ["--dtype", "fp32", "--only", "torch", "--tokens", 50]
    status, result = benchmark(captures["llama"], tmp_path, *options)
    (comparison,) = result["comparisons"]
    (row,) = comparison["rows"]
    assert status == 0 and row["note"] == "" and 0 <= row["extra_bytes"] < 2**28
    assert 0 < comparison["pairs"] < taken.pairs and comparison["tokens"] <= 50
    assert len(taken.first(comparison["pairs"]).labels) == comparison["tokens"]
    assert len(taken.first(comparison["pairs"] + 1).labels) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sharpness", "50"], "leave out --sharpness"),
        (["--shape", "llama3-8b", "--pairs", "2"], "leave out --shape and --pairs"),
        (["--tokens", "1"], "the first pair of"),
    ],
)
def test_options_that_a_capture_decides_are_refused(options, message, captures, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark(captures["llama"], tmp_path, *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"no capture", {"hidden": 1}])
def test_another_file_is_not_taken_for_a_capture(content, tmp_path, capsys):
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = "No such file" if content is None else "not written by benchmarks/capture.py"
    with pytest.raises(CaptureError, match=message):
        Capture.load(path)
    with pytest.raises(SystemExit):
        benchmark(path, tmp_path)
    assert message in capsys.readouterr().err
