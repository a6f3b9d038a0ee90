"""Countdown for SFT with its problems in several orders: `task: countdown_orders.TASK`.

With numbers up to 9 there are 1,700 training problems, which even a tiny model learns by heart.
The task's seed decides the order of a problem's numbers and which right expression is shown; this one joins the rows
of several seeds. Splits are the task's own, so that no held-out problem is in it in any order.
"""

from dataclasses import replace

from datasets import Dataset, concatenate_datasets

from trl_dllm.tasks import countdown


NUM_ORDERS = 12


def load(
    split: str,
    num_examples: int | None = None,
    seed: int = 0,
    num_numbers: int = 3,
    max_number: int = 9,
    data_dir: str | None = None,
) -> Dataset:
    """`num_examples` rows of each of the seeds from `seed` on; `data_dir` is not used."""
    kwargs = {"num_numbers": num_numbers, "max_number": max_number}
    return concatenate_datasets(
        [countdown.load(split, num_examples, seed + order, **kwargs) for order in range(NUM_ORDERS)]
    )


TASK = replace(countdown.TASK, name="countdown_orders", load=load)
