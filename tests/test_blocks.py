"""Blocks of prompt and canvas against counting."""

import pytest
import torch
from cases import PROMPTS
from oracles import block_starts, left_pad

from trl_dllm.blocks import ALIGNMENTS, Blocks


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_blocks_are_counted_from_the_prompt_or_from_the_canvas_whatever_the_padding(size, alignment):
    _, mask = left_pad(PROMPTS, 11)
    number = Blocks(size, alignment).number(mask.bool(), 9)
    for row, prompt in enumerate(PROMPTS):
        padding, length = 11 - len(prompt), len(prompt)
        assert number[row, :padding].tolist() == [-1] * padding
        place = [p - (length if alignment == "canvas" else 0) for p in range(length + 9)]
        block = [p // size for p in place]
        assert number[row, padding:].tolist() == [b - min(block) for b in block]
        canvas = number[row, 11:].tolist()
        begins = [i for i in range(9) if i == 0 or canvas[i] != canvas[i - 1]]
        assert begins == block_starts(length, 9, size, alignment)
    wider = Blocks(size, alignment).number(torch.nn.functional.pad(mask.bool(), (5, 0)), 9)
    assert torch.equal(wider[:, 5:], number)


def test_wrong_blocks_are_refused():
    with pytest.raises(ValueError, match="block_size=0 must be at least 1 position"):
        Blocks(0)
    with pytest.raises(ValueError, match="block_alignment='prompt' is unknown; choose 'position' or 'canvas'"):
        Blocks(4, "prompt")
