"""Write a randomly initialised tiny model and its tokenizer to a folder.

trl-dllm init-tiny runs/tiny --family llada --hidden_size 64 --num_layers 4 --seed 0
"""

import argparse
import sys

from trl_dllm.command import Parser, count, run_script
from trl_dllm.models import FAMILIES, create_tiny_model


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="Folder to write to.")
    parser.add_argument("--family", default="llada", choices=sorted(FAMILIES), help="Model family.")
    parser.add_argument("--hidden_size", type=count, default=64, help="Width; a multiple of 16, of 64 for 4-bit.")
    parser.add_argument("--num_layers", type=count, default=4, help="Decoder layers.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights.")
    return parser


def main(args: argparse.Namespace) -> None:
    model, tokenizer = create_tiny_model(args.family, args.hidden_size, args.num_layers, args.seed)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"A {args.family} with {parameters:,} parameters is in {args.output_dir}.")


if __name__ == "__main__":
    run_script("trl-dllm init-tiny", make_parser, main, sys.argv[1:])
