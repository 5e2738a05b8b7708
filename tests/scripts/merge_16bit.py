"""An adapter that has learnt something, merged into 16 bits, saved alone, and read back by transformers and PEFT."""

from unsloth import FastModel  # isort: skip

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = FastModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=64,
    load_in_4bit=False,
    load_in_8bit=False,
    full_finetuning=False,
    attn_implementation="sdpa",
)
model = FastModel.get_peft_model(
    model,
    finetune_vision_layers=False,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=False,
    r=8,
    lora_alpha=8,
    lora_dropout=0,
    bias="none",
    random_state=3407,
)

inputs = tokenizer(["The capital of France is"], return_tensors="pt").to(model.device)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
model(**inputs, labels=inputs["input_ids"]).loss.backward()
optimizer.step()

FastModel.for_inference(model)
with torch.no_grad():
    expected = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits

model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
model.save_pretrained_merged("merged_4bit", tokenizer, save_method="merged_4bit_forced")
model.save_pretrained_merged("adapter", tokenizer, save_method="lora", maximum_memory_usage=0.5)

again = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
with torch.no_grad():
    merged = again(**inputs).logits
same_tokenizer = AutoTokenizer.from_pretrained("merged")
adapted, _ = FastModel.from_pretrained("adapter", load_in_4bit=False)
with torch.no_grad():
    loaded = adapted.eval()(**inputs).logits
