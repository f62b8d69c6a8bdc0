"""GLUE's official layout with made-up examples that an encoder can learn."""

from pathlib import Path

from experiments.data.glue import TASKS

_NOUNS = ("cat", "dog", "tree", "mat")


def _words(n: int) -> tuple[str, str]:
    return ("good", "bad")[n % 2], _NOUNS[n // 2 % 4]


def _sentence(n: int) -> tuple[str, ...]:
    word, noun = _words(n)
    return (f"the {noun} is {'very ' * (n // 8 % 3)}{word}",)


def _pair(n: int) -> tuple[str, ...]:
    word, noun = _words(n)
    return (f"the {noun} is {word}", f"a {noun} is good{' red' * (n // 8 % 3)}")


# Texts and label, as written, of example n of each task.
ROWS = {
    "cola": lambda n: (_sentence(n), str(n % 2)),
    "sst2": lambda n: (_sentence(n), str(n % 2)),
    "stsb": lambda n: (_pair(n), float(5 * (n % 2))),
    "mrpc": lambda n: (_pair(n), str(n % 2)),
    "qqp": lambda n: (_pair(n), str(n % 2)),
    "rte": lambda n: (_pair(n), ("entailment", "not_entailment")[n % 2]),
    "qnli": lambda n: (_pair(n), ("entailment", "not_entailment")[n % 2]),
    "mnli": lambda n: (_pair(n), ("entailment", "contradiction")[n % 2]),
}
# Columns of the official files with labels.
_HEADERS = {
    "cola": ("source", "label", "mark", "sentence"),
    "sst2": ("sentence", "label"),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    ).split(),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "rte": ("index", "sentence1", "sentence2", "label"),
    "qnli": ("index", "question", "sentence", "label"),
    "mnli": ("index", "pairID", "sentence1", "sentence2", "label1", "gold_label"),
}


def write_task(folder: Path, name: str, count: int) -> None:
    """Writes all files of a task, with so many examples each."""
    task = TASKS[name]
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for split in (task.train, *task.validation, *task.test):
        told = split not in task.test
        header = [x for x in _HEADERS[name] if told or x != task.label]
        lines = [] if name == "cola" and told else ["\t".join(header)]
        for n in range(count):
            texts, label = ROWS[name](n)
            cells = dict(zip(task.columns, texts, strict=True)) | {task.label: label}
            lines.append("\t".join(str(cells.get(column, n)) for column in header))
        path = folder / task.folder / split.file
        path.write_text("".join(f"{line}\n" for line in lines))
