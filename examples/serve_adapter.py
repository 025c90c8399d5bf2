"""Answers from a base with an adapter that a run exported, by transformers and PEFT.

    fedllm export runs/own_data --out adapters/mine
    python examples/serve_adapter.py adapters/mine "Name the opposite." "tall"

A server for many users reads the same folder, for example vLLM:

    vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules mine=adapters/mine

`fedllm export --merge` writes base and adapter as one model, for programs that know no adapters.
"""

import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

# the prompt of `data.template: alpaca`; a chat model has tokenizer.apply_chat_template instead
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def answer(folder: Path, instruction: str, input_: str, *, max_new_tokens: int = 64) -> str:
    """Return the model's answer, without the prompt."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokens = tokenizer(PROMPT.format(instruction=instruction, input=input_), return_tensors="pt")
    with torch.no_grad():
        written = model.generate(
            **tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = written[0, tokens["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("need ADAPTER, INSTRUCTION and INPUT")
    print(answer(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
