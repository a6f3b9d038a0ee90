"""Dry runs of what would be launched on several processes: this one takes a step, and knows what the others would."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from trl_dllm.command import run_script
from trl_dllm.reports.memory import Sharding


def is_dry(argv: list[str]) -> bool:
    """Whether the arguments of a script ask for a dry run, as its parser reads a bool."""
    words = [word for arg in argv for word in arg.split("=", 1)] + [""]
    values = [after for word, after in pairwise(words) if word == "--dry_run"]
    return bool(values) and (values[-1].startswith("--") or values[-1].lower() in ("", "true", "t", "yes", "y", "1"))


def run_dry(prog: str, make_parser: Callable, main: Callable, argv: list[str], sharding: Sharding) -> None:
    """Run a script's dry run as one of the processes of a launch."""
    from transformers import TrainingArguments

    with mock.patch.object(TrainingArguments, "world_size", sharding.processes):
        run_script(prog, make_parser, partial(main, sharding=sharding), argv)


def run_launched(prog: str, make_parser: Callable, main: Callable, argv: list[str]) -> None:
    """Run a script in a process that may be one of a launch. A dry run is the first one's, alone."""
    environment = dict(os.environ)
    if not is_dry(argv) or int(environment.get("WORLD_SIZE", 1)) == 1:
        run_script(prog, make_parser, main, argv)
    elif int(environment.get("RANK", 0)) == 0:
        theirs = [
            name for name in environment if name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_"))
        ]
        for name in [*theirs, "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"]:
            os.environ.pop(name, None)
        run_dry(prog, make_parser, main, argv, sharding_of_launch(environment))


def sharding_of_launch(environment: Mapping[str, str]) -> Sharding:
    """How the processes of a launch share a step, by what `accelerate launch` has told them."""
    processes = int(environment.get("WORLD_SIZE", 1))
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        return _deepspeed(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"), file, processes)
    kind = "fsdp2" if environment.get("ACCELERATE_USE_FSDP", "false") == "true" else "ddp"
    return Sharding(kind if processes > 1 else "none", processes)


def sharding_of(launch: list[str]) -> Sharding:
    """How processes share a step that are launched with these arguments of `accelerate launch`, and its config."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    args = launch_command_parser().parse_args([*launch, "script"])
    file = args.config_file or default_config_file
    config = load_config_from_file(file) if launch and Path(file).is_file() else None
    kind = None if config is None else config.distributed_type
    processes = args.num_processes or getattr(config, "num_processes", None) or max(1, torch.cuda.device_count())
    if args.use_deepspeed or kind == DistributedType.DEEPSPEED:
        settings = {} if config is None else config.deepspeed_config
        file = args.deepspeed_config_file or settings.get("deepspeed_config_file")
        return _deepspeed(args.zero_stage or settings.get("zero_stage"), file, processes)
    if args.use_fsdp or kind == DistributedType.FSDP:
        return Sharding("fsdp2", processes)
    return Sharding("ddp" if processes > 1 else "none", processes)


def _deepspeed(stage: Any, file: str | None, processes: int) -> Sharding:
    if file and file != "none":
        stage = json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)
    stage = 2 if stage is None else int(stage)  # accelerate's own
    return Sharding(f"zero{stage}" if stage else "ddp", processes)
