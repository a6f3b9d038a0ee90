"""What the trainers' configs share: refusing options of TRL that do not apply, and taking over a stock config."""

from dataclasses import fields


# field -> (accepted values, why it does not apply and what to do instead)
Refused = dict[str, tuple[tuple, str]]


def refuse(config, refused: Refused, what: str) -> None:
    """Raise ValueError for the first option of `refused` that has another value than those accepted."""
    for name, (accepted, why) in refused.items():
        if getattr(config, name, accepted[0]) not in accepted:
            raise ValueError(f"{name}={getattr(config, name)!r} does not apply to {what}: {why}.")


def take_over(cls, stock_cls, args):
    """A config of `cls` with a stock one's values and the diffusion fields at their defaults; not validated yet."""
    # Not rebuilt from its fields: TRL's __post_init__ has resolved some of them and would refuse its own result.
    config = object.__new__(cls)
    config.__dict__.update(args.__dict__)
    stock = {f.name for f in fields(stock_cls)}
    for f in fields(cls):
        if f.name not in stock:
            setattr(config, f.name, f.default)
    return config
