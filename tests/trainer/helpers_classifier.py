"""A tiny RoBERTa that tells three kinds of text apart, in a folder: it decides at `<s>`, and has few positions."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import RobertaConfig, RobertaForSequenceClassification

from trl_dllm.models.tiny import create_tiny_tokenizer


LABELS = ["neutral", "toxic", "odd"]
POSITIONS = 40  # tokens that it takes, special ones among them


def write_classifier(folder: Path, num_labels: int = len(LABELS), seed: int = 0, **settings) -> str:
    tokenizer = create_tiny_tokenizer()
    special = [(tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=special
    )
    names = LABELS[:num_labels]
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS + tokenizer.pad_token_id + 1,  # RoBERTa counts from behind its padding
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        initializer_range=1.0,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
