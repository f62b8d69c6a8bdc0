"""Settings that all commands have in common that train a pretrained model on."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import tyro

from experiments.configs.run import RunConfig, TrainingConfig, check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningRunConfig(RunConfig):
    """How long, and where it is kept.

    Attributes:
        epochs: Times that all examples are learnt from; an evaluation and a checkpoint
            end each, and every 500th step is saved besides. What is kept is the model
            of the best one.
        pad_to_max_length: Whether every batch is as long as an example may be, so that
            one program is compiled and not one a length: for short runs on an
            accelerator, where compiling takes longer than padding.
    """

    epochs: int = 3
    batch_size: int = 32
    pad_to_max_length: bool = False


class PretrainedConfig(Protocol):
    """What is trained on."""

    @property
    def name(self) -> str:
        """A folder or file, or a name on the hub."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningConfig(TrainingConfig):
    """What is the same for whatever is fine-tuned.

    A command adds `data`, which has a `data`.
    """

    model: PretrainedConfig
    run: tyro.conf.OmitArgPrefixes[FineTuningRunConfig]

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        super().__post_init__()
        check_at_least(1, self.run, "epochs")
        source, own = Path(self.model.name).expanduser(), self.run_dir / "model"
        if self.run.overwrite and source.resolve() == own.resolve():
            raise ValueError(
                f"--overwrite would delete {source}, which is to be trained on: give "
                f"another --run-dir than {self.run_dir}."
            )
        if self.optimization.accumulate == "subspace":
            raise ValueError("--accumulate subspace is not for fine-tuning.")
        if self.optimization.optimizer == "low_rank":
            raise ValueError(
                "low_rank has no kernels that pretrained weights could be loaded into: "
                "lora keeps them beside its factors."
            )

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for one run to go on from another's state.

        Padding is left out: it changes rounding, and which random numbers dropout
        gets. The fingerprints of data, tokenizer and weights are for the caller to add.
        """
        config = super().identity() | {"epochs": self.run.epochs}
        del config["data"]["data"], config["model"]["name"]
        return config


def check_positions(max_length: int, positions: int | None, model: str) -> None:
    """Refuses examples of more tokens than a model has positions; None: any number.

    Raises:
        ValueError: They may be.
    """
    if positions is not None and max_length > positions:
        raise ValueError(
            f"--max-length {max_length} is more than the {positions} positions of "
            f"{model}: give at most that."
        )
