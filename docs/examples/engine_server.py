"""A process that holds a masked diffusion model and draws completions for a trainer in another one.

    python docs/examples/engine_server.py MODEL --port 8000 --block_length 32 --diffusion_steps 128

It answers like TRL's vLLM server, with the trajectory beside the tokens:

- `GET /health/`;
- `POST /generate/`: {prompts, max_tokens, temperature, seeds} -> {prompt_ids, completion_ids, logprobs, canvas_ids,
  step_maps}. Prompts are text or messages. A step map is
  SGLang's: the decoding step of each token, from 1; 0 for never.
- `POST /update_weights/`: {folder} -> {}: the weights that `save_pretrained` wrote there.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dllm.evaluation import tokenize_prompts
from trl_dllm.generation import DiffusionGenerationConfig, generate


class Engine:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        self.update_weights(args.model)

    def update_weights(self, folder: str) -> dict:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return {}

    def generate(self, prompts: list, max_tokens: int, temperature: float, seeds: list[int]) -> dict:
        config = DiffusionGenerationConfig(
            max_tokens,
            temperature=temperature,
            block_length=self.args.block_length,
            diffusion_steps=self.args.diffusion_steps,
        )
        ids, mask = (table.to(self.model.device) for table in tokenize_prompts(self.tokenizer, prompts))
        rollout = generate(self.model, ids, mask, config, torch.tensor(seeds, device=ids.device)).to("cpu")
        return {
            "prompt_ids": _kept(rollout.prompt_ids, rollout.prompt_mask),
            "completion_ids": _kept(rollout.completion_ids, rollout.counted),
            "logprobs": _kept(rollout.logps, rollout.counted),
            "canvas_ids": rollout.completion_ids.tolist(),
            "step_maps": (rollout.unmask_step + 1).tolist(),
        }


def _kept(table: torch.Tensor, mask: torch.Tensor) -> list[list]:
    return [row[keep].tolist() for row, keep in zip(table, mask, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--block_length", type=int)
    parser.add_argument("--diffusion_steps", type=int)
    engine = Engine(parser.parse_args())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"status": "ok"})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(
                {"/generate/": engine.generate, "/update_weights/": engine.update_weights}[self.path](**request)
            )

        def answer(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", engine.args.port), Handler) as server:
        print(f"serving on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
