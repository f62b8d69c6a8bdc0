"""What a run trains that learns which tools a request needs, and how it is judged."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score

from experiments.assembly import make_parts
from experiments.configs.tinyagent import TinyAgentDataConfig, ToolsConfig
from experiments.data.example_batches import TrainingExamples, encode
from experiments.data.glue import Examples
from experiments.data.hub import model_folder
from experiments.data.tokenizer import check_tokens, load_model_tokenizer
from experiments.encoders import (
    encoder_config,
    example_loss,
    make_predict,
    save_model,
)
from experiments.models import huggingface
from experiments.models.encoder import functional_encoder
from experiments.models.encoder_checkpoint import Labels, load_encoder
from experiments.tinyagent.dataset import Example
from experiments.tinyagent.examples import load_training, tools_of
from experiments.tinyagent.sandbox import TOOLS
from experiments.training.folder import RunFolder
from experiments.training.loop import Plan
from experiments.training.run import Job, Layout, reporter
from experiments.training.step_log import Row

_LABELS = Labels("tinyagent_tools", TOOLS)


def prepare(
    config: ToolsConfig, folder: RunFolder, layout: Layout, console: Console
) -> Job:
    """Reads encoder and requests, and makes what is trained on them."""
    report, data = reporter(console), config.data
    with console.status("Reading encoder and requests", spinner="line"):
        source = model_folder(config.model.name, report)
        shape = encoder_config(config.model, data.max_length, config.mesh, source)
        tokenizer = load_model_tokenizer(source)
        wanted = TinyAgentDataConfig(
            data=data.data,
            train_examples=data.train_examples,
            validation_examples=data.validation_examples,
        )
        examples = load_training(wanted, report)
        train, validation = (
            encode(
                tokenizer,
                requests(some),
                max_length=data.max_length,
                token_types=shape.token_types,
                pad_to_max_length=config.run.pad_to_max_length,
            )
            for some in (examples.train, examples.validation)
        )
        for encoded in (train, validation):
            check_tokens(encoded.tokens, shape.vocab_size, str(source))
    init_params, apply = functional_encoder(
        shape, len(TOOLS), config.optimization.adapter
    )
    batches = TrainingExamples(
        train, config.run.batch_size, config.run.seed, layout.share
    )
    plan = Plan.of_epochs(
        config.run.epochs, batches.steps_an_epoch, config.run.max_skipped
    )
    predict = make_predict(apply, layout, config.microbatch_size)

    facts = {
        "train": train.fingerprint,
        "validation": validation.fingerprint,
        "encoder": huggingface.fingerprint(source),
    }
    return Job(
        parts=make_parts(
            config,
            plan.steps,
            init_params,
            example_loss(apply, losses_of),
            unit="examples",
        ),
        plan=plan,
        batches=batches,
        evaluate=lambda params: judge(predict(params, validation), validation.labels),
        fingerprints=facts,
        data={
            "examples": {
                "train": len(train.tokens),
                "left_out": examples.left_out,
                "fingerprints": facts,
            }
        },
        throughput=lambda examples, seconds: {
            "examples_per_second": examples / seconds
        },
        pretrained=lambda params: load_encoder(source, shape, params, _LABELS, report),
        finish=lambda params: save_model(
            params, config, shape, _LABELS, source, folder
        ),
    )


def requests(examples: Sequence[Example]) -> Examples:
    """Returns requests, labelled (N, 16) with 1 for each tool that their plans call."""
    called = [tools_of(one.plan) for one in examples]
    labels = [[name in tools for name in TOOLS] for tools in called]
    return Examples([(one.request,) for one in examples], np.array(labels, np.float32))


def losses_of(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the binary cross entropy of each tool, mean over them, (N,)."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, labels), -1)


def judge(outputs: np.ndarray, labels: np.ndarray | None) -> Row:
    """Returns loss and scores of (N, 16) outputs; a tool is chosen from 0.5 on.

    `f1` is over all pairs of request and tool, `exact` the share of requests whose
    tools are all right.
    """
    assert labels is not None
    loss = optax.sigmoid_binary_cross_entropy(jnp.asarray(outputs), labels)
    chosen = outputs >= 0
    return {
        "validation_loss": float(jnp.mean(loss)),
        "validation_f1": float(f1_score(labels, chosen, average="micro")),
        "validation_exact": float(accuracy_score(labels, chosen)),
    }
