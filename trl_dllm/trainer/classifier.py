"""A classifier's label as a reward: how toxic, how friendly, how much of a kind a text is."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..tasks.base import completion_text


class ClassifierReward:
    """A reward function: the log-probability that a classifier gives one of its labels for a completion.

    TRL's reward models are something else: they have one output, and read prompt and completion without special tokens
    and uncut. A classifier has an output a label, decides at a special token (RoBERTa's `<s>`), and takes no more
    tokens than it has positions. So this one reads the completion alone, with special tokens, cut at that length.
    An empty completion is read as a space.

    Args:
        name (`str`): folder or Hub name of a sequence-classification model with its tokenizer.
        label (`str`): the name of one of its labels, or its number.
        batch_size (`int`): completions of a forward.

    The model is loaded in float32 when it is first asked, on the device of the process, and never trained.
    """

    def __init__(self, name: str, label: str, batch_size: int = 32):
        self.name, self.label, self.batch_size = name, label, batch_size
        self.__name__ = f"log_prob_{label}"  # as TRL calls it in its logs
        self._model: Any = None

    def check(self) -> int:
        """The label's number, before any weight is loaded.

        Raises:
            ValueError: no such label, a model with one output, or ZeRO-3, which would shard the classifier too.
            OSError: no such model.
        """
        config = AutoConfig.from_pretrained(self.name)
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                f"reward_model_label={self.label!r} under ZeRO-3: the classifier would be sharded, and is no part of "
                "the trained model. Use ZeRO-2 (--accelerate_config zero2)."
            )
        if config.num_labels == 1:
            raise ValueError(
                f"reward_model_label={self.label!r}, but {self.name} has one output and no labels to choose from. "
                "Leave reward_model_label out: the output is then the reward."
            )
        numbers = {str(label): number for number, label in config.id2label.items()}
        numbers |= {str(number): number for number in config.id2label}
        if str(self.label) not in numbers:
            raise ValueError(
                f"reward_model_label={self.label!r} is no label of {self.name}: name one of "
                f"{', '.join(map(str, config.id2label.values()))}."
            )
        return numbers[str(self.label)]

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        """Rewards of completions, texts or messages: at most 0, one a completion."""
        texts = [completion_text(completion) or " " for completion in completions]
        parts = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        return [reward for part in parts for reward in self._rewards(part).tolist()]

    @torch.no_grad()
    def _rewards(self, texts: list[str]) -> Tensor:
        if self._model is None:
            self._load()
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=self._longest
        )
        logits = self._model(**inputs.to(self._model.device)).logits.float()
        several = self._model.config.problem_type == "multi_label_classification"
        log_probs = nn.functional.logsigmoid(logits) if several else logits.log_softmax(dim=-1)
        return log_probs[:, self._number]

    def _load(self) -> None:
        from accelerate import PartialState

        self._number = self.check()
        self._tokenizer = AutoTokenizer.from_pretrained(self.name)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = AutoModelForSequenceClassification.from_pretrained(self.name, dtype=torch.float32)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._longest = min(self._tokenizer.model_max_length, _positions(model))
        self._model = model.to(PartialState().device).eval()


def _positions(model: PreTrainedModel) -> int:
    """How many tokens a model takes: its learned positions, of which RoBERTa keeps the first for padding."""
    found = [getattr(module, "position_embeddings", None) for module in model.modules()]
    learned = [table for table in found if isinstance(table, nn.Embedding)]
    if learned:
        table = learned[0]
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit or torch.iinfo(torch.int32).max
