"""What a command of `trl-dllm` runs; `trl_dllm_cli` is the entry, which lists them.

Training commands take a recipe, overrides, and the arguments of `accelerate launch` among them:

    trl-dllm grpo --config llada_8b/grpo/gsm8k_step_merge --learning_rate 1e-6
    trl-dllm grpo --config mine.yaml --accelerate_config zero2 --num_processes 8

With one device and no launch argument they run in this process.
"""

import sys
from importlib import import_module
from pathlib import Path

from trl_dllm.command import Ended, one_line, run_script, take_debug
from trl_dllm.recipe import find_accelerate_config
from trl_dllm_cli import main


TRAINS = ("sft", "grpo", "dpo")  # take a recipe, and may be launched on several processes


def run(command: str, argv: list[str]) -> None:
    """Run the script of a command, in this process or on several. What goes wrong ends it with one line."""
    rest, debug = take_debug(argv)
    prog, name = f"trl-dllm {command}", command.replace("-", "_")
    if [command, *rest[:1]] == ["report", "curves"]:
        prog, name, argv = f"{prog} curves", "curves", [*rest[1:], *["--debug"] * debug]
    with one_line(prog, debug):
        module = import_module(f"trl_dllm.scripts.{name}")
        if command in TRAINS:
            dry = import_module("trl_dllm.scripts.dry")
            script_flags = {flag for action in module.make_parser()._actions for flag in action.option_strings}
            launch, script = split_launch_arguments(rest, script_flags)
            if dry.is_dry(script):
                sharding = dry.sharding_of(resolve_accelerate_config(launch))
                dry.run_dry(prog, module.make_parser, module.main, [*script, *["--debug"] * debug], sharding)
                return
            if launch or _several_gpus():
                _launch(prog, resolve_accelerate_config(launch), name, [*script, *["--debug"] * debug])
                return
    run_script(prog, module.make_parser, module.main, argv)


def split_launch_arguments(argv: list[str], script_flags: set[str]) -> tuple[list[str], list[str]]:
    """Separate the arguments of `accelerate launch` from the script's own; a flag that both know is the script's."""
    from accelerate.commands.launch import launch_command_parser

    flags = {flag: action for action in launch_command_parser()._actions for flag in action.option_strings}
    launch: list[str] = []
    script: list[str] = []
    i = 0
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
    argv = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--accelerate_config=") else [arg])]
    if "--accelerate_config" not in argv:
        return argv
    i = argv.index("--accelerate_config")
    if i + 1 == len(argv):
        raise ValueError("--accelerate_config needs a value: a file or a name such as zero2.")
    return ["--config_file", str(find_accelerate_config(argv[i + 1])), *argv[:i], *argv[i + 2 :]]


def _several_gpus() -> bool:
    import torch

    return torch.cuda.device_count() > 1


def _launch(prog: str, launch: list[str], name: str, script: list[str]) -> None:
    """Run a script by `accelerate launch`. Its processes say what went wrong in them; this one ends as they did."""
    import logging
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "--debug" not in script:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    path = Path(__file__).parent / "scripts" / f"{name}.py"
    try:
        launch_command(launch_command_parser().parse_args([*launch, str(path), *script]))
    except (ChildFailedError, CalledProcessError) as error:
        if isinstance(error, ChildFailedError):
            rank, failure = error.get_first_failure()
            code = failure.exitcode
        else:
            rank, code = 0, error.returncode
        if code < 0:  # it has said nothing
            print(f"{prog}: process {rank} was ended by signal {-code}", file=sys.stderr)
        raise Ended(f"{prog}: process {rank} ended with {code}", code if code > 0 else 128 - code) from error


if __name__ == "__main__":
    main()
