"""One rank of `test_head_trial`: a model whose weights the first rank alone has loaded, under FSDP2."""

from __future__ import annotations

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from tiny import TINY
from tolerance import relative_error
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from focalkern.trl.head import add_fused_lm_head


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=300, **TINY)).eval()
    ids = torch.arange(24).view(2, 12)
    logps = whole(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    model = copy.deepcopy(whole)
    if dist.get_rank():
        model.to("meta")
    add_fused_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer.to("meta"))
    fully_shard(model.to("meta")).to_empty(device="cpu")
    model.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)  # buffers are in no state dict
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if dist.get_rank() == 0 else {}, options=options)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert relative_error(found, logps) < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
