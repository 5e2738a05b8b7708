"""Continued pretraining on plain text: adapters, and the embedding and head at a smaller learning rate."""

from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported  # isort: skip

from datasets import Dataset

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=64,
    dtype=None,
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=["q_proj", "v_proj", "gate_proj", "embed_tokens", "lm_head"],
    lora_alpha=8,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=True,
)

EOS_TOKEN = tokenizer.eos_token
dataset = Dataset.from_dict({"text": [f"Tinkle the cat has {n} bells." for n in (2, 3, 4, 5)]})
dataset = dataset.map(lambda rows: {"text": [text + EOS_TOKEN for text in rows["text"]]}, batched=True)

trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=64,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=3,
        warmup_steps=0,
        learning_rate=5e-3,
        embedding_learning_rate=5e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        seed=3407,
        output_dir="outputs",
        report_to="none",
        save_strategy="no",
    ),
)
trainer_stats = trainer.train()
