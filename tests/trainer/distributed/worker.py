"""One process of several: `torchrun … worker.py SETTINGS.json`; does every entry of `runs`, writes what it did.

SETTINGS has `checkpoint`, `folder`, `backend` (a `deepspeed` or an `fsdp` config, or nothing for DDP) and `runs` (name
-> keywords of `run`, or of the function of `helpers_distributed` that `do` names).
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def deepspeed_arguments(config: dict) -> dict:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives would be compiled on first use; without them it takes gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before any TrainingArguments: zero.Init asks for the world size.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timedelta(seconds=60))
    return {"deepspeed": config}


def fsdp_arguments(config: dict) -> dict:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # On a CPU accelerate takes DDP whatever is asked for; with the kind of several GPUs it goes its way to FSDP.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: None
    return {"use_cpu": False, "fsdp": True, "fsdp_config": config}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    kinds = {"deepspeed": deepspeed_arguments, "fsdp": fsdp_arguments}
    extra: dict = {}
    for name, config in settings["backend"].items():
        extra |= kinds[name](config)
    import helpers_distributed

    rank, folder, results = os.environ["RANK"], Path(settings["folder"]), {}
    for name, keywords in settings["runs"].items():
        run = getattr(helpers_distributed, keywords.pop("do", "run"))
        results[name] = run(folder / name, keywords.pop("checkpoint", settings["checkpoint"]), **keywords, **extra)
        print(f"process {rank}: {name} has ended", flush=True)
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
    # Not the interpreter's tear-down, in which DeepSpeed's and gloo's threads now and then abort.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
