"""Odds ratio preference optimisation; TRL's classes are imported from where they were."""

from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip

from datasets import Dataset

max_seq_length = 64

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

EOS_TOKEN = tokenizer.eos_token
rows = Dataset.from_dict(
    {
        "instruction": ["Name a metal.", "Name a fruit."],
        "accepted": ["Iron.", "An apple."],
        "refused": ["Wood, perhaps.", "A hammer, perhaps."],
    }
)


def format_prompt(row):
    return {
        "prompt": f"### Instruction:\n{row['instruction']}\n\n### Response:\n",
        "chosen": row["accepted"] + EOS_TOKEN,
        "rejected": row["refused"] + EOS_TOKEN,
    }


dataset = rows.map(format_prompt, remove_columns=rows.column_names)

from trl import ORPOConfig, ORPOTrainer

orpo_trainer = ORPOTrainer(
    model=model,
    train_dataset=dataset,
    tokenizer=tokenizer,
    args=ORPOConfig(
        max_length=max_seq_length,
        max_prompt_length=max_seq_length // 2,
        max_completion_length=max_seq_length // 2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        beta=0.1,
        logging_steps=1,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_steps=3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        output_dir="outputs",
        report_to="none",
        save_strategy="no",
    ),
)
orpo_trainer.train()
