"""List the recipes, or print one with its base filled in.

trl-dllm recipe
trl-dllm recipe llada_8b/grpo/gsm8k_step_merge > mine.yaml
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from trl_dllm.command import Parser, run_script
from trl_dllm.recipe import find_recipe, render_recipe


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="A recipe's name or file. Without it all recipes are listed.")
    parser.add_argument("--markdown", action="store_true", help="List them as the page docs/recipes.md.")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.name is not None:
        return print(render_recipe(find_recipe(args.name)), end="")
    from trl_dllm.reports.recipes import markdown, recipe_tables

    if args.markdown:
        print(markdown(), end="")
    else:
        console = Console(markup=False, highlight=False)
        for folder, rows in recipe_tables().items():
            table = Table(title=f"{folder}/…", title_justify="left")
            table.add_column("recipe", no_wrap=True)
            table.add_column("method")
            what = next(name for name in ("estimator", "objective", "likelihood") if name in rows[0])
            table.add_column(what)
            for row in rows:
                table.add_row(row["recipe"], row["method"], row[what])
            console.print(table)
        console.print("Print one with `trl-dllm recipe NAME`, such as llada_8b/grpo/gsm8k_step_merge.")


if __name__ == "__main__":
    run_script("trl-dllm recipe", make_parser, main, sys.argv[1:])
