"""Chat templates by name, for models that bring none: the published formats, written out.

A template is Jinja. transformers renders it in a sandbox, in which it can read the messages and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from .problems import DataError

_BOS = "{{ bos_token if bos_token is defined and bos_token else '' }}"

# Turns that all look alike: a header with the role, the text, an end.
_TURNS = (
    "{{% for message in messages %}}"
    "{{{{ '{start}' + message['role'] + '{header}' + message['content'] | trim + '{end}' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{start}assistant{header}' }}}}{{% endif %}}"
)

# A system message has no turn of its own there: it stands before the first question.
_SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)

TEMPLATES = {
    # OpenAI's ChatML, as Qwen, SmolLM and many others speak it.
    "chatml": _TURNS.format(start="<|im_start|>", header="\\n", end="<|im_end|>\\n"),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    "llama-3": _BOS + _TURNS.format(start="<|start_header_id|>", header="<|end_header_id|>\\n\\n", end="<|eot_id|>"),
    # https://ai.google.dev/gemma/docs/core/prompt-structure: the assistant is called model
    "gemma": _BOS + _SYSTEM_FIRST + "{% for message in turns %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + message['content'] | trim"
    " + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # https://docs.mistral.ai: [INST] question [/INST] answer </s>
    "mistral": _BOS + _SYSTEM_FIRST + "{% for message in turns %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}{% endif %}"
    "{% endfor %}",
    # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct
    "phi-3": _TURNS.format(start="<|", header="|>\\n", end="<|end|>\\n"),
    # https://huggingface.co/microsoft/phi-4
    "phi-4": _TURNS.format(start="<|im_start|>", header="<|im_sep|>", end="<|im_end|>"),
    # https://huggingface.co/HuggingFaceH4/zephyr-7b-beta
    "zephyr": "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Stanford Alpaca's prompt, for models that know no special tokens.
    "alpaca": _SYSTEM_FIRST + "{{ system }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] | trim + eos_token + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + message['content'] | trim + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
}
TEMPLATES["qwen"] = TEMPLATES["smollm"] = TEMPLATES["chatml"]


def chat_template(name: str) -> str:
    """A template by its name in :data:`TEMPLATES`, or from a file.

    Raises:
        DataError: when there is neither, or the file holds no template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(TEMPLATES))
        raise DataError(f"chat_template {name!r} is no file, and none of {known}")
    try:
        text = path.read_text(encoding="utf-8")
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        render_jinja_template([chat], chat_template=text, bos_token="", eos_token="")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{path}:{error.lineno}: no chat template: {error.message}") from None
    except jinja2.TemplateError as error:  # what the sandbox forbids, for one
        raise DataError(f"{path}: the chat template cannot be used: {error}") from None
    return text
