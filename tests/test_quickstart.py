"""The quickstart end to end: trains, reports what is so, takes the user's data and model or refuses."""

from __future__ import annotations

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
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import quickstart
from preference_data import IGNORE_INDEX, DataError, EncodedPair, Pair, PreferenceSet

COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink"]
THINGS = ["sky", "sea", "house", "car", "door", "hat", "tree", "stone"]
RECORDS = [
    {"prompt": f"The {thing} is", "chosen": f" {colour}.", "rejected": f" not {colour}."}
    for thing in THINGS
    for colour in COLOURS
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": record["prompt"]}],
        "chosen": [{"role": "assistant", "content": record["chosen"]}],
        "rejected": [{"role": "assistant", "content": record["rejected"]}],
    }
    for record in RECORDS
]


def tiny_tokenizer():
    pairs = [Pair(r["prompt"], r["chosen"], r["rejected"], "", "") for r in RECORDS]
    return quickstart.train_tokenizer(pairs)


@pytest.fixture
def plain_data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "plain.jsonl", RECORDS)


@pytest.fixture
def chat_data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "chat.jsonl", CHATS)


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """A model of the user's, as one has it on disk."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(out: Path, *arguments: object) -> dict:
    """Run the quickstart on the CPU and return its metrics."""
    quickstart.main(["--device", "cpu", "--out", str(out), *map(str, arguments)])
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_it_reports_in_a_table_a_plot_and_metrics(plain_data, out, capsys):
    metrics = run(out, "--data", plain_data, "--steps", 10, "--sft-steps", 3, "--batch-size", 8)
    dpo, focalpo = metrics["runs"]
    assert (dpo["gamma"], focalpo["gamma"]) == (0.0, 0.05)
    for training in (dpo, focalpo):
        assert len(training["training_loss"]) == 10
        assert [evaluation["step"] for evaluation in training["held_out"]] == [0, 1, 2, 4, 5, 6, 8, 9, 10]
        assert training["tokens_per_second"] > 0
    screen = capsys.readouterr().out
    after = dpo["held_out"][-1]["reward_accuracy"]
    assert f"0.500 → {after['mean']:.3f} ± {after['standard_error']:.3f}" in screen
    for row in ("loss", "reward accuracy", "reward margin", "logp accuracy", "training tokens/s"):
        assert row in screen
    assert str(out) in screen and "quickstart.png" in screen
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "quickstart.png").stat().st_size > 10_000


def test_before_training_all_rewards_are_level_and_the_loss_is_that_of_even_odds(plain_data, out):
    metrics = run(out, "--data", plain_data, "--steps", 1, "--sft-steps", 3)
    for training in metrics["runs"]:
        start = training["held_out"][0]
        assert start["reward_accuracy"] == {"mean": 0.5, "standard_error": 0.0}
        assert start["reward_margin"]["mean"] == pytest.approx(0, abs=quickstart.TIE)
        even = 0.5 ** training["gamma"] * math.log(2)
        assert start["loss"]["mean"] == pytest.approx(even, rel=1e-4)


def test_it_learns_a_preference_that_holds_for_prompts_never_seen(plain_data, out):
    arguments = ["--steps", 30, "--sft-steps", 5, "--batch-size", 16, "--lr", 2e-3]
    for training in run(out, "--data", plain_data, *arguments)["runs"]:
        assert training["held_out"][-1]["reward_accuracy"]["mean"] > 0.9
        assert training["held_out"][-1]["reward_margin"]["mean"] > 0.5


def test_both_methods_start_from_the_same_weights_and_see_the_same_batches(plain_data, out):
    arguments = ["--steps", 6, "--sft-steps", 3, "--gamma", 0]
    first, second = run(out, "--data", plain_data, *arguments)["runs"]
    assert first["training_loss"] == pytest.approx(second["training_loss"], rel=1e-5)
    assert len(set(first["training_loss"])) > 1


def test_the_seed_decides_the_result(plain_data, tmp_path):
    def losses(folder: str, seed: int) -> list[float]:
        arguments = ["--data", plain_data, "--steps", 2, "--sft-steps", 2, "--seed", seed]
        return run(tmp_path / folder, *arguments)["runs"][1]["training_loss"]

    assert losses("a", 0) == pytest.approx(losses("b", 0), rel=1e-5)
    assert losses("a", 0) != pytest.approx(losses("c", 1), rel=1e-5)


def test_without_data_it_takes_docstrings(out, monkeypatch):
    pairs = [
        Pair(
            f'# m{i}\ndef f{i}(x):\n    """',
            f"Return the value {i} of x.",
            f"Return value the {i} of x.",
            f"m{i}",
            "",
        )
        for i in range(24)
    ]
    monkeypatch.setattr(quickstart, "docstring_pairs", lambda seed: pairs)
    metrics = run(out, "--steps", 1, "--sft-steps", 1)
    assert metrics["runs"][0]["held_out_pairs"] == 4


@pytest.mark.parametrize("data", ["plain_data", "chat_data"])
def test_the_users_model_is_trained_on_the_users_data_without_sft(data, model_dir, out, request):
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    data = request.getfixturevalue(data)
    metrics = run(out, "--data", data, "--model", model_dir, "--steps", 2, "--lr", 1e-3)
    assert metrics["arguments"]["sft_steps"] == 0
    assert metrics["arguments"]["beta"] == 0.1
    after = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    # At most one optimizer step at full rate and one at a lower one: no weight can have moved further.
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 2.1e-3
    assert AutoTokenizer.from_pretrained(out / "model").chat_template


def test_conversations_train_the_small_model_too(chat_data, out):
    metrics = run(out, "--data", chat_data, "--steps", 1, "--sft-steps", 1)
    assert all(math.isfinite(training["training_loss"][0]) for training in metrics["runs"])


def test_a_malformed_line_is_named_and_nothing_is_trained(tmp_path, out):
    data = write_jsonl(tmp_path / "bad.jsonl", [*RECORDS[:3], {"prompt": "The sky is", "chosen": " blue."}])
    script = Path(quickstart.__file__)
    result = subprocess.run(
        [sys.executable, script, "--data", data, "--out", out], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "line 4: `rejected` missing" in result.stderr
    assert "Nothing was trained" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_missing_file_is_named(tmp_path, out):
    with pytest.raises(SystemExit, match="no-such-file"):
        run(out, "--data", tmp_path / "no-such-file.jsonl")
    assert not out.exists()


def test_conversations_and_a_model_without_chat_template_are_refused(chat_data, model_dir, out):
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="no chat template\nNothing was trained"):
        run(out, "--data", chat_data, "--model", model_dir)
    assert not out.exists()


def test_a_model_with_an_unknown_transform_of_its_logits_is_refused(plain_data, model_dir, out, monkeypatch):
    forward = LlamaForCausalLM.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 50 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(SystemExit, match="LlamaForCausalLM is not supported"):
        run(out, "--data", plain_data, "--model", model_dir)
    assert not out.exists()


def test_pairs_left_out_are_counted(tmp_path, out, capsys):
    long = [{**record, "chosen": record["chosen"] * 40} for record in RECORDS[:8]]  # all of one prompt
    data = write_jsonl(tmp_path / "long.jsonl", long + RECORDS[8:])
    run(out, "--data", data, "--steps", 1, "--sft-steps", 0, "--max-length", 30)
    assert "8 of" in (screen := capsys.readouterr().out) and "pairs left out, longer than 30 tokens" in screen


def test_if_no_pair_is_left_nothing_is_trained(plain_data, out):
    with pytest.raises(SystemExit, match="no pairs are left\nNothing was trained"):
        run(out, "--data", plain_data, "--max-length", 4)
    assert not out.exists()


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


# Heads that do more to the logits than hidden @ weight.T: in the config's words, and what it comes to.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=300, **TINY)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(vocab_size=300, head_dim=16, final_logit_softcapping=2.0, **TINY),
    ),
    "cohere": (CohereForCausalLM, CohereConfig(vocab_size=300, logit_scale=0.25, **TINY)),
    "granite": (GraniteForCausalLM, GraniteConfig(vocab_size=300, logits_scaling=4.0, **TINY)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    "phi": (PhiForCausalLM, PhiConfig(vocab_size=300, **TINY)),  # a head with bias
}


@pytest.fixture
def policy(request) -> quickstart.Policy:
    torch.manual_seed(0)
    model_class, config = MODELS[request.param]
    model = model_class(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # a random head's logits are too small to tell
        if (bias := model.get_output_embeddings().bias) is not None:
            bias.normal_()
    return quickstart.Policy(model, tokenizer=None)


PAIRS = PreferenceSet(
    [EncodedPair([5, 6, 7, 8, 1], [5, 6, 9, 1], 2), EncodedPair([5, 6, 10, 11, 12, 1], [5, 6, 4, 1], 2)],
    2,
    "cpu",
)


@pytest.mark.parametrize("policy", list(MODELS), indirect=True)
def test_the_log_probs_are_those_of_the_models_own_logits(policy):
    batch = PAIRS.batch([0, 1])
    logits = policy.model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    nll = F.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    torch.testing.assert_close(policy.logps(batch), -nll, rtol=1e-4, atol=1e-4)
    policy.check(batch)


@pytest.mark.parametrize("policy", ["gemma2", "cohere", "granite"], indirect=True)
def test_a_transform_that_is_not_taken_into_account_is_noticed(policy):
    policy.logit_options = {"softcap": None, "logit_scale": 1.0}
    with pytest.raises(DataError, match="ForCausalLM is not supported"):
        policy.check(PAIRS.batch([0, 1]))


@pytest.mark.parametrize("policy", ["llama"], indirect=True)
def test_the_loss_takes_the_references_log_probs_of_the_very_pairs(policy):
    PAIRS.ref_logps = torch.tensor([[-3.0, -5.0], [-7.0, -11.0]])
    loss_fn = quickstart.FusedFocalPOLoss(beta=0.3, gamma=0.05)
    out = quickstart.preference_loss(policy, loss_fn, PAIRS, [1, 0])
    logps = policy.logps(PAIRS.batch([1, 0])).sum(-1)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (logps[:2] - torch.tensor([-5.0, -3.0])))
    torch.testing.assert_close(out.rejected_rewards, 0.3 * (logps[2:] - torch.tensor([-11.0, -7.0])))


def test_a_tie_counts_one_half():
    margins = torch.tensor([2.0, -0.1, 0.0, quickstart.TIE / 2, -quickstart.TIE / 2])
    assert quickstart.wins(margins).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]


def test_the_standard_error_is_that_of_the_mean():
    estimate = quickstart.Estimate.of(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert (estimate.mean, estimate.standard_error) == (0.75, 0.25)
    assert str(estimate) == "0.750 ± 0.250"
    assert str(quickstart.Estimate(-1e-9, 0.0)) == "0.000 ± 0.000"
