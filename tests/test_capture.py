"""What is captured is what the model's head receives, and the benchmark runs from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import quickstart
from preference_data import Pair, docstring_pairs, encode_pair, read_pairs

from benchmarks import capture, throughput
from benchmarks.capture_file import Capture, CapturedInput, CaptureError
from benchmarks.check import choose_sample, error_bound, errors_of, plain_errors, sampled_step
from benchmarks.inputs import PRESENT
from benchmarks.peers import all_peers

# Chosen and rejected differ in length, and so do the pairs.
RECORDS = [
    {"prompt": f"The {thing} is", "chosen": f" {colour}.", "rejected": f" {'not ' * times}{colour}."}
    for times, thing in enumerate(["sky", "sea", "house", "car", "door", "hat"], start=1)
    for colour in ["red", "green", "blue", "white"]
]
# Transforms of the logits are to show.
SHARP = {**TINY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.5}
MODELS = {
    "llama": lambda vocab: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **SHARP)),
    "gemma2": lambda vocab: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=vocab, head_dim=16, final_logit_softcapping=5.0, **SHARP)
    ),
    "cohere": lambda vocab: CohereForCausalLM(CohereConfig(vocab_size=vocab, logit_scale=0.25, **SHARP)),
    "granite": lambda vocab: GraniteForCausalLM(GraniteConfig(vocab_size=vocab, logits_scaling=4.0, **SHARP)),
    "phi": lambda vocab: with_bias(PhiForCausalLM(PhiConfig(vocab_size=vocab, **SHARP))),
}


def with_bias(model):
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", RECORDS)


def save_model(folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    pairs = [Pair(record["prompt"], record["chosen"], record["rejected"], "", "") for record in RECORDS]
    tokenizer = quickstart.train_tokenizer(pairs)
    MODELS[kind](len(tokenizer)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def take(model: Path, data: Path, out: Path, *options: object) -> Capture:
    arguments = [model, "--data", data, "--out", out, "--device", "cpu", *options]
    capture.main([str(argument) for argument in arguments])
    return Capture.load(out)


@torch.no_grad()
def own_logps(model: Path, data: Path) -> dict[tuple[int, ...], float]:
    """Log-prob of each completion by its tokens and their number, one unpadded sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    found = {}
    for pair in read_pairs(data):
        encoded = encode_pair(pair, tokenizer)
        for ids in (encoded.chosen, encoded.rejected):
            logps = network(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            scored = range(encoded.prompt_length - 1, len(ids) - 1)
            found[tuple(ids)] = sum(logps[at, ids[at + 1]].item() for at in scored)
    return found


def head_logps(taken: Capture) -> torch.Tensor:
    """Log-probs of the labels `[N]` from what the file holds, as one reads it who has no model."""
    logits = taken.hidden @ taken.weight.T + (0 if taken.bias is None else taken.bias)
    logits = taken.logit_scale * logits.float()
    if taken.softcap is not None:
        logits = taken.softcap * torch.tanh(logits / taken.softcap)
    return logits.log_softmax(-1).gather(-1, taken.labels[:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_and_head_give_the_log_probs_of_the_model(kind, data, tmp_path):
    model = save_model(tmp_path / "model", kind)
    taken = take(model, data, tmp_path / "capture.pt")
    assert taken.pairs == len(RECORDS) and taken.labels.shape == taken.hidden.shape[:1]
    assert (taken.softcap, taken.logit_scale) == {
        "gemma2": (5.0, 1.0), "cohere": (None, 0.25), "granite": (None, 0.25)
    }.get(kind, (None, 1.0))  # fmt: skip
    assert (taken.bias is not None) == (kind == "phi")
    sums = torch.stack([part.sum() for part in head_logps(taken).split(taken.cu_seqlens.diff().tolist())])
    torch.testing.assert_close(sums, taken.ref_logps, rtol=1e-4, atol=1e-4)
    expected = sorted(own_logps(model, data).values())
    torch.testing.assert_close(sums.sort().values, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_chosen_come_first_and_their_rejected_in_the_same_order(llama, data, tmp_path):
    taken = take(llama, data, tmp_path / "capture.pt")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [tokenizer.decode(part) for part in taken.labels.split(taken.cu_seqlens.diff().tolist())]
    pairs = set(zip(texts[: taken.pairs], texts[taken.pairs :], strict=True))
    assert pairs == {(record["chosen"] + "</s>", record["rejected"] + "</s>") for record in RECORDS}


def test_sharpness_is_that_of_the_captured_rows(llama, data, tmp_path, capsys):
    taken = take(llama, data, tmp_path / "capture.pt")
    logps = (taken.hidden @ taken.weight.T).log_softmax(-1)
    assert taken.sharpness["rows"] == len(logps)
    assert taken.sharpness["nll"] == pytest.approx(-head_logps(taken).mean().item(), rel=1e-4)
    assert taken.sharpness["entropy"] == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-4)
    entries = (logps.exp() > PRESENT).sum(-1).double().mean().item()
    assert taken.sharpness["entries"] == pytest.approx(entries, rel=1e-3)
    assert f"{entries:.0f} entries above 2^-12 per row" in capsys.readouterr().out


def test_capture_stops_with_the_pair_that_brings_the_last_token(llama, data, tmp_path):
    everything = take(llama, data, tmp_path / "all.pt")
    taken = take(llama, data, tmp_path / "some.pt", "--tokens", 60, "--batch-size", 5)
    assert len(taken.labels) >= 60 > len(taken.first(taken.pairs - 1).labels)
    torch.testing.assert_close(taken.hidden, everything.first(taken.pairs).hidden)
    assert torch.equal(taken.labels, everything.first(taken.pairs).labels)


def test_reference_log_probs_are_those_of_the_reference_model(llama, data, tmp_path):
    other = save_model(tmp_path / "sft", seed=1)
    taken = take(llama, data, tmp_path / "capture.pt", "--reference", other)
    of_other = take(other, data, tmp_path / "other.pt")
    torch.testing.assert_close(taken.ref_logps, of_other.ref_logps)
    assert (taken.model, taken.reference) == ("llama", "sft")
    assert (of_other.model, of_other.reference) == ("sft", "sft")


def test_dtype_of_the_checkpoint_is_kept(data, tmp_path):
    model = save_model(tmp_path / "model", "gemma2", dtype=torch.bfloat16)
    taken = take(model, data, tmp_path / "capture.pt")
    assert taken.hidden.dtype == taken.weight.dtype == torch.bfloat16
    assert taken.ref_logps.dtype == torch.float32


def test_docstrings_are_the_data_unless_given(llama, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    (library / "m.py").write_text('def f():\n    """a b c d e"""\n\n\ndef g():\n    """f g h i"""\n')
    monkeypatch.setattr(capture, "docstring_pairs", lambda seed: docstring_pairs(seed, library))
    path = tmp_path / "capture.pt"
    capture.main([str(llama), "--out", str(path), "--device", "cpu"])
    taken = Capture.load(path)
    assert taken.pairs == 2 and taken.data == "docstrings of Python's standard library"


class Shifted(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits.sin()
        return out


def test_a_model_that_transforms_its_logits_in_another_way_is_refused(llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "AutoModelForCausalLM", Shifted)
    with pytest.raises(
        SystemExit, match=r"Shifted is not supported: it transforms its logits(.|\n)*Nothing was"
    ):
        take(llama, data, tmp_path / "capture.pt")
    assert not (tmp_path / "capture.pt").exists()


def test_a_reference_with_another_vocabulary_is_refused(llama, data, tmp_path):
    tokenizer = quickstart.train_tokenizer([Pair("Quite", " other words", "", "", "")])
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHARP)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="another vocabulary"):
        take(llama, data, tmp_path / "capture.pt", "--reference", tmp_path / "other")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', [], "`rejected` missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', ["--max-length", 2], "longer than 2 tokens"),
    ],
)
def test_unusable_data_is_refused_by_name(lines, options, message, llama, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines)
    with pytest.raises(SystemExit) as stop:
        take(llama, path, tmp_path / "capture.pt", *options)
    assert message in str(stop.value) + capsys.readouterr().out
    assert "Nothing was captured" in str(stop.value)


def test_a_missing_model_is_refused(data, tmp_path):
    with pytest.raises(SystemExit, match="Nothing was captured"):
        take(tmp_path / "no-such-model", data, tmp_path / "capture.pt")


def benchmark(path: Path, tmp_path: Path, *options: object) -> tuple[int, dict]:
    report = tmp_path / "result.json"
    arguments = [
        "--capture",
        path,
        "--device",
        "cpu",
        "--threads",
        1,
        "--repeats",
        1,
        "--json",
        report,
        *options,
    ]
    status = throughput.main([str(argument) for argument in arguments])
    return status, json.loads(report.read_text())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_benchmark_runs_from_a_capture_and_agrees_with_float64(kind, data, tmp_path, capsys):
    path = tmp_path / "capture.pt"
    taken = take(save_model(tmp_path / "model", kind), data, path)
    options = ["--no-memory", "--only", "torch", "torch-exact", "eager", "--saturated", 0, 0.5]
    status, result = benchmark(path, tmp_path, "--dtype", "fp32", "bf16", *options)
    assert status == 0 and len(result["comparisons"]) == 4
    for comparison in result["comparisons"]:
        assert [row["status"] for row in comparison["rows"]] == ["ok"] * 3
        assert (comparison["tokens"], comparison["pairs"]) == (len(taken.labels), taken.pairs)
        assert comparison["shape"]["vocab"] == len(taken.weight)
        assert comparison["input"]["kind"] == "captured" and comparison["input"]["model"] == "model"
        assert str(tmp_path) not in json.dumps(comparison)
    # In the model's own dtype the input is as sharp as the model was.
    assert result["comparisons"][0]["input"]["nll"] == pytest.approx(taken.sharpness["nll"], rel=1e-5)
    assert "captured from model on pairs.jsonl, reference model" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "eager", "trl"])
def test_peers_agree_on_sequences_of_different_lengths(name, llama, data, tmp_path):
    if name == "trl":
        pytest.importorskip("trl", reason="the comparison needs TRL, which the extra `trl` installs")
    path = tmp_path / "capture.pt"
    taken = take(llama, data, path, "--reference", save_model(tmp_path / "sft", seed=1))
    assert len(set(taken.cu_seqlens.diff().tolist())) > 3
    source = CapturedInput(path, taken.shape, len(taken.labels), taken.pairs, torch.float32, "cpu")
    batch, _ = source.batch()
    batch.requires_grad_(frozen_head=False)
    sample = choose_sample(batch, seed=0)
    truth, plain = (sampled_step(batch, sample, dtype) for dtype in (torch.float64, torch.float32))
    # The reference is another model: no pair is at u = 0.
    assert (truth.losses - torch.log(torch.tensor(2.0))).abs().min() > 1e-4
    loss = all_peers()[name].load("cpu")(batch).loss
    gradients = list(torch.autograd.grad(loss, batch.differentiated()))
    found = errors_of(loss.detach(), gradients, sample, truth)
    assert found.exceeded(error_bound(plain_errors(truth, plain), torch.float32)) == []


def test_memory_of_a_capture_is_measured_without_the_file(llama, data, tmp_path):
    path = tmp_path / "capture.pt"
    take(llama, data, path)
    status, result = benchmark(path, tmp_path, "--dtype", "fp32", "--only", "torch")
    (row,) = result["comparisons"][0]["rows"]
    assert status == 0 and row["note"] == "" and 0 <= row["extra_bytes"] < 2**28


def test_fewer_tokens_take_the_first_pairs_that_fit(llama, data, tmp_path):
    path = tmp_path / "capture.pt"
    taken = take(llama, data, path)
    options = ["--dtype", "fp32", "--no-memory", "--only", "torch", "--tokens", 50]
    status, result = benchmark(path, tmp_path, *options)
    comparison = result["comparisons"][0]
    assert status == 0 and 0 < comparison["pairs"] < taken.pairs and comparison["tokens"] <= 50
    assert len(taken.first(comparison["pairs"]).labels) == comparison["tokens"]
    assert len(taken.first(comparison["pairs"] + 1).labels) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sharpness", "50"], "leave out --sharpness"),
        (["--hidden", "64", "--vocab", "100"], "leave out --hidden and --vocab"),
        (["--shape", "llama3-8b", "--pairs", "2"], "leave out --shape and --pairs"),
        (["--tokens", "1"], "the first pair of"),
    ],
)
def test_options_that_a_capture_decides_are_refused(options, message, llama, data, tmp_path, capsys):
    path = tmp_path / "capture.pt"
    take(llama, data, path)
    with pytest.raises(SystemExit):
        benchmark(path, tmp_path, *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no capture", {"hidden": 1}])
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
