"""The Hugging Face hub: C4, T5's tokenizer, models, and what to do when it fails."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import datasets

from experiments.data.text_files import TextError
from experiments.data.tokenizer import TOKENIZER_SETTINGS
from experiments.errors import PassingError

Report = Callable[[str], None]
T = TypeVar("T")

# The dataset's repository may change under a run that takes a month; a commit does
# not. This one holds English C4, version 3.0.1.
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
_C4_SHARDS = {"train": 1024, "validation": 8}

_GO_ON = "A run that had begun is as it was saved: --resume goes on with it."
_WAYS = (
    "Check the network (HTTPS_PROXY, HF_ENDPOINT), or give files that are here "
    "(--data, --tokenizer, --model.name)."
)
# Seconds to go on trying where a user waits for the start of a run.
_PATIENCE = 60.0
# Seconds between two tries, doubled from one to the next.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
# No pickle, and no code.
_WEIGHTS = ("*.safetensors", "*.index.json")
_MODEL_FILES = ("config.json", "tokenizer.json", *TOKENIZER_SETTINGS, *_WEIGHTS)
# Answers of a server that may be another one a little later.
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def c4_urls(split: Literal["train", "validation"]) -> list[str]:
    """Return the addresses of the shards of English C4, as `datasets` opens them."""
    count = _C4_SHARDS[split]
    folder = f"hf://datasets/allenai/c4@{C4_REVISION}/en"
    return [
        f"{folder}/c4-{split}.{number:05d}-of-{count:05d}.json.gz"
        for number in range(count)
    ]


def t5_tokenizer(report: Report, patience: float) -> Path:
    """Return T5-base's SentencePiece model, kept in the hub's own cache.

    Args:
      report: Takes a line for the user before each wait.
      patience: Seconds to go on trying.

    Raises:
      TextError: It is not in that cache, and the hub cannot be reached.
    """
    import huggingface_hub

    def get() -> Path:
        path = huggingface_hub.hf_hub_download("google-t5/t5-base", "spiece.model")
        return Path(path)

    return _persist("hf://google-t5/t5-base/spiece.model", get, report, patience)


def dataset_split(
    repository: str, revision: str, name: str, split: str, report: Report
) -> "datasets.Dataset":
    """Return a split of a dataset, kept in the library's own cache.

    Args:
      repository: On the hub.
      revision: Commit of it.
      name: Of the dataset within it.
      split: Name of the split.
      report: Takes a line for the user before each wait.

    Raises:
      TextError: It is not in that cache, and the hub cannot be reached.
    """
    import datasets

    def get() -> datasets.Dataset:
        return datasets.load_dataset(repository, name, split=split, revision=revision)

    return _persist(
        f"hf://datasets/{repository}",
        get,
        report,
        where=f" ({name}, {split})",
        broken=(datasets.exceptions.DatasetsError,),
    )


def model_folder(name: str, report: Report) -> Path:
    """Return the folder of a model: `name` itself, or the hub's, kept in its cache.

    Args:
      name: A folder, or a name on the hub: OWNER/MODEL.
      report: Takes a line for the user before each wait.

    Raises:
      TextError: There is no such folder, and no such model in the cache or on the hub.
    """
    return _folder(name, "model", _MODEL_FILES, report)


def dataset_folder(name: str, files: Sequence[str], report: Report) -> Path:
    """Return the folder of a dataset's files; as of `model_folder`."""
    return _folder(name, "dataset", files, report)


def _folder(
    name: str,
    kind: Literal["model", "dataset"],
    files: Sequence[str],
    report: Report,
) -> Path:
    import huggingface_hub

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise TextError(
            f"{name} is no folder (seen from {Path.cwd()}), nor a {kind}'s name on the "
            f"hub, which is OWNER/{kind.upper()}."
        )
    place = "" if kind == "model" else "datasets/"

    def get() -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=kind, allow_patterns=list(files)
            )
        )

    return _persist(f"hf://{place}{name}", get, report)


def _persist(
    what: str,
    get: Callable[[], T],
    report: Report,
    patience: float = _PATIENCE,
    *,
    where: str = "",
    broken: tuple[type[Exception], ...] = (),
) -> T:
    """Return what `get` does, which the hub, or what else is `broken`, may hinder."""
    quiet_hub()
    retries = Retries(what, report, patience)
    while True:
        try:
            return get()
        except (*network_errors(), *broken) as error:
            retries.wait_or_raise(error, where)


def quiet_hub() -> None:
    """Keep progress bars and warnings of the libraries off the user's screen.

    Failures are reported here, by `Retries`; the libraries would add their own lines
    and, for each read, up to 20 waits of 5 seconds.
    """
    import datasets.config
    import huggingface_hub

    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    for action in ("OPEN", "READ"):
        setattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1)
    for wait in ("OPEN_", "READ_", "READ_SERVER_UNAVAILABLE_", "READ_RATE_LIMIT_"):
        setattr(datasets.config, f"STREAMING_{wait}RETRY_INTERVAL", 0)


def network_errors() -> tuple[type[Exception], ...]:
    """Return what reading from the hub raises where the hub or the way to it fails."""
    from huggingface_hub.utils import httpx

    # The last: of a package that a proxy needs (socksio).
    return (OSError, httpx.HTTPError, ImportError)


class UnreachableError(TextError, PassingError):
    """The hub, or the way to it, fails for longer than patience lasts."""


class Retries:
    """Waits after a failure, longer each time, until patience ends."""

    def __init__(self, what: str, report: Report, patience: float) -> None:
        """Take note.

        Args:
          what: What is read, for messages.
          report: Takes a line for the user before each wait.
          patience: Seconds to go on trying, from now or from the last `reset`.
        """
        self._what = what
        self._report = report
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """Note that reading went on: the next failure is the first one again."""
        self._wait = _FIRST_WAIT
        self._since = time.monotonic()

    def wait_or_raise(self, error: Exception, where: str = "") -> None:
        """Wait where another try may help.

        Raises:
          TextError: It would not help.
          UnreachableError: It might, but patience has ended.
        """
        cause, passing = _explain(error, remote="://" in self._what)
        message = f"{self._what}{where}: {cause}"
        tried = time.monotonic() - self._since
        if not passing:
            raise TextError(f"{message} {_GO_ON}") from error
        if tried + self._wait > self._patience:
            raise UnreachableError(
                f"{message} Tried for {tried:.0f} s. {_WAYS} {_GO_ON}"
            ) from error
        self._report(f"{message} Trying again in {self._wait:.0f} s.")
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)


def _explain(error: Exception, *, remote: bool) -> tuple[str, bool]:
    """Return the cause in a sentence, and whether it may pass by itself."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if remote and constants.HF_HUB_OFFLINE:
        return "the hub may not be asked, for HF_HUB_OFFLINE is set. Unset it.", False
    chain: BaseException | None = error
    while chain is not None:  # the answer may be wrapped in a FileNotFoundError
        if isinstance(chain, HfHubHTTPError) and chain.response is not None:
            status = chain.response.status_code
            if status in _PASSING_STATUS:
                return f"the hub answers with HTTP status {status}.", True
            return (
                f"the hub refuses with HTTP status {status}. Check the address and, "
                "if it asks for an account, `hf auth login`.",
                False,
            )
        chain = chain.__cause__ or chain.__context__
    # The last of these stands for "not in the hub's cache, and no network".
    absent = isinstance(error, FileNotFoundError)
    if absent and not isinstance(error, LocalEntryNotFoundError):
        return "there is no such file.", False
    lasting = PermissionError | IsADirectoryError | ImportError
    passing = not isinstance(error, lasting)
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    first_line = str(root).partition("\n")[0]
    return f"cannot be read ({type(root).__name__}: {first_line}).", passing
