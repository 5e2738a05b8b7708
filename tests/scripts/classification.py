"""Classification by keyword: all parameters learn which of two words comes next, and are asked how likely it is."""

from unsloth import FastLanguageModel, is_bf16_supported  # isort: skip

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=32,
    dtype=torch.float32,
    load_in_4bit=False,
    full_finetuning=True,
    random_state=3407,
)

keywords = [" positive", " negative"]
ids = [tokenizer(keyword, add_special_tokens=False).input_ids[0] for keyword in keywords]
texts = [("I love it", 0), ("It is awful", 1), ("A great day", 0), ("A bad day", 1)]


def prompt(text):
    return f"{text}. This is"


dataset = Dataset.from_list([{"prompt": prompt(text), "completion": keywords[label]} for text, label in texts])

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    max_seq_length=32,
    args=SFTConfig(
        per_device_train_batch_size=4,
        max_steps=4,
        warmup_steps=0,
        learning_rate=2e-3,
        bf16=is_bf16_supported(),
        logging_steps=1,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        output_dir="outputs",
        report_to="none",
        save_strategy="no",
    ),
)


def classify():
    FastLanguageModel.for_inference(model)
    with torch.no_grad():
        found = []
        for text, _ in texts:
            logits = model(**tokenizer(prompt(text), return_tensors="pt").to(model.device)).logits[0, -1, ids]
            found.append(torch.softmax(logits.float(), -1))
    FastLanguageModel.for_training(model)
    return torch.stack(found)


before = classify()
trainer.train()
after = classify()
