"""Answers, streamed as they are written."""

from unsloth import FastLanguageModel  # isort: skip

import io
from contextlib import redirect_stdout

from transformers import TextStreamer

from unsloth.chat_templates import get_chat_template

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    max_seq_length=128,
    dtype=None,
    load_in_4bit=False,
)
tokenizer = get_chat_template(
    tokenizer,
    chat_template="chatml",
    mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"},
    map_eos_token=True,
    system_message="You answer briefly.",
)
FastLanguageModel.for_inference(model)

messages = [{"from": "human", "value": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)

screen = io.StringIO()
with redirect_stdout(screen):
    text_streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(
        **inputs, streamer=text_streamer, max_new_tokens=8, use_cache=True, temperature=1.5, min_p=0.1, do_sample=True
    )
