"""What a run on a task of GLUE trains, and how it is judged."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments.assembly import make_parts
from experiments.configs.glue import GlueConfig
from experiments.data import glue
from experiments.data.example_batches import Encoded, TrainingExamples, encode
from experiments.data.glue import Split, Task, TaskName
from experiments.data.hub import model_folder
from experiments.data.tokenizer import check_tokens, load_model_tokenizer
from experiments.encoders import (
    Apply,
    encoder_config,
    example_loss,
    make_predict,
    save_model,
)
from experiments.models import huggingface
from experiments.models.encoder import functional_encoder
from experiments.models.encoder_checkpoint import Labels, load_encoder
from experiments.models.encoder_config import EncoderConfig
from experiments.training import distributed
from experiments.training.folder import RunFolder
from experiments.training.loop import Plan
from experiments.training.microbatches import LossFn
from experiments.training.run import Job, Layout, reporter
from experiments.training.step_log import Row


@dataclasses.dataclass(frozen=True)
class Texts:
    """The examples of a task, tokenized."""

    train: Encoded
    validation: Mapping[Split, Encoded]
    test: Mapping[Split, Encoded]


def prepare(
    config: GlueConfig, folder: RunFolder, layout: Layout, console: Console
) -> Job:
    """Reads encoder and examples, and makes what is trained on them."""
    task, report = glue.TASKS[config.data.task], reporter(console)
    labels = labels_of(config.data.task)
    with console.status("Reading encoder and examples", spinner="line"):
        source = model_folder(config.model.name, report)
        shape = encoder_config(
            config.model, config.data.max_length, config.mesh, source
        )
        texts, facts = read_texts(config, task, source, shape, report)
    init_params, apply = functional_encoder(
        shape, task.outputs, config.optimization.adapter
    )
    batches = TrainingExamples(
        texts.train, config.run.batch_size, config.run.seed, layout.share
    )
    plan = Plan.of_epochs(
        config.run.epochs, batches.steps_an_epoch, config.run.max_skipped
    )
    predict = make_predict(apply, layout, config.microbatch_size)

    def evaluate(params: optax.Params) -> Row:
        outputs = {
            split: predict(params, encoded)
            for split, encoded in texts.validation.items()
        }
        return judge(task, outputs, texts.validation)

    def finish(params: optax.Params) -> None:
        save_model(params, config, shape, labels, source, folder)
        for split, encoded in texts.test.items():
            outputs = predict(params, encoded)
            if distributed.is_first():
                path = folder.predictions / split.submission
                glue.write_submission(path, task, outputs)

    return Job(
        parts=make_parts(
            config, plan.steps, init_params, make_loss(apply, task), unit="examples"
        ),
        plan=plan,
        batches=batches,
        evaluate=evaluate,
        objective=lambda row: -row[f"validation_{task.metrics[0]}"],
        fingerprints=facts,
        data={"examples": {"train": len(texts.train.tokens), "fingerprints": facts}},
        throughput=lambda examples, seconds: {
            "examples_per_second": examples / seconds
        },
        pretrained=lambda params: load_encoder(source, shape, params, labels, report),
        finish=finish,
    )


def labels_of(name: TaskName) -> Labels:
    """Returns what the outputs of a task's head stand for."""
    # A score has the name that transformers gives to it.
    return Labels(name, glue.TASKS[name].classes or ("LABEL_0",))


def read_texts(
    config: GlueConfig,
    task: Task,
    folder: Path,
    shape: EncoderConfig,
    report: Callable[[str], None],
) -> tuple[Texts, dict[str, str]]:
    """Reads and tokenizes a task's examples.

    Returns:
        The examples, and fingerprints of them and of the encoder.
    """
    data = config.data
    tokenizer = load_model_tokenizer(folder)

    def read(split: Split) -> Encoded:
        examples = glue.load(
            data.task,
            split,
            data.data,
            on_bad_input=data.on_bad_input,
            report=report,
        )
        if split == task.train:
            examples = examples.first(data.train_examples)
        encoded = encode(
            tokenizer,
            examples,
            max_length=data.max_length,
            token_types=shape.token_types,
            pad_to_max_length=config.run.pad_to_max_length,
        )
        check_tokens(encoded.tokens, shape.vocab_size, str(folder))
        return encoded

    train = read(task.train)
    validation = {split: read(split) for split in task.validation}
    test = {split: read(split) for split in task.test}
    facts = {
        "train": train.fingerprint,
        "validation": ",".join(one.fingerprint for one in validation.values()),
        "encoder": huggingface.fingerprint(folder),
    }
    return Texts(train, validation, test), facts


def make_loss(apply: Apply, task: Task) -> LossFn:
    """Makes the loss of a task."""
    return example_loss(apply, functools.partial(losses_of, task))


def losses_of(task: Task, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns an example's loss each: cross entropy, or the squared error of a score.

    Args:
        task: What is predicted.
        outputs: (N, C) float32 of the model.
        labels: (N,) numbers of classes, or scores.
    """
    if task.classes:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.square(outputs[:, 0] - labels)


def judge(
    task: Task, outputs: Mapping[Split, np.ndarray], examples: Mapping[Split, Encoded]
) -> Row:
    """Returns loss and scores of a model's outputs on the validation splits.

    The first split's have the metrics' names; those of another one, which MNLI has,
    are named after it.
    """
    row: Row = {}
    for split, some in outputs.items():
        labels, more = examples[split].labels, split.suffix
        loss = jnp.mean(losses_of(task, some, labels))
        row[f"validation_loss{more}"] = float(loss)
        for name, score in glue.scores(task, some, labels).items():
            row[f"validation_{name}{more}"] = score
    return row
