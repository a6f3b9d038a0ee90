"""The command line: `trl-dllm {init-tiny,sft,grpo,eval,generate,report}`.

Training commands take a recipe, overrides, and the arguments of `accelerate launch` among them:

    trl-dllm grpo --config recipe.yaml --learning_rate 1e-6
    trl-dllm grpo --config recipe.yaml --accelerate_config zero2 --num_processes 8

With one device and no launch argument they run in this process.
"""

import sys
from importlib import import_module, resources
from pathlib import Path


# command -> (module in scripts, whether it trains and so may be launched on several processes, one line of help)
COMMANDS = {
    "init-tiny": ("init_tiny", False, "write a randomly initialised tiny model and tokenizer"),
    "sft": ("sft", True, "fine-tune a masked diffusion model on prompts and answers"),
    "grpo": ("grpo", True, "train a masked diffusion model with GRPO"),
    "eval": ("eval", False, "evaluate a model on a task"),
    "generate": ("generate", False, "complete prompts"),
    "report": ("report", False, "compare likelihood estimates with what a model draws"),
}


def split_launch_arguments(argv: list[str], script_flags: set[str]) -> tuple[list[str], list[str]]:
    """Separate the arguments of `accelerate launch` from the script's own; a flag that both know is the script's."""
    from accelerate.commands.launch import launch_command_parser

    flags = {flag: action for action in launch_command_parser()._actions for flag in action.option_strings}
    launch, script, i = [], [], 0
    while i < len(argv):
        flag = argv[i].split("=")[0]
        action = flags.get(flag) if flag not in script_flags else None
        target = launch if action or flag == "--accelerate_config" else script
        target.append(argv[i])
        i += 1
        takes_value = (action is None or action.nargs != 0) and "=" not in argv[i - 1]
        while i < len(argv) and not argv[i].startswith("--") and (target is script or takes_value):
            target.append(argv[i])
            i += 1
            takes_value = False
    return launch, script


def resolve_accelerate_config(argv: list[str]) -> list[str]:
    """Turn `--accelerate_config NAME` (a file, or a name known here or to TRL) into `--config_file`."""
    if "--accelerate_config" not in argv:
        return argv
    i = argv.index("--accelerate_config")
    if i + 1 == len(argv):
        raise ValueError("--accelerate_config needs a value: a file or a name such as zero2.")
    name, shipped = argv[i + 1], resources.files("trl.accelerate_configs")
    recipes = Path(__file__).parent.parent / "recipes" / "accelerate_configs"
    candidates = [Path(name), recipes / f"{name}.yaml", Path(str(shipped)) / f"{name}.yaml"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted({file.stem for folder in candidates[1:] for file in folder.parent.glob("*.yaml")})
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of {', '.join(known)}.")
    return ["--config_file", str(path), *argv[:i], *argv[i + 2 :]]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
        print("usage: trl-dllm COMMAND [arguments]; COMMAND --help says more\n\n" + "\n".join(lines))
        if argv and argv[0] not in ("-h", "--help"):
            raise SystemExit(f"\ntrl-dllm: unknown command {argv[0]!r}")
        return
    command, *rest = argv
    name, trains, _ = COMMANDS[command]
    module = import_module(f"trl_dllm.scripts.{name}")
    parser = module.make_parser(prog=f"trl-dllm {command}")
    if not trains:
        module.main(parser.parse_args(rest))
        return
    try:
        script_flags = {flag for action in parser._actions for flag in action.option_strings}
        launch, script = split_launch_arguments(rest, script_flags)
        if launch or _several_gpus():
            return _launch(resolve_accelerate_config(launch), name, script)
        arguments = parser.parse_args_and_config(script)
    except (ValueError, FileNotFoundError) as error:  # a recipe to mend, not a bug to trace
        raise SystemExit(f"trl-dllm {command}: {error}") from error
    module.main(*arguments)


def _several_gpus() -> bool:
    import torch

    return torch.cuda.device_count() > 1


def _launch(launch: list[str], name: str, script: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    path = Path(__file__).parent / "scripts" / f"{name}.py"
    launch_command(launch_command_parser().parse_args([*launch, str(path), *script]))


if __name__ == "__main__":
    main()
