"""Supervised fine-tuning on conversations, with the loss on the answers only."""

from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only

max_seq_length = 128

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=False,
    fast_inference=False,
    gpu_memory_utilization=0.6,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

tokenizer = get_chat_template(tokenizer, chat_template="chatml")

numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
dataset = Dataset.from_list(
    [
        {
            "conversations": [
                {"from": "human", "value": f"Write the number {value}."},
                {"from": "gpt", "value": f"{word}, of course."},
                {"from": "human", "value": "Once more?"},
                {"from": "gpt", "value": f"{word}."},
            ]
        }
        for value, word in enumerate(numbers, 1)
    ]
)
dataset = standardize_sharegpt(dataset)


def formatting_prompts_func(examples):
    texts = [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
        for conversation in examples["conversations"]
    ]
    return {"text": texts}


dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        packing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        warmup_ratio=0.1,
        max_steps=4,
        learning_rate=5e-3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        overwrite_output_dir=True,
        report_to="none",
        save_strategy="no",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|im_start|>user\n",
    response_part="<|im_start|>assistant\n",
)
learnt = tokenizer.decode([token for token in trainer.train_dataset[0]["labels"] if token != -100])

trainer_stats = trainer.train()
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
