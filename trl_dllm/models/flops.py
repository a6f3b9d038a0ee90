"""Counting forward floating-point operations: what was run, by shapes, not timed."""

from torch import nn

from .head import TILE_ROWS, unwrap


class ForwardFlops:
    """Operations of a forward of `model`, counted as two a multiply-add.

    Linear layers cost 2·in·out a token, attention 4·hidden a (query, key) pair and layer, and the head 2·hidden·V for
    each row that it is applied to, in whole tiles. Norms, rotary embeddings and softmaxes are left out (under 1 %).
    """

    def __init__(self, model: nn.Module):
        model = unwrap(model)
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        # in_features, not numel(): 4-bit weights are packed and ZeRO-3 weights are partitioned.
        linear = [
            m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features") and m is not head
        ]
        self.per_token = sum(2 * m.in_features * m.out_features for m in linear)
        self.per_pair = 4 * config.hidden_size * config.num_hidden_layers
        self.per_head_row = 2 * config.hidden_size * config.vocab_size

    def __call__(self, batch: int, queries: int, keys: int, head_rows: int) -> int:
        """Operations of a call: `batch` rows of `queries` positions attending to `keys`, the head at `head_rows`."""
        tiles = max(1, -(-head_rows // TILE_ROWS)) * TILE_ROWS
        return batch * queries * (self.per_token + keys * self.per_pair) + tiles * self.per_head_row
