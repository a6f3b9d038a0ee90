"""The command `trl-dllm`: it names its commands and its version without loading torch, TRL or the package.

It stands outside of the package because `import trl_dllm` registers the model families with transformers, which takes
seconds.
"""

import sys
from difflib import get_close_matches
from importlib import metadata


COMMANDS = {
    "init-tiny": "write a randomly initialised tiny model and tokenizer",
    "sft": "fine-tune a masked diffusion model on prompts and answers",
    "grpo": "train a masked diffusion model with GRPO",
    "dpo": "train a masked diffusion model on preferences (VRPO)",
    "eval": "evaluate a model on a task",
    "generate": "complete prompts",
    "report": "compare likelihood estimates with what a model draws; `report curves` draws what runs have learned",
    "trace": "show on a page how completions were filled in, step by step",
    "merge": "merge an adapter into its base model",
    "convert": "convert a checkpoint that needs its own code into one that does not",
    "recipe": "list the recipes, or print one with its base filled in",
}


def main(argv: list[str] | None = None) -> None:
    """Run `trl-dllm` with the arguments given, or those of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--debug"]:  # of every command, where it may stand as well
        argv = [*argv[1:2], "--debug", *argv[2:]]
    command = argv[0] if argv else "--help"
    if command in COMMANDS:
        from trl_dllm.cli import run

        return run(command, argv[1:])
    if command == "--version":
        return print("trl-dllm", metadata.version("trl-dllm"))
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    print(
        "usage: trl-dllm COMMAND [arguments]; COMMAND --help says more; --version\n"
        "       --debug shows the traceback of an error\n\n" + "\n".join(lines)
    )
    if command not in ("-h", "--help"):
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"\ntrl-dllm: unknown command {command!r}{hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
