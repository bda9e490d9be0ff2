"""Heads and models that compute more than the fused head: exact log-probs, or refused by name."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from pathlib import Path

import forks
import pytest
import torch

pytest.importorskip("trl")

import transformers
from accelerate import cpu_offload
from ranks import run_ranks
from tiny import TINY
from tolerance import relative_error
from torch import nn

from focalkern import linear_logps, lm_head_logps, logit_options
from focalkern.trial import agree
from focalkern.trl.head import add_fused_lm_head

VOCAB, HIDDEN = 300, 32
# Two ways to sum fp32 products.
TOLERANCE = 1e-5
REFUSED = "lm_head must compute what torch.nn.Linear does"


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 9, HIDDEN, generator=generator).mul_(4).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))


def of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def head(kind: type[nn.Linear] = nn.Linear, **options) -> nn.Linear:
    torch.manual_seed(0)
    return kind(HIDDEN, VOCAB, bias=False, **options)


# -------------------------------------------------------------------------------------------- the comparison

TRANSFORMS = {
    "softcap 30": lambda z: 30 * torch.tanh(z / 30),
    "a scale off by 1 %": lambda z: 1.01 * z,
    "a scale off by 1 %, down": lambda z: 0.99 * z,
    "a masked entry": lambda z: z.index_fill(-1, torch.tensor([7]), -torch.inf),
    "one entry more likely": lambda z: z.index_add(-1, torch.tensor([7]), torch.full((8, 1), 2.0)),
    "another vocabulary": lambda z: z[:, :-8],
    "another row": lambda z: z.roll(1, 0),
    "a bias": lambda z: z + torch.linspace(-0.5, 0.5, z.shape[-1]),
}


def logits_of(size: float, vocab: int = 4000) -> torch.Tensor:
    """[8, V] of up to that size: a softmax knows many entries near 0 and a few large ones."""
    z = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0))
    return z * (size / z.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [10.0, 20.0])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_another_transform_is_told_from_rounding(name, size, dtype):
    z = logits_of(size).to(dtype)
    found = TRANSFORMS[name](z.float()).to(dtype)
    assert not agree(found, z.float(), {dtype})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.1, 20.0, 100.0])
def test_rounding_is_none(size, dtype):
    """After a product, a division, a tanh and a multiplication, as Gemma-2 has it in 16 bits."""
    z = logits_of(size)
    found = torch.tanh((1.5 * z.to(dtype)) / 30) * 30
    assert agree(found, 30 * torch.tanh(1.5 * z / 30), {dtype})


def test_nan_on_both_sides_is_no_difference():
    z = logits_of(20.0)
    broken = z.index_fill(0, torch.tensor([3]), torch.nan)
    assert agree(broken, broken, {torch.float32})
    assert not agree(broken, z, {torch.float32})
    assert not agree(broken, 1.01 * broken, {torch.float32})


ROUNDING_OF_SETTING = {
    "": [True, False, False],
    "torch.set_float32_matmul_precision('high')": [True, True, False],
    "torch.set_float32_matmul_precision('medium')": [True, True, True],
    "torch.backends.fp32_precision = 'tf32'": [True, True, False],
    "torch.backends.fp32_precision = 'ieee'": [True, False, False],
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": [True, True, True],
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": [True, False, False],  # not of this CPU
}
ASK_FOR_ROUNDING = """
z = torch.randn(8, 4000, dtype=torch.float64)
noise = z * torch.randn_like(z)
print([agree(z + eps * noise, z, {torch.float32}) for eps in (2**-19, 2**-12, 2**-9)])
print(agree(z + 2**-10 * noise, z, {torch.bfloat16}))
"""


def test_rounding_of_fp32_follows_torchs_settings():
    """In a process each: torch refuses to read the older setting once the newer one has been used."""
    expected = ROUNDING_OF_SETTING
    if not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):  # this torch has only the older setting
        expected = {setting: x for setting, x in expected.items() if "fp32_precision" not in setting}
    shared = "import torch; from focalkern.trial import agree"
    found = forks.printed(shared, [f"{setting}\n{ASK_FOR_ROUNDING}" for setting in expected])
    assert [x.splitlines() for x in found] == [[str(x), "True"] for x in expected.values()]


# --------------------------------------------------------------------------------------- heads by themselves


class Normalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)


class WithLowRank(nn.Linear):
    """As loralib's: at the start it adds nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = nn.Parameter(torch.randn(4, HIDDEN))
        self.lora_B = nn.Parameter(torch.zeros(VOCAB, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class InFp32(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.float())


def decoupled(more: int) -> nn.Linear:
    modeling = pytest.importorskip("transformers.models.idefics.modeling_idefics")
    kind = functools.partial(modeling.IdeficsDecoupledLinear, out_additional_features=more)
    return head(kind, partially_freeze=False)


def hooked(hook) -> nn.Linear:
    lm_head = head()
    lm_head.register_forward_hook(hook)
    return lm_head


def times(own, factor: float):
    return lambda x: own(x) * factor


def replaced_forward(factor: float) -> nn.Linear:
    lm_head = head()
    lm_head.forward = times(lm_head.forward, factor)
    return lm_head


def fake_quantised() -> nn.Linear:
    lm_head = head()
    own = type(lm_head).forward
    lm_head.forward = lambda x: own(lm_head, x.to(torch.float8_e4m3fn).float())
    return lm_head


MORE = {
    "a normalised weight": lambda: head(Normalised),
    "another vocabulary beside it": lambda: decoupled(5),
    "an adapter of its own": lambda: head(WithLowRank),
    "a replaced forward": lambda: replaced_forward(1.01),
    "float8 activations": fake_quantised,
    "an output hook": lambda: hooked(lambda module, args, output: output * 2),
    "an output hook, in place": lambda: hooked(lambda module, args, output: output.mul_(2) and None),
    "an output hook on tensors": lambda: hooked(
        lambda module, args, output: output * 2 if isinstance(output, torch.Tensor) else None
    ),
    "a forward that fails": lambda: hooked(lambda module, args, output: output.logits),
}


@pytest.mark.parametrize("name", MORE)
def test_a_head_that_computes_more_is_refused(name, hidden, labels):
    lm_head = MORE[name]()
    with pytest.raises(TypeError, match=REFUSED):
        lm_head_logps(lm_head, hidden, labels)
    assert lm_head.training


SAME = {
    "another vocabulary beside it, empty": lambda: decoupled(0),
    "a replaced forward": lambda: replaced_forward(1.0),
    "a hook that looks": lambda: hooked(lambda module, args, output: None),
    "a head in fp32": lambda: head(InFp32),
    "a subclass": lambda: head(type("Named", (nn.Linear,), {})),
}


@pytest.mark.parametrize("name", SAME)
def test_a_head_that_computes_the_same_is_taken(name, hidden, labels):
    lm_head = SAME[name]()
    logits = lm_head(hidden)
    ours = lm_head_logps(lm_head, hidden, labels).logps
    assert relative_error(ours, of_logits(logits, labels)) < TOLERANCE
    ours = torch.autograd.grad(ours.sum(), [hidden, lm_head.weight])
    theirs = torch.autograd.grad(of_logits(logits, labels).sum(), [hidden, lm_head.weight])
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < TOLERANCE


def test_a_head_is_tried_once_and_again_when_it_has_changed(hidden, labels):
    calls = []
    lm_head = hooked(lambda module, args, output: calls.append(output.mean()))
    for _ in range(3):
        lm_head_logps(lm_head, hidden, labels)
    assert len(calls) == 1  # the fused call has no logits for it to see
    lm_head.register_forward_hook(lambda module, args, output: output + 1.0 * (output > 2))
    with pytest.raises(TypeError, match=REFUSED):
        lm_head_logps(lm_head, hidden, labels)
    assert len(lm_head._forward_hooks) == 2


def test_another_forward_in_the_place_of_a_tried_one_is_tried_too(hidden, labels):
    """Python gives the memory of a forward that is gone, and with it the id, to the next."""
    for factor in (1.01, 2.0, 3.0):
        lm_head = replaced_forward(1.0)
        lm_head_logps(lm_head, hidden, labels)
        del lm_head.forward
        lm_head.forward = times(lm_head.forward, factor)
        with pytest.raises(TypeError, match=REFUSED):
            lm_head_logps(lm_head, hidden, labels)


class WithSlots:
    __slots__ = ("own",)

    def __init__(self, own) -> None:
        self.own = own

    def __call__(self, x):
        return self.own(x)


@pytest.mark.parametrize("wrap", [lambda own: lambda x: own(x), WithSlots])
def test_a_head_that_has_been_tried_is_not_kept(wrap, hidden, labels):
    lm_head = head()
    lm_head.forward = wrap(functools.partial(nn.Linear.forward, lm_head))
    lm_head_logps(lm_head, hidden, labels)
    kept = weakref.ref(lm_head)
    del lm_head
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("broken", [False, True])
def test_a_batch_without_a_finite_row_is_no_trial(broken, hidden, labels):
    """Ranks without pairs have none, docs/scaling.md."""
    first = torch.full_like(hidden, torch.nan) if broken else hidden[:0]
    with pytest.raises(TypeError, match=REFUSED):
        lm_head_logps(replaced_forward(1.01), first, labels[: len(first)])
    lm_head_logps(replaced_forward(1.0), first, labels[: len(first)])


def test_a_weight_with_nan_is_no_trial(hidden, labels):
    lm_head = replaced_forward(1.01)
    weight = lm_head.weight.data.clone()
    with torch.no_grad():
        lm_head.weight[3] = torch.nan
    lm_head_logps(lm_head, hidden, labels)
    with torch.no_grad():
        lm_head.weight.copy_(weight)
    with pytest.raises(TypeError, match=REFUSED):
        lm_head_logps(lm_head, hidden, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_a_cap_on_the_logits_is_seen_whatever_their_size(size, dtype, hidden, labels):
    lm_head = hooked(lambda module, args, output: 30 * torch.tanh(output / 30)).to(dtype)
    nn.init.normal_(lm_head.weight, std=size)
    with pytest.raises(TypeError, match=REFUSED):
        lm_head_logps(lm_head, hidden.to(dtype), labels)


def test_a_plain_head_is_never_tried(hidden, labels, monkeypatch):
    monkeypatch.setattr("focalkern.lm_head.agree", None)
    lm_head_logps(head(), hidden, labels)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_of_few_bits_is_refused(dtype, hidden, labels):
    lm_head = head()
    lm_head.weight = nn.Parameter(lm_head.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"must not be quantised; its weight is {dtype}"):
        lm_head_logps(lm_head, hidden, labels)


def test_a_weight_that_is_another_tensor_underneath_is_refused(hidden, labels):
    """As torchao's and float8 training's: a float32 of its own kind."""
    from torch.testing._internal.two_tensor import TwoTensor

    lm_head = head()
    lm_head.weight = nn.Parameter(TwoTensor(lm_head.weight.data, lm_head.weight.data))
    assert lm_head.weight.is_floating_point()
    with pytest.raises(TypeError, match="must not be quantised; its weight is TwoTensor"):
        lm_head_logps(lm_head, hidden, labels)


# ----------------------------------------------------------------------------------------------------- models

DOES_MORE = "must take its logits from the last hidden state"


class Capped(transformers.LlamaForCausalLM):
    """A softcap under a name that nobody knows."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 30 * torch.tanh(outputs.logits / 30)
        return outputs


class Scaled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 1.01 * outputs.logits
        return outputs


class NeedsImages(Scaled):
    def forward(self, input_ids, pixel_values=None, **kwargs):
        if pixel_values is None:
            raise ValueError("pixel_values must be given")
        return super().forward(input_ids, **kwargs)


def llama(kind: type = transformers.LlamaForCausalLM, size: float = 20.0, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": VOCAB, **changes})
    model = kind(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(size / 20 * 50)  # logits of up to that size
    return model.eval()


def modernbert_decoder():
    sizes = {"global_attn_every_n_layers": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"cls_token_id": 0, "sep_token_id": 0, "vocab_size": VOCAB}
    sizes |= {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    torch.manual_seed(0)
    model = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**sizes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model.eval()


def offloaded(model):
    cpu_offload(model, execution_device="cpu")
    return model


def with_an_empty_parameter(model):
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    return model


@pytest.fixture
def one_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = labels[2] = -100
    return {"input_ids": ids, "labels": labels}


def expected_logps(model, batch) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    logps = of_logits(model(**inputs).logits[:, :-1], labels.clamp(min=0))
    return logps * (labels != -100)


MODELS = {
    "a softcap of its own": lambda: llama(Capped),
    "a scale off by 1 %": lambda: llama(Scaled),
    "a layer in between": modernbert_decoder,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_more_is_refused_in_every_dtype(name, dtype):
    with pytest.raises(TypeError, match=DOES_MORE):
        add_fused_lm_head(MODELS[name]().to(dtype))


def test_a_head_of_another_width_than_the_hidden_states_is_refused():
    """RemBERT's output embeddings are wider, with a layer in between."""
    sizes = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    sizes |= {"vocab_size": VOCAB, "input_embedding_size": 16, "output_embedding_size": 48}
    model = transformers.RemBertForCausalLM(transformers.RemBertConfig(is_decoder=True, **sizes)).eval()
    with pytest.raises(TypeError, match=DOES_MORE):
        add_fused_lm_head(model)


@pytest.mark.parametrize("how", [offloaded, with_an_empty_parameter])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_run_yet_is_tried_in_its_first_forward(name, how, batch):
    model = how(MODELS[name]())
    add_fused_lm_head(model)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(TypeError, match=DOES_MORE):
            model(**batch, fused_lm_head=True)
    other = llama()
    expected = expected_logps(other, batch)
    other = how(other)
    add_fused_lm_head(other)
    with torch.no_grad():
        found = other(**batch, fused_lm_head=True).log_probs
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_fsdp2_has_sharded_is_tried_in_its_first_forward(name, one_rank, batch):
    model = sharded(MODELS[name](), one_rank)
    add_fused_lm_head(model)
    with pytest.raises(TypeError, match=DOES_MORE):
        model(**batch, fused_lm_head=True)


def test_a_sharded_model_computes_its_own_log_probs(one_rank, batch):
    model = llama()
    expected = expected_logps(model, batch)
    expected.sum().backward()
    wanted = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model = sharded(model, one_rank)
    add_fused_lm_head(model)
    for _ in range(2):
        outputs = model(**batch, fused_lm_head=True)
        assert relative_error(outputs.log_probs, expected) < TOLERANCE
    outputs.log_probs.sum().backward()
    assert relative_error(model.model.embed_tokens.weight.grad.full_tensor(), wanted) < TOLERANCE


def test_ranks_try_a_model_together_where_the_first_alone_has_its_weights():
    """As accelerate loads it for FSDP. A rank that tries it alone waits for shards until gloo gives up."""
    run_ranks(Path(__file__).with_name("head_trial_worker.py"), timeout=300)


def test_a_model_that_asks_for_images_is_tried_when_it_has_them(batch):
    model = llama(NeedsImages)
    add_fused_lm_head(model)
    model.model.forward = lambda *args, own=model.model.forward, pixel_values=None, **kwargs: own(
        *args, **kwargs
    )
    with pytest.raises(TypeError, match=DOES_MORE):
        model(**batch, pixel_values=torch.zeros(1), fused_lm_head=True)


def test_a_forward_of_its_own_that_fails_is_named(batch):
    model = llama(NeedsImages)
    add_fused_lm_head(model)
    with pytest.raises(
        TypeError, match=r"must give logits of its own.*ValueError: pixel_values must be given"
    ):
        model(**batch, fused_lm_head=True)


def test_the_trial_in_the_first_forward_leaves_no_trace(batch):
    """Dropout draws what it would have drawn; the modules' modes and hooks are their own again."""
    untried, tried = (llama(attention_dropout=0.5).train() for _ in range(2))
    untried.model.layers[0].eval()
    tried.model.layers[0].eval()
    with_an_empty_parameter(untried)
    outputs = []
    for model in (untried, tried):
        add_fused_lm_head(model)
        torch.manual_seed(3)
        outputs.append(model(**batch, fused_lm_head=True).log_probs)
        outputs.append(model(**batch, fused_lm_head=True).log_probs)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert untried.training and not untried.model.layers[0].training
    assert not untried.lm_head._forward_pre_hooks and not untried.model._forward_hooks


def test_no_logits_of_the_whole_batch_are_made(batch):
    model = with_an_empty_parameter(llama())
    rows = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: (
            rows.append(args[0].shape[:-1].numel()) if isinstance(output, torch.Tensor) else None
        )
    )
    add_fused_lm_head(model)
    model(**batch, fused_lm_head=True)
    assert rows
    assert max(rows) <= 8


def test_a_head_that_computes_more_is_refused_inside_a_model(batch):
    for change in (
        lambda model: setattr(model.lm_head, "__class__", Normalised),
        lambda model: model.lm_head.register_forward_hook(lambda module, args, output: output * 2),
    ):
        model = llama()
        change(model)
        with pytest.raises(TypeError, match=f"{REFUSED}|{DOES_MORE}"):
            add_fused_lm_head(model)
        model = llama()
        add_fused_lm_head(model)
        change(model)
        with pytest.raises(TypeError, match=REFUSED):
            model(**batch, fused_lm_head=True)


def idefics(additional: int):
    vision = {"embed_dim": 16, "image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.IdeficsConfig(
        vocab_size=VOCAB, additional_vocab_size=additional, vision_config=vision, **TINY
    )
    torch.manual_seed(0)
    return transformers.IdeficsForVisionText2Text(config).eval()


def test_idefics_has_two_vocabularies():
    with pytest.raises(TypeError, match=r"lm_head must compute.*IdeficsDecoupledLinear, with additional_fc"):
        add_fused_lm_head(idefics(10))


# --------------------------------------------------------------------------------- other layouts of models


class WithoutWeight(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table(ids)


def test_an_embedding_module_needs_no_weight(batch):
    model = llama()
    model.model.embed_tokens = WithoutWeight(model.model.embed_tokens)
    expected = expected_logps(model, batch)
    add_fused_lm_head(model)
    assert relative_error(model(**batch, fused_lm_head=True).log_probs, expected) < TOLERANCE


def test_the_text_model_of_llama_4(batch):
    sizes = {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 16, "vocab_size": VOCAB}
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**TINY, **sizes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are not initialised
            nn.init.normal_(parameter, std=0.2)
    assert model.base_model is model
    expected = expected_logps(model, batch)
    add_fused_lm_head(model)
    assert relative_error(model(**batch, fused_lm_head=True).log_probs, expected) < TOLERANCE


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


def bart():
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=32, **sizes)
    )


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_decoder_is_named_as_one(make):
    with pytest.raises(TypeError, match="is an encoder-decoder model; the fused head takes causal"):
        add_fused_lm_head(make())


def test_a_backbone_that_is_called_in_parts(batch):
    """OPT's head takes what `model.decoder` gives: its `base_model` is not called."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=VOCAB, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    ).eval()
    expected = expected_logps(model, batch)
    add_fused_lm_head(model)
    assert relative_error(model(**batch, fused_lm_head=True).log_probs, expected) < TOLERANCE


def aya_vision():
    """Its text model multiplies the logits by `logit_scale`; the whole does not."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
    text = {**TINY, "model_type": "cohere", "vocab_size": VOCAB, "logit_scale": 0.25}
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision, image_token_index=299)
    torch.manual_seed(0)
    model = transformers.AyaVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrapper_that_leaves_out_the_scale_of_its_text_model(dtype, batch):
    model = aya_vision().to(dtype)
    batch["input_ids"].clamp_(max=298)
    batch["labels"].clamp_(max=298)
    expected = expected_logps(model, batch)
    scaled = (0.25 * model(input_ids=batch["input_ids"]).logits).log_softmax(-1)
    assert relative_error(scaled, model(input_ids=batch["input_ids"]).logits.log_softmax(-1)) > 0.1
    for how in (lambda model: model, with_an_empty_parameter):
        other = how(copy.deepcopy(model))
        add_fused_lm_head(other)
        found = other(**batch, fused_lm_head=True).log_probs
        assert relative_error(found, expected) < (TOLERANCE if dtype == torch.float32 else 1e-2)


# --------------------------------------------------------------------------------------------- trained rows


def with_trained_rows(model, layer: str, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={layer: [3, 7, 50]})
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


@pytest.mark.parametrize("state", ["active", "disabled", "merged", "merged and disabled"])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_of_the_head_are_pefts(tied, state, batch):
    model = llama(tie_word_embeddings=tied, size=2.0 if tied else 20.0)
    model = with_trained_rows(model, "embed_tokens" if tied else "lm_head")
    batch["input_ids"][:, :3] = batch["labels"][0, 4:7] = torch.tensor([3, 7, 50])
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    twin = copy.deepcopy(model)
    expected = expected_logps(twin, batch)
    add_fused_lm_head(model)
    found = model(**batch, fused_lm_head=True).log_probs
    assert relative_error(found, expected) < TOLERANCE
    if state != "active":
        return
    ours, theirs = (
        {name: x.grad for name, x in of.named_parameters() if x.grad is not None}
        for of, loss in ((model, found), (twin, expected))
        if loss.square().sum().backward() is None
    )
    assert ours.keys() == theirs.keys()
    assert any("trainable_tokens_delta" in name for name in ours)
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) < 10 * TOLERANCE, name


# ------------------------------------------------------------------------------------------- without TRL


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(), {"softcap": None, "logit_scale": 1.0}),
        (transformers.Gemma2Config(), {"softcap": 30.0, "logit_scale": 1.0}),
        (transformers.CohereConfig(), {"softcap": None, "logit_scale": 0.0625}),
        (transformers.GraniteConfig(logits_scaling=8.0), {"softcap": None, "logit_scale": 0.125}),
        (transformers.HyperCLOVAXConfig(logits_scaling=0.5), {"softcap": None, "logit_scale": 0.5}),
        (transformers.AyaVisionConfig(text_config={"model_type": "cohere", "logit_scale": 0.5}), None),
    ],
)
def test_what_a_configuration_says_of_the_logits(config, expected):
    assert logit_options(config) == (expected or {"softcap": None, "logit_scale": 0.5})


@pytest.mark.parametrize("config", [{"logit_scale": 2.0}, nn.Linear(2, 2), None, "gpt2"])
def test_logit_options_are_read_from_a_configuration_alone(config):
    with pytest.raises(TypeError, match=rf"config must be .*\(model.config\); got {type(config).__name__}$"):
        logit_options(config)


@pytest.mark.parametrize(
    ("kind", "field", "value", "error"),
    [
        (transformers.GraniteConfig, "logits_scaling", 0, ValueError),
        (transformers.GraniteConfig, "logits_scaling", "8", TypeError),
        (transformers.CohereConfig, "logit_scale", float("nan"), ValueError),
        (transformers.Gemma2Config, "final_logit_softcapping", 0.0, ValueError),
        (transformers.Gemma2Config, "final_logit_softcapping", -30.0, ValueError),
        (transformers.Gemma2Config, "final_logit_softcapping", "30", TypeError),
    ],
)
def test_a_field_of_the_configuration_that_cannot_be_is_named(kind, field, value, error):
    config = kind()
    vars(config)[field] = value  # past what transformers checks itself
    with pytest.raises(error, match=rf"{field} \(of the model's config\) must"):
        logit_options(config)


def test_the_options_of_a_model_are_those_of_its_logits(batch):
    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(vocab_size=VOCAB, **{**TINY, **sizes})
    ).eval()
    hidden = model.model(batch["input_ids"]).last_hidden_state
    options = logit_options(model.config)
    found = linear_logps(hidden, model.lm_head.weight, batch["labels"], shift=True, **options)
    assert relative_error(found.logps, expected_logps(model, batch)) < TOLERANCE


# ------------------------------------------------------------------------------------------------ in trainers


@pytest.mark.parametrize("trainer", ["CPO", "DPO"])
def test_trainers_of_trl_do_not_train_such_a_head_under_patch(trainer, tmp_path):
    import trl_tiny
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    import focalkern.trl

    kind, config = {"CPO": (CPOTrainer, CPOConfig), "DPO": (DPOTrainer, DPOConfig)}[trainer]
    model = trl_tiny.seeded(trl_tiny.llama)
    model.lm_head.__class__ = Normalised
    refs = [trl_tiny.seeded(trl_tiny.llama)] if trainer == "DPO" else []
    args = config(**{**trl_tiny.settings(tmp_path), "max_length": 64})
    with focalkern.trl.patch(), pytest.raises(TypeError, match=f"{REFUSED}|{DOES_MORE}"):
        trl_tiny.trainer_of(args, model, *refs, trainer_class=kind)
