"""Runs scripts as a process of several on CPUs, where they would take a GPU each: `on_cpu.py SCRIPT ARGUMENTS…`.

What is set here is the machine; the launcher, its config and the script are their own.
"""

import os
import runpy
import sys


def use_gloo_for_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives would be compiled on first use; without them it takes gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before any TrainingArguments: zero.Init asks for the world size.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def take_cpus_for_gpus() -> None:
    """On a CPU accelerate takes DDP whatever is asked for; with the kind of several GPUs it goes its way to FSDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: None


def say_back_end() -> None:
    """Have each training print what it runs on, once everything is prepared."""
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback, trainer

    class Back(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            shared = AcceleratorState()
            stage = getattr(shared.deepspeed_plugin, "zero_stage", None) if args.deepspeed_plugin else None
            split = all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
            print(
                f"back end: {shared.distributed_type.value} {stage} split={split} of {shared.num_processes}",
                flush=True,
            )

    trainer.DEFAULT_CALLBACKS.append(Back)


def end() -> None:
    """Leave without the interpreter's tear-down, in which DeepSpeed's and gloo's threads now and then abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or "--deepspeed" in sys.argv
    if uses_deepspeed:
        use_gloo_for_deepspeed()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpus_for_gpus()
    say_back_end()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    end()


if __name__ == "__main__":
    main()
