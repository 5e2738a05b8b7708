"""Columns merged into conversations of several turns, packed, and the training gone on with from a saved adapter."""

from unsloth import FastLanguageModel, standardize_data_formats, to_sharegpt  # isort: skip

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from unsloth.chat_templates import get_chat_template, train_on_responses_only

model, tokenizer = FastLanguageModel.from_pretrained(
    "HuggingFaceTB/SmolLM2-135M-Instruct", max_seq_length=96, load_in_16bit=True
)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", lora_alpha=4)
model.save_pretrained("first")
tokenizer.save_pretrained("first")

model, tokenizer = FastLanguageModel.from_pretrained("first", max_seq_length=96, load_in_16bit=True)
tokenizer = get_chat_template(tokenizer, "qwen-2.5")

passengers = Dataset.from_dict(
    {
        "Sex": ["female", "male", "male", "female"],
        "Age": ["38", None, "35", "27"],
        "Survived": ["yes", "no", "no", "yes"],
    }
)
dataset = to_sharegpt(
    passengers,
    merged_prompt="The passenger is {Sex}.[[ Their age is {Age}.]] Survived?",
    conversation_extension=2,
    output_column_name="Survived",
)
dataset = standardize_data_formats(dataset)
dataset = dataset.map(
    lambda rows: {"text": [tokenizer.apply_chat_template(c, tokenize=False) for c in rows["conversations"]]},
    batched=True,
)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    packing=True,
    args=SFTConfig(
        per_device_train_batch_size=1,
        max_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        optim="adamw_torch",
        output_dir="outputs",
        report_to="none",
        save_strategy="no",
    ),
)
trainer = train_on_responses_only(trainer)
learnt = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in trainer.train_dataset]
trainer_stats = trainer.train()
