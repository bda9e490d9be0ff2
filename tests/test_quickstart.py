"""The quickstart end to end: trains, reports, takes the user's data and model or refuses them in one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import quickstart
from preference_data import IGNORE_INDEX, DataError, Pair, PreferenceSet
from quickstart_parts import TIE, Policy, estimate, train_tokenizer, wins

COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink"]
THINGS = ["sky", "sea", "house", "car", "door", "hat", "tree", "stone"]
RECORDS = [
    {"prompt": f"The {thing} is", "chosen": f" {colour}.", "rejected": f" not {colour}."}
    for thing in THINGS
    for colour in COLOURS
]
CHATS = [
    {"prompt": [{"role": "user", "content": record["prompt"]}]}
    | {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}
    for record in RECORDS
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    records = {"plain": RECORDS, "chat": CHATS}
    return {name: write_jsonl(folder / f"{name}.jsonl", some) for name, some in records.items()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A model of the user's, as one has it on disk."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Pair(**record, group="", origin="") for record in RECORDS])
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(out: Path, *arguments: object) -> dict:
    """Run the quickstart on the CPU and return its metrics."""
    quickstart.main(["--device", "cpu", "--out", str(out), *map(str, arguments)])
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[dict, str, Path]:
    """Metrics, printed text and folder of one run of 10 steps; 8 of its pairs are too long."""
    out = tmp_path_factory.mktemp("demo")
    long = [{**record, "prompt": "The attic is", "chosen": record["chosen"] * 40} for record in RECORDS[:8]]
    data = write_jsonl(out / "pairs.jsonl", RECORDS + long)
    options = ["--steps", 10, "--batch-size", 16, "--lr", 2e-3, "--max-length", 30]
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        metrics = run(out, "--data", data, *options)
    return metrics, screen.getvalue(), out


def test_it_reports_in_a_table_a_plot_and_metrics(demo):
    metrics, screen, out = demo
    for training in metrics["runs"]:
        assert len(training["training_loss"]) == 10
        assert [at["step"] for at in training["held_out"]] == [0, 1, 2, 4, 5, 6, 8, 9, 10]
        mean, error = training["held_out"][-1]["reward margin"]
        assert f"0.000 → {mean:.3f} ± {error:.3f}" in screen
    assert "A pair of 72:\n  prompt    The " in screen and "8 too long" in screen
    for row in ("loss", "reward accuracy", "reward margin", "logp accuracy", str(out), "quickstart.png"):
        assert row in screen
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "quickstart.png").stat().st_size > 10_000


def test_before_training_all_rewards_are_level_and_the_loss_is_that_of_even_odds(demo):
    for training, gamma in zip(demo[0]["runs"], (0.0, 0.05), strict=True):
        start = training["held_out"][0]
        assert start["reward accuracy"] == [0.5, 0.0]
        assert start["reward margin"][0] == pytest.approx(0, abs=TIE)
        assert start["loss"][0] == pytest.approx(0.5**gamma * math.log(2), rel=1e-4)


def test_it_learns_a_preference_that_holds_for_prompts_never_seen(demo):
    for training in demo[0]["runs"]:
        assert training["held_out"][-1]["reward accuracy"][0] > 0.9
        assert training["held_out"][-1]["reward margin"][0] > 0.5


def test_both_methods_start_from_the_same_weights_and_see_the_batches_of_the_seed(data, tmp_path):
    arguments = ["--data", data["chat"], "--steps", 2, "--gamma", 0]
    first, second = (training["training_loss"] for training in run(tmp_path, *arguments)["runs"])
    assert first == pytest.approx(second, rel=1e-5)
    other = run(tmp_path, *arguments, "--seed", 1)["runs"][0]["training_loss"]
    assert first != pytest.approx(other, rel=1e-5)


def test_without_data_it_takes_docstrings(tmp_path, monkeypatch):
    pairs = [
        Pair(f'# m\ndef f{i}(x):\n    """', f"Return value {i} of x.", f"Return {i} value of x.", f"m{i}", "")
        for i in range(24)
    ]
    monkeypatch.setattr(quickstart, "docstring_pairs", lambda seed: pairs)
    assert run(tmp_path, "--steps", 1)["held_out_pairs"] == 4


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_users_model_is_trained_on_the_users_data_without_sft(kind, data, model_dir, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    metrics = run(tmp_path, "--data", data[kind], "--model", model_dir, "--steps", 2, "--lr", 1e-3)
    assert (metrics["arguments"]["beta"], metrics["arguments"]["batch_size"]) == (0.1, 8)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    # At most one optimizer step at full rate and one at a lower one: no weight can have moved further.
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 2.1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt"\n', [], "line 2: not valid JSON"),
        ('{"prompt": "a", "chosen": "b"}\n', [], "line 1: `prompt` is text, .* `rejected` is missing"),
        ('{"question": "a", "good": "b", "bad": "c"}\n', [], "the line's keys: question, good, bad"),
        ("", [], "holds no preference pairs"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', [], "only one prompt in the data: two are"),
        (None, [], "No such file"),
        (RECORDS, ["--max-length", 4], "no training pairs are left: 0 kept, 48 too long .more than 4 tokens"),
        (CHATS, ["--model", "without_template"], "line .* the model's tokenizer has no chat template"),
    ],
)
def test_bad_data_is_refused_in_one_line(text, options, message, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in model_dir.iterdir():
        if file.name != "chat_template.jinja":
            Path("without_template").mkdir(exist_ok=True)
            Path("without_template", file.name).symlink_to(file)
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text if isinstance(text, str) else "\n".join(map(json.dumps, text)))
    with pytest.raises(SystemExit, match=f"^Nothing was trained: .*{message}[^\n]*$"):
        run(tmp_path / "out", "--data", path, *options)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_the_message_and_no_traceback(tmp_path):
    command = [sys.executable, quickstart.__file__, "--data", tmp_path / "no-such-file.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert "no-such-file.jsonl" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--batch-size", "-1"], "must be at least 1, got -1"),
        (["--beta", "0"], "beta"),
        (["--gamma", "-1"], "gamma"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# Heads that do more to the logits than hidden @ weight.T, in the words of their config.
HEADS = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}),
    "phi": (PhiConfig, {}),  # a head with bias
}


def model_with(head: str, vocab: int, **sizes: object) -> PreTrainedModel:
    """A model of random weights whose logits are large enough to show its transform."""
    torch.manual_seed(0)
    config, transform = HEADS[head]
    given = {**TINY, "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, **transform, **sizes}
    model = AutoModelForCausalLM.from_config(config(**given))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        if (bias := model.get_output_embeddings().bias) is not None:
            bias.normal_()
    return model


PAIRS = PreferenceSet(
    [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1]},
        {"prompt_ids": [5, 6], "chosen_ids": [10, 11, 12, 1], "rejected_ids": [4, 1]},
    ],
    batch_size=2,
    device="cpu",
)


@pytest.fixture
def policy(request) -> Policy:
    return Policy(model_with(request.param, vocab=300), tokenizer=None)


@pytest.mark.parametrize("policy", list(HEADS), indirect=True)
def test_the_log_probs_are_those_of_the_models_own_logits(policy):
    batch = PAIRS.batch([0, 1])
    logits = policy.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    targets = batch.labels[:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(policy.logps(batch), -nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.through_head(batch)[1], logits[targets != IGNORE_INDEX])


@pytest.mark.parametrize("policy", ["gemma2", "cohere", "granite"], indirect=True)
def test_a_transform_of_the_logits_that_is_not_known_is_refused(policy):
    policy.logit_options = {"softcap": None, "logit_scale": 1.0}
    with pytest.raises(DataError, match="ForCausalLM is not supported"):
        policy.through_head(PAIRS.batch([0, 1]))


@pytest.mark.parametrize("policy", ["llama"], indirect=True)
def test_the_loss_takes_the_references_log_probs_of_the_very_pairs(policy):
    PAIRS.ref_logps = torch.tensor([[-3.0, -5.0], [-7.0, -11.0]])
    loss_fn = quickstart.FusedFocalPOLoss(beta=0.3, gamma=0.05)
    out = quickstart.preference_loss(policy, loss_fn, PAIRS, [1, 0])
    logps = policy.logps(PAIRS.batch([1, 0])).sum(-1)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (logps[:2] - torch.tensor([-5.0, -3.0])))
    torch.testing.assert_close(out.rejected_rewards, 0.3 * (logps[2:] - torch.tensor([-11.0, -7.0])))


def test_a_tie_counts_one_half_and_the_error_is_that_of_the_mean():
    assert wins(torch.tensor([2.0, -0.1, 0.0, TIE / 2, -TIE / 2])).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert estimate(torch.tensor([1.0, 0.0, 1.0, 1.0])) == "0.750 ± 0.250"
    assert estimate(torch.tensor([-1e-9, -1e-9])) == "0.000 ± 0.000"
