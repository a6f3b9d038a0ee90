"""Pictures of a run, as PNG files."""

from pathlib import Path


def plot_reward(log_history: list[dict], path: str | Path, title: str, column: str = "reward") -> Path:
    """Draw the training reward of a run against the floating-point operations counted until then.

    Args:
        log_history (`list[dict]`): of the trainer's state, with the entries `flops` and `column`.
        path (`str`): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [(entry["flops"], entry[column]) for entry in log_history if column in entry and "flops" in entry]
    flops, rewards = zip(*points, strict=True)
    smooth = [sum(rewards[max(0, i - 4) : i + 1]) / (i + 1 - max(0, i - 4)) for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(6, 4), dpi=150)
    axes.plot(flops, rewards, color="tab:blue", alpha=0.3, label="logged")
    axes.plot(flops, smooth, color="tab:blue", label="mean of the last 5")
    axes.set(xlabel="floating-point operations (counted)", ylabel=f"training {column}", title=title, xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def plot_language(learned: list[dict], improved: list[dict], path: str | Path, title: str) -> Path:
    """Draw an SFT run's loss and a GRPO run's reward, KL and length, each against its steps.

    Args:
        learned (`list[dict]`): the log history of SFT, with `loss`.
        improved (`list[dict]`): of GRPO, with `reward`, `kl` where there is one, and `completions/mean_length`.
        path (`str`): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (learned, "loss", "SFT: loss, nats a token"),
        (improved, "reward", "GRPO: reward"),
        (improved, "kl", "GRPO: KL to the SFT model, nats a token"),
        (improved, "completions/mean_length", "GRPO: tokens a completion"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), dpi=120)
    for ax, (history, column, name) in zip(axes, panels, strict=True):
        points = [(entry["step"], entry[column]) for entry in history if column in entry]
        ax.plot(
            *zip(*points, strict=True) if points else ((), ()),
            color="tab:blue",
            linewidth=1.2,
            marker=".",
            markersize=4,
        )
        ax.set(xlabel="step", title=name)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)
