"""A bench small enough for tests."""

from experiments.bench.config import Bench, parse_args

MODEL = (
    "--model.hidden-size 16 --model.intermediate-size 24 --model.num-heads 2 "
    "--model.num-layers 2 --model.vocab-size 280 --sequence-length 8 --batch-size 2 "
    "--validation-tokens 64 --history 3 --update-proj-gap 2"
).split()
SETTINGS = (
    "--preset demo --rank 4 --natural-rank 2 --repeats 2 --layouts stacked "
    "--dtypes float32 --optimizers adamw optax_galore galore natural_galore "
    "--layers 1 2 --growth-layers 1 2 --growth-ranks 2 32 --growth-histories 1 2 "
    "--energy-steps 3"
).split()


def tiny(*args: str) -> Bench:
    return parse_args([*SETTINGS, *MODEL, *args])
