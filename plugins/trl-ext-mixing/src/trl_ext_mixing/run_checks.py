"""What a run has to have for these methods, checked before the model loads."""

from __future__ import annotations

from trl_ext.errors import ConfigurationError
from trl_ext.records import RunDescription


def refuse_unknown_reward(run: RunDescription, name: str) -> None:
    """Raise where the reward function that shall decide is none of the run's.

    Raises:
        ConfigurationError: naming those that there are.
    """
    if name and run.rewards and name not in run.rewards:
        raise ConfigurationError(f"reward={name!r} is not one of the reward functions: {', '.join(run.rewards)}")


def refuse_undecided_reward(run: RunDescription, name: str) -> None:
    """Raise where what is trained on depends on whether a prompt is solved, and it is not said which reward says so.

    Raises:
        ConfigurationError: naming the choices.
    """
    refuse_unknown_reward(run, name)
    if not name and len(run.rewards) > 1:
        raise ConfigurationError(
            f"with several reward functions, say which one tells whether a prompt is solved: reward={run.rewards[0]} "
            f"(or {', '.join(run.rewards[1:])})"
        )


def refuse_without_own_forward(
    run: RunDescription, setting: str, alternative: str = "", *, in_the_loss: bool = False
) -> None:
    """Raise where demonstrations cannot have a forward and a backward outside of the trainer's.

    Args:
        run: as asked for.
        setting: names plugin and option in the message.
        alternative: what else to do where parameters are sharded.
        in_the_loss: the forward is part of the trainer's loss, and all ranks make it, as FSDP2 allows.

    Raises:
        ConfigurationError: sharded parameters, images, or reentrant checkpointing.
    """
    if run.sharding not in ("none", "ddp") and not (in_the_loss and run.sharding == "fsdp2"):
        raise ConfigurationError(
            f"{setting} takes gradients by torch.autograd.grad, in as many passes as a rank has demonstrations, and "
            f"sharded parameters ({run.sharding}) are gathered and their gradients summed only in passes that all "
            f"ranks make; use DDP{alternative}"
        )
    if images := sorted({"image", "images"}.intersection(run.columns)):
        raise ConfigurationError(f"{setting}: demonstrations are of text alone, but the data has {images[0]!r}")
    if run.args.gradient_checkpointing and (run.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigurationError(
            f"{setting} takes gradients by torch.autograd.grad, which reentrant checkpointing does not allow; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def refuse_missing_column(run: RunDescription, column: str, setting: str) -> None:
    """Raise where the rows that come back with the rollouts lack a column.

    Raises:
        ConfigurationError: there is none of this name, or the trainer drops it.
    """
    if run.columns and column not in run.columns:
        raise ConfigurationError(
            f"{setting}: the training data has no column {column!r}; there are {', '.join(run.columns)}"
        )
    if run.args.remove_unused_columns:
        raise ConfigurationError(f"{setting}: remove_unused_columns=True drops {column!r}; set it to False")


def refuse_split_generations(run: RunDescription) -> None:
    """Raise where a generation batch serves more than one optimiser step: its prompts would be counted in each.

    Raises:
        ConfigurationError: naming the settings.
    """
    args = run.args
    if args.num_iterations > 1 or args.steps_per_generation != args.gradient_accumulation_steps:
        raise ConfigurationError(
            f"a generation batch has to be one optimiser step, but num_iterations={args.num_iterations} and "
            f"steps_per_generation={args.steps_per_generation} with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}; set num_iterations=1 and leave steps_per_generation out"
        )
