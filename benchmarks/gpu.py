"""What a GPU does with this library, in one command: one JSON and one table.

    python benchmarks/gpu.py --minutes 8

Needs torch, transformers, peft, trl and datasets (and bitsandbytes for nf4), and nothing from the Hub: LLaDA-8B's
shapes with random weights, as many of its layers as fit the card. The parts:

- `device`: what it is, and the number of layers that the next three take;
- `decoding`: tokens a second of denoising and of cached any-order decoding, and in bfloat16 how far the sampler's
  log-probs are from the scorer's (mismatch KL, k3);
- `step_merge`, `any_order`: seconds of each part of a trainer's step with LoRA, its operations a second and its peak
  memory, on trajectories that are drawn and not decoded, of which 75 % up to the EOS counts; StepMerge with N = 8;
- `attention`: the pass of P + 2L tokens with a dense mask and with FlexAttention;
- `head`: tiles of different sizes, one layer beneath them;
- `nf4`: LoRA on 4-bit weights and on bfloat16 ones;
- `compile`: a forward and a backward, eager and compiled.

They run in another process. A part that ends with an error, or has not ended when its share of the minutes (and what
those before it left over) is gone, leaves what it has found and says so in the JSON and the table; the others go on,
in a new process.
"""

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from trl_dllm import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_dllm.generation import DiffusionGenerationConfig, generate
from trl_dllm.likelihood import AnyOrder, Estimator, ExactTrajectory, Plan, StepMerge, compact, score_view, token_logps
from trl_dllm.models import LLaDAConfig, MaskedDiffusionSpec, head
from trl_dllm.models.tiny import create_tiny_tokenizer
from trl_dllm.rollout import Rollout
from trl_dllm.trainer import profile


GIB = 2**30
SHARE = 0.75
Found = Iterator[dict[str, Any]]  # what a part finds, as it finds it


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="For all parts together.")
    parser.add_argument("--output", default="gpu.json", help="The JSON.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="Which parts to run.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu.")
    parser.add_argument("--dtype", default="bfloat16", help="Of the weights.")
    parser.add_argument("--hidden_size", type=int, default=4096, help="Width.")
    parser.add_argument("--intermediate_size", type=int, default=12288, help="Width inside an MLP.")
    parser.add_argument("--num_heads", type=int, default=32, help="Attention heads.")
    parser.add_argument("--num_layers", type=int, default=0, help="Decoder layers; 0: as many as fit, 32 at most.")
    parser.add_argument("--few_layers", type=int, default=4, help="Layers of the parts that compare.")
    parser.add_argument("--vocab_size", type=int, default=126464, help="Vocabulary.")
    parser.add_argument("--lora_r", type=int, default=128, help="Rank of the adapters.")
    parser.add_argument("--prompt_length", type=int, default=200, help="Prompt tokens a row.")
    parser.add_argument("--canvas", type=int, default=256, help="Canvas, decoded two tokens a step.")
    parser.add_argument("--block_length", type=int, default=32, help="Positions a block.")
    parser.add_argument("--rows", type=int, default=6, help="Completions of a micro-batch.")
    parser.add_argument("--tile_rows", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="Of the head.")
    parser.add_argument("--compile_backend", default="inductor", help="Of torch.compile.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights and trajectories.")
    return parser


# ---------------------------------------------------------------------------------------------------- time and memory


class Meter:
    """A part's clock: when it must end, and how long and how much memory its work takes."""

    def __init__(self, device: str, seconds: float):
        self.device, self.end = torch.device(device), time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one call, and what it gave."""
        self.synchronize()
        start = time.perf_counter()
        result = work()
        self.synchronize()
        return time.perf_counter() - start, result

    def seconds(self, work: Callable[[], Any], budget: float, most: int = 10) -> float:
        """The median of several calls within `budget` seconds, behind one that warms up."""
        end = time.perf_counter() + min(budget, self.left)
        self.once(work)
        taken = [self.once(work)[0]]
        while len(taken) < most and time.perf_counter() + taken[-1] < end:
            taken.append(self.once(work)[0])
        return median(taken)

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> float | None:
        """GiB allocated at most since the last reset; None where nobody counts."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else None

    def measured(self, work: Callable[[], Any], budget: float) -> dict[str, float | None]:
        self.reset_peak()
        return {"seconds": self.seconds(work, budget), "peak GiB": self.peak}


# -------------------------------------------------------------------------------------------------- models and batches


def fitting_layers(args: argparse.Namespace) -> int:
    """How many of LLaDA's layers the card has room for beside LoRA, its optimizer and a micro-batch's activations."""
    if args.num_layers:
        return args.num_layers
    weights = 4 * args.hidden_size**2 + 3 * args.hidden_size * args.intermediate_size
    adapters = args.lora_r * (11 * args.hidden_size + 3 * args.intermediate_size)
    tokens = args.rows * (args.prompt_length + 2 * args.canvas)
    # Activations are 215 kB a token and layer at LLaDA's widths, measured; of an adapter there is a cast, too.
    layer = 2 * weights + 18 * adapters + 215e3 / 4096 * args.hidden_size * tokens
    room = 0.85 * torch.cuda.get_device_properties(0).total_memory - 8 * args.hidden_size * args.vocab_size - 2 * GIB
    return max(1, min(32, int(room // layer)))


def create_model(args: argparse.Namespace, layers: int, lora: bool = True) -> Any:
    """A LLaDA with random weights, made where it runs; its predictions are not uniform."""
    tokenizer = create_tiny_tokenizer()
    torch.manual_seed(args.seed)
    config = LLaDAConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return get_peft_model(model, LoraConfig(r=args.lora_r, target_modules="all-linear")) if lora else model


def draw(args: argparse.Namespace, rows: int | None = None) -> Rollout:
    """Trajectories of two tokens a step, of which about `SHARE` of the canvas counts."""
    rows, tokenizer = args.rows if rows is None else rows, create_tiny_tokenizer()
    generator = torch.Generator().manual_seed(args.seed)
    place = torch.arange(args.canvas)
    rank = torch.rand(rows, args.canvas // args.block_length, args.block_length, generator=generator).argsort(2)
    step = (place // args.block_length * args.block_length + rank.argsort(2).flatten(1)) // 2
    end = ((0.5 + torch.rand(rows, 1, generator=generator)) * SHARE * args.canvas).long().clamp(1, args.canvas) - 1
    ids = torch.randint(5, args.vocab_size, (rows, args.canvas), generator=generator)
    return Rollout(
        prompt_ids=torch.randint(5, args.vocab_size, (rows, args.prompt_length), generator=generator),
        prompt_mask=torch.ones(rows, args.prompt_length, dtype=torch.bool),
        completion_ids=torch.where(place == end, tokenizer.eos_token_id, ids),
        unmask_step=step,
        logps=torch.zeros(rows, args.canvas),
        counted=place <= end,
        view_seed=torch.arange(rows),
        mask_token_id=tokenizer.mask_token_id,
        steps=args.canvas // 2,
    ).validate()


def scoring(args: argparse.Namespace, model: nn.Module, estimator: Estimator) -> Callable[[], None]:
    """A forward and a backward of an estimator's first views, as the trainer makes them."""
    rollout = draw(args).to(torch.device(args.device))
    view, owner = Plan(estimator, rollout, 0, args.rows)[0]
    view, spec = compact(view), MaskedDiffusionSpec.from_model(model)

    def work() -> None:
        scores = score_view(model, view, args.canvas, spec, owner=owner, rows=len(rollout))
        scores.logps.sum().backward()
        model.zero_grad()

    return work


# --------------------------------------------------------------------------------------------------------------- parts


def device(args: argparse.Namespace, meter: Meter) -> Found:
    yield {"torch": torch.__version__, "layers": fitting_layers(args)}
    if meter.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        yield {"name": card.name, "GiB": card.total_memory / GIB, "CUDA": torch.version.cuda}


def decoding(args: argparse.Namespace, meter: Meter) -> Found:
    """Tokens a second of both decoders, and how far their log-probs are from those of an exact estimator."""
    model = create_model(args, fitting_layers(args), lora=False).eval()
    prompts = draw(args).prompt_ids.to(meter.device)
    mask = torch.ones_like(prompts)
    width = args.prompt_length + args.canvas
    with torch.no_grad():
        ids = torch.ones(args.rows, width, dtype=torch.int64, device=meter.device)
        forward = meter.seconds(lambda: model.model(ids, use_cache=False), budget=10, most=3)
    yield {f"seconds of a forward of {args.rows} x {width}": forward}
    kinds: list[tuple[str, dict, Estimator]] = [
        ("any-order, cached", {"decoding": "any_order", "cache": "exact"}, AnyOrder()),
        ("denoising", {}, ExactTrajectory()),
    ]
    for name, settings, estimator in kinds:
        # Half of the canvas's positions are steps. A block warms up; the exact score takes as long as denoising does.
        blocks = args.canvas // args.block_length
        if name == "denoising":
            blocks = min(blocks, int(0.8 * meter.left / (args.block_length * forward)) - 1)
        if blocks < 1:
            yield {f"{name}: left out": "it takes longer than this part may"}
            continue
        for canvas in (args.block_length, blocks * args.block_length):
            config = DiffusionGenerationConfig(
                canvas, block_length=args.block_length, diffusion_steps=canvas // 2, stop_at_eos=False, **settings
            )
            taken, rollout = meter.once(lambda config=config: generate(model, prompts, mask, config))
        yield {
            f"{name}: canvas": canvas,
            f"{name}: tokens/s": args.rows * canvas / taken,
            f"{name}: TFLOP/s": rollout.flops / taken / 1e12,
        }
        with torch.no_grad():
            scores = token_logps(model, rollout, estimator, batch_size=args.rows)
        difference = (scores.logps - rollout.logps)[rollout.counted].double()
        yield {
            f"{name}: mismatch KL": (difference.exp() - 1 - difference).mean().item(),
            f"{name}: mismatch max": difference.abs().max().item(),
        }


class Steps(TrainerCallback):
    """Ends the training when the part's time is nearly up, and keeps the memory of all steps but the first."""

    def __init__(self, meter: Meter):
        self.meter, self.start, self.longest = meter, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.longest, self.start = max(self.longest, now - self.start), now
        if state.global_step == 1:
            self.meter.reset_peak()
        if state.global_step >= 4 and self.meter.left < 2.5 * self.longest:
            control.should_training_stop = True


def update(args: argparse.Namespace, meter: Meter, **settings: Any) -> Found:
    """Steps of the trainer: two updates on each generation batch, with a KL; the first two warm up."""
    tokenizer, rollout = create_tiny_tokenizer(), draw(args)

    def engine(prompts: list, trainer: Any) -> dict[str, list]:
        tables = (rollout.completion_ids, rollout.unmask_step, rollout.prompt_ids)
        canvas, steps, prompt_ids = (table[: len(prompts)].tolist() for table in tables)
        completions = [row[: int(n)] for row, n in zip(canvas, rollout.counted.sum(dim=1), strict=True)]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": None,
            "canvas_ids": canvas,
            "unmask_step": steps,
        }

    with tempfile.TemporaryDirectory() as folder:
        on_gpu = meter.device.type == "cuda"
        trainer = DiffusionGRPOTrainer(
            create_model(args, fitting_layers(args), lora=False),
            lambda completion_ids, **kwargs: [sum(ids) % 97 / 97 for ids in completion_ids],
            DiffusionGRPOConfig(
                folder,
                use_cpu=not on_gpu,
                bf16=on_gpu,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                gradient_checkpointing=False,
                beta=0.04,
                num_iterations=2,
                num_generations=args.rows,
                per_device_train_batch_size=args.rows,
                gradient_accumulation_steps=1,
                max_steps=12,
                max_completion_length=args.canvas,
                block_length=args.block_length,
                diffusion_steps=args.canvas // 2,
                stop_at_eos=False,
                vllm_importance_sampling_correction=False,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["x"]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear"),
            rollout_func=engine,
            callbacks=[Steps(meter)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "profile/rest_seconds" in entry][2:]
        seconds = {
            part: sum(entry[f"profile/{part}_seconds"] for entry in steps) / len(steps)
            for part in (*profile.PARTS, "rest")
        }
        yield {f"seconds of a step: {part}": value for part, value in seconds.items()}
        yield {"seconds of an update": seconds["forward"] + seconds["backward"], "peak GiB": meter.peak}
        operations = trainer.flops.counted / trainer.state.global_step
        yield {"TFLOP/s": operations / sum(seconds[part] for part in profile.PARTS) / 1e12, "steps": len(steps)}


def step_merge(args: argparse.Namespace, meter: Meter) -> Found:
    return update(args, meter, estimator="step_merge", num_segments=8, p_mask_prompt=0.15)


def any_order(args: argparse.Namespace, meter: Meter) -> Found:
    return update(args, meter, estimator="any_order", decoding="any_order")


def attention(args: argparse.Namespace, meter: Meter) -> Found:
    """The any-order pass by both backends, as the trainer runs it: with the masks made."""
    model = create_model(args, args.few_layers)
    for backend in ("sdpa", "flex_attention"):
        model.get_base_model().set_attn_implementation(backend)
        work = scoring(args, model, AnyOrder())
        yield {f"{backend}: {key}": value for key, value in meter.measured(work, meter.left / 3).items()}


def compiled(args: argparse.Namespace, meter: Meter) -> Found:
    """A forward and a backward of StepMerge's first views."""
    model = create_model(args, args.few_layers)
    for name in ("eager", "compiled"):
        if name == "compiled":
            model = torch.compile(model, dynamic=True, backend=args.compile_backend)
        work = scoring(args, model, StepMerge(8))
        yield {f"{name}: {key}": value for key, value in meter.measured(work, meter.left / 3).items()}


def tiles(args: argparse.Namespace, meter: Meter) -> Found:
    """The head on all counted positions, above one layer."""
    work = scoring(args, create_model(args, 1), StepMerge(1))
    for rows in args.tile_rows:
        with tiles_of(rows):
            measured = meter.measured(work, meter.left / len(args.tile_rows))
            yield {f"{rows} rows: {key}": value for key, value in measured.items()}


@contextmanager
def tiles_of(rows: int):
    before, head.TILE_ROWS = head.TILE_ROWS, rows
    try:
        yield
    finally:
        head.TILE_ROWS = before


def nf4(args: argparse.Namespace, meter: Meter) -> Found:
    """LoRA on the same layers in both forms."""
    import bitsandbytes

    for name in (args.dtype, "nf4"):
        model = create_model(args, args.few_layers, lora=False)
        if name == "nf4":
            model.is_loaded_in_4bit = True
            for parent in list(model.model.modules()):
                for child, linear in list(parent.named_children()):
                    if type(linear) is nn.Linear:
                        setattr(parent, child, _quantised(bitsandbytes, linear, meter.device))
        yield {f"{name}: GiB of weights": sum(p.numel() * p.element_size() for p in model.parameters()) / GIB}
        model = get_peft_model(model, LoraConfig(r=args.lora_r, target_modules="all-linear"))
        work = scoring(args, model, StepMerge(8))
        yield {f"{name}: {key}": value for key, value in meter.measured(work, meter.left / 3).items()}
        del model, work


def _quantised(bitsandbytes: Any, linear: nn.Linear, device: torch.device) -> nn.Module:
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device=torch.device("cpu"),
    )
    packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return packed.to(device)


# Each with its share of the time.
PARTS: dict[str, tuple[Callable[[argparse.Namespace, Meter], Found], float]] = {
    "device": (device, 0.05),
    "decoding": (decoding, 0.3),
    "step_merge": (step_merge, 0.2),
    "any_order": (any_order, 0.1),
    "attention": (attention, 0.1),
    "head": (tiles, 0.05),
    "nf4": (nf4, 0.1),
    "compile": (compiled, 0.1),
}


# ------------------------------------------------------------------------------------------------------------ the runs


class Worker:
    """A process that runs parts, and is replaced when one has failed: what CUDA is left like then, nobody knows."""

    def __init__(self, args: argparse.Namespace):
        # Spawned: whoever asked whether there is a GPU cannot hand it to a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(args, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # its imports are done

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The results of a part, and the error if it ended with one."""
        end, results = time.perf_counter() + seconds, {}
        try:
            self.pipe.send((name, 0.9 * seconds))
            while self.pipe.poll(max(0.0, end - time.perf_counter())):
                some, error, ended = self.pipe.recv()
                results |= some
                if ended:
                    return {"results": results} | ({"error": error} if error else {})
            error = f"not finished within {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join()
            error = f"its process ended with exit code {self.process.exitcode}"
        return {"results": results, "error": error}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(args: argparse.Namespace, pipe: Any) -> None:
    """Messages are (some results, an error or None, whether the part has ended)."""
    pipe.send(None)
    while True:
        name, seconds = pipe.recv()
        error = None
        try:
            meter = Meter(args.device, seconds)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            meter.reset_peak()
            for found in PARTS[name][0](args, meter):
                pipe.send((found, None, False))
        except Exception as failure:
            traceback.print_exc()
            first = next(iter(str(failure).strip().splitlines()), "")
            error = f"{type(failure).__name__}: {first}"
        pipe.send(({}, error, True))


def main(args: argparse.Namespace) -> dict[str, Any]:
    end, worker = time.perf_counter() + 60 * args.minutes, None
    report: dict[str, Any] = {"settings": vars(args), "parts": {}}
    table = Table("part", "quantity", "value", title="benchmarks/gpu.py")
    for number, name in enumerate(args.parts):
        worker = worker or Worker(args)
        start = time.perf_counter()
        share = PARTS[name][1] / sum(PARTS[other][1] for other in args.parts[number:])
        found = worker.run(name, max(5.0, (end - start) * share))
        if "error" in found:
            worker.stop()
            worker = None
        report["parts"][name] = found | {"seconds": time.perf_counter() - start}
        for quantity, value in (found["results"] | {key: found[key] for key in ("error",) if key in found}).items():
            table.add_row(name, quantity, f"{value:.4g}" if isinstance(value, float) else str(value))
        # Behind each part: a machine that is taken away leaves what there is.
        Path(args.output).write_text(json.dumps(report, indent=1))
    if worker is not None:
        worker.stop()
    Console(width=120).print(table)
    return report


if __name__ == "__main__":
    main(make_parser().parse_args())
