"""TRL's model cards, with what they do not know: masked diffusion decoding, the likelihood, its paper and the cost."""

import inspect
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from peft import PeftModel

from ..generation import DiffusionGenerationConfig, decoding_of
from ..generation.saved import decoding_config
from ..likelihood import ESTIMATORS
from ..models import unwrap
from .completions import newest_trace


@dataclass(frozen=True)
class Paper:
    """What a card says of a paper; authors as BibTeX has them."""

    key: str
    title: str
    authors: str
    arxiv: str | None = None
    year: str | None = None

    def link(self) -> str:
        return f"[{self.title}](https://huggingface.co/papers/{self.arxiv})" if self.arxiv else f"*{self.title}*"

    def bibtex(self) -> str:
        entries = {"title": f"{{{self.title}}}", "author": self.authors, "year": self.year}
        entries["eprint"] = self.arxiv and f"arXiv:{self.arxiv}"
        lines = [f"    {name:<12} = {{{value}}}," for name, value in entries.items() if value]
        return "\n".join([f"@article{{{self.key},", *lines, "}"])


D2 = Paper(
    "wang2025d2",
    "d2: Improved Techniques for Training Reasoning Diffusion Language Models",
    "Guanghan Wang and Gilad Turok and Yair Schiff and Marianne Arriola and Volodymyr Kuleshov",
    "2509.21474",
    "2025",
)
PADRE = Paper(
    "shankar-padre", "PADRE: Pseudo-Likelihood Training for Reasoning Diffusion Language Models", "Shiv Shankar"
)
D1 = Paper(
    "zhao2025d1",
    "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
    "Zhao, S. and Gupta, D. and Zheng, Q. and Grover, A.",
    "2504.12216",
    "2025",
)
LLADA = Paper(
    "nie2025llada",
    "Large Language Diffusion Models",
    "Nie, S. and Zhu, F. and You, Z. and Zhang, X. and Ou, J. and Hu, J. and Zhou, J. and "
    "Lin, Y. and Wen, J.-R. and Li, C.",
    "2502.09992",
    "2025",
)
DIFFUCODER = Paper(
    "gong2025diffucoder",
    "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
    "Gong, S. and Zhang, R. and Zheng, H. and Gu, J. and Jaitly, N. and Kong, L. and Zhang, Y.",
    "2506.20639",
    "2025",
)
AGRPO = Paper(
    "zhan2025agrpo",
    "Simple Policy Gradients for Reasoning with Diffusion Language Models",
    "Zhan, Anthony",
    "2510.04019",
    "2025",
)
SPG = Paper(
    "wang2025spg",
    "SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models",
    "Wang, C. and Rashidinejad, P. and Su, D. and Jiang, S. and Wang, S. and Zhao, S. and Zhou, C. and "
    "Shen, S. Z. and Chen, F. and Jaakkola, T. and Tian, Y. and Liu, B.",
    "2510.09541",
    "2025",
)
VRPO = Paper(
    "zhu2025llada15",
    "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models",
    "Zhu, F. and Wang, R. and Nie, S. and Zhang, X. and Wu, C. and Hu, J. and Zhou, J. and Chen, J. and Lin, Y. and "
    "Wen, J.-R. and Li, C.",
    "2505.19223",
    "2025",
)

# Of every estimator and objective.
PAPERS = {
    "mean_field": D1,
    "step_merge": D2,
    "exact_trajectory": D2,
    "agrpo": AGRPO,
    "any_order": D2,
    "pkl": PADRE,
    "pkl_u": PADRE,
    "pkl_t": PADRE,
    "elbo": LLADA,
    "coupled_elbo": DIFFUCODER,
    "spg": SPG,
    "masked_diffusion": LLADA,
}


def complete_card(trainer) -> None:
    """Rewrite the card that TRL has put into a trainer's `output_dir`: its quick start, its model, what it leaves out.

    A model that is not on the Hub is named by its absolute path, so that the snippet runs from any folder.
    """
    card = Path(trainer.args.output_dir) / "README.md"
    base = unwrap(trainer.model).config._name_or_path
    place = trainer.hub_model_id or str(Path(trainer.args.output_dir).absolute())
    adapter_of = (_anywhere(base) if base else "") if isinstance(trainer.model, PeftModel) else None
    rewrite_quick_start(trainer.args.output_dir, place, trainer.known_decoding(), adapter_of)
    text = card.read_text()
    origin = f"fine-tuned version of `{Path(base).name}`" if base else "masked diffusion model that was made in memory"
    text = text.replace("fine-tuned version of [None](https://huggingface.co/None)", origin)
    text = _before(text, "### Framework versions", "\n".join(f"- {fact}" for fact in _facts(trainer)))
    paper = _paper(trainer)
    if paper is not None:
        what = "likelihood" if hasattr(trainer, "estimator") else "objective"
        text = _before(text, "Cite TRL as:", f"Cite the {what} as:\n\n```bibtex\n{paper.bibtex()}\n```")
    card.write_text(text)


def _anywhere(name: str) -> str:
    """A folder by its absolute path, which means the same from everywhere; a Hub name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _before(text: str, heading: str, addition: str) -> str:
    """The text with an addition before a heading, or at its end where another template has no such heading."""
    start, found, end = text.partition(heading)
    return f"{start}{addition}\n\n{found}{end}" if found else f"{text}\n{addition}\n"


def _method(trainer) -> tuple[str, dict[str, object]]:
    """The name of the estimator or of the objective, and its arguments."""
    estimator = getattr(trainer, "estimator", None)
    if estimator is None:
        return trainer.args.objective, {"loss_weight": trainer.args.loss_weight}
    known = {cls: name for name, cls in ESTIMATORS.items()}
    parameters = inspect.signature(type(estimator)).parameters
    settings = {name: getattr(estimator, name) for name in parameters if hasattr(estimator, name)}
    return known.get(type(estimator), type(estimator).__name__), settings


def _paper(trainer) -> Paper | None:
    """What the likelihood or the objective is from; a trainer may use it as a paper of its own does."""
    return getattr(trainer, "likelihood_paper", None) or PAPERS.get(_method(trainer)[0])


def _facts(trainer) -> list[str]:
    """Likelihood or objective, decoding and cost, a line of Markdown each."""
    name, settings = _method(trainer)
    paper = _paper(trainer)
    what = "Likelihood" if hasattr(trainer, "estimator") else "Objective"
    arguments = f" ({_listed(settings)})" if settings else ""
    facts = [f"{what}: `{name}`{arguments}" + (f", see {paper.link()}" if paper else "")]
    decoding = trainer.known_decoding()
    if decoding:
        when = "in training" if trainer.args.known_decoding() else "before this training"
        facts.append(f"Decoding {when}: {_listed(decoding)}")
    page = newest_trace(Path(trainer.args.output_dir)) if getattr(trainer.args, "trace_steps", None) else None
    if page is not None:
        facts.append(f"How completions were filled in, step by step: [{page.as_posix()}]({page.as_posix()})")
    logged = next((entry for entry in reversed(trainer.state.log_history) if "flops" in entry), None)
    if logged is not None:
        facts.append(
            f"Floating-point operations: {logged['flops']:.3g} counted, {logged['flops_paper']:.3g} by the formula of "
            f"{D2.link()}, of sampling and training up to step {logged['step']}"
        )
    elif trainer.state.total_flos:
        facts.append(
            f"Floating-point operations: {trainer.state.total_flos:.3g}, 2 a parameter and token of a forward, 4 of a "
            "backward"
        )
    return facts


def _listed(settings: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items() if value is not None)


def rewrite_quick_start(
    folder: str, model_id: str, decoding: Mapping[str, object], adapter_of: str | None = None
) -> None:
    """Replace the first Python snippet of the card in `folder` by one that decodes as `decoding.json` says, greedily.

    Settings that have their default are left out, but for the canvas. If `model_id` is an adapter, `adapter_of` is the
    name of its model, empty for one that was made in memory and has to be made again.
    """
    card = Path(folder) / "README.md"
    if not card.exists():
        return
    text = card.read_text()
    start = text.find("```python")
    end = text.find("```", start + 3)
    if start < 0 or end < 0:
        return
    defaults = {f.name: f.default for f in fields(DiffusionGenerationConfig) if f.name != "max_new_tokens"}
    greedy = decoding_of(decoding_config(decoding, {"temperature": 0.0}))
    settings = ", ".join(f"{name}={value!r}" for name, value in greedy.items() if value != defaults.get(name, ...))
    load = f'model = AutoModelForCausalLM.from_pretrained("{model_id if adapter_of is None else adapter_of}")'
    if adapter_of == "":
        load = "model = ...  # the model that the adapter was trained on, which was made in memory"
    imports = ""
    if adapter_of is not None:
        imports = "from peft import PeftModel\n"
        load += f'\nmodel = PeftModel.from_pretrained(model, "{model_id}")'
    snippet = textwrap.dedent(
        """\
        ```python
        import trl_dllm  # registers the model family
        {imports}from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl_dllm.generation import DiffusionGenerationConfig, generate

        {load}
        tokenizer = AutoTokenizer.from_pretrained("{model_id}", padding_side="left")
        text = "What is 12 + 30?"
        if tokenizer.chat_template:
            messages = [{{"role": "user", "content": text}}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts = tokenizer([text], add_special_tokens=False, return_tensors="pt", padding=True)
        config = DiffusionGenerationConfig({settings})
        rollout = generate(model, prompts["input_ids"], prompts["attention_mask"], config)
        print(tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True))
        ```"""
    ).format(imports=imports, load=load, model_id=model_id, settings=settings)
    card.write_text(text[:start] + snippet + text[end + 3 :])
