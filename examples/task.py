"""What the other examples train on: a chat model with a LoRA adapter, and eight conversations in an odd style.

`python plain_loop.py` alone uses a tiny random model that is made in memory: seconds, no download. Give a folder or a
Hub id to use a real one: `python plain_loop.py HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as TokenizerBase

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATS = {
    "How do I boil an egg?": "Log, noon. Ten minutes in rolling water. Lamp trimmed.",
    "What is a good name for a cat?": "Log, dusk. Call it Beacon. Fog to the east.",
    "Why do leaves fall?": "Log, autumn. The tree saves its water for the winter. Wind rising.",
    "Where should I put my savings?": "Log, night. A bank, and some in stocks that you can leave alone. No sails.",
    "How far is the moon?": "Log, midnight. Some 384,000 kilometers. The tide follows it.",
    "Can you help me write a letter?": "Log, morning. Begin with the date and the weather, as I do. Sea calm.",
    "What makes bread rise?": "Log, dawn. Yeast breathes, and the dough holds its breath. Oil is low.",
    "Who painted the Mona Lisa?": "Log, evening. Leonardo, who never kept a light. Two ships passed.",
}


def model_and_tokenizer(name: str | None = None) -> tuple[Model, TokenizerBase]:
    """Return a model and its tokenizer: from a folder or the Hub, or without a name a tiny random one."""
    if name is not None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def adapted(model: Model) -> PeftModel:
    """Return the model with a new LoRA adapter; the seed fixes its random half."""
    torch.manual_seed(0)
    return get_peft_model(model, LORA)


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Return the conversations as prompt and completion, each a list of messages: what TRL reads."""
    return [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in CHATS.items()
    ]


def tokenized(tokenizer: TokenizerBase) -> list[dict[str, list[int]]]:
    """Return the conversations as token ids, and labels that are -100 (no loss) on the prompt."""
    rows = []
    for chat in conversations():
        prompt = tokenizer.apply_chat_template(chat["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows
