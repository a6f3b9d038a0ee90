"""One process of several: `torchrun … grpo_worker.py SETTINGS.json`; does every entry of `runs`, writes what it did.

SETTINGS has `checkpoint`, `folder`, `deepspeed` (a DeepSpeed config or null) and `runs` (name -> keywords of
`run`, or of the function of `helpers_distributed` that `do` names).
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def initialise_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives would be compiled on first use; without them it takes gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before any TrainingArguments: zero.Init asks for the world size.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if settings["deepspeed"]:
        initialise_deepspeed()
    import helpers_distributed

    rank, folder, results = os.environ["RANK"], Path(settings["folder"]), {}
    extra = {"deepspeed": settings["deepspeed"]} if settings["deepspeed"] else {}
    for name, keywords in settings["runs"].items():
        run = getattr(helpers_distributed, keywords.pop("do", "run"))
        results[name] = run(folder / name, settings["checkpoint"], **keywords, **extra)
        (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
