"""What `focalkern train examples/recipes/llama3-8b-focalpo.yaml` does, in Python.

    accelerate launch --config_file examples/accelerate/zero3.yaml examples/trl_focalpo.py

The recipe says where each value is from. docs/training.md has the whole way, from an empty node to the model.
"""

from __future__ import annotations

from datasets import load_dataset

from focalkern.trl import FocalPOConfig, FocalPOTrainer, ProgressPlot

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"  # or a folder
DATA = "princeton-nlp/llama3-ultrafeedback-armorm"  # or a folder with train.jsonl and test.jsonl
OPTIONS = {
    "output_dir": "runs/llama3-8b-focalpo",
    "model_init_kwargs": {"dtype": "float32", "attn_implementation": "flex_attention"},
    # The loss. DPO: gamma=0.0; the others are in docs/trl.md.
    "beta": 0.1,
    "gamma": 0.05,
    # 8 GPUs x 2 pairs x 8 steps = 128 pairs
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 6e-7,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 2048,
    "seed": 42,
    "bf16": True,
    "share_prompt": True,
    "precompute_ref_log_probs": True,
    # What is seen of it, and kept.
    "logging_steps": 5,
    "report_to": "tensorboard",
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.2,
    "save_total_limit": 1,
}


def main(model: str = MODEL, data: str = DATA, **options) -> FocalPOTrainer:
    pairs = load_dataset(data)
    trainer = FocalPOTrainer(
        model,
        args=FocalPOConfig(**{**OPTIONS, **options}),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        callbacks=[ProgressPlot()],
    )
    trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main().accelerator.end_training()  # closes trackers and process group
