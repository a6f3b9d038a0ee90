"""Masked diffusion models in EleutherAI's lm-evaluation-harness, as `--model trl_dllm`.

    python -m trl_dllm.harness --model trl_dllm --tasks gsm8k \\
        --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,max_new_tokens=256,diffusion_steps=128

The harness finds models by a table of its own, so this module registers ours and hands over to its command line.
`generate_until` decodes a canvas, `loglikelihood` is a Monte-Carlo evidence lower bound (`Elbo`).
"""

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from .evaluation import complete
from .generation import DiffusionGenerationConfig, generate, saved_decoding_config
from .likelihood import Elbo, token_logps
from .models import MaskedDiffusionSpec
from .models.adapters import load_adapter
from .noise import Purpose, hash64
from .processes import say
from .rollout import Rollout


@register_model("trl_dllm")
class DiffusionLM(LM):
    """A masked diffusion model for the harness.

    Args:
        pretrained (`str`): folder or Hub name.
        dtype (`str`): of the weights.
        batch_size (`int`): rows a forward.
        num_samples (`int`): Monte-Carlo draws of the evidence lower bound; LLaDA's own evaluation takes 128.
        is_greedy (`bool`): whether to find out if greedy decoding gives a continuation (a forward a token), which
            accuracy on multiple choice does not need; otherwise it is reported as not.
        seed (`int`): of all draws.
        peft (`str`, *optional*): folder or Hub name of an adapter, under the name that the harness's models give it.
        max_new_tokens (`int`, *optional*): canvas length where a task does not say (`max_gen_toks`); `None` takes the
            one that the model was trained with (`decoding.json`), or 256.
        temperature (`float`): of the draws; 0 is greedy.
        decoding: any further field of `DiffusionGenerationConfig`, for a canvas of `max_new_tokens`; those that are
            not given are the model's, as it was trained. Another canvas has the same blocks, or the default ones where
            they do not divide it, and as many tokens a step, rounded up.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 8,
        device: str | None = None,
        num_samples: int = 128,
        is_greedy: bool = False,
        seed: int = 0,
        max_batch_size: int | None = None,  # given by the harness for batch_size="auto"
        peft: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **decoding: Any,
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__()
        # First of all, so that bad settings are an error before the model loads.
        canvas = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        given = {**canvas, "temperature": temperature, **decoding}
        self.sampling, line = saved_decoding_config([peft, pretrained], given)
        if line:
            say(line)
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained, padding_side="left")
        # The harness says "cuda" where its user says nothing.
        cuda = torch.cuda.is_available()
        self._device = torch.device("cpu" if (device or "cuda").startswith("cuda") and not cuda else device or "cuda")
        if self._device.type == "cpu" and device not in (None, "cpu"):
            say(f"device={device} (the harness's own, if none was given), but torch finds no GPU: it runs on the CPU.")
        base = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
        self.model = (load_adapter(base, peft) if peft else base).eval().to(self._device)
        self.spec = MaskedDiffusionSpec.from_model(self.model, self.tokenizer)
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.num_samples, self.find_greedy = int(num_samples), str(is_greedy).lower() == "true"
        self.seed = int(seed)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)  # with tokenize=False
        return text

    def _config(self, canvas_length: int) -> DiffusionGenerationConfig:
        """The decoding settings for a canvas."""
        if canvas_length == self.sampling.max_new_tokens:
            return self.sampling
        return self.sampling.resized(canvas_length)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each request's context on a canvas, cut at the first of its stop strings."""
        answers = [""] * len(requests)
        order = sorted(
            range(len(requests)), key=lambda i: requests[i].args[1].get("max_gen_toks", self.sampling.max_new_tokens)
        )
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        while order:
            canvas_length = requests[order[0]].args[1].get("max_gen_toks", self.sampling.max_new_tokens)
            batch = [
                i
                for i in order[: self.batch_size]
                if requests[i].args[1].get("max_gen_toks", self.sampling.max_new_tokens) == canvas_length
            ]
            order = order[len(batch) :]
            seeds = hash64(self.seed, Purpose.EVALUATION, torch.tensor(batch))
            contexts = [requests[i].args[0] for i in batch]
            texts, _ = complete(
                self.model, self.tokenizer, contexts, self._config(canvas_length), seeds, spec=self.spec
            )
            for i, text in zip(batch, texts, strict=True):
                until = requests[i].args[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            progress.update(len(batch))
        progress.close()
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Evidence lower bound in nats of each continuation given its context, and whether it is the greedy one."""
        results = []
        for number, request in enumerate(tqdm(requests, disable=disable_tqdm, desc="loglikelihood")):
            context, continuation = request.args
            whole = self.tokenizer(text=context + continuation)["input_ids"]
            start = len(self.tokenizer(text=context)["input_ids"]) if context else 0
            results.append(self._bound(whole[:start], whole[start:], number))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Evidence lower bound in nats of each whole text."""
        return [
            self._bound([], self.tokenizer(text=request.args[0])["input_ids"], number)[0]
            for number, request in enumerate(tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"))
        ]

    @torch.no_grad()
    def _bound(self, prompt: list[int], answer: list[int], number: int) -> tuple[float, bool]:
        if not prompt:  # a shifted family needs a token before the first one
            bos = self.tokenizer.bos_token_id
            prompt = [self.tokenizer.eos_token_id if bos is None else bos]
        ids = torch.tensor([prompt], device=self._device)
        target = torch.tensor([answer], dtype=torch.int64, device=self._device)
        seed = hash64(self.seed, Purpose.EVALUATION, torch.tensor([number], device=self._device))
        rollout = Rollout(
            prompt_ids=ids,
            prompt_mask=torch.ones_like(ids),
            completion_ids=target,
            unmask_step=torch.zeros_like(target),
            logps=torch.zeros(target.shape, device=self._device),
            counted=torch.ones_like(target),
            view_seed=seed,
            mask_token_id=self.spec.mask_token_id,
            blocks=self.spec.blocks,
        )
        total, done = 0.0, 0
        while done < self.num_samples:  # rows of a batch are draws of the same text
            draws = min(self.batch_size, self.num_samples - done)
            rows = rollout[torch.zeros(draws, dtype=torch.int64)]
            seeds = hash64(seed, torch.arange(done, done + draws, device=self._device))
            total += token_logps(self.model, rows, Elbo(num_samples=1), seeds=seeds, spec=self.spec).logps.sum().item()
            done += draws
        greedy = False
        if self.find_greedy:
            length, size = len(answer), self.spec.block_size
            config = DiffusionGenerationConfig(
                length if size is None else -(-length // size) * size,
                block_length=size,
                tokens_per_step=1,
                temperature=0.0,
                stop_at_eos=False,
            )
            drawn = generate(self.model, ids, torch.ones_like(ids), config, seed, self.spec).completion_ids
            greedy = bool((drawn[:, :length] == target).all())
        return total / self.num_samples, greedy


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
