"""The Alpaca format: columns put into one text by a function, older names of arguments, transformers' arguments."""

from unsloth import FastLanguageModel, is_bfloat16_supported, unsloth_train  # isort: skip

from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTTrainer

max_seq_length = 64
dtype = None
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=True,
    random_state=3407,
    max_seq_length=max_seq_length,
)

alpaca_prompt = """### Instruction:
{}

### Input:
{}

### Response:
{}"""
EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    columns = zip(examples["instruction"], examples["input"], examples["output"], strict=True)
    return {"text": [alpaca_prompt.format(*row) + EOS_TOKEN for row in columns]}


words = ["sun", "moon", "tree", "river"]
dataset = Dataset.from_dict(
    {
        "instruction": ["Say it backwards."] * len(words),
        "input": words,
        "output": [word[::-1] for word in words],
    }
)
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=1,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        warmup_steps=1,
        max_steps=3,
        learning_rate=5e-3,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        evaluation_strategy="no",
        group_by_length=True,
        report_to="none",
        save_strategy="no",
    ),
)
trainer_stats = unsloth_train(trainer)
