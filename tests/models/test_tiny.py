"""The tiny model and its tokenizer."""

import pytest
import torch
from transformers import AutoTokenizer

from trl_dllm.models import create_tiny_model


def test_tiny_models_repeat_and_leave_the_global_generator_alone(family):
    state = torch.get_rng_state()
    (a, _), (b, _), (c, _) = (create_tiny_model(family, hidden_size=32, num_layers=1, seed=s) for s in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_tiny_tokenizer_round_trip(tmp_path):
    model, tokenizer = create_tiny_model("llada", hidden_size=16, num_layers=1)
    text = "What's 3 + 4?\n<answer>7</answer> {~}"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    encoded = again(text)["input_ids"]
    assert encoded == tokenizer(text)["input_ids"] and len(encoded) == len(text)
    assert again.decode(encoded) == text and again.padding_side == "left"
    assert again.mask_token_id == model.config.mask_token_id == 3 and len(again) == model.config.vocab_size
    assert (
        len({again.pad_token_id, again.eos_token_id, again.bos_token_id, again.mask_token_id, again.unk_token_id}) == 5
    )


def test_tiny_models_take_fields_of_their_config(family):
    model, tokenizer = create_tiny_model(family, 16, 1, tie_word_embeddings=True, vocab_size=1009)
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(model.lm_head.weight) == 1009
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.dtype == torch.float32
    default, _ = create_tiny_model(family)
    assert 150_000 < default.num_parameters() < 250_000


def test_tiny_chats_are_one_line_a_message():
    _, tokenizer = create_tiny_model(hidden_size=16, num_layers=1)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "s:Be brief.\nu:1+1\na:"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "s:Be brief.\nu:1+1\n"


def test_tiny_model_errors():
    with pytest.raises(ValueError, match=r"family='gpt'.*dream.*llada"):
        create_tiny_model("gpt")
    with pytest.raises(ValueError, match=r"hidden_size=40.*multiple of 16"):
        create_tiny_model(hidden_size=40)
