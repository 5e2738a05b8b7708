"""A model as GGUF files, in 16 bits and in 8."""

from unsloth import FastLanguageModel  # isort: skip

import torch

model, tokenizer = FastLanguageModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", 64, None, False)
model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "down_proj"], lora_alpha=16)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)

model.save_pretrained_gguf("gguf", tokenizer, quantization_method=["f16", "fast_quantized"])

try:
    model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q4_k_m")
except ValueError as error:
    refused = str(error)
